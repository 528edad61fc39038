"""Model FLOPs utilisation (MFU): the share of the devices' peak that the U-Net's arithmetic uses."""

import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sdxl_trainer.cache.models.single_file_names import build_name_table
from sdxl_trainer.configs.schema import DataConfig
from sdxl_trainer.data.formats.latents import VAE_FACTOR
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.train.estimates.gpus import find_gpu_of

BACKWARD_PASSES = 2  # the backward pass costs two forward passes: gradients of the inputs and of the weights
REPEATED_BY_FULL = 0.77  # share of the forward pass that full gradient checkpointing repeats


@dataclass(frozen=True)
class FlopCount:
    """A number that grows with the latent's area, such as an image's FLOPs; self-attention grows with its square."""

    per_area_squared: float = 0.0
    per_area: float = 0.0
    constant: float = 0.0

    def compute(self, latent_area: float) -> float:
        """Return the number for an image whose latent has this area (h x w)."""
        return (self.per_area_squared * latent_area + self.per_area) * latent_area + self.constant

    def __add__(self, other: "FlopCount") -> "FlopCount":
        return FlopCount(
            self.per_area_squared + other.per_area_squared,
            self.per_area + other.per_area,
            self.constant + other.constant,
        )


@dataclass(frozen=True, kw_only=True)
class ForwardCounts:
    """Work of the U-Net's forward pass for one image."""

    matrix: FlopCount  # FLOPs of matrix products with weights
    convolution: FlopCount  # FLOPs
    attention: FlopCount  # FLOPs of products between queries, keys and values
    outputs: FlopCount  # values that matrix products and convolutions with weights write
    num_weights: int

    @property
    def flops(self) -> FlopCount:
        """FLOPs of all products."""
        return self.matrix + self.convolution + self.attention


@dataclass(frozen=True)
class MfuReference:
    """The FLOPs of an image and the devices' peak, from which MFU is computed."""

    count: FlopCount
    peak_flops: float  # FLOP/s of all ranks' devices together


def build_mfu_reference(
    unet: torch.nn.Module, unet_config: Mapping[str, Any], num_text_tokens: int, precision: str, ranks: Ranks
) -> MfuReference | None:
    """Build the reference for MFU, or return None where MFU is meaningless.

    That is so for a device whose peak is not known, in fp32, and for a U-Net that is trained in part: its backward pass
    takes fewer FLOPs.

    Args:
        num_text_tokens: length of the text conditioning, with start and end marks.
        precision: `engine.precision`.
    """
    gpu = find_gpu_of(ranks.device)
    if gpu is None or precision == "fp32" or not all(parameter.requires_grad for parameter in unet.parameters()):
        return None
    return MfuReference(count_training_flops(unet_config, num_text_tokens), gpu.peak_flops * ranks.world_size)


def count_training_flops(unet_config: Mapping[str, Any], num_text_tokens: int) -> FlopCount:
    """Count the FLOPs of training the whole U-Net on one image: forward and backward pass, without recomputation.

    For SDXL at 1024² px and 77 tokens the count is 20.28 TFLOP: three times the forward pass that
    `torch.utils.flop_counter` counts. That counter would take about 2 s of CPU per bucket, and importing diffusers.

    Raises:
        ValueError: the U-Net does not have SDXL's topology.
    """
    forward, passes = count_forward(unet_config, num_text_tokens).flops, 1 + BACKWARD_PASSES
    return FlopCount(passes * forward.per_area_squared, passes * forward.per_area, passes * forward.constant)


def count_forward(unet_config: Mapping[str, Any], num_text_tokens: int) -> ForwardCounts:
    """Count the work of a forward pass from the shapes of the weights, each of which is used once per position.

    Args:
        num_text_tokens: length of the text conditioning, with start and end marks.

    Raises:
        ValueError: the U-Net does not have SDXL's topology.
    """
    rows, num_levels = build_name_table("unet", unet_config), len(unet_config["block_out_channels"])
    matrix = convolution = attention = outputs = FlopCount()
    for row in rows:
        if len(row.source_shape) == 1:  # biases and norms
            continue
        name, num_weights, width = row.sources[0], math.prod(row.source_shape), row.source_shape[0]
        positions_per_area = 0.25 ** _find_level(name, num_levels)
        if "time_emb" in name or "add_embedding" in name:
            positions = FlopCount(constant=1)
        elif "attn2.to_k" in name or "attn2.to_v" in name:
            positions = FlopCount(constant=num_text_tokens)
        else:
            positions = FlopCount(per_area=positions_per_area)
        flops = FlopCount(0.0, 2 * num_weights * positions.per_area, 2 * num_weights * positions.constant)
        if len(row.source_shape) == 4:
            convolution += flops
        else:
            matrix += flops
        outputs += FlopCount(0.0, width * positions.per_area, width * positions.constant)
        # Attention multiplies each query by all keys, and the resulting weights by all values.
        if "attn1.to_q" in name:
            attention += FlopCount(per_area_squared=4 * width * positions_per_area**2)
        elif "attn2.to_q" in name:
            attention += FlopCount(per_area=4 * width * positions_per_area * num_text_tokens)
    total = sum(math.prod(row.source_shape) for row in rows)
    return ForwardCounts(
        matrix=matrix, convolution=convolution, attention=attention, outputs=outputs, num_weights=total
    )


def average_training_flops(unet_config: Mapping[str, Any], data: DataConfig) -> float:
    """Return the FLOPs of training on one square image, averaged over the resolutions.

    Raises:
        ValueError: the U-Net does not have SDXL's topology.
    """
    count = count_training_flops(unet_config, data.max_tokens + 2)
    return statistics.mean(count.compute(area) for area in list_areas(data))


def list_areas(data: DataConfig) -> list[int]:
    """List the areas of square latents, one for each resolution."""
    return [(side // VAE_FACTOR) ** 2 for side in data.resolution_px]


def _find_level(name: str, num_levels: int) -> int:
    """Return how often the latent's sides have been halved where a weight is used."""
    if name.startswith("mid_block."):
        return num_levels - 1
    block = re.match(r"(down|up)_blocks\.(\d+)\.(downsamplers|upsamplers)?", name)
    if block is None:
        return 0
    direction, number, sampler = block.groups()
    level = int(number) if direction == "down" else num_levels - 1 - int(number)
    return level + {None: 0, "downsamplers": 1, "upsamplers": -1}[sampler]
