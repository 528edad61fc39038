"""AdamW and Lion for weights that are bf16 alone: each new value is rounded up or down by chance, and right on average.

Rounding to the nearest loses every change that is smaller than half the distance to the next number, in bf16 about
1/500 of a weight. Rounded by chance a value between two numbers becomes the upper one as often as it is near to it, so
that the small changes of many steps add up to what they should (Gupta et al. 2015, arXiv 1502.02551). The moments are
rounded in the same way: with a decay of 0.999 the second one would else never fall.
"""

from collections.abc import Iterable
from typing import Any

import torch

from sdxl_trainer.data.order.keyed_random import derive_seed

CHUNK = 2**22  # values updated at once, in fp32; whole tensors of ZeRO's would take the memory that bf16 saves


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 to bf16 of the same shape, whose expectation is the fp32 value.

    bf16 is the upper half of fp32: a random number is added to the lower half, which carries over as often as the lower
    half is large, and then cut off. Numbers that bf16 can hold stay what they are.
    """
    noise = torch.randint(2**16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    return noise.add_(values.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


class StochasticOptimizer(torch.optim.Optimizer):
    """What both have in common. Elementwise, so ZeRO's flat shards are as good as whole weights.

    What is drawn depends on the seed and the number of the step alone, so a resume draws what the unbroken run draws.

    Args:
        seed: another one on each rank, which holds other weights.
        defaults: settings of the groups.
    """

    MOMENTS: tuple[str, ...]

    def __init__(self, params: Iterable, seed: int, defaults: dict[str, Any]):
        super().__init__(params, defaults)
        self._seed = seed
        self._drawing: tuple[int, torch.device] | None = None  # the step and device that the generator is for
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
        """The weights and moments after an update, from those before; all [N] fp32. `step` counts from 1."""
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
        """See StochasticOptimizer."""
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
        """See StochasticOptimizer."""
        (weight, average), (beta, beta_2), lr = values, group["betas"], group["lr"]
        change = average.lerp(gradient, 1 - beta).sign()
        return weight * (1 - lr * group["weight_decay"]) - lr * change, average.lerp(gradient, 1 - beta_2)
