"""Distributions of timesteps, drawn independently or spread evenly over a global batch."""

import math

import numpy as np
import pytest
import torch

from sdxl_trainer.configs.objective import MAX_MODE_SCALE, ObjectiveConfig
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.train.objective.diffusion import LatentStatistics
from sdxl_trainer.train.objective.objective import Objective, SampleKeys
from sdxl_trainer.train.objective.timesteps import (
    build_cosmap,
    build_histogram,
    build_logit_normal,
    build_mode,
    draw_low_discrepancy,
    draw_uniform,
    resolve_shift,
    scale_to_range,
    shift_draws,
)

STATISTICS = LatentStatistics(mean=torch.zeros(1), scale=torch.ones(1))
COUNT = 20_000
PIXELS = 1024 * 1024
KS_LIMIT = 1.95 / math.sqrt(COUNT)  # Kolmogorov-Smirnov at 0.1 %; the draws are seeded, so the result is fixed


def build(global_batch_size: int = 16, **settings) -> Objective:
    return Objective(ObjectiveConfig(**settings), STATISTICS, global_batch_size)


def draw(objective: Objective, steps: int, positions: int) -> np.ndarray:
    """Draw timesteps, [steps, positions]."""
    keys = (SampleKeys(3, step, list(range(positions))) for step in range(steps))
    return np.stack([objective.sample_timesteps(step_keys, PIXELS).values.numpy() for step_keys in keys])


def measure_distance(values: np.ndarray, cdf) -> float:
    """Return the largest distance between the distribution of `values` and `cdf` (Kolmogorov-Smirnov)."""
    values = np.sort(values.ravel())
    expected = cdf(values)
    ranks = np.arange(len(values) + 1) / len(values)
    return max(np.abs(ranks[1:] - expected).max(), np.abs(ranks[:-1] - expected).max())


def compute_normal_cdf(z: np.ndarray) -> np.ndarray:
    return np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in z])


def test_keyed_draws_are_uniform_and_below_one():
    draws = draw_uniform([derive_seed(0, RandomStream.TIMESTEP, step, 1) for step in range(COUNT)]).numpy()
    assert measure_distance(draws, lambda u: u) < KS_LIMIT
    assert draw_uniform([2**63 - 1]).item() < 1 and draw_uniform([0]).item() == 0
    assert draw_uniform([2**10]).item() == 2**-53  # the finest step of a float64 below 1


@pytest.mark.parametrize("low_discrepancy", [False, True])
def test_uniform_timesteps_cover_exactly_the_range(low_discrepancy):
    objective = build(min_timestep=200, max_timestep=220, low_discrepancy=low_discrepancy)
    values = draw(objective, COUNT // 16, 16)
    assert values.dtype == np.int64
    counts = np.bincount(values.ravel(), minlength=221)
    assert counts[:200].sum() == 0 and len(counts) == 221 and counts[220] == 0
    assert np.abs(counts[200:220] / values.size - 1 / 20).max() < 0.006
    # Each position by itself is uniform too: 1250 draws into 4 parts.
    counts_by_position = np.stack([np.bincount((column - 200) // 5, minlength=4) for column in values.T])
    assert np.abs(counts_by_position / len(values) - 0.25).max() < 0.05


def test_the_default_range_covers_the_whole_schedule():
    values = draw(build(), COUNT // 16, 16)
    assert (values.min(), values.max()) == (0, 999)
    assert measure_distance(values + 0.5, lambda t: t / 1000) < KS_LIMIT + 0.0005


@pytest.mark.parametrize("low_discrepancy", [False, True])
def test_logit_normal_has_its_distribution(low_discrepancy):
    objective = build(
        prediction="flow",
        timestep_density="logit_normal",
        logit_mean=0.5,
        logit_std=1.5,
        min_timestep=100,
        max_timestep=900,
        low_discrepancy=low_discrepancy,
    )
    values = draw(objective, COUNT // 16, 16)
    assert values.dtype == np.float32 and len(np.unique(values)) > 0.99 * values.size  # 1000·s, not rounded

    def cdf(t: np.ndarray) -> np.ndarray:
        share = (t.astype(np.float64) - 100) / 800
        return compute_normal_cdf((np.log(share / (1 - share)) - 0.5) / 1.5)

    assert measure_distance(values, cdf) < KS_LIMIT


def test_logit_normal_matches_values_computed_by_hand():
    invert = build_logit_normal(mean=1.0, std=2.0)
    draws = torch.tensor([0.0, 0.5, compute_normal_cdf(np.array([1.0])).item(), 1.0], dtype=torch.float64)
    expected = [0, 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3)), 1]
    assert invert(draws).tolist() == pytest.approx(expected)


def test_mode_matches_values_computed_by_hand():
    """f(u; scale) = 1 - u - scale·(cos²(πu/2) - 1 + u), equation 20 of arXiv 2403.03206, at 1 - u."""
    draws = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    cosines = [math.cos(math.pi / 2 * (1 - u)) ** 2 for u in draws.tolist()]
    expected = [u - 1.29 * (cosine - u) for u, cosine in zip(draws.tolist(), cosines, strict=True)]
    assert build_mode(1.29)(draws).tolist() == pytest.approx(expected, abs=1e-12)
    assert expected[1] == pytest.approx(0.25 + 1.29 * (0.25 - (1 - math.sqrt(0.5)) / 2))
    assert build_mode(0)(draws).equal(draws)
    for scale in (-1.0, MAX_MODE_SCALE):  # the ends of the range in which an inverse CDF increases
        assert (build_mode(scale)(torch.linspace(0, 1, 1001, dtype=torch.float64)).diff() > -1e-15).all()
        assert (build_mode(scale * 1.01)(torch.linspace(0, 1, 1001, dtype=torch.float64)).diff() < 0).any()
    values = draw(build(prediction="flow", timestep_density="mode"), COUNT // 16, 16) / 1000
    middle = ((values > 0.25) & (values < 0.75)).mean()
    assert middle == pytest.approx(0.733, abs=0.01)  # the u with f(u) = 1/4 and 3/4 are 0.1336 and 0.8664


@pytest.mark.parametrize("low_discrepancy", [False, True])
def test_cosmap_has_its_distribution(low_discrepancy):
    """The density 2/(π(1 - 2s + 2s²)) has the CDF (2/π)·atan(s/(1 - s))."""
    objective = build(prediction="flow", timestep_density="cosmap", low_discrepancy=low_discrepancy)
    values = draw(objective, COUNT // 16, 16) / 1000
    assert measure_distance(values, lambda s: 2 / math.pi * np.arctan(s / (1 - s))) < KS_LIMIT
    draws = torch.tensor([0.0, 1 / 3, 0.5, 1.0], dtype=torch.float64)  # tan(π/6) = 1/sqrt(3)
    assert build_cosmap()(draws).tolist() == pytest.approx([0, 1 - 1 / (1 + 3**-0.5), 0.5, 1])


def test_a_histogram_gives_the_frequencies_of_its_parts():
    invert = build_histogram([1, 0, 3])
    draws = torch.tensor([0, 0.125, 0.2499999, 0.25, 0.625, 0.9999999], dtype=torch.float64)
    assert invert(draws).tolist() == pytest.approx([0, 1 / 6, 1 / 3, 2 / 3, 5 / 6, 1], abs=1e-6)
    values = draw(build(timestep_density=[1.0, 0.0, 3.0], max_timestep=300), COUNT // 16, 16)
    counts = np.bincount(values.ravel() // 100, minlength=3) / values.size
    assert counts == pytest.approx([0.25, 0, 0.75], abs=0.01)
    zeros = build_histogram([0, 1, 0])(torch.tensor([0.0, 0.5, 1 - 1e-12], dtype=torch.float64))
    assert zeros.tolist() == pytest.approx([1 / 3, 1 / 2, 2 / 3])


def test_shift_moves_draws_towards_noise():
    draws = torch.tensor([0.0, 0.5, 1.0])
    assert shift_draws(draws, 3.0).tolist() == pytest.approx([0, 0.75, 1])
    assert shift_draws(draws, 1.0).equal(draws)
    shifted, plain = (build(timestep_shift=shift).sample_timesteps(SampleKeys(0, 0, [1]), PIXELS) for shift in (3, 1))
    assert shifted.values > plain.values


def test_the_shift_grows_with_the_square_root_of_the_pixels():
    assert resolve_shift(3.0, None, 123) == 3
    assert resolve_shift(3.0, 1024, 1024 * 1024) == 3
    assert resolve_shift(3.0, 1024, 2048 * 2048) == 6
    assert resolve_shift(2.0, 1024, 832 * 1216) == pytest.approx(2 * math.sqrt(832 * 1216) / 1024)
    by_size = build(prediction="flow", timestep_shift=2.0, timestep_shift_base_px=512)
    keys = SampleKeys(0, 0, [1])
    for pixels, shift in ((512 * 512, 2.0), (1024 * 1024, 4.0), (256 * 256, 1.0)):
        static = build(prediction="flow", timestep_shift=shift)
        assert by_size.sample_timesteps(keys, pixels).values.equal(static.sample_timesteps(keys, pixels).values)


def test_the_shift_is_applied_after_the_density():
    """A density over the first half, s from 0 to 1/2, shifted by 3: 3·s/(1 + 2·s), from 0 to 3/4."""
    values = draw(build(timestep_density=[1.0, 0.0], timestep_shift=3.0), COUNT // 16, 16) / 1000
    assert values.max() == pytest.approx(0.75, abs=0.002)
    assert measure_distance(values + 0.0005, lambda t: 2 * t / (3 - 2 * t)) < KS_LIMIT + 0.001


def test_rounded_timesteps_stay_in_the_range():
    ends = torch.tensor([0.0, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    assert scale_to_range(ends, 0, 1000).long().tolist() == [0, 999, 999]
    assert scale_to_range(ends, 999, 1000).long().tolist() == [999, 999, 999]
    assert scale_to_range(ends, 0, 1).long().tolist() == [0, 0, 0]
    assert (scale_to_range(ends, 0, 1000).float() < 1000).all()


def test_low_discrepancy_draws_are_evenly_spaced_on_any_number_of_ranks():
    seed = derive_seed(5)
    whole = draw_low_discrepancy(seed, range(12), 12)
    assert np.diff(np.sort(whole.numpy())) == pytest.approx([1 / 12] * 11)
    assert ((0 <= whole) & (whole < 1)).all()
    # Two ranks with micro batches of 3 and two accumulation steps draw the same numbers.
    shares = {rank: [range(s, s + 3) for s in range(3 * rank, 12, 6)] for rank in (0, 1)}
    parts = [draw_low_discrepancy(seed, share, 12) for rank in (0, 1) for share in shares[rank]]
    assert torch.cat(parts).sort().values.equal(whole.sort().values)
    assert not draw_low_discrepancy(derive_seed(6), range(12), 12).equal(whole)


def test_low_discrepancy_over_ranks_and_accumulation_through_the_objective():
    objective = build(global_batch_size=40, low_discrepancy=True)
    for step in range(20):
        micro = [
            objective.sample_timesteps(SampleKeys(0, step, list(range(s, s + 5))), PIXELS).values
            for s in range(0, 40, 5)
        ]
        counts = np.bincount(torch.cat(micro).numpy() // 25, minlength=40)
        assert (np.abs(counts - 1) <= 1).all()  # one in each fortieth of the schedule, up to its edges
        assert np.bincount(torch.cat(micro).numpy() // 250, minlength=4) == pytest.approx([10] * 4, abs=1)
    position_7 = draw(objective, 1000, 40)[:, 7]
    assert measure_distance(position_7 + 0.5, lambda t: t / 1000) < 1.95 / math.sqrt(1000)


def test_low_discrepancy_lowers_the_variance_of_a_batch():
    spread = draw(build(low_discrepancy=True), 300, 16).mean(1).std()
    assert spread < 0.3 * draw(build(), 300, 16).mean(1).std()
