"""Noise: plain, offset, pyramid and perturbed. Pure, and drawn sample by sample from a seed of its own.

So a sample's noise does not depend on the rank, micro batch or company it comes in. Each kind of draw has its own
seeds: turning one on leaves the others as they were.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import interpolate

from sdxl_trainer.train.objective.diffusion import expand


def draw_noise(shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Unit Gaussian noise, [B, *shape] float32, each sample drawn from its own seed."""
    return torch.stack([torch.randn(*shape, generator=make_generator(seed, device), device=device) for seed in seeds])


def add_offset(
    noise: torch.Tensor, x0: torch.Tensor, strength: torch.Tensor, adaptive_scale: float, seeds: Sequence[int]
) -> torch.Tensor:
    """Noise whose mean over the image varies too: n + k·randn(B, C, 1, 1), so that very dark and bright are learnt.

    With `adaptive_scale` a, k becomes max(0, k + a·|mean of x0 over the image|) for each channel. [B, C, h, w] in and
    out; `strength` k is [B]. Source: crosslabs.org/blog/diffusion-with-offset-noise; the adaptive form is kohya's.
    """
    strengths = expand(strength, noise) + adaptive_scale * x0.mean(dim=(2, 3), keepdim=True).abs()  # [B, C, 1, 1]
    return noise + strengths.clamp(min=0) * draw_noise((noise.shape[1], 1, 1), seeds, noise.device)


def add_pyramid(noise: torch.Tensor, num_levels: int, discount: float, seeds: Sequence[int]) -> torch.Tensor:
    """Noise of many resolutions, brought back to a standard deviation of 1 (multires or pyramid noise).

    Level i adds discount^i times noise that is r^i times smaller than the latent, enlarged to it, with a random r of 2
    to 4 for each level; a side of 1 is the last level. Level 0 has full size. [B, C, h, w] in and out, each sample
    divided by its own deviation. Source: Whitaker 2023, "Multi-resolution noise for diffusion model training".
    """
    return torch.stack([_add_pyramid(one, num_levels, discount, seed) for one, seed in zip(noise, seeds, strict=True)])


def _add_pyramid(noise: torch.Tensor, num_levels: int, discount: float, seed: int) -> torch.Tensor:
    """`add_pyramid` of one sample, [C, h, w]."""
    channels, height, width = noise.shape
    # On the CPU, which need not wait for a GPU to know the sizes.
    ratios = (2 + 2 * torch.rand(num_levels, generator=make_generator(seed))).tolist()
    generator = make_generator(seed, noise.device)
    for level, ratio in enumerate(ratios):
        size = (max(1, int(height / ratio**level)), max(1, int(width / ratio**level)))
        small = torch.randn(1, channels, *size, generator=generator, device=noise.device)
        noise = noise + discount**level * interpolate(small, (height, width), mode="bilinear")[0]
        if 1 in size:
            break
    return noise / noise.std()


def perturb_noise(noise: torch.Tensor, strength: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """n + γ·randn, used for x_t only, so that the U-Net meets inputs as imperfect as its own (Ning et al. 2023,
    arXiv 2301.11706). [B, ...] in and out; `strength` γ is [B]."""
    return noise + expand(strength, noise) * draw_noise(noise.shape[1:], seeds, noise.device)


def make_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that nothing else draws from."""
    return torch.Generator(device).manual_seed(seed)
