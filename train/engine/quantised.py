"""8-bit moments of bitsandbytes, read and written value by value, as resharding needs.

A moment of N values is N codes of 8 bits, a table of the values of the 256 codes (-1 to 1, ascending), and the largest
absolute value of each block of 256 values, by which its codes are scaled. Small tensors are kept in fp32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

WRAPPED = "__bnb_optimizer_quant_state__"  # key under which bitsandbytes hides these tensors from FSDP
BLOCK = 256
MIN_QUANTISED = 4096  # bitsandbytes quantises tensors of at least this many values
CHUNK = 1 << 22  # values quantised at once


@dataclass(frozen=True)
class QuantisedMoment:
    """A moment in 8 bit."""

    codes: torch.Tensor  # uint8, N values in any shape
    table: torch.Tensor  # [256] fp32
    scales: torch.Tensor  # [blocks] fp32

    def numel(self) -> int:
        """Return the number of values."""
        return self.codes.numel()

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return values `start` to `stop` as [stop - start] fp32."""
        first = start // BLOCK
        scales = self.scales[first : -(-stop // BLOCK)].repeat_interleave(BLOCK)[start - first * BLOCK :]
        return self.table[self.codes.reshape(-1)[start:stop].int()] * scales[: stop - start]


def join_moments(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's saved state of a tensor, with the parts of each 8-bit moment joined under its name."""
    plain = {key: value for key, value in state.items() if key != WRAPPED} | state.get(WRAPPED, {})
    for number in ("1", "2"):
        if f"absmax{number}" in plain:
            codes, table, scales = (plain.pop(f"{part}{number}") for part in ("state", "qmap", "absmax"))
            plain[f"state{number}"] = QuantisedMoment(codes, table, scales)
    return plain


def split_moment(key: str, moment: QuantisedMoment) -> dict[str, torch.Tensor]:
    """Return the parts of the moment `key`, such as `state1`, under bitsandbytes' names."""
    number = key.removeprefix("state")
    return {key: moment.codes, f"qmap{number}": moment.table, f"absmax{number}": moment.scales}


def quantise(values: torch.Tensor, table: torch.Tensor) -> QuantisedMoment:
    """Quantise fp32 values [N] to the nearest codes of a table."""
    codes = torch.empty(values.shape, dtype=torch.uint8)
    scales = torch.empty(-(-len(values) // BLOCK))
    borders = (table[1:] + table[:-1]) / 2
    for start in range(0, len(values), CHUNK):
        chunk = values[start : start + CHUNK]
        blocks = torch.nn.functional.pad(chunk, (0, -len(chunk) % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(1)
        scales[start // BLOCK :][: len(largest)] = largest
        shares = blocks / torch.where(largest == 0, 1, largest)[:, None]
        codes[start : start + CHUNK] = torch.bucketize(shares, borders).view(-1)[: len(chunk)].to(torch.uint8)
    return QuantisedMoment(codes, table, scales)
