"""FID, KID and CMMD: torch-fidelity's numbers, resamples, and verdicts on models of one quality."""

import numpy as np
import pytest
import torch

from sdxl_trainer.train.quality.comparison import FeatureSet, list_floors, list_lines
from sdxl_trainer.train.quality.measures import compute_cmmd, compute_fid, compute_kid
from sdxl_trainer.train.quality.resampling import (
    MEASURES,
    Resampled,
    draw_counts,
    draw_subsets,
    halve,
    resample_measure,
    summarize,
)


def draw_features(seed: int, num_images: int, size: int, shift: float) -> torch.Tensor:
    mixing = np.eye(size) + 0.3 * np.random.default_rng(99).standard_normal((size, size))
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((num_images, size)) @ mixing + shift)


# From torch-fidelity 0.4.0: `fid_statistics_to_metric`, and `mmd2` of as many images on both sides, with `kernel_poly`
# of degree 3, and biased with `kernel_rbf` of sigma 10, over features of length 1, times 1000.
LIBRARY = [
    (40, 30, 6, 1.9909007570989399, 0.6274469860396428, 2.262065686603254),
    (10, 12, 20, 52.11011366469691, 2.1032556525953074, 3.0857755691138244),  # singular covariances
]


@pytest.mark.parametrize("n, m, size, fid, kid, cmmd", LIBRARY)
def test_measures_are_those_of_torch_fidelity(n: int, m: int, size: int, fid: float, kid: float, cmmd: float) -> None:
    x, y, number = draw_features(1, n, size, 0.0), draw_features(2, m, size, 0.4), min(n, m)
    # torch-fidelity takes roots of eigenvalues, and those of a singular matrix are off by the root of fp64's precision.
    assert compute_fid(x, y) == pytest.approx(fid, rel=1e-12 if n > size else 1e-6)
    assert compute_fid(y, x) == pytest.approx(compute_fid(x, y), rel=1e-12)
    assert float(compute_kid(x[:number], y[:number])) == pytest.approx(kid, rel=1e-12)
    assert float(compute_cmmd(x[:number], y[:number])) == pytest.approx(cmmd, rel=1e-10)


def test_equal_sets_have_no_distance() -> None:
    x = draw_features(1, 30, 40, 0.0)
    assert compute_fid(x, x) == pytest.approx(0, abs=1e-9) and float(compute_cmmd(x, x)) == pytest.approx(0, abs=1e-9)
    assert float(compute_kid(x, x)) < 0  # unbiased: two samples of one distribution have 0 on average
    sets = [draw_features(number, 16, 4, 0.0) for number in range(600)]
    values = [float(compute_kid(*pair)) for pair in zip(sets[::2], sets[1::2], strict=True)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 300**0.5


def test_kernels_in_blocks_are_those_of_whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw_features(1, 23, 5, 0.0), draw_features(2, 19, 5, 0.3)
    whole = [float(compute(x, y)) for compute in (compute_kid, compute_cmmd)]
    monkeypatch.setattr("sdxl_trainer.train.quality.measures.BLOCK", 7)
    assert [float(compute(x, y)) for compute in (compute_kid, compute_cmmd)] == pytest.approx(whole, rel=1e-12)


def test_counts_repeat_images_but_no_image_is_paired_with_its_copy() -> None:
    x, y = draw_features(1, 6, 3, 0.0), draw_features(2, 5, 3, 0.5)
    x_counts, y_counts = torch.tensor([2, 0, 1, 3, 1, 1]), torch.tensor([1, 1, 0, 2, 1])
    repeated = [features.repeat_interleave(counts, 0) for features, counts in ((x, x_counts), (y, y_counts))]
    assert compute_fid(x, y, x_counts, y_counts) == pytest.approx(compute_fid(*repeated), rel=1e-12)
    counts = x_counts[None], y_counts[None]
    assert float(compute_cmmd(x, y, *counts)) == pytest.approx(float(compute_cmmd(*repeated)), rel=1e-9)
    total, places = [], [torch.arange(len(c)).repeat_interleave(c) for c in (x_counts, y_counts)]
    for features, own in zip(repeated, places, strict=True):
        kernel, differ = (features @ features.T / 3 + 1) ** 3, own[:, None] != own
        total.append(float(kernel[differ].mean()))
    across = float(((repeated[0] @ repeated[1].T / 3 + 1) ** 3).mean())
    assert float(compute_kid(x, y, *counts)) == pytest.approx(sum(total) - 2 * across, rel=1e-12)
    both = torch.stack([x_counts, torch.ones(6)]), torch.stack([y_counts, torch.ones(5)])
    assert compute_kid(x, y, *both).tolist() == pytest.approx(
        [float(compute_kid(x, y, *counts)), float(compute_kid(x, y))], rel=1e-12
    )


def test_subsets_and_halves_hold_different_images() -> None:
    first, second = draw_subsets(21)
    assert (first.sum(1) == 10).all() and (second.sum(1) == 10).all() and first.max() == 1
    assert len({tuple(row) for row in torch.cat([first, second]).tolist()}) == 200
    assert draw_subsets(5000)[0][0].sum() == 1000
    halves = halve(21)
    assert [len(half) for half in halves] == [10, 10] and not set(halves[0]) & set(halves[1])
    assert (draw_counts(21).sum(1) == 21).all()


def test_intervals_of_differences_are_paired_and_rarely_wrong() -> None:
    """Two models of one quality, whose images share what their captions give: 5 % of verdicts may be wrong."""
    counts, wrong, shares = draw_counts(40), dict.fromkeys(MEASURES, 0), []
    for number in range(100):
        random = np.random.default_rng(number)
        caption = random.standard_normal((40, 3))
        reference = torch.from_numpy(caption + 0.3 * random.standard_normal((40, 3)))
        drawn = [torch.from_numpy(0.8 * caption + 0.5 * random.standard_normal((40, 3)) + 0.4) for _ in range(2)]
        for name, measure in MEASURES.items():
            values = np.array([float(measure(x, reference, None, None)) for x in drawn])
            resampled = Resampled(values, resample_measure(measure, drawn, reference, counts[:60]), 40)
            difference, own = resampled.estimate_difference(1, 0), [resampled.estimate(model) for model in range(2)]
            wrong[name] += difference.p_value < 0.05
            independent = float(np.hypot(*(estimate.high - estimate.value for estimate in own)))
            shares.append((difference.high - difference.value) / independent)
    assert np.mean(shares) < 0.9  # pairs make intervals narrower than those of two series of their own
    assert all(number <= 11 for number in wrong.values()), wrong  # 95 % of such series have at most 9


def test_an_interval_is_centred_on_its_value() -> None:
    estimate = summarize(2.0, np.array([4.0, 5.0, 6.0]), 9)  # resamples of a measure that is too high with few images
    margin = 1.95996 * (9 / 8) ** 0.5
    assert (estimate.low, estimate.high) == pytest.approx((2 - margin, 2 + margin), rel=1e-4)
    assert estimate.p_value == pytest.approx(0.0594, abs=2e-4)
    assert summarize(0.0, np.zeros(3), 9).p_value == 1 and summarize(1.0, np.ones(3), 9).p_value == 0


def test_intervals_of_distances_end_at_zero_and_halves_compare_alike() -> None:
    resampled = Resampled(np.array([0.1, 0.2]), np.array([[0.0, 0.1], [0.2, 0.3], [0.4, 0.5]]), 9)
    for name, ends_at_zero in (("FID", True), ("CMMD", True), ("x0 error", True), ("KID", False)):
        line = list_lines(name, "", ["a", "b"], resampled)[0]
        assert (line.low == 0) == ends_at_zero
        assert line.high == pytest.approx(0.1 + 1.95996 * 0.2 * (9 / 8) ** 0.5, rel=1e-4)
    x, y = draw_features(1, 12, 3, 0.0), draw_features(2, 12, 3, 0.5)
    (floor,) = list_floors(FeatureSet("f", False, [x, y], y), ["FID"], ["a", "same"])
    first, second = halve(12)
    assert floor.num_images == 6 and floor.value == pytest.approx(compute_fid(y[first], y[second]))
    assert floor.models == pytest.approx({"a": compute_fid(x[first], y[second]), "same": floor.value})
