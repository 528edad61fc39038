"""Effects of single settings in a grid, against numbers computed by hand."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from sdxl_trainer.train.evidence.comparison import BETTER, UNDECIDED, WORSE, Effect, judge_effects
from sdxl_trainer.train.evidence.grid_contrasts import find_contrasts
from sdxl_trainer.train.evidence.pairing import NUM_BINS, Sample, SharedErrors
from sdxl_trainer.train.evidence.runs import SEED_KEY, EvidenceRun

GRID = list(product("012", ("none", "min_snr"), ("1", "16")))  # seed, weighting, candidates; the baseline is first
SEEDS, WEIGHTING, CANDIDATES = map(list, zip(*GRID, strict=True))


def score(seed: str, weighting: str, candidates: str) -> float:
    """Return 1, more by 0.10, 0.11 and 0.12 with min_snr, and less by 0.3, 0.3 and 0.36 with 16 candidates."""
    by_weighting, by_candidates = (0.1 + 0.01 * int(seed), -0.36 if seed == "2" else -0.3)
    return 1 + by_weighting * (weighting == "min_snr") + by_candidates * (candidates == "16")


def judge(scores: list[float], settings: dict[str, list[str]], seeds: list[str]) -> list[Effect]:
    runs = [
        EvidenceRun(folder=Path(str(number)), name=str(number), settings={SEED_KEY: seed}, validations={}, seconds={})
        for number, seed in enumerate(seeds)
    ]
    samples = [Sample(str(number), 64, 64) for number in range(10)]
    errors = np.broadcast_to(np.array(scores)[:, None, None], (len(runs), len(samples), NUM_BINS))
    return judge_effects(runs, find_contrasts(settings, seeds), SharedErrors(samples, [0] * 10, errors, []))


def test_an_effect_is_the_mean_over_the_other_settings_with_the_seeds_as_evidence() -> None:
    settings = {"objective.weighting": WEIGHTING, "objective.noise_candidates": CANDIDATES}
    first, second = judge([score(*cell) for cell in GRID], settings, SEEDS)
    assert (first.setting, first.against, first.num_combinations) == ("objective.weighting=min_snr", "none", 2)
    assert (second.setting, second.against) == ("objective.noise_candidates=16", "1")
    # 3 differences of 0.11 on average with the variance 0.0001: 0.11 ± 4.3027·sqrt(0.0001/3), t² = 363.
    assert first.baseline == pytest.approx(1 - 0.32 / 2) and first.verdict.seeds == (3, 3)
    assert first.verdict.difference == pytest.approx(0.11) and first.verdict.is_paired
    assert first.verdict.low == pytest.approx(0.11 - 0.024841, abs=1e-6)
    assert first.verdict.high == pytest.approx(0.11 + 0.024841, abs=1e-6)
    # -0.32 with the variance 0.0012: t² = 256. With 2 degrees of freedom p is 1 - sqrt(t² / (t² + 2)).
    assert second.verdict.difference == pytest.approx(-0.32)
    p_value = 1 - np.sqrt(363 / 365)
    assert first.verdict.p_value == pytest.approx(2 * p_value, rel=1e-3)  # Holm: the smaller of two
    assert second.verdict.p_value == pytest.approx(2 * p_value, rel=1e-3)  # above 1 - sqrt(256 / 258)
    assert (first.verdict.verdict, second.verdict.verdict) == (WORSE, BETTER)


def test_holms_correction_leaves_a_weak_effect_undecided() -> None:
    settings = {"objective.weighting": WEIGHTING, "objective.noise_candidates": CANDIDATES}
    scores = [
        1 + 0.1 * (1 + 0.4 * (int(seed) - 1)) * ((weighting == "min_snr") + (candidates == "16"))
        for seed, weighting, candidates in GRID
    ]
    for effect in judge(scores, settings, SEEDS):  # t² = 18.75, p = 0.049, which is 0.099 for two effects
        assert effect.verdict.p_value == pytest.approx(2 * (1 - np.sqrt(18.75 / 20.75)), rel=1e-3)
        assert (effect.verdict.verdict, effect.verdict.reason) == (UNDECIDED, "other settings are judged too")
        assert effect.verdict.low is not None and effect.verdict.low > 0  # the interval is that of one effect


def test_only_pairs_of_runs_that_differ_in_one_setting_count() -> None:
    """Three of four cells with three seeds, and a third weighting with one seed."""
    cells = [cell for cell in GRID if cell[1:] != ("min_snr", "16")] + [("0", "debiased", "1"), ("0", "debiased", "16")]
    seeds, weighting, candidates = map(list, zip(*cells, strict=True))
    settings = {"weighting": weighting, "candidates": candidates}
    found = {contrast.setting: contrast for contrast in find_contrasts(settings, seeds)}
    counts = {name: (contrast.num_combinations, len(contrast.baseline)) for name, contrast in found.items()}
    assert counts == {"weighting=min_snr": (1, 3), "weighting=debiased": (2, 2), "candidates=16": (2, 4)}
    for one, other in zip(found["candidates=16"].baseline, found["candidates=16"].arm, strict=True):
        assert cells[one][:2] == cells[other][:2] and (cells[one][2], cells[other][2]) == ("1", "16")
    scores = [score(*cell) + (cell[1] == "debiased") for cell in cells]
    by_setting = {effect.setting: effect.verdict for effect in judge(scores, settings, seeds)}
    assert by_setting["weighting=min_snr"].difference == pytest.approx(0.11)
    assert by_setting["candidates=16"].difference == pytest.approx(-0.32)
    few = by_setting["weighting=debiased"]
    assert (few.verdict, few.reason, few.difference) == (UNDECIDED, "one seed", pytest.approx(1))


def test_settings_that_were_changed_one_at_a_time_form_no_grid() -> None:
    assert find_contrasts({"a": ["1", "2", "1"], "b": ["1", "1", "2"]}, ["0"] * 3) == []
    assert find_contrasts({"a": ["1", "2", "3"]}, ["0"] * 3) == []


def test_settings_that_follow_from_others_are_no_effects_of_their_own() -> None:
    settings = {
        "optim.name": ["adamw", "adamw", "lion", "lion"],
        "optim.lr": ["1e-4", "1e-4", "1e-5", "1e-5"],
        "objective.weighting": ["none", "p2", "none", "p2"],
        "objective.weighting_gamma": ["null", "5", "null", "5"],
    }
    found = [(contrast.setting, contrast.against) for contrast in find_contrasts(settings, ["0"] * 4)]
    assert found == [
        ("optim.name=lion optim.lr=1e-5", "adamw 1e-4"),
        ("objective.weighting=p2 objective.weighting_gamma=5", "none null"),
    ]
    settings |= {
        "optim.name": [*settings["optim.name"], "adamw", "lion"],
        "optim.lr": [*settings["optim.lr"], "1e-4", "1e-5"],
        "objective.weighting": [*settings["objective.weighting"], "min_snr", "min_snr"],
        "objective.weighting_gamma": [*settings["objective.weighting_gamma"], "5", "5"],
    }
    found = [contrast.setting for contrast in find_contrasts(settings, ["0"] * 6)]
    assert found[1:] == ["objective.weighting=p2", "objective.weighting=min_snr"]
