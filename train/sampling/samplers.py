"""Samplers of k-diffusion, as pure functions: the same steps as in ComfyUI, Forge and A1111.

Each moves x along the probability-flow ODE of Karras et al. (2022, arXiv 2206.00364), dx/dsigma = (x - x0)/sigma, from
the first sigma to the last, which is 0. x0 is the model's estimate at (x, sigma). The ODE is the same for a rectified
flow, where (x - x0)/sigma is the predicted n - x0.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

# (x, sigma) -> x0
Denoise = Callable[[torch.Tensor, float], torch.Tensor]


def sample_euler(denoise: Denoise, x: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """Sample by Euler's method (algorithm 2 of the paper, without its noise)."""
    for sigma, next_sigma in pairwise(sigmas):
        x0 = denoise(x, sigma)
        # x + (x - x0)/sigma·(next_sigma - sigma), without its cancellation: x is 4500 times x0 at zero terminal SNR.
        x = x0 + (x - x0) * (next_sigma / sigma)
    return x


def sample_dpmpp_2m(denoise: Denoise, x: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """Sample by DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), in h = ln(sigma/next_sigma).

    The first step has no earlier x0, and the last step goes to the x0 that it finds.
    """
    earlier_x0, earlier_h = None, math.nan
    for sigma, next_sigma in pairwise(sigmas):
        x0 = denoise(x, sigma)
        if next_sigma == 0:
            return x0
        h = math.log(sigma / next_sigma)
        # x0 in the middle of the step, on the line through the last two estimates.
        middle_x0 = x0 if earlier_x0 is None else x0 + (x0 - earlier_x0) * (h / (2 * earlier_h))
        x = next_sigma / sigma * x - math.expm1(-h) * middle_x0
        earlier_x0, earlier_h = x0, h
    return x


SAMPLERS: dict[str, Callable[[Denoise, torch.Tensor, Sequence[float]], torch.Tensor]] = {
    "euler": sample_euler,
    "dpmpp_2m": sample_dpmpp_2m,
}
