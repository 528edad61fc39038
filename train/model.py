"""Builds the network that is trained."""

from typing import Any

import torch

from sdxl_trainer.cache.model_source import ModelSource
from sdxl_trainer.cache.single_file import load_component


def load_unet(source: ModelSource, gradient_checkpointing: bool) -> torch.nn.Module:
    """SDXL's U-Net in fp32, ready to train."""
    from diffusers import UNet2DConditionModel

    unet: Any  # diffusers' from_pretrained is typed as a union that is never returned
    if source.file is None:
        unet = UNet2DConditionModel.from_pretrained(source.folder, subfolder="unet", use_safetensors=True)
    else:
        settings = source.read_config("unet")
        unet = UNet2DConditionModel.from_config(settings)
        load_component(unet, source.file, "unet", settings)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.float().train()
