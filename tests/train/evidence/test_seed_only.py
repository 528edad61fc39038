"""The short form of tests/campaigns/seed_only.py: six good runs and three that learn nothing, of one step each."""

from pathlib import Path

from campaigns.seed_only import GOOD_LR, compute_wilson_interval, judge_all, list_missing, plan_runs
from programs import run_program

SHORT = (
    "validation.share=0.5",
    "validation.timesteps_per_sample=1",
    "optim.schedule=constant",
    "train.global_batch_size=2",
)


def test_seeds_are_no_effect_and_a_spoilt_learning_rate_is(cached_folder: Path, tmp_path: Path) -> None:
    runs = plan_runs(tmp_path / "runs", 6, ["1e-9"])
    missing = list_missing(runs, 1)
    assert len(missing) == 9
    parts = (" ".join(["train", str(cached_folder / "tiny.yaml"), *SHORT, *words]) for words in missing)
    run_program("tests/support/several_runs.py", *" + ".join(parts).split())
    assert list_missing(runs, 1) == []  # finished runs are not trained again
    report = judge_all(runs, num_splits=20, seed=0)
    assert report["wrong"] == [] and report["possible_splits"] == 10
    assert list(report["errors"]) == [*(f"seed-{n}" for n in range(6)), *(f"lr-1e-9-seed-{n}" for n in range(3))]
    assert len(set(report["errors"].values())) == 7  # nothing learned is the same with any seed
    assert report["paired"]["splits"] == 20 and report["paired"]["samples"] >= 8
    verdicts = report["spoilt"]["1e-9"]
    assert verdicts["same seeds"].endswith("3 and 3 seeds, in pairs)")
    assert verdicts["other seeds"].endswith("3 and 3 seeds)")
    # Spoilt runs among the good ones are no matter of seeds, and are counted.
    mixed = {GOOD_LR: [*runs[GOOD_LR][:3], *runs["1e-9"]]}
    assert judge_all(mixed, num_splits=20, seed=0)["unpaired"]["false"] > 0


def test_wilsons_interval_by_hand() -> None:
    # 10 of 200: (10 + 1.9207) / 203.8415 ± 1.96 / 203.8415 · sqrt(9.5 + 0.9604)
    assert [round(edge, 4) for edge in compute_wilson_interval(10, 200)] == [0.0274, 0.0896]
    assert [round(edge, 4) for edge in compute_wilson_interval(0, 200)] == [0.0, 0.0188]
