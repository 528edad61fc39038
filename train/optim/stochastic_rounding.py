"""AdamW and Lion with stochastic rounding, for weights and moments in bf16 without fp32 masters.

Rounding to the nearest loses every change that is smaller than half the distance to the next number, in bf16 about
1/500 of a weight. Stochastic rounding picks the upper of two numbers with a probability equal to the value's position
between them, so that small changes add up correctly over many steps (Gupta et al. 2015, arXiv 1502.02551). The moments
are rounded in the same way: with a beta of 0.999, the second moment would otherwise never fall.
"""

from collections.abc import Iterable
from typing import Any

import torch

from sdxl_trainer.data.order.keyed_random import derive_seed

# Values updated at once in fp32. Whole flat tensors of ZeRO would take the memory that bf16 saves.
CHUNK = 2**22


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round fp32 to bf16 of the same shape, whose expectation is the fp32 value.

    bf16 is the upper half of fp32. A random number is added to the lower half, which carries over with a probability
    proportional to that half, and the lower half is cut off. Numbers that bf16 can represent stay unchanged.
    """
    noise = torch.randint(2**16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    return noise.add_(values.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


class StochasticOptimizer(torch.optim.Optimizer):
    """Base of the optimizers with stochastic rounding.

    Updates are elementwise, so ZeRO's flat shards give the same result as whole weights. Random numbers depend on the
    seed and the number of the step only, so a resumed run draws the same ones as an uninterrupted run.

    Args:
        seed: differs between ranks, which hold different weights.
        defaults: default settings of the groups.
    """

    MOMENTS: tuple[str, ...]

    def __init__(self, params: Iterable, seed: int, defaults: dict[str, Any]):
        super().__init__(params, defaults)
        self._seed = seed
        self._drawing: tuple[int, torch.device] | None = None  # step and device of the generator
        self._generator = torch.Generator()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every weight that has a gradient. DeepSpeed may call it several times in one optimizer step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: torch.Tensor, gradients: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update({"step": 0, **{name: torch.zeros_like(parameter) for name in self.MOMENTS}})
        state["step"] += 1
        generator = self._get_generator(state["step"], parameter.device)
        stored = [tensor.view(-1).split(CHUNK) for tensor in (parameter, *(state[name] for name in self.MOMENTS))]
        for gradient, *parts in zip(gradients.reshape(-1).split(CHUNK), *stored, strict=True):
            updated = self.compute(gradient.float(), [part.float() for part in parts], group, state["step"])
            for part, values in zip(parts, updated, strict=True):
                part.copy_(round_stochastically(values, generator))

    def compute(
        self, gradient: torch.Tensor, values: list[torch.Tensor], group: dict[str, Any], step: int
    ) -> tuple[torch.Tensor, ...]:
        """Compute the weights and moments after an update; all [N] fp32.

        Args:
            values: the weights, then the moments in the order of MOMENTS.
            step: number of this update, from 1.
        """
        raise NotImplementedError

    def _get_generator(self, step: int, device: torch.device) -> torch.Generator:
        if self._drawing != (step, device):
            self._drawing = (step, device)
            self._generator = torch.Generator(device).manual_seed(derive_seed(self._seed, step))
        return self._generator


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

    def compute(
        self, gradient: torch.Tensor, values: list[torch.Tensor], group: dict[str, Any], step: int
    ) -> tuple[torch.Tensor, ...]:
        """Compute AdamW's update; see StochasticOptimizer."""
        (weight, first, second), (beta, beta_2), lr = values, group["betas"], group["lr"]
        first = first.lerp(gradient, 1 - beta)
        second = second.lerp(gradient.square(), 1 - beta_2)
        size = (second / (1 - beta_2**step)).sqrt() + group["eps"]
        return weight * (1 - lr * group["weight_decay"]) - lr / (1 - beta**step) * first / size, first, second


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

    def compute(
        self, gradient: torch.Tensor, values: list[torch.Tensor], group: dict[str, Any], step: int
    ) -> tuple[torch.Tensor, ...]:
        """Compute Lion's update; see StochasticOptimizer."""
        (weight, average), (beta, beta_2), lr = values, group["betas"], group["lr"]
        change = average.lerp(gradient, 1 - beta).sign()
        return weight * (1 - lr * group["weight_decay"]) - lr * change, average.lerp(gradient, 1 - beta_2)
