"""Updates in fp32 of weights in bf16 without fp32 masters: by this project's optimizers, and by any other class.

A weight is read as fp32, and what an update makes of it is rounded: at random, or to the nearest with the difference
kept in a second bf16 number and added when the weight is read again (Kahan summation).
"""

from collections.abc import Mapping, Sequence
from functools import cache, wraps
from typing import Any

import torch

from sdxl_trainer.data.order.keyed_random import derive_seed
from sdxl_trainer.train.optim.stochastic_rounding import CHUNK, Compute, Scalar, build_key, update_whole

REMAINDER = "kahan_comp"  # optimi's name for the state of Kahan summation
NUM_UPDATES = "num_rounded"  # of a weight that an optimizer of another library updates


class NarrowWeight:
    """A weight in bf16 that is read and updated in fp32.

    Args:
        state: the optimizer's for this weight; keeps the remainder of Kahan summation.
        key: of the random numbers; None rounds to the nearest and keeps the remainder.
    """

    def __init__(self, weight: torch.Tensor, state: dict[str, Any], key: tuple[int, int] | None):
        self._flat, self._key, self._remainder = weight.view(-1), key, None
        if key is None:
            if REMAINDER not in state:
                state[REMAINDER] = torch.zeros_like(weight)
            self._remainder = state[REMAINDER].view(-1)

    def read_into(self, wide: torch.Tensor) -> None:
        """Copy the values into a tensor of the weight's size in fp32."""
        flat = wide.view(-1).copy_(self._flat)
        if self._remainder is not None:
            flat.add_(self._remainder)

    def update(self, compute: Compute, change: torch.Tensor, scalars: Sequence[float]) -> None:
        """Round into the weight what `compute` makes of it and of `change`, [N] fp32; see `update_whole`."""
        if self._key is not None:
            update_whole(compute, change, [self._flat], scalars, self._key)
        elif self._remainder is not None:
            parts = zip(*(values.split(CHUNK) for values in (change, self._flat, self._remainder)), strict=True)
            for part, stored, remainder in parts:
                (values,) = compute(part, [stored.float().add_(remainder)], scalars)
                stored.copy_(values)
                remainder.copy_(values - stored)


def subtract(
    change: torch.Tensor, values: Sequence[torch.Tensor], scalars: Sequence[Scalar]
) -> tuple[torch.Tensor, ...]:
    """Return the weight times a share that is kept, the only scalar, minus the change."""
    return (values[0] * scalars[0] - change,)


def replace(
    change: torch.Tensor, values: Sequence[torch.Tensor], scalars: Sequence[Scalar]
) -> tuple[torch.Tensor, ...]:
    """Return the change as the new weight."""
    return (change,)


def restore_fp32(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Replace loaded state by what was saved in fp32; PyTorch has rounded it to the type of the weights.

    Args:
        saved: a state dict.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for weight, number in zip(weights, numbers, strict=True):
        state = optimizer.state[weight]
        for name, value in saved["state"].get(number, {}).items():
            if isinstance(value, (torch.Tensor, list)):
                state[name] = _choose_fp32(value, state[name], weight.device)


def _choose_fp32(saved: Any, loaded: Any, device: torch.device) -> Any:
    """Return what was loaded, or a copy of what was saved if that was rounded; of a list, each item."""
    if isinstance(saved, list):
        return [_choose_fp32(*items, device) for items in zip(saved, loaded, strict=True)]
    # PyTorch has chosen the device of the others, such as counters.
    is_rounded = isinstance(saved, torch.Tensor) and saved.dtype == torch.float32 != loaded.dtype
    return saved.to(device, copy=True) if is_rounded else loaded


@cache
def widen(kind: type[Any]) -> type[Any]:
    """Derive an optimizer that updates an fp32 copy of a weight in bf16 by `kind`, and rounds it into the weight.

    Its state is in the types that `kind` chooses for weights in fp32. A step updates one weight, as gradient release
    does, so that a single copy exists at a time.
    """

    class WideOptimizer(kind):
        """Takes, besides the arguments of its base, the seed of the rounding, and whether to sum as Kahan does."""

        @wraps(kind.__init__)
        def __init__(self, params: Any, seed: int = 0, kahan_sum: bool = False, **named: Any):
            super().__init__(params, **named)
            self._seed, self._kahan_sum = seed, kahan_sum

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            """Update the one weight."""
            (group,) = self.param_groups
            (weight,) = group["params"]
            state = self.state.pop(weight, {})
            own = {name: state.pop(name) for name in (REMAINDER, NUM_UPDATES) if name in state}
            own[NUM_UPDATES] = own.get(NUM_UPDATES, 0) + 1
            seed = derive_seed(self._seed, own[NUM_UPDATES], group.get("first_tensor", 0))
            narrow = NarrowWeight(weight, own, None if self._kahan_sum else build_key(seed))
            wide = torch.nn.Parameter(torch.empty_like(weight, dtype=torch.float32))
            narrow.read_into(wide.data)
            wide.grad = weight.grad.float()
            self.state[wide], group["params"] = state, [wide]
            try:
                super().step()
            finally:
                wide.grad, group["params"] = None, [weight]
                self.state[weight] = self.state.pop(wide) | own
            narrow.update(replace, wide.data.view(-1), [])

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            """Load a state dict without rounding state that is in fp32."""
            super().load_state_dict(dict(state_dict))
            restore_fp32(self, state_dict)

    WideOptimizer.__name__ = kind.__name__
    return WideOptimizer
