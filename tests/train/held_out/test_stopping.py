"""When to stop: the best step, over-fitting, and the ranking of checkpoints, on validations written by hand."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.checkpoint.folder import MANIFEST, list_checkpoints, prune_checkpoints
from sdxl_trainer.train.held_out.best_step import find_best_step, rank_steps
from sdxl_trainer.train.held_out.history import ErrorHistory, read_histories
from sdxl_trainer.train.held_out.inference import (
    bootstrap_means,
    bootstrap_together,
    compute_slope_p_value,
    compute_trend_p_value,
)
from sdxl_trainer.train.held_out.over_fitting import Losses, choose_stale_step, find_over_fitting, has_risen
from sdxl_trainer.train.held_out.sample_errors import (
    WEIGHTS,
    Facts,
    SampleError,
    get_file,
    list_files,
    write_sample_errors,
)
from sdxl_trainer.train.setting_checks import check_keep_best

LOG_SNRS = (-5.0, 1.0, 5.0)
FALLING = Losses(np.arange(1, 101), 1 - 0.002 * np.arange(1, 101) + 0.02 * np.random.default_rng(5).normal(size=100))
FLAT = Losses(FALLING.steps, np.tile([1.0, 1.02, 1.01, 0.99], 25))


def write_validation(
    run: Path,
    step: int,
    levels: dict[str, float],
    num_samples: int = 20,
    seed: int = 0,
    power: float = 1.0,
    missing: Sequence[int] = (),
) -> None:
    """Write a validation whose x0 errors are `levels` of each average, times numbers of each sample and noise level."""
    errors = {}
    for average, level in levels.items():
        errors[average] = [
            SampleError(
                key=f"key-{number}",
                bucket=Size(64, 64),
                source=0,
                turn=turn,
                timestep=100.0 * turn,
                log_snr=log_snr,
                x0_power=power,
                loss=1.0,
                x0_error=level * (1 + number) * np.exp(-log_snr) * (1 + 0.01 * ((number * 7 + turn + step) % 5 - 2)),
                v_error=1.0,
            )
            for number in range(num_samples)
            if number not in missing
            for turn, log_snr in enumerate(LOG_SNRS)
        ]
    facts = Facts(step=step, samples_seen=step, seed=seed, timesteps_per_sample=len(LOG_SNRS), prediction="epsilon")
    write_sample_errors(run, errors, facts)


def build_history(levels: Sequence[float], spread: float = 0.0, num_samples: int = 40, seed: int = 0) -> ErrorHistory:
    """Build a history with these errors on the average, and errors of each sample that differ by `spread`."""
    random = np.random.default_rng(seed)
    errors = np.array(levels)[:, None, None] * random.lognormal(0, 1, (1, num_samples, 8))
    errors = errors * np.exp(spread * random.standard_normal(errors.shape))
    return ErrorHistory(steps=[10 * number for number in range(len(levels))], errors=errors)


def test_intervals_of_many_steps_hold_together() -> None:
    values = np.random.default_rng(0).normal(0.1, 1.0, (200, 1))
    (alone,), (together,) = bootstrap_means(values), bootstrap_together(values)
    assert alone is not None and together.mean == alone.mean
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high), abs=0.01)
    assert together.p_value == pytest.approx(alone.p_value, abs=0.03)
    false, false_alone = 0, 0
    for number in range(100):
        values = np.random.default_rng(number).standard_normal((200, 10))
        false += any(interval.low > 0 or interval.high < 0 for interval in bootstrap_together(values, 400))
        means = bootstrap_means(values, 400)
        false_alone += any(interval is not None and interval.low * interval.high > 0 for interval in means)
    assert false <= 10 and false_alone >= 25  # of 100, where 5 and 40 are expected
    zeros = bootstrap_together(np.column_stack([np.zeros(9), np.ones(9)]))
    assert zeros == [(0, 0, 0, 1), (1, 1, 1, 0)]


def test_trends_by_hand() -> None:
    assert compute_trend_p_value([1, 2, 3, 4, 5]) == pytest.approx(1 / 120)
    assert compute_trend_p_value([2, 1, 3]) == pytest.approx(3 / 6) and compute_trend_p_value(
        [3, 2, 1]
    ) == pytest.approx(1)
    assert compute_trend_p_value([1, 1]) == pytest.approx(1)
    random = np.random.default_rng(0)
    rising = (np.arange(31) * 0.04 + random.standard_normal(31)).tolist()
    exact, normal = compute_trend_p_value(rising[:30]), compute_trend_p_value(rising)
    assert 0.001 < exact < 0.2 and normal == pytest.approx(exact, abs=0.03)  # on both sides of the approximation
    # Slope -0.9, residuals ±0.1…: t = -0.9 / sqrt(0.1 / 2 / 5) = -9, of 2 degrees of freedom.
    values = np.array([4.0, 3.2, 2.4, 1.2])
    slope, residual = np.polyfit(range(4), values, 1, full=True)[:2]
    t = float(slope[0] / np.sqrt(residual[0] / 2 / 5))
    expected = 0.5 * (1 - abs(t) / np.sqrt(2 + t * t))  # Student's t of 2 degrees has this tail
    assert compute_slope_p_value(np.arange(4.0), values) == pytest.approx(expected, rel=1e-3)
    assert compute_slope_p_value(np.arange(4.0), -values) == pytest.approx(1 - expected, rel=1e-3)
    assert compute_slope_p_value(np.arange(3.0), -np.arange(3.0)) == 0


def test_the_best_step_is_told_from_those_that_are_not_measurably_worse() -> None:
    best = find_best_step(build_history([2.0, 1.0, 1.0, 1.0, 1.5], spread=0.3, num_samples=100))
    assert best is not None and best.step in (10, 20, 30) and best.equals == [10, 20, 30]
    assert [excess.is_worse for excess in best.excesses] == [True, False, False, False, True]
    last = best.excesses[-1]
    assert last.step == 40 and 0.3 < last.low < last.mean < last.high < 0.8
    exact = find_best_step(build_history([2.0, 1.0, 1.0, 1.01]))
    assert exact is not None and (exact.step, exact.equals) == (10, [10, 20])  # the first of equals; 1 % is measurable
    assert exact.error == pytest.approx(float(build_history([1.0]).means[0]))
    few = find_best_step(build_history([2.0, 1.0], num_samples=7))
    assert few is not None and few.equals == [0, 10] and few.excesses[0].low > 0.9  # the bootstrap of 7 decides nothing
    diverged = find_best_step(build_history([2.0, 1.0, np.inf]))
    assert diverged is not None and [excess.step for excess in diverged.excesses] == [0, 10]
    assert find_best_step(build_history([np.inf, np.inf])) is None


def test_noise_levels_count_alike() -> None:
    """A plain mean would be that of the noisiest bin."""
    errors = np.ones((2, 10, 8)) * 10.0 ** np.arange(3, -5, -1)
    errors[1, :, 0] *= 0.9
    errors[1, :, 4:] *= 1.5
    assert ErrorHistory(steps=[1, 2], errors=errors).means[1] == pytest.approx((0.9 * 1.5**4) ** (1 / 8) * 10**-0.5)
    np.testing.assert_allclose(ErrorHistory(steps=[1, 2], errors=errors).bin_means[1, [0, 7]], [900, 1.5e-4])


def judge(levels: Sequence[float], losses: Losses = FALLING, spread: float = 0.1) -> bool:
    return find_over_fitting(build_history(levels, spread, num_samples=100), losses) is not None


def test_over_fitting_is_named() -> None:
    turning = [2.0, 1.5, 1.2, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25]
    assert judge(turning)
    excess = find_over_fitting(build_history(turning, 0.1, num_samples=100), FALLING)
    assert excess is not None and excess.step == 80 and excess.mean == pytest.approx(0.25, abs=0.05)
    assert choose_stale_step(build_history(turning)) == 30 and choose_stale_step(build_history(turning[:-1])) is None
    # Each condition on its own:
    assert not judge(turning[:-1])  # 4 validations after the best one
    assert not judge(turning, FLAT) and not judge(turning, Losses(FALLING.steps, FALLING.values[::-1]))
    assert not judge(turning, Losses(FALLING.steps[:19], FALLING.values[:19]))
    assert not judge(turning, spread=3.0)  # within the interval
    assert not judge([*turning[:-1], 1.02])  # it has come down again
    assert not judge([*turning, np.inf])  # the weights have diverged, which is another fault
    assert not judge([2.0, 1.0, 1.25, 1.2, 1.15, 1.1, 1.05])  # it comes down, as after a jump of the learning rate


@pytest.mark.parametrize(("correlation", "most"), [(0.0, 4), (0.5, 30)])
def test_runs_that_are_merely_noisy_raise_no_alarm(correlation: float, most: int) -> None:
    """Of 200 runs whose every difference is measurable and whose training loss falls, judged at 40 validations."""
    random, false, found = np.random.default_rng(1), 0, 0
    for _ in range(200):
        noise = [random.standard_normal()]
        for draw in random.standard_normal(39):
            noise.append(correlation * noise[-1] + np.sqrt(1 - correlation**2) * draw)
        errors = 100 * np.exp(-np.arange(40) / 2) + np.array(noise)
        false += any(has_risen(errors[:number].tolist()) for number in range(6, 41))
        rising = errors + np.maximum(0, np.arange(40) - 15)  # by one standard deviation at each validation
        found += any(has_risen(rising[:number].tolist()) for number in range(6, 41))
    assert false <= most and found >= 195


def test_only_validations_of_the_same_set_are_compared(tmp_path: Path) -> None:
    write_validation(tmp_path, 10, {WEIGHTS: 9.0}, seed=1)
    write_validation(tmp_path, 20, {WEIGHTS: 9.0}, power=1.1)
    write_validation(tmp_path, 30, {WEIGHTS: 9.0}, num_samples=17)
    write_validation(tmp_path, 40, {WEIGHTS: 2.0}, missing=[3])  # one could not be read
    write_validation(tmp_path, 50, {WEIGHTS: 3.0, "0.9": 1.0})
    get_file(tmp_path, 45).write_bytes(b"damaged")
    histories = read_histories(list_files(tmp_path))
    assert histories.others == [10, 20, 30] and list(histories.damaged) == [45]
    assert {name: history.steps for name, history in histories.by_average.items()} == {WEIGHTS: [40, 50], "0.9": [50]}
    weights = histories.by_average[WEIGHTS]
    assert weights.errors.shape == (2, 19, 8) and (~np.isnan(weights.errors)).sum() == 2 * 19 * len(LOG_SNRS)
    assert weights.means[1] / weights.means[0] == pytest.approx(1.5, rel=0.01)
    assert read_histories({}).by_average == {}


def test_steps_are_ranked_by_what_their_checkpoint_holds(tmp_path: Path) -> None:
    levels = {10: (5.0, 1.0), 20: (2.0, 3.0), 30: (4.0, 4.5), 40: (np.nan, np.nan), 60: (9.0, np.nan)}
    for step, (weights, average) in levels.items():
        write_validation(tmp_path, step, {WEIGHTS: weights, "0.9": average})
    assert rank_steps(tmp_path, [60, 50, 40, 30, 20, 10]).steps == [10, 20, 30, 60]
    shutil.copy(get_file(tmp_path, 20), get_file(tmp_path, 25))
    assert rank_steps(tmp_path, [30, 25, 20]).steps == [20, 25, 30]  # the earlier one of equals
    # After a change of the validation set, earlier steps come after those of the new one.
    write_validation(tmp_path, 70, {WEIGHTS: 50.0}, seed=1)
    get_file(tmp_path, 60).write_bytes(b"damaged")
    ranking = rank_steps(tmp_path, [10, 20, 60, 70])
    assert ranking.steps == [70, 10, 20] and list(ranking.damaged) == [60]


def make_checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / MANIFEST).write_text('{"files": {"trainer_state.json": {"bytes": 2, "sha256": ""}}}')


def test_the_best_checkpoints_are_kept_besides_the_last(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def prune(*settings: int) -> list[int]:
        prune_checkpoints(folder, *settings)
        return [int(path.name[5:]) for path in list_checkpoints(folder)]

    for step, level in {10: 5.0, 20: 1.0, 30: 3.0, 40: 2.0, 50: np.nan, 70: 4.0, 80: 6.0}.items():
        write_validation(tmp_path, step, {WEIGHTS: level})
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 60)  # saved on request or in an emergency, and not validated
    assert prune(9, 0, 1) == [10, 20, 30, 40, 50, 60, 70, 80]
    shutil.rmtree(folder / "step-00000040")  # by hand: the next best takes its place
    file = get_file(tmp_path, 30)
    content = file.read_bytes()
    file.write_bytes(b"damaged")
    assert prune(3, 50, 2) == [20, 30, 50, 60, 70, 80]  # that of step 30 may be among the best once it can be read
    file.write_bytes(content)
    (folder / "step-00000020" / "trainer_state.json").unlink()
    assert prune(1, 0, 1) == [20, 30, 80]  # one that is not whole does not count as kept
    write_validation(tmp_path, 90, {WEIGHTS: 0.5})
    make_checkpoint(tmp_path, 90)
    assert prune(1, 0, 1) == [90] and prune(1, 0) == [90]


@pytest.mark.parametrize(
    ("validation", "every_steps", "rule"),
    [
        ({}, 100, "needs a validation"),
        ({"share": 0.1}, 100, "validation.every_steps is 0"),
        ({"share": 0.1, "every_steps": 100}, 0, "checkpoint.every_steps is 0"),
        ({"share": 0.1, "every_steps": 150}, 100, "seldom fall on one step"),
        ({"share": 0.1, "every_steps": 50}, 100, None),
        ({"metadata": ["val.json"], "every_steps": 300}, 100, None),
    ],
)
def test_a_ranking_without_validations_is_refused(validation: dict, every_steps: int, rule: str | None) -> None:
    config = Config.model_validate(
        {"checkpoint": {"keep_best": 2, "every_steps": every_steps}, "validation": validation}
    )
    problems = list(check_keep_best(config))
    assert [problem.key for problem in problems] == ["checkpoint.keep_best"] * (rule is not None)
    assert not problems or (rule in problems[0].rule and "set " in problems[0].cure)
    config.checkpoint.keep_best = 0
    assert list(check_keep_best(config)) == []
