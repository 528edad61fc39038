"""The tiny VAE with 16 or 32 latent channels, which needs no training.

The latents z [C, h, w] are a tight frame of the trained VAE's 4 channels: z = F·z4 + shift with a matrix F [C, 4] of
±1/2. Its rows have the norm 1, so every channel keeps the std of the 4, and Fᵀ·F = C/4, so 4/C·Fᵀ inverts it. Scaling
and shift are those of Flux's VAE (16 channels) and of Flux 2's as it is used with SDXL (32 channels).
"""

from typing import Any, NamedTuple

import torch

BASE_CHANNELS = 4


class LatentScale(NamedTuple):
    """Scaling and shift of x0 = (latent - shift)·scaling."""

    scaling_factor: float
    shift_factor: float


WIDE_SCALES = {16: LatentScale(0.3611, 0.1159), 32: LatentScale(0.6043, 0.0760)}


def build_frame(channels: int) -> torch.Tensor:
    """Return the matrix F, [channels, 4]: the signs of row i are the bits of i, so 16 rows are all different."""
    bits = torch.arange(channels)[:, None] >> torch.arange(BASE_CHANNELS) & 1
    return 0.5 - bits.float()


@torch.no_grad()
def widen_vae(vae: Any, channels: int) -> Any:
    """Return a VAE with `channels` latents (16 or 32) that encodes and decodes images like the given one of 4.

    The posterior of a channel has the geometric mean of the variances of the 4, rescaled like the mean.
    """
    from diffusers import AutoencoderKL

    scale, frame = WIDE_SCALES[channels], build_frame(channels)
    gain = vae.config.scaling_factor / scale.scaling_factor
    config = {**vae.config, "latent_channels": channels, **scale._asdict()}
    config.pop("_use_default_values", None)  # from_config would take the defaults of the names in it
    wide: Any = AutoencoderKL.from_config(config)
    targets = wide.state_dict()
    for name, value in vae.state_dict().items():
        # A layer with more channels has those of the trained one first, and zeros for the others.
        targets[name].zero_()[tuple(slice(size) for size in value.shape)] = value
    # Moments of the encoder: means, then log variances.
    moments, bias = vae.quant_conv.weight[:, :, 0, 0], vae.quant_conv.bias
    log_share = torch.full_like(frame, 1 / BASE_CHANNELS)
    quant, post = wide.quant_conv, wide.post_quant_conv
    for layer in (quant, post):
        layer.weight.zero_()
        layer.bias.zero_()
    quant.weight[:channels, : 2 * BASE_CHANNELS, 0, 0] = gain * frame @ moments[:BASE_CHANNELS]
    quant.bias[:channels] = gain * frame @ bias[:BASE_CHANNELS] + scale.shift_factor
    quant.weight[channels:, : 2 * BASE_CHANNELS, 0, 0] = log_share @ moments[BASE_CHANNELS:]
    quant.bias[channels:] = log_share @ bias[BASE_CHANNELS:] + 2 * torch.tensor(gain).log()
    inverse = vae.post_quant_conv.weight[:, :, 0, 0] @ frame.T * (BASE_CHANNELS / channels / gain)  # [4, channels]
    post.weight[:BASE_CHANNELS, :, 0, 0] = inverse
    post.bias[:BASE_CHANNELS] = vae.post_quant_conv.bias - scale.shift_factor * inverse.sum(dim=1)
    return wide.eval()
