"""Timesteps: uniform draws, keyed to the sample, through the inverse CDF of the wanted density. All pure.

A density is given by its inverse CDF, a map of [0, 1) onto itself, so any density works with evenly spread draws too.
"""

from collections.abc import Callable, Sequence

import torch

InverseCdf = Callable[[torch.Tensor], torch.Tensor]
BITS = 53  # of a float64's fraction


def draw_uniform(seeds: Sequence[int]) -> torch.Tensor:
    """One number in [0, 1) for each seed of 63 well-mixed bits (data/order/plan.py: derive_seed), [B] float64."""
    return torch.tensor([seed >> (63 - BITS) for seed in seeds], dtype=torch.float64) * 2.0**-BITS


def draw_low_discrepancy(seed: int, positions: Sequence[int], total: int) -> torch.Tensor:
    """The numbers of `positions` among `total` points 1/total apart, all shifted by one draw, [B] float64 in [0, 1).

    Whoever computes them, together they lie as evenly as can be, and each by itself is uniform (Kingma et al. 2021,
    arXiv 2107.00630, appendix I).

    Args:
        seed: of the optimizer step, the same for all its samples.
        positions: places in the global batch, of `total` samples.
    """
    shifted = draw_uniform([seed]) + torch.tensor(list(positions), dtype=torch.float64) / total
    return shifted % 1.0


def build_uniform() -> InverseCdf:
    """Every timestep equally often."""
    return lambda draws: draws


def build_logit_normal(mean: float, std: float) -> InverseCdf:
    """sigmoid(mean + std·z) with a normal z (Esser et al. 2024, arXiv 2403.03206)."""
    return lambda draws: torch.sigmoid(mean + std * torch.special.ndtri(draws))


def build_histogram(weights: Sequence[float]) -> InverseCdf:
    """Any density, as its heights over equal parts of the range; they need not add up to 1.

    Within a part all timesteps are equally likely. Parts of height 0 never come.
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
    """Move draws towards noise (shift > 1): shift·s / (1 + (shift - 1)·s), as SD3 does for large images."""
    return shift * draws / (1 + (shift - 1) * draws)


def scale_to_range(draws: torch.Tensor, minimum: int, maximum: int) -> torch.Tensor:
    """[0, 1] to real timesteps in [minimum, maximum), [B] float64; 1, which rounding can reach, stays below maximum."""
    timesteps = minimum + draws * (maximum - minimum)
    return timesteps.clamp(minimum, maximum * (1 - 2.0**-20))
