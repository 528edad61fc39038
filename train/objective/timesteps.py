"""Timestep sampling, as pure functions: a uniform draw per sample, mapped through the inverse CDF of a density.

A density is given by its inverse CDF, a map from [0, 1) to [0, 1). Low-discrepancy draws therefore work with every
density.
"""

import math
from collections.abc import Callable, Sequence

import torch

InverseCdf = Callable[[torch.Tensor], torch.Tensor]
FRACTION_BITS = 53  # of a float64


def draw_uniform(seeds: Sequence[int]) -> torch.Tensor:
    """Return one number in [0, 1) per 63-bit seed of `derive_seed` (data/order/keyed_random.py), [B] float64."""
    return torch.tensor([seed >> (63 - FRACTION_BITS) for seed in seeds], dtype=torch.float64) * 2.0**-FRACTION_BITS


def draw_low_discrepancy(seed: int, positions: Sequence[int], total: int) -> torch.Tensor:
    """Return evenly spaced numbers, (u + position/total) mod 1 with one shared uniform u, [B] float64 in [0, 1).

    Each number by itself is uniform. Together, the numbers of a global batch cover [0, 1) as evenly as possible, no
    matter which ranks and micro batches draw them (Kingma et al. 2021, arXiv 2107.00630, appendix I).

    Args:
        seed: seed of the optimizer step, shared by all its samples.
        positions: the samples' positions in the global batch.
        total: samples in the global batch.
    """
    shifted = draw_uniform([seed]) + torch.tensor(list(positions), dtype=torch.float64) / total
    return shifted % 1.0


def build_uniform() -> InverseCdf:
    """Build the inverse CDF of the uniform density."""
    return lambda draws: draws


def build_logit_normal(mean: float, std: float) -> InverseCdf:
    """Build the inverse CDF of the logit-normal density: sigmoid(mean + std·z), z standard normal (Esser et al. 2024,
    arXiv 2403.03206)."""
    return lambda draws: torch.sigmoid(mean + std * torch.special.ndtri(draws))


def build_mode(scale: float) -> InverseCdf:
    """Build the inverse CDF of the density with heavy tails or a raised middle: u - scale·(sin²(π·u/2) - u).

    It is Esser et al.'s f(1 - u; scale) (arXiv 2403.03206, equation 20), which increases with u.

    Args:
        scale: from -1 to 2/(π - 2); outside of this range the map is not monotonic.
    """
    return lambda draws: draws - scale * (torch.sin(math.pi / 2 * draws).square() - draws)


def build_cosmap() -> InverseCdf:
    """Build the inverse CDF of the density 2/(π·(1 - 2s + 2s²)): s = 1 - 1/(tan(π·u/2) + 1) (arXiv 2403.03206,
    equation 21)."""
    return lambda draws: 1 - 1 / (torch.tan(math.pi / 2 * draws) + 1)


def build_histogram(weights: Sequence[float]) -> InverseCdf:
    """Build the inverse CDF of a density that is constant on equal parts of [0, 1).

    Args:
        weights: the density's height on each part; the weights need not add up to 1. A part of weight 0 is never drawn.
    """
    heights = torch.tensor(list(weights), dtype=torch.float64)
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), heights.cumsum(0)])  # the CDF at the parts' edges
    edges = edges / edges[-1]

    def invert(draws: torch.Tensor) -> torch.Tensor:
        part = torch.searchsorted(edges, draws, right=True).clamp(1, len(heights)) - 1
        within = (draws - edges[part]) / (edges[part + 1] - edges[part])
        return (part + within) / len(heights)

    return invert


def shift_draws(draws: torch.Tensor, shift: float) -> torch.Tensor:
    """Return shift·s / (1 + (shift - 1)·s) for draws s: more noise for shift > 1, as SD3 uses for large images
    (Esser et al. 2024, arXiv 2403.03206)."""
    return shift * draws / (1 + (shift - 1) * draws)


def resolve_shift(shift: float, base_px: int | None, num_pixels: float) -> float:
    """Return the shift for an image of `num_pixels`: shift·sqrt(num_pixels)/base_px (arXiv 2403.03206, equation 23).

    Args:
        shift: the shift for a square image with a side of `base_px`.
        base_px: None gives all images the same shift.
    """
    return shift if base_px is None else shift * math.sqrt(num_pixels) / base_px


def scale_to_range(draws: torch.Tensor, minimum: int, maximum: int) -> torch.Tensor:
    """Scale draws in [0, 1] to real timesteps in [minimum, maximum), [B] float64.

    A draw of 1, which rounding can produce, gives a timestep just below `maximum`.
    """
    timesteps = minimum + draws * (maximum - minimum)
    return timesteps.clamp(minimum, maximum * (1 - 2.0**-20))
