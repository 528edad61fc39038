"""A frozen base in 8 or 4 bit under adapters, by bitsandbytes: linear layers of the attention blocks.

Weights alone are quantised. A product converts its weight back to the type of the activations for a moment, in the
forward and again in the backward pass (QLoRA, Dettmers et al. 2023, arXiv 2305.14314). Quantisation is a function of
the model file, so a resume repeats it.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.lora import LoraConfig, QuantisedBase
from sdxl_trainer.configs.problems import Problem

# Bytes of a value: 8 bits with a scale in fp32 for 256 values; 4 bits with a scale in 8 bit for 64 values, and of those
# scales one in fp32 for 256.
VALUE_BYTES: dict[QuantisedBase, float] = {"int8": 1 + 4 / 256, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}


def check_quantised_base(lora: LoraConfig, engine: EngineConfig) -> Iterator[Problem]:
    """Yield a problem for each reason why the base cannot be quantised."""
    if lora.quantised_base == "none":
        return
    if engine.compile != "none":
        rule, cure = "does not work with engine.compile", "set engine.compile: none, or leave lora.quantised_base out"
        yield Problem("lora.quantised_base", lora.quantised_base, rule, cure)
    if engine.offload_blocks:
        rule = "leaves little of a block for engine.offload_blocks to move"
        yield Problem("lora.quantised_base", lora.quantised_base, rule, "leave engine.offload_blocks out")
    if engine.zero_stage == 3 or engine.offload_param:
        rule = "does not work with ZeRO 3, which shards weights"
        yield Problem("lora.quantised_base", lora.quantised_base, rule, "leave engine.zero_stage out")
    if importlib.util.find_spec("bitsandbytes") is None:
        rule = "needs bitsandbytes, which is not installed"
        cure = "pip install bitsandbytes, or leave it out"
        yield Problem("lora.quantised_base", lora.quantised_base, rule, cure)


def find_base_linears(unet: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Find the frozen linear layers of a U-Net's attention blocks by name. Adapters were added before."""
    return {
        name: layer
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear) and ".attentions." in name and not layer.weight.requires_grad
    }


def quantise_base(unet: torch.nn.Module, kind: QuantisedBase) -> None:
    """Replace the frozen linear layers of the attention blocks by quantised ones, each where its weight is."""
    if kind == "none":
        return
    for name, layer in find_base_linears(unet).items():
        parent, _, own_name = name.rpartition(".")
        setattr(unet.get_submodule(parent), own_name, QuantisedLinear(layer, kind))


class QuantisedLinear(torch.nn.Module):
    """A frozen linear layer with a weight in 8 or 4 bit, and its bias as it is.

    The weight is no parameter, so engines neither convert nor save it.
    """

    def __init__(self, layer: torch.nn.Linear, kind: QuantisedBase):
        super().__init__()
        self._functions: Any = importlib.import_module("bitsandbytes.functional")  # an optional package
        self._kind = kind
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        weight = layer.weight.detach()
        if kind == "nf4":
            self._codes, self._scales = self._functions.quantize_4bit(
                weight, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
        else:
            self._codes, self._scales = self._functions.quantize_blockwise(weight, blocksize=256)

    def read_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [out, in], as the codes stand for it."""
        read = self._functions.dequantize_4bit if self._kind == "nf4" else self._functions.dequantize_blockwise
        return read(self._codes, self._scales).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x · weightᵀ + bias, [..., out] of [..., in]."""
        return _Product.apply(x, self)  # pyright: ignore[reportReturnType]


class _Product(torch.autograd.Function):
    """The product with a quantised weight, which is not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantisedLinear) -> torch.Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.read_weight(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.read_weight(gradient.dtype), None
