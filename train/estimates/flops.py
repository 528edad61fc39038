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

# Dense TFLOP/s in bf16 with fp32 accumulation, by the driver's device name. Sources: NVIDIA's data sheets (half of the
# figures with sparsity) and, for GeForce, the white papers of the Ampere GA102 and Ada architectures. Names must match
# exactly: laptop chips, partial GPUs (MIG, vGPU) and models with fewer cores have names that begin alike.
PEAK_TFLOPS = {
    "NVIDIA B200": 2250.0,
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA H100 80GB HBM3": 989.5,  # SXM
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A40": 149.7,
    "NVIDIA A30": 165.0,
    "NVIDIA A10": 125.0,
    "NVIDIA L40S": 362.05,
    "NVIDIA L40": 181.05,
    "NVIDIA L4": 121.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
}
BACKWARD_PASSES = 2  # the backward pass costs two forward passes: gradients of the inputs and of the weights


def get_peak_flops(device_name: str) -> float | None:
    """Return a device's dense bf16 FLOP/s, or None for a device that is not in the table."""
    tflops = PEAK_TFLOPS.get(device_name)
    return None if tflops is None else tflops * 1e12


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of training the whole U-Net on one image, as a polynomial in the latent's area.

    Forward and backward pass count; the recomputation of gradient checkpointing does not. Self-attention grows with the
    square of the area, convolutions and projections with the area.
    """

    per_area_squared: float
    per_area: float
    constant: float

    def compute(self, latent_area: int) -> float:
        """Return the FLOPs of an image whose latent has this area (h x w)."""
        return (self.per_area_squared * latent_area + self.per_area) * latent_area + self.constant


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
    if ranks.device.type != "cuda" or precision == "fp32":
        return None
    peak_flops = get_peak_flops(torch.cuda.get_device_name(ranks.device))
    if peak_flops is None or not all(parameter.requires_grad for parameter in unet.parameters()):
        return None
    return MfuReference(count_training_flops(unet_config, num_text_tokens), peak_flops * ranks.world_size)


def count_training_flops(unet_config: Mapping[str, Any], num_text_tokens: int) -> FlopCount:
    """Count the FLOPs of training from the shapes of the weights, each of which is used once per position.

    For SDXL at 1024² px and 77 tokens the count is 20.28 TFLOP per image: three times the forward pass that
    `torch.utils.flop_counter` counts. That counter would take about 2 s of CPU per bucket, and importing diffusers.

    Raises:
        ValueError: the U-Net does not have SDXL's topology.
    """
    rows, num_levels = build_name_table("unet", unet_config), len(unet_config["block_out_channels"])
    per_area_squared = per_area = constant = 0.0
    for row in rows:
        if len(row.source_shape) == 1:  # biases and norms
            continue
        name, num_weights = row.sources[0], math.prod(row.source_shape)
        positions_per_area = 0.25 ** _find_level(name, num_levels)
        if "time_emb" in name or "add_embedding" in name:
            constant += 2 * num_weights
        elif "attn2.to_k" in name or "attn2.to_v" in name:
            constant += 2 * num_weights * num_text_tokens
        else:
            per_area += 2 * num_weights * positions_per_area
        # Attention multiplies each query by all keys, and the resulting weights by all values.
        if "attn1.to_q" in name:
            per_area_squared += 4 * row.source_shape[0] * positions_per_area**2
        elif "attn2.to_q" in name:
            per_area += 4 * row.source_shape[0] * positions_per_area * num_text_tokens
    passes = 1 + BACKWARD_PASSES
    return FlopCount(passes * per_area_squared, passes * per_area, passes * constant)


def average_training_flops(unet_config: Mapping[str, Any], data: DataConfig) -> float:
    """Return the FLOPs of training on one square image, averaged over the resolutions.

    Raises:
        ValueError: the U-Net does not have SDXL's topology.
    """
    count = count_training_flops(unet_config, data.max_tokens + 2)
    sides = [side // VAE_FACTOR for side in data.resolution_px]
    return statistics.mean(count.compute(side * side) for side in sides)


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
