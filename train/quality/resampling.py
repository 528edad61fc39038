"""Intervals of measures, and of their differences between models, by the bootstrap over captions.

A resample draws captions with replacement, and with each its validation image and the images of all models. The same
resamples serve all models and measures, so differences are paired: what a caption adds to all models cancels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from sdxl_trainer.train.held_out.inference import MAX_DEGREES, Uncertainty, Variance, compute_t_tail
from sdxl_trainer.train.quality.measures import compute_cmmd, compute_fid, compute_kid

NUM_RESAMPLES = 200
NUM_SUBSETS, MAX_SUBSET = 100, 1000  # of KID, as in its paper
SEED = 20240
NORMAL_QUANTILE = Uncertainty([Variance(1.0, MAX_DEGREES)]).compute_quantile()  # 1.96

# (x, y, x_counts [R, n], y_counts [R, m]) → [R]; counts of None are one resample with each image once.
Measure = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


def compute_fids(
    x: torch.Tensor, y: torch.Tensor, x_counts: torch.Tensor | None = None, y_counts: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `compute_fid` of each resample, [R]."""
    if x_counts is None or y_counts is None:
        return torch.tensor([compute_fid(x, y)], dtype=torch.float64)
    found = [compute_fid(x, y, *counts) for counts in zip(x_counts, y_counts, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


MEASURES: dict[str, Measure] = {"FID": compute_fids, "KID": compute_kid, "CMMD": compute_cmmd}
CLIP_ONLY = {"CMMD"}


class Estimate(NamedTuple):
    """A value with its interval, and the two-sided p-value of the hypothesis that it is 0."""

    value: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Resampled:
    """A measure of several models: its values, and those of resamples."""

    values: np.ndarray  # [models]
    resamples: np.ndarray  # [R, models]
    num_images: int

    def estimate(self, model: int) -> Estimate:
        """Return the value of a model with its interval."""
        return summarize(float(self.values[model]), self.resamples[:, model], self.num_images)

    def estimate_difference(self, model: int, baseline: int) -> Estimate:
        """Return the value of a model minus that of a baseline, with the interval of the difference."""
        difference = float(self.values[model] - self.values[baseline])
        return summarize(difference, self.resamples[:, model] - self.resamples[:, baseline], self.num_images)


def draw_counts(num_images: int) -> torch.Tensor:
    """Return how often each image is in each resample, [NUM_RESAMPLES, num_images], always the same."""
    random = np.random.default_rng(SEED)
    counts = random.multinomial(num_images, np.full(num_images, 1 / num_images), NUM_RESAMPLES)
    return torch.from_numpy(counts)


def draw_subsets(num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return NUM_SUBSETS pairs of random subsets, as counts [NUM_SUBSETS, num_images] each.

    Subsets hold half of the images, so that they differ, and at most MAX_SUBSET.
    """
    random, size = np.random.default_rng(SEED + 1), min(MAX_SUBSET, num_images // 2)
    counts = np.zeros((2, NUM_SUBSETS, num_images))
    for subset in counts.reshape(-1, num_images):
        subset[random.permutation(num_images)[:size]] = 1
    return torch.from_numpy(counts[0]), torch.from_numpy(counts[1])


def halve(num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two random halves of all images, of equal size."""
    order = np.random.default_rng(SEED + 2).permutation(num_images)
    half = num_images // 2
    return np.sort(order[:half]), np.sort(order[half : 2 * half])


def resample_measure(
    measure: Measure, drawn: Sequence[torch.Tensor], reference: torch.Tensor, counts: torch.Tensor
) -> np.ndarray:
    """Return a measure of each model in each resample, [R, models].

    Args:
        drawn: features of each model's images, [n, D].
        reference: features of the validation images, [n, D].
        counts: [R, n], of the captions.
    """
    return np.stack([measure(x, reference, counts, counts).cpu().numpy() for x in drawn], axis=1)


def summarize(value: float, resampled: np.ndarray, num_images: int) -> Estimate:
    """Return a value with its normal interval by the standard deviation of resamples.

    Percentiles of the resamples would be off: a resample holds fewer different images, so its FID is larger. Deviations
    are scaled by sqrt(n / (n - 1)), because resamples vary less than new samples would.
    """
    deviation = float(np.std(resampled, ddof=1)) * (num_images / (num_images - 1)) ** 0.5
    if deviation == 0:
        return Estimate(value, value, value, 1.0 if value == 0 else 0.0)
    margin = NORMAL_QUANTILE * deviation
    return Estimate(value, value - margin, value + margin, compute_t_tail(value / deviation, MAX_DEGREES))
