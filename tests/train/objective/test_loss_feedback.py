"""Learned loss weighting and loss-adaptive timesteps: hand-computed numbers, and one result for any number of ranks."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.data.order.plan import Plan
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.objective.adaptive_timesteps import add_losses, compute_probabilities
from sdxl_trainer.train.objective.diffusion import LatentStatistics
from sdxl_trainer.train.objective.learned_weighting import (
    FREQUENCIES,
    PHASES,
    LearnedWeighting,
    compute_features,
    compute_log_losses,
    update_weighting,
)
from sdxl_trainer.train.objective.loss_feedback import (
    FeedbackState,
    LossFeedback,
    MicroLosses,
    StepLosses,
    build_feedback_state,
    build_log_sigmas,
)
from sdxl_trainer.train.objective.objective import Objective, SampleKeys
from sdxl_trainer.train.run.loop import copy_state_at

STATISTICS = LatentStatistics(mean=torch.zeros(1), scale=torch.ones(1))
PIXELS = 1024 * 1024
FULL = [[1.0] * 10, [3.0] * 10]  # roots of mean squares 1 and 3
PROBABILITIES = [0.99 * 0.25 + 0.005, 0.99 * 0.75 + 0.005]
CPU = torch.device("cpu")


def build(state: FeedbackState | None = None, global_batch_size: int = 4, **settings) -> Objective:
    config = ObjectiveConfig(**settings)
    return Objective(config, STATISTICS, global_batch_size, feedback_state=state)


def get_feedback(objective: Objective) -> LossFeedback:
    assert objective.feedback is not None
    return objective.feedback


@pytest.mark.parametrize(
    ("settings", "timesteps", "sigmas"),
    [
        # The first and last sigma of SDXL.
        ({}, [0, 999], [0.029167, 14.614647]),
        ({"prediction": "v", "zero_terminal_snr": True}, [0, 999], [0.029167, 4096]),
        ({"prediction": "flow"}, [0, 200, 500, 750, 1000], [1 / 4096, 0.25, 1, 3, 4096]),
    ],
)
def test_sigma_is_finite_at_every_timestep(settings, timesteps, sigmas) -> None:
    log_sigmas = build_log_sigmas(ObjectiveConfig(**settings))(np.array(timesteps))
    np.testing.assert_allclose(np.exp(log_sigmas), sigmas, rtol=2e-5)
    assert np.isfinite(compute_features(log_sigmas)).all()


def test_the_features_are_those_of_the_paper() -> None:
    features = compute_features(np.array([0.0, math.log(14.6)]))
    assert features.shape == (2, 128)
    expected = math.sqrt(2 / 128) * math.cos(math.log(14.6) / 4 * FREQUENCIES[5] + PHASES[5])
    assert features[1, 5] == pytest.approx(expected, rel=1e-12)
    # Normal frequencies times 2π and uniform phases, which no release may change: checkpoints hold weights for them.
    assert abs(FREQUENCIES.mean()) < 1.7 and FREQUENCIES.std() == pytest.approx(2 * math.pi, rel=0.15)
    assert 0 <= PHASES.min() < 0.3 and 6 < PHASES.max() < 2 * math.pi
    assert FREQUENCIES[:2].tolist() == pytest.approx([1.2994276421956388, 3.3672616837216034], rel=1e-12)
    assert PHASES[:2].tolist() == pytest.approx([0.43907817637640745, 4.019157380326487], rel=1e-12)


def test_updates_are_those_of_autograd_and_adam() -> None:
    """Of mean(factor·(loss/exp(u) + u)), with samples that do not count."""
    random, weighting = np.random.default_rng(0), LearnedWeighting()
    weights = torch.zeros(128, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weights], lr=0.05, betas=(0.9, 0.99))
    for _ in range(5):
        log_sigmas, losses = random.normal(size=6), random.exponential(size=6)
        factors = np.array([1, 0.5, 2, 1, 0, 1.0])
        losses[4] = 1e9  # of a bad sample
        u = torch.from_numpy(compute_features(log_sigmas)) @ weights
        adam.zero_grad()
        terms = torch.from_numpy(factors) * (torch.from_numpy(losses) / u.exp() + u)
        terms[:5].sum().div(6).backward()
        adam.step()
        losses[5] = np.nan
        weighting = update_weighting(weighting, log_sigmas, losses, factors, 0.05)
    np.testing.assert_allclose(weighting.weights, weights.detach().numpy(), rtol=1e-9)
    assert weighting.num_updates == 5
    assert update_weighting(weighting, np.zeros(2), np.array([np.inf, 1]), np.array([1.0, 0.0]), 0.05) == weighting


def test_the_first_update_is_that_computed_by_hand() -> None:
    """Loss 3 at u = 0: du = 1 - 3, and Adam's first step is the learning rate in the gradient's direction."""
    weighting = update_weighting(LearnedWeighting(), np.zeros(1), np.array([3.0]), np.ones(1), 0.01)
    features = compute_features(np.zeros(1))[0]
    np.testing.assert_allclose(weighting.weights, 0.01 * np.sign(features), rtol=1e-4)
    assert compute_log_losses(weighting, np.zeros(1))[0] == pytest.approx(0.01 * np.abs(features).sum(), rel=1e-4)
    assert weighting.first_moments == pytest.approx(list(0.1 * -2 * features))
    assert weighting.second_moments == pytest.approx(list(0.01 * 4 * features**2))


def test_weights_learn_the_inverse_of_the_mean_loss() -> None:
    random, weighting = np.random.default_rng(0), LearnedWeighting()
    for _ in range(600):
        log_sigmas = random.uniform(-3.5, 2.6, 64)
        losses = np.exp(-0.5 * log_sigmas) * random.exponential(size=64)
        weighting = update_weighting(weighting, log_sigmas, losses, np.ones(64), 0.01)
    log_sigmas = np.linspace(-3.3, 2.4, 20)
    np.testing.assert_allclose(compute_log_losses(weighting, log_sigmas), -0.5 * log_sigmas, atol=0.35)


def test_probabilities_are_those_computed_by_hand() -> None:
    np.testing.assert_allclose(compute_probabilities(FULL), PROBABILITIES, rtol=1e-12)
    # sqrt((9·0 + 10²) / 10) = sqrt(10) against 1
    rare = compute_probabilities([[0.0] * 9 + [-10.0], [1.0] * 10])
    assert rare[0] == pytest.approx(0.99 * math.sqrt(10) / (math.sqrt(10) + 1) + 0.005)
    for uniform in ([[5.0] * 10, [1.0] * 9], [[], []], [[0.0] * 10] * 2):
        assert compute_probabilities(uniform).tolist() == [0.5, 0.5]


def test_the_table_keeps_the_last_ten_losses_in_order() -> None:
    table = add_losses([[], [7.0]], [0] * 12 + [1], range(13))
    assert table == [list(range(2, 12)), [7, 12]]
    before = [[1.0], [2.0]]
    assert add_losses(before, [0], [3.0]) == [[1.0, 3.0], [2.0]] and before == [[1.0], [2.0]]


def test_draws_are_uniform_until_every_bin_has_ten_losses() -> None:
    keys = SampleKeys(3, 5, [0, 1, 2, 3])
    plain = build().sample_timesteps(keys, PIXELS)
    drawn = build(adaptive_timestep_bins=2).sample_timesteps(keys, PIXELS)
    assert plain.levels is None and drawn.levels is not None
    assert drawn.values.equal(plain.values) and drawn.levels.factors.tolist() == [1] * 4
    assert drawn.levels.bins.tolist() == (plain.values >= 500).long().tolist()
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0])
    assert drawn.levels.weigh(weights).equal(weights)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [250, 750]),
        ({"min_timestep": 200, "max_timestep": 600}, [300, 500]),
        # s = 0.25 and 0.75 become 3s / (1 + 2s).
        ({"prediction": "flow", "timestep_shift": 3.0}, [500, 900]),
        ({"timestep_density": [3, 1]}, [1000 / 6, 500]),  # quantiles of the density
    ],
)
def test_draws_go_through_the_adaptive_quantile(settings, expected) -> None:
    """The middle of a bin's probability is the middle of the bin, whose factor is 1 / (p·2)."""
    objective = build(FeedbackState(FULL), adaptive_timestep_bins=2, **settings)
    changed = get_feedback(objective).change_draws(torch.tensor([PROBABILITIES[0] / 2, 1 - PROBABILITIES[1] / 2]))
    assert changed.draws.tolist() == pytest.approx([0.25, 0.75]) and changed.bins.tolist() == [0, 1]
    timesteps = objective._scale_draws(changed.draws, settings.get("timestep_shift", 1.0))
    assert timesteps.tolist() == pytest.approx(expected, abs=1)
    levels = get_feedback(objective).weigh(timesteps, changed.bins)
    assert levels.factors.tolist() == pytest.approx([1 / (2 * p) for p in PROBABILITIES])


def test_low_discrepancy_draws_each_bin_as_often_as_its_probability() -> None:
    """And so the mean of loss·factor is that of uniform timesteps."""
    settings = {"adaptive_timestep_bins": 2, "low_discrepancy": True}
    objective = build(FeedbackState(FULL), global_batch_size=400, **settings)
    for step in range(3):
        micro = [
            objective.sample_timesteps(SampleKeys(0, step, list(range(first, first + 100))), PIXELS).levels
            for first in range(0, 400, 100)
        ]
        bins = torch.cat([levels.bins for levels in micro if levels])
        factors = torch.cat([levels.factors for levels in micro if levels])
        assert abs(int((bins == 0).sum()) - 400 * PROBABILITIES[0]) <= 1
        losses = torch.tensor([1.0, 3.0])[bins]
        assert float((losses * factors).mean()) == pytest.approx(2, abs=0.01)


def list_micro_losses(objective: Objective, sizes: list[int]) -> list[MicroLosses]:
    """Micro batches of a global batch with the losses 1, 2, …; the third sample is bad, and the loss of another NaN."""
    positions = torch.arange(sum(sizes))
    losses, weights = 1.0 + positions, torch.ones(sum(sizes))
    losses[4], weights[2], weights[3] = torch.nan, 0.0, 0.5
    found = []
    for own in positions.split(sizes):
        levels = objective.sample_timesteps(SampleKeys(0, 0, own.tolist()), PIXELS).levels
        assert levels is not None
        found.append(MicroLosses(losses[own], own, weights[own], levels))
    return found


def learn(ranks: list[list[MicroLosses]], feedback: LossFeedback) -> FeedbackState:
    """Add up what the ranks share, and learn from it."""
    parts = [feedback.collect(micro_batches, CPU) for micro_batches in ranks]
    shared = sum(torch.cat(part) for part in parts)
    assert isinstance(shared, torch.Tensor)
    feedback.expect(lambda: StepLosses(*shared.numpy().reshape(4, -1)))
    return feedback.read_next_state()


def test_any_number_of_ranks_learns_the_same_in_the_order_of_positions() -> None:
    settings = {"adaptive_timestep_bins": 2, "learned_weighting": True}
    weighting = update_weighting(LearnedWeighting(), np.zeros(1), np.array([3.0]), np.ones(1), 0.1)
    before = FeedbackState([[], []], weighting)
    objective = build(before, 8, **settings)
    micro = list_micro_losses(objective, [2, 2, 2, 2])
    one = learn([micro], get_feedback(objective))
    assert learn([micro[1::2], micro[::2]], get_feedback(objective)) == one
    assert learn([list_micro_losses(objective, [4, 4])], get_feedback(objective)) == one
    timesteps = torch.cat([batch.levels.timesteps for batch in micro]).numpy()
    u = compute_log_losses(weighting, build_log_sigmas(objective.config)(timesteps))
    expected: list[list[float]] = [[], []]
    for number in (0, 1, 3, 5, 6, 7):
        expected[int(timesteps[number] >= 500)].append((1 + number) * math.exp(-u[number]))
    assert all(expected) and sum(map(len, one.timestep_losses)) == 6
    for found, losses in zip(one.timestep_losses, expected, strict=True):
        assert found == pytest.approx(losses)
    assert one.weighting is not None and one.weighting.num_updates == 2 and get_feedback(objective).state == before


def test_the_logged_loss_has_no_learned_weight() -> None:
    factors, losses = np.array([1, 0.5, 0, 2], np.float32), np.array([1, 2, 3, 4], np.float32)
    assert StepLosses(factors, losses, losses, losses).mean == (1 + 1 + 0 + 8) / 4


def test_the_learned_weight_is_in_the_trained_loss_alone() -> None:
    weighting = update_weighting(LearnedWeighting(), np.zeros(1), np.array([3.0]), np.ones(1), 0.1)
    objective = build(FeedbackState([], weighting), learned_weighting=True)
    levels = objective.sample_timesteps(SampleKeys(0, 0, [0, 1]), PIXELS).levels
    assert levels is not None
    u = compute_log_losses(weighting, build_log_sigmas(objective.config)(levels.timesteps.numpy()))
    assert levels.weigh(torch.tensor([1.0, 0.5])).tolist() == pytest.approx((np.exp(-u) * [1, 0.5]).tolist())
    target = torch.zeros(2, 4, 2, 2)
    assert objective.compute_losses(target + 2, target, levels.timesteps).tolist() == [4, 4]  # as validation does


def test_a_save_beside_the_loop_has_the_losses_of_a_step_that_is_not_counted_yet() -> None:
    objective = build(adaptive_timestep_bins=2)
    feedback = get_feedback(objective)
    state = TrainState(step=7, feedback=feedback.state)
    run: Any = SimpleNamespace(state=state, objective=objective, plan=Plan(np.zeros(8, np.int64), 4, seed=0))
    feedback.expect(lambda: StepLosses(*np.ones((4, 4), np.float32)))
    assert copy_state_at(run, 7) == state
    later = copy_state_at(run, 8)
    assert later.step == 8 and later.feedback.timestep_losses == [[], [1.0] * 4] and state.feedback != later.feedback
    # The main thread may count the step meanwhile.
    assert feedback.finish_step() == later.feedback == feedback.read_next_state() == copy_state_at(run, 8).feedback


def test_the_state_is_saved_exactly_and_fits_the_present_settings(tmp_path: Path) -> None:
    weighting = update_weighting(LearnedWeighting(), np.zeros(1), np.array([3.0]), np.ones(1), 0.1)
    state = TrainState(step=1, feedback=FeedbackState([[0.1, 1 / 3], []], weighting))
    state.save(tmp_path)
    assert TrainState.load(tmp_path) == state
    fresh, more = (build_feedback_state(build(learned_weighting=True, adaptive_timestep_bins=n).config) for n in (2, 3))
    assert state.feedback.fit_to(fresh) == state.feedback
    assert state.feedback.fit_to(build_feedback_state(build().config)) == FeedbackState()
    assert FeedbackState().fit_to(fresh) == fresh == FeedbackState([[], []], LearnedWeighting())
    assert state.feedback.fit_to(more) == FeedbackState([[], [], []], weighting)
    assert state.feedback.fit_to(fresh, {"noise_offset"}) == state.feedback
    assert state.feedback.fit_to(fresh, {"timestep_shift"}) == FeedbackState([[], []], weighting)
    assert state.feedback.fit_to(fresh, {"prediction"}) == fresh


def test_the_curves_of_the_report() -> None:
    objective = build(FeedbackState(FULL), adaptive_timestep_bins=2, timestep_density=[3, 1])
    curves = objective.describe_noise_levels()
    assert curves is not None and curves["timesteps"] == curves["weights"] == []
    assert curves["edges"] == pytest.approx([0, 1000 / 3, 1000], abs=0.01)
    assert curves["frequencies"] == pytest.approx([2 * p for p in PROBABILITIES])
    curves = build(learned_weighting=True).describe_noise_levels()
    assert curves is not None and curves["weights"] == [1] * 201 and curves["edges"] == curves["frequencies"] == []
    assert curves["timesteps"][::50] == [0, 250, 500, 750, 999]
    assert build().describe_noise_levels() is None
