"""Statistics of comparisons, as pure functions: bootstrap, Holm's correction, Student's t, trends, and sizes of
experiments.

Symbols: N samples, K groups of errors, n runs of an arm.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 4000
RESAMPLES_AT_ONCE = 100  # their counts of samples are held together, [100, N]
BOOTSTRAP_SEED = 20231
MIN_SAMPLES = 8  # below, the bootstrap decides nothing
MAX_EXACT = 30  # values of a trend whose p-value is counted
MAX_DEGREES = 1e6  # of freedom; Student's t is normal by then


class Interval(NamedTuple):
    """An estimate with its interval at CONFIDENCE, and the two-sided p-value of the hypothesis that it is 0."""

    mean: float
    low: float
    high: float
    p_value: float


class Variance(NamedTuple):
    """A part of the variance of an estimate, and the degrees of freedom that it was measured with."""

    value: float
    degrees: float


def combine_degrees(parts: Sequence[Variance]) -> float:
    """Return the degrees of freedom of a sum of variances (Satterthwaite 1946, and Welch 1947 for two)."""
    total = sum(part.value for part in parts)
    spread = sum(part.value**2 / part.degrees for part in parts)
    return total**2 / spread if spread else MAX_DEGREES


@dataclass(frozen=True)
class Uncertainty:
    """The variance of an estimate: parts between few runs, and a part between many samples.

    The tail of each is Student's, with its own degrees of freedom; that of the estimate is their mean, weighted by the
    variances, as Cochran & Cox (1957) weight quantiles. The degrees of freedom of the sum (Satterthwaite) would be as
    many as the samples' whenever few runs happen to lie close together, and those of the runs alone would make
    intervals twice as wide as needed where samples vary most.
    """

    between_seeds: Sequence[Variance]
    between_samples: Variance = Variance(0.0, 1)

    @property
    def deviation(self) -> float:
        """The standard deviation of the estimate."""
        return math.sqrt(sum(part.value for part in self.between_seeds) + self.between_samples.value)

    def compute_tail(self, t: float) -> float:
        """Return the probability that the estimate is further from its expectation than `t` deviations."""
        of_seeds, (of_samples, degrees) = sum(part.value for part in self.between_seeds), self.between_samples
        tail = 0.0
        if of_seeds:
            tail += of_seeds * compute_t_tail(t, combine_degrees(self.between_seeds))
        if of_samples:
            tail += of_samples * compute_t_tail(t, degrees)
        return tail / (of_seeds + of_samples)

    def compute_quantile(self) -> float:
        """Return the number of deviations that an estimate exceeds, on either side, with 1 - CONFIDENCE."""
        low, high = 0.0, 1e3
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.compute_tail(middle) > 1 - CONFIDENCE else (low, middle)
        return high


def bootstrap_means(values: np.ndarray, num_resamples: int = NUM_RESAMPLES) -> list[Interval | None]:
    """Return the mean of each column with its interval by the bootstrap over rows (Efron & Tibshirani 1993).

    All columns share the resamples. Deviations are scaled by sqrt(N / (N - 1)), because resamples of N rows vary less
    than new samples would; percentiles of the deviations give the interval.

    Args:
        values: [N, K]; NaN where a sample has no value.

    Returns:
        For each column an interval, or None for a column with fewer than two values.
    """
    is_known = np.isfinite(values)
    filled, parts = np.where(is_known, values, 0.0), []
    for counts in _resample_rows(len(values), num_resamples):
        with np.errstate(invalid="ignore"):  # a resample without any value of a column has no mean
            parts.append((counts @ filled) / (counts @ is_known))
    resampled = np.concatenate(parts)
    intervals: list[Interval | None] = []
    for column in range(values.shape[1]):
        known = values[is_known[:, column], column]
        means = resampled[np.isfinite(resampled[:, column]), column]
        intervals.append(_summarize(float(known.mean()), means, len(known)) if len(known) > 1 else None)
    return intervals


def _resample_rows(num_rows: int, num_resamples: int) -> Iterator[np.ndarray]:
    """Yield how often each resample contains each row, [up to RESAMPLES_AT_ONCE, N]. Equal for equal arguments."""
    random = np.random.default_rng(BOOTSTRAP_SEED)
    for start in range(0, num_resamples, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, num_resamples - start)
        yield random.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size) if num_rows else np.zeros((size, 0))


def bootstrap_together(values: np.ndarray, num_resamples: int = NUM_RESAMPLES) -> list[Interval]:
    """Return the mean of each column with an interval; all intervals hold together at CONFIDENCE.

    Each interval is as many standard errors wide as the largest deviation among all columns of a resample is at
    CONFIDENCE (the maximum of t: Westfall & Young 1993, Romano & Wolf 2005). p-values are corrected alike.

    Args:
        values: [N, K] finite, N of at least 2.
    """
    means, num_rows = values.mean(axis=0), len(values)
    resampled = np.concatenate([counts @ values / num_rows for counts in _resample_rows(num_rows, num_resamples)])
    deviations = np.abs(resampled - means) * math.sqrt(num_rows / (num_rows - 1))  # [resamples, K]
    errors = np.sqrt(np.square(deviations).mean(axis=0))
    scales = np.where(errors > 0, errors, 1.0)
    largest = (deviations / scales).max(axis=1)
    margins = float(np.quantile(largest, CONFIDENCE)) * errors
    shares = (largest[:, None] >= np.abs(means) / scales).mean(axis=0)
    p_values = np.where(errors > 0, np.maximum(shares, 1 / num_resamples), np.where(means == 0, 1.0, 0.0))
    columns = (means, means - margins, means + margins, p_values)
    return [Interval(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _summarize(mean: float, resampled: np.ndarray, num_values: int) -> Interval:
    scaled = mean + (resampled - mean) * math.sqrt(num_values / (num_values - 1))
    low, high = np.quantile(scaled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    tail = min(np.mean(scaled <= 0), np.mean(scaled >= 0))
    # A p-value below that of a single resample cannot be measured.
    p_value = min(1.0, max(2 * float(tail), 2 / len(scaled))) if scaled.any() else 1.0
    return Interval(mean, float(low), float(high), p_value)


def adjust_by_holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that stay valid when all hypotheses are tested at once (Holm 1979), in the same order."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(order), 0.0
    for place, number in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def compute_t_tail(t: float, degrees: float) -> float:
    """Return the probability that Student's t with `degrees` of freedom is further from 0 than `t`.

    With t = sqrt(degrees)·tan(a) the density is proportional to cos(a)^(degrees - 1), which is integrated by Simpson's
    rule over the tail, so that small probabilities keep their precision.
    """
    degrees = min(degrees, MAX_DEGREES)
    edge = math.atan(abs(t) / math.sqrt(degrees))
    log_norm = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(math.pi) / 2
    # Beyond 60 deviations of a nearly normal density nothing is left; a grid up to pi/2 would miss its peak.
    end = min(math.pi / 2, edge + 60 / math.sqrt(degrees))
    angles = np.linspace(edge, end, 4001)
    density = np.cos(angles).clip(min=0) ** (degrees - 1)
    weights = np.ones(4001)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    integral = float(density @ weights) * (end - edge) / 4000 / 3
    return min(1.0, 2 * math.exp(log_norm) * integral)


def compute_t_interval(mean: float, uncertainty: Uncertainty) -> Interval:
    """Return the interval of an estimate."""
    deviation = uncertainty.deviation
    if not deviation:
        return Interval(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    margin = uncertainty.compute_quantile() * deviation
    return Interval(mean, mean - margin, mean + margin, uncertainty.compute_tail(mean / deviation))


def count_needed(effect: float, uncertainty_of: Callable[[int], Uncertainty], start: int, most: int) -> int | None:
    """Return the smallest count from `start` on with which an effect of this size is outside its interval.

    Args:
        uncertainty_of: count → uncertainty of the effect.
        most: None is returned if more would be needed.
    """

    def decides(count: int) -> bool:
        uncertainty = uncertainty_of(count)
        deviation = uncertainty.deviation
        return not deviation or uncertainty.compute_tail(effect / deviation) < 1 - CONFIDENCE

    if not decides(most):
        return None
    low, high = start - 1, most  # more never hurts
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high


def compute_trend_p_value(values: Sequence[float]) -> float:
    """Return the probability that values in random order rise as steadily as these (Mann 1945, Kendall 1938).

    Equal values count as falling. It is exact up to MAX_EXACT values, and from there on by the normal distribution.
    """
    ordered, count = np.array(values), len(values)
    num_falling = sum(int((ordered[place + 1 :] <= value).sum()) for place, value in enumerate(ordered))  # pairs
    if count > MAX_EXACT:
        num_pairs = count * (count - 1) / 2
        deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)  # of rising minus falling pairs
        return math.erfc((num_pairs - 2 * num_falling - 1) / deviation / math.sqrt(2)) / 2
    probabilities = np.ones(1)  # of each number of falling pairs
    for number in range(2, count + 1):
        probabilities = np.convolve(probabilities, np.full(number, 1 / number))
    return min(1.0, float(probabilities[: num_falling + 1].sum()))


def compute_slope_p_value(places: np.ndarray, values: np.ndarray) -> float:
    """Return the probability that values without a trend fall as much along `places`, by linear regression.

    Args:
        places, values: [N] each, N of at least 3.
    """
    centred = places - places.mean()
    slope = centred @ values / (centred @ centred)
    residuals = values - values.mean() - slope * centred
    degrees = len(values) - 2
    deviation = math.sqrt(residuals @ residuals / degrees / (centred @ centred))
    if not deviation:
        return 0.0 if slope < 0 else 1.0
    tail = compute_t_tail(slope / deviation, degrees) / 2
    return tail if slope < 0 else 1 - tail
