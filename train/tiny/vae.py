"""Training of the tiny SDXL's VAE, which wrote configs/tiny/vae/diffusion_pytorch_model.safetensors.

    python -m sdxl_trainer.train.tiny.vae --out DIR --minutes 20

The training images are drawn like the demo set's, from other seeds. The VAE learns to reconstruct them from 4 noisy
latent channels at an eighth of the size. Then the latents are scaled to SDXL's statistics: mean 0, std 1/0.13025.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.data.files import usual_mode
from sdxl_trainer.data.images.demo_set import BACKGROUNDS, COLOURS, SHAPES, draw_image
from sdxl_trainer.train.tiny.build import build_tiny_vae, load_tiny_vae

Vae = Any  # an AutoencoderKL; diffusers' own annotations do not survive its decorators

SCALING_FACTOR = 0.13025
FIRST_SEED = 1_000_000  # far from any demo set's seed
BATCH_SIZE = 8
LEARNING_RATE = 2e-3
WARM_UP_STEPS = 50
KL_WEIGHT = 1e-5
# Noise on the latents while decoding, relative to their std. The decoder learns to map nearby latents to similar
# images, so small errors of a diffusion model stay small.
LATENT_NOISE = 0.15
FULL_SIZE_SHARE = 0.5  # last share of the time, spent on full-size images; half-size images are 4 × faster
NUM_STATISTICS_BATCHES = 24
OTHER_COLOURS_SHARE = 0.25  # share of training images in random colours, so that the VAE reconstructs other colours too
SIZES_PX = ((128, 128), (160, 96), (96, 160), (192, 64))  # (width, height): the demo set's buckets
HALF_SIZES_PX = ((64, 64), (80, 48), (48, 80), (96, 32))
# Brightness and two colour differences. Each is standardised, so colour gets as much of the latents' energy as
# brightness, which would otherwise dominate in images of black, white and grey.
OPPONENT = ((1 / 3, 1 / 3, 1 / 3), (0.5, -0.5, 0.0), (0.25, 0.25, -0.5))
REFERENCE = 4.0  # constant channels of ±4 beside ±RGB keep the last group norm's divisor nearly constant


class VaeLoss(NamedTuple):
    """Loss of a batch."""

    loss: torch.Tensor  # scalar
    psnr_db: float  # of the reconstruction


def draw_batch(
    rng: random.Random, size_px: tuple[int, int], batch_size: int = BATCH_SIZE, other_colours_share: float = 0.0
) -> torch.Tensor:
    """Draw training images, [B, 3, H, W] from -1 to 1, of `size_px` = (width, height)."""
    images = []
    for _ in range(batch_size):
        colour, background = rng.choice(list(COLOURS.values())), rng.choice(list(BACKGROUNDS.values()))
        if rng.random() < other_colours_share:
            colour, background = _draw_colour(rng), _draw_colour(rng)
        images.append(np.asarray(draw_image(colour, rng.choice(SHAPES), background, size_px, rng)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _draw_colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


@torch.no_grad()
def initialise_as_box_filter(vae: Vae) -> None:
    """Initialise the VAE as a box filter, the mean colour of each 8×8 block, so that training only adds edges.

    With the default initialisation, the colours need 20 minutes of training on a CPU. Here every residual branch starts
    at 0, and three channels carry RGB through the shortcuts. The last activation keeps them because silu(x) - silu(-x)
    = x.
    """
    for name, module in vae.named_modules():
        for ending, initialise in INITIALISERS.items():
            if name.endswith(ending):
                initialise(module.weight)
    opponent = torch.tensor(OPPONENT)
    encoder, decoder = vae.encoder, vae.decoder
    _initialise_last_layers(encoder, encoder.down_blocks[-1].resnets[0].conv_shortcut, opponent)
    _initialise_last_layers(decoder, decoder.up_blocks[-1].resnets[0].conv_shortcut, torch.eye(3))
    encoder.conv_out.weight[4:] = 0  # the log variances start constant
    encoder.conv_out.bias[4:] = -6
    decoder.conv_in.weight[:3] = 0
    decoder.conv_in.weight[:3, :3, 1, 1] = torch.linalg.inv(opponent)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(len(conv.weight))[:, :, None, None])
        conv.bias.zero_()


def _copy_rgb(weight: torch.Tensor, value: float, taps: slice = slice(None)) -> None:
    """Make output channels 0 to 2 of a convolution [out, in, k, k] copies of input channels 0 to 2."""
    weight[:3] = 0
    for channel in range(3):
        weight[channel, channel, taps, taps] = value


# Initial weights of layers, by the end of their name.
INITIALISERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "conv2": torch.nn.init.zeros_,
    "to_out.0": torch.nn.init.zeros_,
    "conv_shortcut": partial(_copy_rgb, value=1.0),
    "downsamplers.0.conv": partial(_copy_rgb, value=0.25, taps=slice(0, 2)),
    "upsamplers.0.conv": partial(_copy_rgb, value=1.0, taps=slice(1, 2)),
    "encoder.conv_in": partial(_copy_rgb, value=1.0, taps=slice(1, 2)),
}


def _initialise_last_layers(coder: Any, shortcut: Any, matrix: torch.Tensor) -> None:
    """Make the shortcut output RGB, -RGB, ±REFERENCE and zeros, and norm, SiLU and conv_out output matrix @ RGB."""
    shortcut.weight.zero_()
    shortcut.bias.zero_()
    for channel in range(3):
        shortcut.weight[channel, channel] = 1
        shortcut.weight[channel + 3, channel] = -1
    shortcut.bias[6], shortcut.bias[7] = REFERENCE, -REFERENCE
    coder.conv_norm_out.weight.fill_(REFERENCE * math.sqrt(2 / shortcut.out_channels))
    coder.conv_out.weight[:3] = 0
    coder.conv_out.weight[:3, :3, 1, 1] = matrix
    coder.conv_out.weight[:3, 3:6, 1, 1] = -matrix


def compute_loss(vae: Vae, images: torch.Tensor) -> VaeLoss:
    """Return the loss L1 + 4·L2 + KL_WEIGHT·KL of a batch [B, 3, H, W] that is decoded from noisy latents."""
    posterior = vae.encode(images).latent_dist
    latents = posterior.sample()  # [B, 4, H/8, W/8]
    std = latents.detach().std(dim=(0, 2, 3), keepdim=True)  # [1, 4, 1, 1]
    noisy = latents + LATENT_NOISE * std * torch.randn_like(latents)
    error = vae.decode(noisy).sample - images
    squared = error.square().mean()
    kl = posterior.kl().mean() / latents[0].numel()
    return VaeLoss(error.abs().mean() + 4 * squared + KL_WEIGHT * kl, compute_psnr(squared.item()))


def compute_psnr(mean_squared_error: float) -> float:
    """Return the peak signal-to-noise ratio in dB of images from -1 to 1 (peak to peak 2)."""
    return 10 * math.log10(4 / mean_squared_error)


def train_steps(vae: Vae, seconds: float, seed: int) -> Iterator[VaeLoss]:
    """Train the VAE for a number of seconds, and yield the loss of each step."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    start = time.monotonic()
    step = 0
    while (progress := (time.monotonic() - start) / seconds) < 1:
        # Half a cosine to zero, because edges become sharp at the low rates of the end.
        rate = LEARNING_RATE * min(1, (step + 1) / WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = rate
        is_full_size = progress > 1 - FULL_SIZE_SHARE
        size_px = rng.choice(SIZES_PX if is_full_size else HALF_SIZES_PX)
        images = draw_batch(rng, size_px, other_colours_share=OTHER_COLOURS_SHARE)
        result = compute_loss(vae, images.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        yield result


@torch.no_grad()
def scale_latents(vae: Vae, seed: int) -> None:
    """Change quant_conv and post_quant_conv so that each latent channel has mean 0 and std 1/0.13025.

    Both are 1×1 convolutions next to the latents, and their changes cancel, so the decoded images stay the same.
    """
    rng = random.Random(seed)
    # The demo set's proportions: half of the images are squares, and the other three buckets share the rest.
    sizes_px = [SIZES_PX[0] if index % 2 else SIZES_PX[1 + index // 2 % 3] for index in range(NUM_STATISTICS_BATCHES)]
    latents = [vae.encode(draw_batch(rng, size_px)).latent_dist.mode() for size_px in sizes_px]  # [B, 4, h, w] each
    channels = torch.cat([latent.transpose(0, 1).flatten(1) for latent in latents], dim=1)  # [4, pixels]
    mean = channels.mean(dim=1)  # [4]
    gain = 1 / (SCALING_FACTOR * channels.std(dim=1))  # [4]
    quant, post_quant = vae.quant_conv, vae.post_quant_conv  # moments [8] = means [4], log variances [4]
    quant.weight[:4] *= gain[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) * gain
    quant.bias[4:] += 2 * gain.log()
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight /= gain[None, :, None, None]


@torch.no_grad()
def measure_psnr(vae: Vae, seed: int, num_images: int = 24) -> float:
    """Measure the PSNR in dB over new 128² images, decoded from the posterior's mean and rounded to 8 bits."""
    images = draw_batch(random.Random(seed), (128, 128), num_images)
    decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    rounded = torch.round((decoded + 1) * 127.5) / 127.5 - 1
    return compute_psnr((rounded - images).square().mean().item())


def save_reconstructions(vae: Vae, path: Path) -> None:
    """Write one image that shows eight images above their reconstructions."""
    images = draw_batch(random.Random(FIRST_SEED + 2), (128, 128), other_colours_share=OTHER_COLOURS_SHARE)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    rows = torch.cat([torch.cat(list(images), dim=2), torch.cat(list(decoded), dim=2)], dim=1)  # [3, 2·H, 8·W]
    Image.fromarray(((rows + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(path)


def train_tiny_vae(folder: Path, minutes: float, seed: int = 0, start_from: Path | None = None) -> Path:
    """Train the VAE for a number of minutes, write its fp16 weights into a folder, and return their path."""
    torch.manual_seed(seed)
    if start_from is None:
        vae = build_tiny_vae()
        initialise_as_box_filter(vae)
    else:
        vae = load_tiny_vae(start_from)
    vae = vae.to(memory_format=torch.channels_last).train()
    for step, result in enumerate(train_steps(vae, minutes * 60, FIRST_SEED + seed), start=1):
        if step % 50 == 0:
            sys.stdout.write(f"step {step}  loss {result.loss.item():.4f}  PSNR {result.psnr_db:.1f} dB\n")
            sys.stdout.flush()
    vae.eval()
    scale_latents(vae, FIRST_SEED + 1)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "diffusion_pytorch_model.safetensors"
    with usual_mode(path):
        save_file({name: value.half().contiguous() for name, value in vae.state_dict().items()}, path)
    saved_vae = load_tiny_vae(path)
    save_reconstructions(saved_vae, folder / "reconstructions.png")
    sys.stdout.write(f"PSNR {measure_psnr(saved_vae, FIRST_SEED + 3):.2f} dB, {path.stat().st_size} bytes in {path}\n")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, train the VAE and write it."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trainer.train.tiny.vae", description="Train the tiny VAE.")
    parser.add_argument("--out", type=parse_path, required=True, metavar="DIR", help="folder for the weights")
    parser.add_argument("--minutes", type=float, default=20, metavar="M", help="minutes of training (20)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of weights and images (0)")
    parser.add_argument("--start-from", type=parse_path, metavar="FILE", help="weights to continue from")
    options = parser.parse_args(arguments)
    train_tiny_vae(options.out, options.minutes, options.seed, options.start_from)


if __name__ == "__main__":
    main()
