"""The trained networks without values, on PyTorch's meta device: parameters and activations have shapes only."""

from collections.abc import Mapping
from typing import Any

import torch

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.cache.models.vae_config import PADDING
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.networks.adapters import add_adapters
from sdxl_trainer.train.networks.parameter_groups import build_parameter_groups
from sdxl_trainer.train.networks.trained_networks import (
    ENCODERS,
    TrainedNetworks,
    configure_unet,
    list_trained_encoders,
    unfreeze_text_encoder,
)


def build_empty_networks(source: ModelSource, trained: list[str]) -> TrainedNetworks:
    """Build the trained networks on the meta device, with all parameters trainable that a run could train.

    Args:
        trained: names of the text encoders that are trained.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(source.read_config("unet"))
    encoders = {name: build_empty_encoder(source, name) for name in trained}
    for encoder in encoders.values():
        unfreeze_text_encoder(encoder, gradient_checkpointing=False)
    return TrainedNetworks(unet, **encoders)


def build_empty_encoder(source: ModelSource, name: str) -> Any:
    """Build a text encoder on the meta device.

    Args:
        name: `text_encoder` or `text_encoder_2`.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds: dict[str, Any] = dict(zip(ENCODERS, (CLIPTextModel, CLIPTextModelWithProjection), strict=True))
    with torch.device("meta"):
        return kinds[name](CLIPTextConfig(**source.read_config(name)))


def build_empty_vae(config: Mapping[str, Any]) -> Any:
    """Build a VAE on the meta device, in fp32 and frozen.

    Args:
        config: of the VAE, from `read_vae_config`.
    """
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config({key: value for key, value in config.items() if key != PADDING})
    return vae.eval().requires_grad_(False)


def build_empty_run_networks(source: ModelSource, config: Config, dtype: torch.dtype) -> TrainedNetworks:
    """Build the networks of a run on the meta device as the run trains them: with adapters, and parts of them frozen.

    Args:
        dtype: data type in which the networks compute.

    Raises:
        UserInputError: patterns of the settings match nothing (see `check_trained_parameters`).
    """
    networks = build_empty_networks(source, list_trained_encoders(config.optim))
    if config.lora.rank:
        add_adapters(dict(networks.named_children()), config.lora)
    build_parameter_groups(networks, config.optim, source.read_config("unet"), config.lora.b_lr_ratio)
    # Without its own `to`, in which diffusers warns of modules to keep in fp32.
    torch.nn.Module.to(networks, dtype)
    # xformers' attention would try its kernels on a GPU; it saves the same tensors as PyTorch's.
    configure_unet(networks.unet, config.engine.model_copy(update={"attention": "sdpa"}))
    return networks.train()
