"""The trained networks, as one module for DeepSpeed's engine."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from sdxl_trainer.cache.encode.text_encoder import encode_text
from sdxl_trainer.cache.models.components import build_component, read_component
from sdxl_trainer.cache.models.single_file_names import TextProjection, get_canonical_name
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.launch.logger import warn_once
from sdxl_trainer.train.networks.checkpointing import resolve_checkpointing, set_checkpointing
from sdxl_trainer.train.networks.compilation import Compilation
from sdxl_trainer.train.networks.conditioning import TextEmbeddings, TextInputs
from sdxl_trainer.train.networks.fp8_linears import convert_linears

ENCODERS = ("text_encoder", "text_encoder_2")


class TrainedNetworks(torch.nn.Module):
    """The U-Net and the text encoders that are trained with it.

    One forward pass runs all of them, because DeepSpeed counts its engine's forward passes as micro steps. Parameters
    are named `unet.…`, `text_encoder.…`, `text_encoder_2.…`.

    Args:
        text_encoder, text_encoder_2: None for an encoder that stays frozen.

    Attributes:
        compilation: of the U-Net; None if it is not compiled.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        text_encoder: torch.nn.Module | None = None,
        text_encoder_2: torch.nn.Module | None = None,
    ):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.compilation: Compilation | None = None

    def forward(
        self,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        text: TextInputs,
        time_ids: torch.Tensor,
        text_keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the U-Net's prediction, with the shape of `x_t` [B, C, h, w].

        Args:
            timesteps: [B].
            text: text inputs of `TextConditioner.build_inputs`.
            time_ids: [B, 6], SDXL's size and crop conditioning.
            text_keep: [B], 1 for samples that keep their text embeddings, 0 for samples whose embeddings become zeros;
                None keeps all.
        """
        hidden, pooled = self.encode(text)
        if text_keep is not None:
            keep = text_keep.to(hidden.dtype)
            hidden, pooled = hidden * keep[:, None, None], pooled * keep[:, None]
        conditions = {"text_embeds": pooled.to(x_t.dtype), "time_ids": time_ids}
        return self.unet(x_t, timesteps, hidden.to(x_t.dtype), added_cond_kwargs=conditions).sample

    def encode(self, text: TextInputs) -> TextEmbeddings:
        """Return the U-Net's text conditioning. Trained encoders run here, with gradients."""
        hidden, hidden_2, pooled = (text.get(name) for name in ("hidden", "hidden_2", "pooled"))
        if self.text_encoder is not None:
            hidden = encode_text(self.text_encoder, text["input_ids"], text.get("weights")).hidden
        if self.text_encoder_2 is not None:
            hidden_2, pooled = encode_text(self.text_encoder_2, text["input_ids_2"], text.get("weights_2"))
        assert hidden is not None and hidden_2 is not None and pooled is not None, "text of both encoders is needed"
        return TextEmbeddings(torch.cat([hidden, hidden_2.to(hidden.dtype)], dim=-1), pooled)


def load_unet(
    source: ModelSource,
    config: EngineConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.nn.Module:
    """Load SDXL's U-Net for training, and apply the settings of `engine` that change its execution.

    The settings are fp8, gradient checkpointing, the attention backend and channels_last.
    """
    from diffusers import UNet2DConditionModel

    build = partial(UNet2DConditionModel.from_config, source.read_config("unet"))
    unet: Any = build_component(build, source, "unet", device=device, dtype=dtype)
    if config.fp8 == "linear":
        count = format_count(convert_linears(unet), "linear layer")
        warn_once("engine.fp8: {} multiply in fp8; experimental: no GPU has shown its gain or its losses yet", count)
    configure_unet(unet, config)
    return unet.train()


def configure_unet(unet: Any, config: EngineConfig) -> None:
    """Apply the execution options of `engine` that act on single layers; `gradient_checkpointing: auto` is off."""
    set_checkpointing(unet, resolve_checkpointing(config))
    if config.attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    if config.channels_last:
        for layer in unet.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_pre_hook(convert_to_channels_last)


def read_trained_weights(
    networks: TrainedNetworks, source: ModelSource, text_projection: TextProjection
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (parameter name, tensor) of each trained weight of the base model, in the precision of the file.

    Not for networks with adapters, whose trained weights are not in the base model.
    """
    for component, network in networks.named_children():
        parameters = network.named_parameters()
        names = {get_canonical_name(component, name): name for name, weight in parameters if weight.requires_grad}
        for name, tensor in read_component(source, component, text_projection):
            if name in names:
                yield f"{component}.{names[name]}", tensor


def convert_to_channels_last(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Convert the inputs of a convolution to channels_last; a forward pre-hook.

    The layout of its input determines the layout of a convolution's output and of the following layers, up to the next
    attention layer. Weights keep their layout: ZeRO stores them in flat buffers, and DeepSpeed 0.19 cannot broadcast
    other layouts.
    """
    return tuple(activation.contiguous(memory_format=torch.channels_last) for activation in inputs)


def list_trained_encoders(config: OptimConfig) -> list[str]:
    """List the text encoders that have a learning rate."""
    return [name for name in ENCODERS if getattr(config, f"{name}_lr")]


def checkpoint_text_encoder(encoder: Any) -> None:
    """Switch a text encoder's gradient checkpointing on. transformers has renamed the method."""
    enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def unfreeze_text_encoder(encoder: Any, gradient_checkpointing: bool) -> None:
    """Prepare a text encoder for training.

    The U-Net uses the hidden states before the last layer. The pooled state of encoder 1 is not used either, so its
    last layer and final norm do not affect the loss and stay frozen.
    """
    encoder.train()
    if gradient_checkpointing:
        checkpoint_text_encoder(encoder)
    unused = (
        ()
        if hasattr(encoder, "text_projection")
        else (f".layers.{encoder.config.num_hidden_layers - 1}.", "final_layer_norm.")
    )
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(not any(part in f".{name}" for part in unused))
