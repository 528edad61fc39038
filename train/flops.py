"""Model FLOPs utilisation (MFU): what of the devices' peak the U-Net's arithmetic makes use of."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.tokens import WINDOW
from sdxl_trainer.launch.distributed import Ranks

# Dense TFLOP/s in bf16 with fp32 accumulation, by device name: NVIDIA's data sheets (half of what they give with
# sparsity) and, for GeForce, the white papers of the Ampere GA102 and Ada architectures. The first that fits counts.
PEAK_TFLOPS = {
    r"B200": 2250.0,
    r"H200 NVL": 835.5,
    r"H200": 989.5,
    r"H100 NVL": 835.5,
    r"H100 PCIe": 756.5,
    r"H100": 989.5,
    r"A100": 312.0,
    r"A40": 149.7,
    r"A30": 165.0,
    r"A10": 125.0,
    r"L40S": 362.05,
    r"L40": 181.05,
    r"L4": 121.0,
    r"RTX 4090$": 165.2,
    r"RTX 3090$": 71.0,
}
FIT_SIDES = (32, 64, 96)  # latent grids that the curve is laid through
BACKWARD_SHARE = 2  # a backward pass multiplies by each weight for its input's gradient, and for its own


def find_peak_flops(device_name: str) -> float | None:
    """A device's dense bf16 FLOP/s; None for what is not in the table, and for slices (MIG) of what is."""
    if "MIG" in device_name.split():
        return None
    found = (tflops for name, tflops in PEAK_TFLOPS.items() if re.search(rf"\b(?:{name})(?!\w)", device_name))
    return next((tflops * 1e12 for tflops in found), None)


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of training the whole U-Net on one image: forward and backward, without what checkpointing computes again.

    Convolutions and projections grow with the latent's area, self-attention with its square, nothing else does: a
    parabola through three areas is exact. `coefficients`: of area², area and 1.
    """

    coefficients: tuple[float, float, float]

    def compute(self, latent_size: tuple[int, int]) -> float:
        """FLOPs of an image of this latent (height, width)."""
        return float(np.polyval(self.coefficients, latent_size[0] * latent_size[1]))


@dataclass(frozen=True)
class Utilisation:
    """What MFU is reckoned with."""

    count: FlopCount
    peak_flops: float  # of all ranks' devices together, per second


def find_utilisation(
    unet: torch.nn.Module, unet_config: Mapping[str, Any], config: Config, ranks: Ranks
) -> Utilisation | None:
    """What MFU needs, or None where a number would say nothing: a device whose peak is not known, fp32, or a U-Net
    that is trained in part, whose backward pass is a part of the whole too."""
    if ranks.device.type != "cuda" or config.engine.precision == "fp32":
        return None
    peak_flops = find_peak_flops(torch.cuda.get_device_name(ranks.device))
    if peak_flops is None or not all(parameter.requires_grad for parameter in unet.parameters()):
        return None
    num_windows = config.data.max_tokens // WINDOW
    count = count_training_flops(unet_config, num_windows * (WINDOW + 2))
    return Utilisation(count, peak_flops * ranks.world_size)


def count_training_flops(unet_config: Mapping[str, Any], num_text_tokens: int) -> FlopCount:
    """Count by forward passes on the meta device, which compute nothing: seconds, and no memory.

    For SDXL at 1024² and 77 tokens that is 20.28 TFLOP an image.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(unet_config))
    areas, counts = [side * side for side in FIT_SIDES], []
    for side in FIT_SIDES:
        counts.append((1 + BACKWARD_SHARE) * count_forward_flops(unet, (side, side), num_text_tokens))
    a, b, c = np.linalg.solve(np.vander(np.array(areas, np.float64)), np.array(counts, np.float64))
    return FlopCount((float(a), float(b), float(c)))


def count_forward_flops(unet: Any, latent_size: tuple[int, int], num_text_tokens: int) -> int:
    """FLOPs of a forward pass of a U-Net on the meta device on one latent of this (height, width)."""
    config = unet.config
    num_time_ids = 6
    num_pooled = config.projection_class_embeddings_input_dim - num_time_ids * config.addition_time_embed_dim
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        conditions = {"text_embeds": torch.empty(1, num_pooled), "time_ids": torch.empty(1, num_time_ids)}
        text = torch.empty(1, num_text_tokens, config.cross_attention_dim)
        unet(torch.empty(1, config.in_channels, *latent_size), torch.empty(1), text, added_cond_kwargs=conditions)
    return counter.get_total_flops()
