"""AdamW and Lion with stochastic rounding, for weights and moments in bf16 without fp32 masters.

Rounding to the nearest loses every change that is smaller than half the distance to the next number, in bf16 about
1/500 of a weight. Stochastic rounding picks the upper of two numbers with a probability equal to the value's position
between them, so that small changes add up correctly over many steps (Gupta et al. 2015, arXiv 1502.02551). The moments
are rounded in the same way: with a beta of 0.999, the second moment would otherwise never fall.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._triton import has_triton

from sdxl_trainer.data.order.keyed_random import derive_seed

# Values that an eager update converts to fp32 at once. Whole flat tensors would take the memory that bf16 saves.
CHUNK = 2**22
LOWER_HALF = 2**16 - 1
Scalar = float | torch.Tensor  # a number, or [] fp32 on the device of the weights


def hash_integers(values: torch.Tensor) -> torch.Tensor:
    """Permute the int32 numbers at random: two multiplications and three shifts, after C. Wellons' hash-prospector.

    Integer arithmetic gives the same bits on every device, and a compiler merges it with the update around it. The
    generators of CUDA GPUs draw numbers that depend on the number of multiprocessors, by kernels of their own.
    """
    values = (values ^ _shift(values, 16)) * 0x7FEB352D
    values = (values ^ _shift(values, 15)) * (0x846CA68B - 2**32)
    return values ^ _shift(values, 16)


def _shift(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int32 numbers to the right, and fill with zeros. PyTorch's operator fills with the sign."""
    return (values >> bits) & ((1 << (32 - bits)) - 1)


def build_key(seed: int) -> tuple[int, int]:
    """Return the key of `draw_halves` for a seed of 62 bits."""
    return seed & 0x7FFFFFFF, (seed >> 31) & 0x7FFFFFFF


def draw_halves(
    num: int, start: Scalar, key: tuple[Scalar, Scalar], like: torch.Tensor, count: int = 3
) -> Sequence[torch.Tensor]:
    """Draw random numbers below 2^16 for each of the positions [start, start + num), each [num] int32.

    Args:
        key: two int32 numbers.
        like: a tensor on the device of the result.
        count: numbers for each position, at most three; fewer are the first ones.
    """
    positions = torch.arange(num, dtype=torch.int32, device=like.device) + start
    first = hash_integers(hash_integers(positions ^ key[0]) + key[1])
    halves = [first & LOWER_HALF, _shift(first, 16)][:count]
    return halves if count < 3 else [*halves, hash_integers(first + key[0]) & LOWER_HALF]


def round_stochastically(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Round fp32 to bf16 of the same shape, whose expectation is the fp32 value.

    bf16 is the upper half of fp32. A random number is added to the lower half, which carries over with a probability
    proportional to that half, and the lower half is cut off. Numbers that bf16 can represent stay unchanged.

    Args:
        noise: int32 random numbers below 2^16, one for each value.
    """
    return ((values.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()


Compute = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[Scalar]], tuple[torch.Tensor, ...]]


def update_rounded(
    compute: Compute,
    gradient: torch.Tensor,
    stored: Sequence[torch.Tensor],
    scalars: Sequence[Scalar],
    start: Scalar,
    key: tuple[Scalar, Scalar],
) -> None:
    """Update weights and moments, [N] bf16 each, in place.

    Args:
        compute: `StochasticOptimizer.compute`.
        start: position of the first value in its tensor.
        key: of the random numbers.
    """
    updated = compute(gradient.float(), [values.float() for values in stored], scalars)
    halves = draw_halves(len(gradient), start, key, gradient, len(stored))
    for values, result, noise in zip(stored, updated, halves, strict=True):
        values.copy_(round_stochastically(result, noise))


@cache
def compile_update() -> Callable[..., None]:
    """Return `update_rounded`, compiled into one kernel for a whole tensor, which converts values in registers."""
    return torch.compile(update_rounded, fullgraph=True, dynamic=True)


def update_whole(
    compute: Compute,
    gradient: torch.Tensor,
    stored: Sequence[torch.Tensor],
    scalars: Sequence[float],
    key: tuple[int, int],
) -> None:
    """Update a weight tensor and its moments, [N] bf16 each, in place: by one kernel, or in chunks without a compiler.

    Args:
        compute: a function of a module, as `StochasticOptimizer.compute`; it is compiled once.
        gradient: [N], or other values that `compute` takes in its place.
    """
    if gradient.is_cuda and has_triton():
        compile_update()(compute, gradient, stored, *_copy_numbers(scalars, key, gradient.device))
        return
    for start in range(0, len(gradient), CHUNK):
        part = slice(start, start + CHUNK)
        update_rounded(compute, gradient[part], [values[part] for values in stored], scalars, start, key)


class StochasticOptimizer(torch.optim.Optimizer):
    """Base of the optimizers with stochastic rounding.

    Updates are elementwise, so ZeRO's flat shards give the same result as whole weights. Random numbers depend on the
    seed, the number of the step, the tensor and the position in it only, so a resumed run draws the same ones as an
    uninterrupted run.

    Args:
        seed: differs between ranks, which hold different weights.
        defaults: default settings of the groups.
    """

    MOMENTS: tuple[str, ...]  # at most two

    def __init__(self, params: Iterable, seed: int, defaults: dict[str, Any]):
        super().__init__(params, defaults)
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every weight that has a gradient. DeepSpeed may call it several times in one optimizer step.

        A group that is a part of a larger one has the number of its first tensor as `first_tensor`.
        """
        number = 0
        for group in self.param_groups:
            number = group.get("first_tensor", number)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, number)
                number += 1

    def _update(self, parameter: torch.Tensor, gradients: torch.Tensor, group: dict[str, Any], number: int) -> None:
        """Update a weight tensor; `number` is its place among all of the optimizer."""
        state = self.state[parameter]
        if not state:
            state.update({"step": 0, **{name: torch.zeros_like(parameter) for name in self.MOMENTS}})
        state["step"] += 1
        key = build_key(derive_seed(self._seed, state["step"], number))
        scalars = self.list_scalars(group, state["step"])
        stored = [tensor.view(-1) for tensor in (parameter, *(state[name] for name in self.MOMENTS))]
        update_whole(self.compute, gradients.reshape(-1), stored, scalars, key)

    @staticmethod
    def list_scalars(group: dict[str, Any], step: int) -> list[float]:
        """List the numbers that `compute` needs. `step` is the number of the update, from 1."""
        raise NotImplementedError

    @staticmethod
    def compute(
        gradient: torch.Tensor, values: Sequence[torch.Tensor], scalars: Sequence[Scalar]
    ) -> tuple[torch.Tensor, ...]:
        """Compute the weights and moments after an update; all [N] fp32.

        Args:
            values: the weights, then the moments in the order of MOMENTS.
            scalars: as `list_scalars` returns them.
        """
        raise NotImplementedError


def _copy_numbers(
    scalars: Sequence[float], key: tuple[int, int], device: torch.device
) -> tuple[Sequence[torch.Tensor], int, tuple[torch.Tensor, torch.Tensor]]:
    """Return scalars, start and key for the compiled update. As Python numbers, each new one would compile anew.

    The copies start without waiting for the device.
    """
    floats = torch.tensor(scalars, dtype=torch.float32, pin_memory=True).to(device, non_blocking=True)
    integers = torch.tensor(key, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)
    return floats.unbind(), 0, (integers[0], integers[1])


class AdamW(StochasticOptimizer):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101)."""

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        seed: int = 0,
    ):
        super().__init__(params, seed, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @staticmethod
    def list_scalars(group: dict[str, Any], step: int) -> list[float]:
        """See StochasticOptimizer."""
        (beta, beta_2), lr = group["betas"], group["lr"]
        kept, rate = 1 - lr * group["weight_decay"], lr / (1 - beta**step)
        return [kept, rate, 1 - beta, 1 - beta_2, 1 / (1 - beta_2**step), group["eps"]]

    @staticmethod
    def compute(
        gradient: torch.Tensor, values: Sequence[torch.Tensor], scalars: Sequence[Scalar]
    ) -> tuple[torch.Tensor, ...]:
        """Compute AdamW's update; see StochasticOptimizer."""
        (weight, first, second), (kept, rate, share, share_2, correction, eps) = values, scalars
        first = first + share * (gradient - first)
        second = second + share_2 * (gradient.square() - second)
        return weight * kept - rate * first / ((second * correction).sqrt() + eps), first, second


class Lion(StochasticOptimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675)."""

    MOMENTS = ("exp_avg",)

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        seed: int = 0,
    ):
        super().__init__(params, seed, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @staticmethod
    def list_scalars(group: dict[str, Any], step: int) -> list[float]:
        """See StochasticOptimizer."""
        (beta, beta_2), lr = group["betas"], group["lr"]
        return [1 - lr * group["weight_decay"], lr, 1 - beta, 1 - beta_2]

    @staticmethod
    def compute(
        gradient: torch.Tensor, values: Sequence[torch.Tensor], scalars: Sequence[Scalar]
    ) -> tuple[torch.Tensor, ...]:
        """Compute Lion's update; see StochasticOptimizer."""
        (weight, average), (kept, rate, share, share_2) = values, scalars
        change = (average + share * (gradient - average)).sign()
        return weight * kept - rate * change, average + share_2 * (gradient - average)
