"""Statistics against numbers computed by hand and from printed tables."""

import numpy as np
import pytest

from sdxl_trainer.train.evidence.comparison import BETTER, UNDECIDED, WORSE, judge_setting
from sdxl_trainer.train.held_out.inference import (
    Uncertainty,
    Variance,
    adjust_by_holm,
    bootstrap_means,
    combine_degrees,
    compute_t_interval,
    compute_t_tail,
    count_needed,
)


@pytest.mark.parametrize(
    ("t", "degrees", "tail"),
    [(1, 1, 0.5), (4.302653, 2, 0.05), (2.776445, 4, 0.05), (2.228139, 10, 0.05), (1.959966, 1e6, 0.05)]
    + [(0, 3, 1.0), (-3.169273, 10, 0.01), (6, 1e9, 1.973e-9), (1e6, 2, 1e-12)],
)
def test_tails_of_students_t(t: float, degrees: float, tail: float) -> None:
    assert compute_t_tail(t, degrees) == pytest.approx(tail, rel=1e-3)
    if tail == 0.05:
        assert Uncertainty([Variance(1.0, degrees)]).compute_quantile() == pytest.approx(t, rel=1e-5)


def test_welchs_interval_by_hand() -> None:
    first, second = np.array([1.0, 2, 3]), np.array([2.0, 4, 6])
    parts = [Variance(values.var(ddof=1) / 3, 2) for values in (first, second)]  # 1/3 and 4/3
    assert combine_degrees(parts) == pytest.approx((5 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2))  # 2.941
    mean, low, high, p_value = compute_t_interval(2.0, Uncertainty(parts))
    assert mean == 2 and (low + high) / 2 == pytest.approx(2)
    assert high - mean == pytest.approx(3.2187 * np.sqrt(5 / 3), rel=1e-3)  # between t of 2 and of 3 degrees
    assert 3.182 < (high - mean) / np.sqrt(5 / 3) < 4.303 and 0.2 < p_value < 0.24
    # With as much variance between samples, the tail is the mean of both. At t = 3.169273 Student's with 10 degrees of
    # freedom has 0.01, and with 2 it has 1 - t / sqrt(2 + t²) = 0.086791.
    both = Uncertainty([Variance(2.0, 2)], Variance(2.0, 10))
    assert both.deviation == 2 and both.compute_tail(3.169273) == pytest.approx((0.01 + 0.086791) / 2, rel=1e-4)
    interval = compute_t_interval(1.0, both)
    assert both.compute_tail((interval.high - 1) / 2) == pytest.approx(0.05) and interval.low == 2 - interval.high
    assert interval.p_value == both.compute_tail(0.5)
    assert compute_t_interval(0.0, Uncertainty([Variance(0.0, 2)])) == (0, 0, 0, 1)


def test_holms_correction_by_hand() -> None:
    assert adjust_by_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_by_holm([0.9, 0.8]) == [1, 1] and adjust_by_holm([]) == []


def test_the_bootstrap_agrees_with_the_normal_theory() -> None:
    values = np.random.default_rng(0).normal(0.3, 2.0, (400, 3))
    values[:, 1] -= 5
    values[100:, 2] = np.nan
    intervals = bootstrap_means(values)
    for column, interval in enumerate(intervals):
        known = values[np.isfinite(values[:, column]), column]
        margin = 1.96 * known.std(ddof=1) / np.sqrt(len(known))
        assert interval is not None and interval.mean == pytest.approx(known.mean())
        assert interval.low == pytest.approx(known.mean() - margin, abs=0.1 * margin)
        assert interval.high == pytest.approx(known.mean() + margin, abs=0.1 * margin)
    assert intervals[1] is not None and intervals[1].p_value < 0.001
    assert bootstrap_means(np.array([[1.0, np.nan], [2.0, 3.0]]))[1] is None
    zeros = bootstrap_means(np.zeros((5, 1)))[0]
    assert zeros is not None and zeros == (0, 0, 0, 1)


def test_the_number_of_seeds_that_would_decide() -> None:
    def measure(count: int) -> Uncertainty:
        return Uncertainty([Variance(1 / count, count - 1)] * 2)

    # 2n - 2 degrees: with 8 seeds 2.145·sqrt(2/8) = 1.07 > 1, with 9 seeds 2.120·sqrt(2/9) = 0.999.
    assert count_needed(1.0, measure, 4, 100) == 9
    assert count_needed(0.01, measure, 4, 100) is None and count_needed(9.0, measure, 4, 100) == 4


def draw_runs(random: np.random.Generator, num_runs: int, effect: float = 0.0) -> np.ndarray:
    """Mean errors [runs, 60] of runs that differ in their seeds, by 1 %, and in each sample, by 2 %."""
    samples = random.lognormal(-1, 0.5, 60)
    seeds = 1 + effect + 0.01 * random.standard_normal((num_runs, 1))
    return samples * seeds * (1 + 0.02 * random.standard_normal((num_runs, 60)))


def judge(baseline: np.ndarray, arm: np.ndarray, is_paired: bool = False) -> str:
    scores = [{str(number): mean for number, mean in enumerate(runs.mean(1).tolist())} for runs in (baseline, arm)]
    return judge_setting(scores[0], scores[1], arm.mean(0) - baseline.mean(0), is_paired).verdict


@pytest.mark.parametrize("is_paired", [False, True])
def test_seeds_alone_are_rarely_taken_for_an_effect(is_paired: bool) -> None:
    """Of 200 comparisons of 3 runs with 3 of the same distribution at most 5 % are wrong, by the interval of 200."""
    random = np.random.default_rng(5)
    wrong = 0
    for _ in range(200):
        runs = draw_runs(random, 6)
        wrong += judge(runs[:3], runs[3:], is_paired) != UNDECIDED
    assert wrong <= 16  # 5 % of 200 are 10 ± 6.2


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_the_level_holds_whatever_share_of_the_variance_is_between_seeds(share: float) -> None:
    """Estimates with the variance 1, measured with 2 degrees of freedom between seeds and 99 between samples."""
    random, found = np.random.default_rng(8), []
    for _ in range(400):
        of_seeds, of_samples = share * random.chisquare(2) / 2, (1 - share) * random.chisquare(99) / 99
        uncertainty = Uncertainty([Variance(of_seeds, 2)], Variance(of_samples, 99))
        deviation, estimate = uncertainty.deviation, random.standard_normal()
        found.append([uncertainty.compute_tail((estimate + effect) / deviation) < 0.05 for effect in (0, 3.2)])
    false, right = np.sum(found, axis=0)
    assert 2 <= false <= 29  # 5 % of 400 are 20 ± 8.7
    if share <= 0.05:  # between many samples an effect of 3.2 deviations is found
        assert right >= 320


def test_random_splits_of_twelve_runs_give_few_false_verdicts() -> None:
    random = np.random.default_rng(6)
    runs = draw_runs(random, 12)
    orders = [random.permutation(12) for _ in range(200)]
    wrong = sum(judge(runs[order[:3]], runs[order[3:6]]) != UNDECIDED for order in orders)
    assert wrong <= 16


def test_an_effect_is_found() -> None:
    random = np.random.default_rng(7)
    verdicts = []
    for _ in range(20):
        baseline, spoilt = draw_runs(random, 3), 0
        samples = baseline.mean(0)
        spoilt = samples * (1.08 + 0.01 * random.standard_normal((3, 1)))
        verdicts.append((judge(baseline, spoilt), judge(spoilt, baseline)))
    assert verdicts.count((WORSE, BETTER)) >= 19
