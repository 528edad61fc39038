"""bitsandbytes' moments in 8 bit, read and made value by value, as a change of ranks or ZeRO stage needs.

A moment of N values is N codes of 8 bits, a table of what the 256 codes stand for (-1 to 1, ascending), and the largest
absolute value of each block of 256 values, by which its codes are scaled. Small tensors are kept in fp32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

WRAPPED = "__bnb_optimizer_quant_state__"  # where bitsandbytes hides these tensors from FSDP in its state dict
BLOCK = 256
MIN_QUANTISED = 4096  # values from which on it quantises
AT_ONCE = 1 << 22  # values


@dataclass(frozen=True)
class Quantised:
    """A moment in 8 bit."""

    codes: torch.Tensor  # uint8, N values in any shape
    table: torch.Tensor  # [256] fp32
    scales: torch.Tensor  # [blocks] fp32

    def numel(self) -> int:
        """How many values it has."""
        return self.codes.numel()

    def read(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start] fp32: some of its values."""
        first = start // BLOCK
        scales = self.scales[first : -(-stop // BLOCK)].repeat_interleave(BLOCK)[start - first * BLOCK :]
        return self.table[self.codes.reshape(-1)[start:stop].int()] * scales[: stop - start]


def list_moments(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a tensor as an optimizer saved it, its moments in 8 bit put together under their names."""
    plain = {key: value for key, value in state.items() if key != WRAPPED} | state.get(WRAPPED, {})
    for number in ("1", "2"):
        if f"absmax{number}" in plain:
            parts = (plain.pop(f"{part}{number}") for part in ("state", "qmap", "absmax"))
            plain[f"state{number}"] = Quantised(*parts)
    return plain


def list_parts(key: str, moment: Quantised) -> dict[str, torch.Tensor]:
    """The moment `key`, such as `state1`, as bitsandbytes takes it."""
    number = key.removeprefix("state")
    return {key: moment.codes, f"qmap{number}": moment.table, f"absmax{number}": moment.scales}


def quantise(values: torch.Tensor, table: torch.Tensor) -> Quantised:
    """The nearest codes of fp32 values [N]."""
    codes = torch.empty(values.shape, dtype=torch.uint8)
    scales = torch.empty(-(-len(values) // BLOCK))
    borders = (table[1:] + table[:-1]) / 2
    for start in range(0, len(values), AT_ONCE):
        some = values[start : start + AT_ONCE]
        blocks = torch.nn.functional.pad(some, (0, -len(some) % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(1)
        scales[start // BLOCK :][: len(largest)] = largest
        shares = blocks / torch.where(largest == 0, 1, largest)[:, None]
        codes[start : start + AT_ONCE] = torch.bucketize(shares, borders).view(-1)[: len(some)].to(torch.uint8)
    return Quantised(codes, table, scales)
