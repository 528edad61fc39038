"""Learned loss weighting, as pure functions (Karras et al. 2024, arXiv 2312.02696, "EDM2").

A loss L at the noise level sigma becomes L/exp(u) + u. Its minimum over u is at exp(u) = L, so exp(u) learns the mean
loss of each noise level, and all noise levels contribute equally to the gradient of the network. u is a linear layer
over Fourier features of ln(sigma)/4.

The layer is so small that each rank updates it on the host, in float64, by the losses of the whole global batch. So it
needs no gradient of the device, and is equal on any number of ranks and at any ZeRO stage.
"""

from dataclasses import dataclass, field

import numpy as np

from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed

NUM_FEATURES = 128
# The features of an infinite logarithm are undefined, and the paper has no infinite sigma. This is diffusers' sigma of
# the last timestep at zero terminal SNR. Its inverse limits a flow without noise.
MAX_SIGMA = 4096.0
BETAS, EPSILON = (0.9, 0.99), 1e-8  # of Adam, as in the paper


@dataclass(frozen=True)
class LearnedWeighting:
    """Weights of the linear layer and the state of its Adam."""

    weights: list[float] = field(default_factory=lambda: [0.0] * NUM_FEATURES)
    first_moments: list[float] = field(default_factory=lambda: [0.0] * NUM_FEATURES)
    second_moments: list[float] = field(default_factory=lambda: [0.0] * NUM_FEATURES)
    num_updates: int = 0


def _draw_uniform(part: int) -> np.ndarray:
    """Return a number in (0, 1) for each feature, [128], the same in every run: the weights only fit these features."""
    seeds = [derive_seed(0, RandomStream.FOURIER_FEATURES, part, number) for number in range(NUM_FEATURES)]
    return (np.array(seeds, np.float64) + 0.5) * 2.0**-63


# Normal by the method of Box and Muller.
FREQUENCIES = 2 * np.pi * np.sqrt(-2 * np.log(_draw_uniform(0))) * np.cos(2 * np.pi * _draw_uniform(1))  # [128]
PHASES = 2 * np.pi * _draw_uniform(2)  # [128]


def limit_log_sigmas(log_sigmas: np.ndarray) -> np.ndarray:
    """Return ln(sigma) limited to sigma from 1/4096 to 4096, infinite ones included."""
    return np.clip(log_sigmas, -np.log(MAX_SIGMA), np.log(MAX_SIGMA))


def compute_features(log_sigmas: np.ndarray) -> np.ndarray:
    """Return the Fourier features sqrt(2/128)·cos(ln(sigma)/4·frequency + phase), [N, 128], of finite ln(sigma) [N].

    The factor gives a row the norm 1 on average, as the paper's normalised layer does.
    """
    return np.sqrt(2 / NUM_FEATURES) * np.cos(log_sigmas[:, None] / 4 * FREQUENCIES + PHASES)


def compute_log_losses(weighting: LearnedWeighting, log_sigmas: np.ndarray) -> np.ndarray:
    """Return u, [N], at ln(sigma) [N]. The weight of a loss is exp(-u)."""
    return compute_features(log_sigmas) @ np.array(weighting.weights)


def update_weighting(
    weighting: LearnedWeighting, log_sigmas: np.ndarray, losses: np.ndarray, factors: np.ndarray, lr: float
) -> LearnedWeighting:
    """Make a step of Adam on the mean of factor·(loss/exp(u) + u) over a global batch.

    Args:
        log_sigmas, losses, factors: [N]. Samples of factor 0, and those whose loss is not finite, do not count; without
            others nothing is changed.
    """
    is_used = np.isfinite(losses) & (factors != 0)
    if not is_used.any():
        return weighting
    features = compute_features(log_sigmas[is_used])
    log_losses = features @ np.array(weighting.weights)
    slopes = factors[is_used] * (1 - losses[is_used] * np.exp(-log_losses))
    gradient = slopes @ features / len(losses)
    number, (beta_1, beta_2) = weighting.num_updates + 1, BETAS
    first = beta_1 * np.array(weighting.first_moments) + (1 - beta_1) * gradient
    second = beta_2 * np.array(weighting.second_moments) + (1 - beta_2) * gradient**2
    direction = first / (1 - beta_1**number) / (np.sqrt(second / (1 - beta_2**number)) + EPSILON)
    return LearnedWeighting(
        weights=(np.array(weighting.weights) - lr * direction).tolist(),
        first_moments=first.tolist(),
        second_moments=second.tolist(),
        num_updates=number,
    )
