"""The rule that names over-fitting: the validation error rises beyond its interval while the training loss falls."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sdxl_trainer.train.held_out.best_step import Excess, find_best_step, find_lowest
from sdxl_trainer.train.held_out.history import ErrorHistory
from sdxl_trainer.train.held_out.inference import compute_slope_p_value, compute_trend_p_value

MIN_AFTER = 5  # validations after the best one
NUM_LAST = 3  # validations that are all measurably worse than the best one
MIN_RISE = 6.0  # of their mean above the best error, in standard deviations from one validation to the next
MAX_TREND_P = 0.01  # that the validations after the best one rise by chance
MAX_SLOPE_P = 0.05  # that the training loss falls by chance
MIN_LOSSES = 20  # steps of training after the best one


class Losses(NamedTuple):
    """Training losses of a run: [N] steps, and [N] finite values."""

    steps: np.ndarray
    values: np.ndarray


def choose_stale_step(history: ErrorHistory) -> int | None:
    """Return the best step if at least MIN_AFTER validations follow it, or None."""
    best = find_lowest(history.means)
    return None if best is None or len(history.steps) - 1 - best < MIN_AFTER else history.steps[best]


def find_over_fitting(history: ErrorHistory, losses: Losses) -> Excess | None:
    """Return how far the last validation is above the best one if the weights over-fit, or None.

    All of these hold: at least MIN_AFTER validations follow the best one; each of the last NUM_LAST is measurably worse
    (`find_best_step`); `has_risen`; and the training loss falls from the best step on, by linear regression.

    Args:
        history: of the weights.
        losses: those after the best step.
    """
    means, (steps, values) = history.means, losses
    if not np.isfinite(means[-1]) or not has_risen(np.log(means[np.isfinite(means)]).tolist()):
        return None
    if len(steps) < MIN_LOSSES or compute_slope_p_value(steps.astype(float), values) >= MAX_SLOPE_P:
        return None
    best = find_best_step(history)
    if best is None or not all(excess.is_worse for excess in best.excesses[-NUM_LAST:]):
        return None
    return best.excesses[-1]


def has_risen(means: Sequence[float]) -> bool:
    """Return whether errors have risen since the lowest one, beyond their variation and not by chance.

    The mean of the last NUM_LAST is more than MIN_RISE standard deviations above the lowest. The standard deviation is
    that from one validation to the next, by the median of second differences, which neither a trend nor the first
    descent widens. And the later a validation after the best one, the higher its error (Mann-Kendall test).
    """
    best = find_lowest(np.array(means))
    if best is None or len(means) - 1 - best < MIN_AFTER:
        return False
    rise = float(np.mean(means[-NUM_LAST:])) - means[best]
    second_differences = np.abs(np.diff(means, 2))
    # 0.6745: the median of a normal distribution's absolute value; 6 = 1 + 4 + 1: the variance of such a difference.
    deviation = float(np.median(second_differences)) / 0.6745 / np.sqrt(6)
    return rise > MIN_RISE * deviation and compute_trend_p_value(means[best + 1 :]) < MAX_TREND_P
