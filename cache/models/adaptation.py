"""New first and last layers for a U-Net whose VAE has another number of channels.

SDXL's U-Net takes and predicts latents of 4 channels. For a VAE with 16 or 32, `conv_in` [320, C, 3, 3] and `conv_out`
[C, 320, 3, 3] are replaced; all other weights are kept.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sdxl_trainer.cache.models.single_file_names import Shape
from sdxl_trainer.cache.models.tensor_stream import TensorSource
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed

KERNEL_AREA = 9  # both layers are 3×3 convolutions
# Near zero, so that the new layer predicts next to nothing at first; not 0, so that the other layers have gradients.
CONV_OUT_STD = 1e-3


@dataclass(frozen=True)
class ChannelAdaptation:
    """New first and last layers for a U-Net. Their weights depend only on the seed, so all ranks and starts agree."""

    channels: int
    seed: int

    def adapt_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config of the U-Net with the new number of channels."""
        return {**config, "in_channels": self.channels, "out_channels": self.channels}

    def replace_tensors(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (source name, tensor) of the U-Net, with new fp32 weights for the two layers."""
        for name, tensor in tensors:
            yield name, self.draw(name, tuple(tensor.shape)) if name in NEW_WEIGHTS else tensor

    def replace_sources(self, sources: Mapping[str, TensorSource], width: int) -> dict[str, TensorSource]:
        """Return the sources of the U-Net's tensors by name, with functions that draw those of the two layers.

        Args:
            width: channels inside the U-Net, beside its first and last layer.
        """
        shapes = {"conv_in.weight": (width,), "conv_in.bias": (width,), "conv_out.weight": (0, width)}
        new = {name: partial(self.draw, name, shapes.get(name, ())) for name in NEW_WEIGHTS}
        return {**sources, **new}

    def draw(self, name: str, shape: Shape) -> torch.Tensor:
        """Draw a weight of the two layers in fp32 on the CPU.

        Args:
            shape: of the weight that it replaces; the new number of channels takes the place of the old one.
        """
        seed = derive_seed(self.seed, RandomStream.ADAPTED_LAYER, list(NEW_WEIGHTS).index(name))
        return NEW_WEIGHTS[name](shape, self.channels, torch.Generator().manual_seed(seed))


def _draw_conv_in_weight(shape: Shape, channels: int, generator: torch.Generator) -> torch.Tensor:
    return _draw_uniform((shape[0], channels, 3, 3), channels, generator)


def _draw_conv_in_bias(shape: Shape, channels: int, generator: torch.Generator) -> torch.Tensor:
    return _draw_uniform((shape[0],), channels, generator)


def _draw_conv_out_weight(shape: Shape, channels: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn((channels, shape[1], 3, 3), generator=generator) * CONV_OUT_STD


def _draw_conv_out_bias(shape: Shape, channels: int, generator: torch.Generator) -> torch.Tensor:
    return torch.zeros(channels)


def _draw_uniform(shape: Shape, in_channels: int, generator: torch.Generator) -> torch.Tensor:
    """Draw from torch's distribution for new convolutions: uniform within ±1/sqrt(inputs of an output value)."""
    bound = 1 / math.sqrt(in_channels * KERNEL_AREA)
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


# Source name of each weight of the two layers → the function that draws it. Its place keys the draw.
NEW_WEIGHTS: dict[str, Callable[[Shape, int, torch.Generator], torch.Tensor]] = {
    "conv_in.weight": _draw_conv_in_weight,
    "conv_in.bias": _draw_conv_in_bias,
    "conv_out.weight": _draw_conv_out_weight,
    "conv_out.bias": _draw_conv_out_bias,
}
