"""Adafactor with stochastic rounding, for weights in bf16 without fp32 masters: about 2 bytes a weight in all.

The second moment of a matrix is kept as the means of its rows and of its columns, in fp32 (Shazeer & Stern 2018, arXiv
1804.04235). The numbers are those of transformers' Adafactor with the settings of SDXL's authors: the given learning
rate, no first moment, no scaling by the size of the weights.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sdxl_trainer.data.order.keyed_random import derive_seed
from sdxl_trainer.train.optim.stochastic_rounding import (
    CHUNK,
    StochasticOptimizer,
    build_key,
    draw_halves,
    round_stochastically,
)

FACTORS = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")
SMALLEST_SQUARE = 1e-30  # added to squared gradients


class Adafactor(StochasticOptimizer):
    """Adafactor over whole weight tensors, of bf16 with stochastic rounding or of fp32.

    Args:
        decay_rate: exponent of the step in the decay of the second moment.
        clip_threshold: an update's root mean square is scaled down to it.
        factor_convolutions: factor the weight of a convolution as one matrix, [out, in * height * width]. The default
            is transformers' way, a matrix [out, in] for each place of the kernel's last axis, which takes 1.3 bytes a
            weight more in 3x3 convolutions.
        seed: of the rounding.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-5,
        decay_rate: float = -0.8,
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        factor_convolutions: bool = False,
        seed: int = 0,
    ):
        defaults = {"lr": lr, "decay_rate": decay_rate, "clip_threshold": clip_threshold, "weight_decay": weight_decay}
        super().__init__(params, seed, defaults | {"factor_convolutions": factor_convolutions})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load a state dict. PyTorch would round the factors to the type of the weights."""
        super().load_state_dict(dict(state_dict))
        weights = [weight for group in self.param_groups for weight in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for weight, number in zip(weights, numbers, strict=True):
            saved = state_dict["state"].get(number, {})
            exact = {name: saved[name].to(weight.device, torch.float32, copy=True) for name in FACTORS if name in saved}
            self.state[weight].update(exact)

    def _update(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[weight]
        state["step"] = state.get("step", 0) + 1
        shape = weight.shape
        if group["factor_convolutions"] and weight.dim() > 2:
            shape = torch.Size([weight.shape[0], weight[0].numel()])
        change = gradient.float().reshape(shape)
        change = change * _scale_by_moment(change, state, 1 - state["step"] ** group["decay_rate"])
        change.div_((change.square().mean().sqrt() / group["clip_threshold"]).clamp_(min=1.0)).mul_(group["lr"])
        kept = 1 - group["weight_decay"] * group["lr"]
        if weight.dtype == torch.float32:
            weight.mul_(kept).sub_(change.view_as(weight))
            return
        key = build_key(derive_seed(self._seed, state["step"], number))
        flat, change = weight.view(-1), change.view(-1)
        for start in range(0, len(flat), CHUNK):
            part = flat[start : start + CHUNK]
            values = part.float().mul_(kept).sub_(change[start : start + CHUNK])
            part.copy_(round_stochastically(values, draw_halves(len(part), start, key, part)[0]))


def _scale_by_moment(gradient: torch.Tensor, state: dict[str, Any], decay: float) -> torch.Tensor:
    """Update the second moment, and return the factor of the gradient: 1 / its square root, of the gradient's shape."""
    squares = gradient.square().add_(SMALLEST_SQUARE)
    if gradient.dim() < 2:
        return _average(state, "exp_avg_sq", squares, decay).rsqrt()
    row = _average(state, "exp_avg_sq_row", squares.mean(dim=-1), decay)
    column = _average(state, "exp_avg_sq_col", squares.mean(dim=-2), decay)
    return (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1) * column.unsqueeze(-2).rsqrt()


def _average(state: dict[str, Any], name: str, values: torch.Tensor, decay: float) -> torch.Tensor:
    """Move an average of the state towards values, and return it."""
    average = state.setdefault(name, torch.zeros_like(values))
    return average.mul_(decay).add_(values, alpha=1 - decay)
