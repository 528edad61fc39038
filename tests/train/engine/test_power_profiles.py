"""Power-function averages: the update keeps what the profile says, and least squares finds other lengths."""

import math

import numpy as np
import pytest

from sdxl_trainer.train.engine.power_profiles import (
    Fit,
    Profile,
    compute_gamma,
    compute_power_decay,
    fit_profile,
    multiply_profiles,
)

STEPS, EVERY, LENGTHS = 240, 12, (0.05, 0.1)


def keep_average(weights: np.ndarray, length: float) -> np.ndarray:
    """The average after each update, [steps, values], by the recursion that training uses."""
    gamma, average, kept = compute_gamma(length), np.full(weights.shape[1], 1e9), []
    for number, values in enumerate(weights, 1):
        decay = compute_power_decay(number, gamma)
        average = decay * average + (1 - decay) * values
        kept.append(average)
    return np.stack(kept)


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    """Weights after each update, [steps, values]: a drift with noise around it, far from 0."""
    random = np.random.default_rng(0)
    return 3 + random.normal(size=(STEPS, 50)).cumsum(0) / 10 + np.linspace(0, 1, STEPS)[:, None]


def list_known(steps: int = STEPS, every: int = EVERY, lengths: tuple[float, ...] = LENGTHS) -> list[Profile]:
    return [Profile(updates, length) for length in lengths for updates in range(every, steps + 1, every)]


def sum_up(weights: np.ndarray, known: list[Profile], fit: Fit) -> np.ndarray:
    kept = {length: keep_average(weights, length) for length in {profile.length for profile in known}}
    return sum(x * kept[p.length][p.updates - 1] for x, p in zip(fit.coefficients, known, strict=True))


def test_gamma_of_a_length() -> None:
    assert compute_gamma(0.05) == pytest.approx(16.97, abs=0.01)  # the paper's figures
    assert compute_gamma(0.1) == pytest.approx(6.94, abs=0.01)
    assert compute_gamma(1 / math.sqrt(12)) == pytest.approx(0, abs=1e-6)
    times = (np.arange(100_000) + 0.5) / 100_000
    for length in (0.01, 0.13, 0.28):
        gamma = compute_gamma(length)
        shares = (gamma + 1) * times**gamma / len(times)
        mean = (shares * times).sum()
        assert math.sqrt((shares * (times - mean) ** 2).sum()) == pytest.approx(length, rel=1e-4)


def test_an_update_keeps_the_integral_of_the_profile(weights: np.ndarray) -> None:
    """Also after few updates, and nothing of what the average was before the first."""
    for length in (0.05, 0.28):
        power = compute_gamma(length) + 1
        for updates in (1, 2, 7, STEPS):
            edges = (np.arange(updates + 1) / updates) ** power
            expected = np.diff(edges) @ weights[:updates]
            np.testing.assert_allclose(keep_average(weights, length)[updates - 1], expected, rtol=1e-12)


def test_products_of_profiles() -> None:
    times = (np.arange(400_000) + 0.5) / 400_000 * 30
    first, second = [Profile(10, 0.05), Profile(30, 0.2)], [Profile(10, 0.1), Profile(20, 0.05), Profile(30, 0.2)]

    def draw(profile: Profile) -> np.ndarray:
        t, gamma = profile.updates, profile.gamma
        return np.where(times <= t, (gamma + 1) * times**gamma / float(t) ** (gamma + 1), 0)

    expected = [[(draw(a) * draw(b)).mean() * 30 for b in second] for a in first]
    np.testing.assert_allclose(multiply_profiles(first, second), expected, rtol=1e-3)


def test_a_kept_length_is_rebuilt_exactly(weights: np.ndarray) -> None:
    known = list_known()
    for length in LENGTHS:
        fit = fit_profile(known, Profile(STEPS, length))
        rebuilt, kept = sum_up(weights, known, fit), keep_average(weights, length)[-1]
        assert fit.residual < 1e-6
        np.testing.assert_allclose(rebuilt, kept, rtol=1e-6)
        expected = [float(profile == Profile(STEPS, length)) for profile in known]
        np.testing.assert_allclose(fit.coefficients, expected, atol=1e-6)


@pytest.mark.parametrize("length", [0.03, 0.07, 0.13, 0.2])
def test_another_length_is_rebuilt_within_the_error_of_its_profile(weights: np.ndarray, length: float) -> None:
    known, wanted = list_known(), Profile(STEPS, length)
    fit = fit_profile(known, wanted)
    assert fit.coefficients.sum() == pytest.approx(1, abs=1e-9) and 0 < fit.residual < 0.06
    error = sum_up(weights, known, fit) - keep_average(weights, length)[-1]
    # The difference of the profiles integrates to 0, so only the change of the weights counts (Cauchy-Schwarz).
    norm = fit.residual * math.sqrt(float(multiply_profiles([wanted], [wanted])[0, 0]))
    change = np.sqrt(np.square(weights - weights[-1]).sum(0))
    assert (np.abs(error) <= norm * change).all() and np.abs(error).max() > 1e-6
    # And no other length is as near.
    others = [keep_average(weights, other)[-1] for other in (length * 0.9, length * 1.1)]
    assert all(np.abs(other - keep_average(weights, length)[-1]).max() > 3 * np.abs(error).max() for other in others)


def test_more_snapshots_and_lengths_come_nearer() -> None:
    wanted = Profile(STEPS, 0.15)
    few, many = (fit_profile(list_known(every=every), wanted).residual for every in (60, 12))
    one = fit_profile(list_known(lengths=(0.05,)), wanted).residual
    assert few > 5 * many and one > 5 * many
    # Twenty snapshots of two lengths: the range that the settings' text names.
    edges = [fit_profile(list_known(), Profile(STEPS, length)).residual for length in (0.02, 0.25)]
    assert max(edges) < 0.1 < min(fit_profile(list_known(), Profile(STEPS, end)).residual for end in (0.015, 0.28))


def test_no_other_sum_that_adds_up_to_1_is_nearer() -> None:
    known, wanted = list_known(every=60), Profile(STEPS, 0.15)
    products, with_wanted = multiply_profiles(known, known), multiply_profiles(known, [wanted])[:, 0]
    square = multiply_profiles([wanted], [wanted])[0, 0]

    def measure(coefficients: np.ndarray) -> float:
        return math.sqrt(1 + (coefficients @ products @ coefficients - 2 * with_wanted @ coefficients) / square)

    fit = fit_profile(known, wanted)
    assert fit.residual == pytest.approx(measure(fit.coefficients), rel=1e-6)
    divided = np.linalg.solve(products, with_wanted)
    assert fit.residual < measure(divided / divided.sum())
    for change in np.random.default_rng(0).normal(size=(20, len(known))) / 100:
        assert fit.residual < measure(fit.coefficients + change - change.mean())


def test_a_thousand_snapshots_are_still_solved() -> None:
    known = list_known(1_000_000, 2000)
    fit = fit_profile(known, Profile(1_000_000, 0.13))
    assert fit.residual < 1e-3 and fit.rounding < 1 and fit.coefficients.sum() == pytest.approx(1, abs=1e-9)
