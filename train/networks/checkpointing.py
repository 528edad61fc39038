"""Gradient checkpointing of the U-Net: which activations the forward pass keeps, and what the backward pass repeats.

`full` repeats every residual and transformer block. `selective` repeats the cheap operations alone: norms and
activation functions that feed a convolution or a matrix product. PyTorch ends the repetition of a region as soon as all
its saved tensors are there again, so the convolution or product at the end of a region is not repeated.
docs/BENCHMARKS.md has the bytes and FLOPs of each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from sdxl_trainer.configs.engine import Checkpointing, EngineConfig

# Runs a function on its inputs and keeps these alone for the backward pass.
RunRegion = Callable[..., Any]


def resolve_checkpointing(config: EngineConfig) -> Checkpointing:
    """Return the checkpointing that the settings come to: none before `auto` is resolved.

    `selective` is for blocks that are not compiled. Its regions would keep blocks from sharing a graph, and a compiled
    block repeats norms and activations by itself where that pays.
    """
    policy = config.gradient_checkpointing
    return "off" if policy == "auto" or (policy == "selective" and config.compile != "none") else policy


def set_checkpointing(unet: Any, policy: Checkpointing, run: RunRegion | None = None) -> None:
    """Set the gradient checkpointing of a U-Net, whatever it was before.

    Args:
        run: runs a function on inputs, as `torch.utils.checkpoint.checkpoint` does; None for that function.
    """
    unet.disable_gradient_checkpointing()
    regions = find_regions(unet)
    for layer in regions:
        vars(layer).pop("forward", None)
    if policy == "off":
        return
    # Without dropout nothing is random in the U-Net, and the state of the generators need not be copied.
    has_dropout = any(layer.p > 0 for layer in unet.modules() if isinstance(layer, torch.nn.Dropout))
    run = run or partial(checkpoint, use_reentrant=False, preserve_rng_state=has_dropout)
    if policy == "full":
        unet.enable_gradient_checkpointing(run)
        return
    for layer, forward in regions.items():
        layer.forward = partial(forward, layer, run)


def find_regions(unet: torch.nn.Module) -> dict[torch.nn.Module, Callable[..., torch.Tensor]]:
    """Map each layer that `selective` changes to the function that replaces its forward pass."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import FeedForward
    from diffusers.models.resnet import ResnetBlock2D

    regions: dict[torch.nn.Module, Callable[..., torch.Tensor]] = {}
    for layer in unet.modules():
        if isinstance(layer, ResnetBlock2D) and layer.time_embedding_norm == "default":
            if layer.upsample is None and layer.downsample is None and layer.time_emb_proj is not None:
                regions[layer] = run_residual
        elif isinstance(layer, FeedForward) and isinstance(layer.net[0], GEGLU) and len(layer.net) == 3:
            regions[layer] = run_feed_forward
    return regions


def run_residual(block: Any, run: RunRegion, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Run a `ResnetBlock2D` on x [B, C, h, w] and the time embedding [B, E]. Norms and activations are not kept."""

    def convolve_first(x: torch.Tensor) -> torch.Tensor:
        return block.conv1(block.nonlinearity(block.norm1(x)))

    def convolve_second(hidden: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return block.conv2(block.dropout(block.nonlinearity(block.norm2(hidden + shift))))

    hidden = run(convolve_first, x)
    shift = block.time_emb_proj(block.nonlinearity(embedding))[:, :, None, None]
    hidden = run(convolve_second, hidden, shift)
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x.contiguous() if block.training else x)
    return (x + hidden) / block.output_scale_factor


def run_feed_forward(layer: Any, run: RunRegion, hidden: torch.Tensor) -> torch.Tensor:
    """Run a `FeedForward` on hidden states [B, N, C]. The gate's activation and the gated values are not kept."""
    gated, dropout, output = layer.net

    def finish(projected: torch.Tensor) -> torch.Tensor:
        values, gate = projected.chunk(2, dim=-1)
        return output(dropout(values * gated.gelu(gate)))

    return run(finish, gated.proj(hidden))
