"""The short form of tests/campaigns/seed_only.py: three good runs and three that learn nothing, of two steps each."""

from pathlib import Path

from campaigns.seed_only import (
    compute_wilson_interval,
    count_false,
    judge_spoilt,
    list_errors,
    list_missing,
    plan_runs,
)
from programs import run_program

SHORT = ("validation.share=0.5", "validation.timesteps_per_sample=1", "optim.schedule=constant")


def test_a_spoilt_learning_rate_is_found_and_counted(cached_folder: Path, tmp_path: Path) -> None:
    runs = plan_runs(tmp_path / "runs", 3, ["1e-9"])
    missing = list_missing(runs, 2)
    assert len(missing) == 6
    parts = (" ".join(["train", str(cached_folder / "tiny.yaml"), *SHORT, *words]) for words in missing)
    run_program("tests/support/several_runs.py", *" + ".join(parts).split())
    assert list_missing(runs, 2) == []  # finished runs are not trained again
    good, spoilt = ([run.folder for run in group] for group in runs.values())
    errors = list_errors([*good, *spoilt])
    assert list(errors) == [*(f"seed-{n}" for n in range(3)), *(f"lr-1e-9-seed-{n}" for n in range(3))]
    assert len({round(error, 3) for error in errors.values()}) == 4  # nothing learned is the same with any seed
    verdicts = judge_spoilt(good, spoilt)
    assert list(verdicts) == ["same seeds"]
    assert verdicts["same seeds"].startswith(("worse (+", "undecided (+"))  # two steps: hardly more than chance
    # As runs that differ only in their seeds: splits that part the two learning rates are false.
    for is_paired in (False, True):
        counted = count_false([*good, *spoilt], num_splits=20, seed=0, is_paired=is_paired)
        assert counted["splits"] == 20 and counted["share"] == counted["false"] / 20
        assert counted["low"] <= counted["share"] < counted["high"]
        assert counted["samples"] >= 8


def test_wilsons_interval_by_hand() -> None:
    # 10 of 200: (10 + 1.9207) / 203.8415 ± 1.96 / 203.8415 · sqrt(9.5 + 0.9604)
    assert [round(edge, 4) for edge in compute_wilson_interval(10, 200)] == [0.0274, 0.0896]
    assert [round(edge, 4) for edge in compute_wilson_interval(0, 200)] == [0.0, 0.0188]
