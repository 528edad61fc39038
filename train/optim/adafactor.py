"""Adafactor for weights in bf16 without fp32 masters, rounded at random or with Kahan's remainder.

The second moment of a matrix is kept as the means of its rows and of its columns, in fp32 (Shazeer & Stern 2018, arXiv
1804.04235). The numbers are those of transformers' Adafactor with the settings of SDXL's authors: the given learning
rate, no first moment, no scaling by the size of the weights.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sdxl_trainer.data.order.keyed_random import derive_seed
from sdxl_trainer.train.optim.stochastic_rounding import StochasticOptimizer, build_key
from sdxl_trainer.train.optim.wide_updates import NarrowWeight, restore_fp32, subtract

SMALLEST_SQUARE = 1e-30  # added to squared gradients


class Adafactor(StochasticOptimizer):
    """Adafactor over whole weight tensors, of bf16 or of fp32.

    Args:
        decay_rate: exponent of the step in the decay of the second moment.
        clip_threshold: an update's root mean square is scaled down to it.
        factor_convolutions: factor the weight of a convolution as one matrix, [out, in * height * width]. The default
            is transformers' way, a matrix [out, in] for each place of the kernel's last axis, which takes 1.3 bytes a
            weight more in 3x3 convolutions.
        kahan_sum: keep the remainder of the rounding to bf16 instead of rounding at random.
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
        kahan_sum: bool = False,
        seed: int = 0,
    ):
        defaults = {"lr": lr, "decay_rate": decay_rate, "clip_threshold": clip_threshold, "weight_decay": weight_decay}
        super().__init__(params, seed, defaults | {"factor_convolutions": factor_convolutions, "kahan_sum": kahan_sum})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load a state dict without rounding the factors."""
        super().load_state_dict(dict(state_dict))
        restore_fp32(self, state_dict)

    def _update(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[weight]
        state["step"] = state.get("step", 0) + 1
        shape = weight.shape
        if group["factor_convolutions"] and weight.dim() > 2:
            shape = torch.Size([weight.shape[0], weight[0].numel()])
        change = _scale_by_moment(gradient.float().reshape(shape), state, 1 - state["step"] ** group["decay_rate"])
        size = torch.linalg.vector_norm(change) / change.numel() ** 0.5
        change.mul_(group["lr"] / (size / group["clip_threshold"]).clamp_(min=1.0))
        kept = 1 - group["weight_decay"] * group["lr"]
        if weight.dtype == torch.float32:
            weight.mul_(kept).sub_(change.view_as(weight))
            return
        key = None if group["kahan_sum"] else build_key(derive_seed(self._seed, state["step"], number))
        NarrowWeight(weight, state, key).update(subtract, change.view(-1), [kept])


def _scale_by_moment(gradient: torch.Tensor, state: dict[str, Any], decay: float) -> torch.Tensor:
    """Update the second moment, and return the gradient divided by its square root."""
    squares = gradient.square().add_(SMALLEST_SQUARE)
    if gradient.dim() < 2:
        return _average(state, "exp_avg_sq", squares, decay).rsqrt().mul_(gradient)
    row = _average(state, "exp_avg_sq_row", squares.mean(dim=-1), decay)
    column = _average(state, "exp_avg_sq_col", squares.mean(dim=-2), decay)
    row = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
    # In the memory of the squares, because large weights would take a third copy.
    return torch.mul(row, column.rsqrt().unsqueeze(-2), out=squares).mul_(gradient)


def _average(state: dict[str, Any], name: str, values: torch.Tensor, decay: float) -> torch.Tensor:
    """Move an average of the state towards values, and return it."""
    if name not in state:
        state[name] = torch.zeros_like(values)
    return state[name].mul_(decay).add_(values, alpha=1 - decay)
