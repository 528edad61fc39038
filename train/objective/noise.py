"""Noise, as pure functions: plain, nearest of several, offset, pyramid and perturbed.

Each sample is drawn from a seed of its own, so its noise does not depend on the rank, on the micro batch or on the
other samples in the batch. Each kind of noise has its own seeds, so enabling one kind does not change the draws of the
others.

Generators of a CPU and of a GPU give different numbers for one seed. `drawn_on` names the device of the generator; by
default that of the result.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import interpolate

from sdxl_trainer.data.loading.device_copy import copy_to_device
from sdxl_trainer.train.objective.diffusion import expand_like

CANDIDATES_AT_ONCE = 16  # 4 MiB for a latent of 4 x 128 x 128


def draw_noise(
    shape: Sequence[int],
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    drawn_on: torch.device | str | None = None,
) -> torch.Tensor:
    """Draw standard normal noise, [B, *shape] float32, each sample from its own seed."""
    source = device if drawn_on is None else drawn_on
    samples = [torch.randn(*shape, generator=build_generator(seed, source), device=source) for seed in seeds]
    return copy_to_device(torch.stack(samples), torch.device(device))


def draw_nearest_noise(
    x0: torch.Tensor, num_candidates: int, seeds: Sequence[int], drawn_on: torch.device | str | None = None
) -> torch.Tensor:
    """Draw several standard normal noises for each sample, and return the one with the smallest L2 distance to its x0.

    Noise and latent are then paired less randomly (immiscible diffusion by k-nearest noise, arXiv 2505.18521). A
    sample's candidates depend on its seed alone, and are drawn and compared CANDIDATES_AT_ONCE at a time, so the choice
    does not depend on the batch.

    Shapes: `x0` and the result [B, C, h, w] float32.
    """
    source = x0.device if drawn_on is None else drawn_on
    pairs = zip(x0, seeds, strict=True)
    return torch.stack([_draw_nearest(own, num_candidates, build_generator(seed, source)) for own, seed in pairs])


def _draw_nearest(x0: torch.Tensor, num_candidates: int, generator: torch.Generator) -> torch.Tensor:
    """Draw the nearest of several noises for one sample, [C, h, w]."""
    counts = [min(CANDIDATES_AT_ONCE, num_candidates - start) for start in range(0, num_candidates, CANDIDATES_AT_ONCE)]
    drawn = (torch.randn(count, *x0.shape, generator=generator, device=generator.device) for count in counts)
    nearest = [_choose_nearest(copy_to_device(candidates, x0.device), x0) for candidates in drawn]
    return nearest[0] if len(nearest) == 1 else _choose_nearest(torch.stack(nearest), x0)


def _choose_nearest(candidates: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """Return the candidate [C, h, w] of [N, C, h, w] that is nearest to x0, without a copy to the host."""
    distances = torch.linalg.vector_norm(candidates - x0, dim=(1, 2, 3))
    return candidates.index_select(0, distances.argmin(dim=0, keepdim=True))[0]


def add_offset(
    noise: torch.Tensor,
    x0: torch.Tensor,
    strength: torch.Tensor,
    adaptive_scale: float,
    seeds: Sequence[int],
    drawn_on: torch.device | str | None = None,
) -> torch.Tensor:
    """Add offset noise n + k·randn(B, C, 1, 1), which shifts the mean of each channel.

    A model trained with it learns very dark and very bright images. With `adaptive_scale` a, the strength k becomes
    max(0, k + a·|mean of x0 over the image|) for each channel.

    Shapes: `noise`, `x0` and the result [B, C, h, w]; `strength` [B].
    Source: crosslabs.org/blog/diffusion-with-offset-noise; the adaptive form is kohya's.
    """
    adaptive = adaptive_scale * x0.mean(dim=(2, 3), keepdim=True).abs()  # [B, C, 1, 1]
    strengths = expand_like(strength, noise) + adaptive  # [B, C, 1, 1]
    return noise + strengths.clamp(min=0) * draw_noise((noise.shape[1], 1, 1), seeds, noise.device, drawn_on)


def add_pyramid(
    noise: torch.Tensor,
    num_levels: int,
    discount: float,
    seeds: Sequence[int],
    drawn_on: torch.device | str | None = None,
) -> torch.Tensor:
    """Add pyramid noise (also called multi-resolution noise) and rescale the sum to a standard deviation of 1.

    Level i adds discount^i times noise drawn at 1/r^i of the latent's size and enlarged to it, with a random r in
    [2, 4) for each level. Level 0 has the full size. The level at which a side reaches 1 is the last. Each sample is
    divided by its own standard deviation.

    Shapes: `noise` and the result [B, C, h, w].
    Source: Whitaker 2023, "Multi-resolution noise for diffusion model training".
    """
    pairs = zip(noise, seeds, strict=True)
    source = noise.device if drawn_on is None else drawn_on
    return torch.stack([_add_pyramid(own, num_levels, discount, seed, source) for own, seed in pairs])


def _add_pyramid(
    noise: torch.Tensor, num_levels: int, discount: float, seed: int, drawn_on: torch.device | str
) -> torch.Tensor:
    """Add pyramid noise to one sample, [C, h, w]."""
    channels, height, width = noise.shape
    # Drawn on the CPU, because the sizes are needed on the host and reading them from a GPU would wait for it.
    ratios = (2 + 2 * torch.rand(num_levels, generator=build_generator(seed))).tolist()
    generator = build_generator(seed, drawn_on)
    for level, ratio in enumerate(ratios):
        size = (max(1, int(height / ratio**level)), max(1, int(width / ratio**level)))
        small = copy_to_device(torch.randn(1, channels, *size, generator=generator, device=drawn_on), noise.device)
        noise = noise + discount**level * interpolate(small, (height, width), mode="bilinear")[0]
        if 1 in size:
            break
    return noise / noise.std()


def perturb_noise(
    noise: torch.Tensor, strength: torch.Tensor, seeds: Sequence[int], drawn_on: torch.device | str | None = None
) -> torch.Tensor:
    """Return n + γ·randn for input perturbation (Ning et al. 2023, arXiv 2301.11706).

    The result is used for x_t only, not for the target: the U-Net learns to handle inputs that are as imperfect as its
    own predictions.

    Shapes: `noise` and the result [B, ...]; `strength` γ [B].
    """
    return noise + expand_like(strength, noise) * draw_noise(noise.shape[1:], seeds, noise.device, drawn_on)


def build_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Build a seeded random generator that is independent of torch's global one."""
    return torch.Generator(device).manual_seed(seed)
