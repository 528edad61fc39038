"""Counts false verdicts between runs that differ only in their seeds, and tries to find spoilt learning rates.

    python tests/campaigns/seed_only.py [--work DIR] [--runs 12] [--steps 30] [--images 300] [--splits 200] [--seed 0]
                                        [--spoilt 1e-2 1e-5]

Trains the quick start's tiny SDXL on the demo set, one run after the other. Random splits of the runs into 3 against 3
are then judged as two settings would be, unpaired and in pairs. A verdict other than `undecided` is false; at most 5 %
may be. Of each spoilt learning rate there are three more runs. Compared with three good runs of the same seeds, and
with three and six of other seeds, they must be `worse`. With --work, finished runs are not trained again. Prints a line
of JSON; exits with status 1 if something is wrong.

Splits of one pool share their runs, so they are not independent comparisons. The 95 % interval (Wilson) is that of the
share of false verdicts among all splits of these runs, and not of the share among all runs that could be trained.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import comb, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[2]
MAX_FALSE_SHARE = 0.05
ARM = 3  # runs
GOOD_LR, SPOILT_LRS = "5e-4", ("1e-2", "1e-5")
WORDS = (
    *("checkpoint.every_steps=0", "sample.prompts=[]", "sample.at_start=false", "sample.every_steps=0"),
    "optim.warmup_steps=2",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep images, model and runs here, and continue there")
    parser.add_argument("--runs", type=int, default=12, metavar="N", help="runs that differ only in the seed")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="optimizer steps of each run")
    parser.add_argument("--images", type=int, default=300, metavar="N", help="images, half of them for validation")
    parser.add_argument("--splits", type=int, default=200, metavar="N", help="random splits")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the splits")
    parser.add_argument("--spoilt", nargs="+", default=SPOILT_LRS, metavar="LR", help="learning rates (1e-2 1e-5)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        settings = prepare(folder, options.images)
        runs = plan_runs(folder.resolve() / "runs", options.runs, options.spoilt)
        for words in list_missing(runs, options.steps):
            launch(["train/main.py", "--cfg", str(settings), *words])
        report = judge_all(runs, options.splits, options.seed)
    print(json.dumps(report))
    return int(bool(report["wrong"]))


class PlannedRun(NamedTuple):
    """A run of the campaign."""

    folder: Path
    seed: int
    lr: str

    @property
    def words(self) -> list[str]:
        """Its own settings."""
        place = [f"run.dir={self.folder.parent}", f"run.name={self.folder.name}"]
        return [*place, f"run.seed={self.seed}", f"optim.lr={self.lr}"]


def launch(words: Sequence[str]) -> None:
    """Run a program of the checkout with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT, env=environment, stdout=sys.stderr)


def prepare(folder: Path, num_images: int) -> Path:
    """Draw images, write the pre-trained tiny SDXL, cache latents, and return the settings of all runs."""
    from sdxl_trainer.data.images.demo_set import NEW_SHAPES, SHAPES, draw_demo_set

    folder = folder.resolve()
    settings = folder / "settings.yaml"
    if settings.exists():
        return settings
    metadata = draw_demo_set(folder / "data", num_images, shapes=(*NEW_SHAPES, *SHAPES))
    launch(["-m", "sdxl_trainer.train.tiny", "--pretrained", "--out", str(folder / "model")])
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    config["model"]["path"] = str(folder / "model")
    config["data"]["metadata"] = [str(metadata)]
    config["cache"]["dir"] = str(folder / "latents")
    config["validation"] = {"share": 0.5}
    draft = folder / "draft.yaml"
    draft.write_text(yaml.safe_dump(config), encoding="utf-8")
    launch(["cache/main.py", "--cfg", str(draft)])
    return draft.rename(settings)


def plan_runs(folder: Path, num_good: int, spoilt_lrs: Sequence[str]) -> dict[str, list[PlannedRun]]:
    """Return the runs by their learning rates, the good ones first."""
    good = [PlannedRun(folder / f"seed-{seed}", seed, GOOD_LR) for seed in range(num_good)]
    spoilt = {lr: [PlannedRun(folder / f"lr-{lr}-seed-{seed}", seed, lr) for seed in range(ARM)] for lr in spoilt_lrs}
    return {GOOD_LR: good, **spoilt}


def list_missing(runs: Mapping[str, Sequence[PlannedRun]], num_steps: int) -> list[list[str]]:
    """Return the settings of each run that has not made its last step, which its last validation follows."""
    from sdxl_trainer.train.held_out.sample_errors import get_file

    missing = [run for group in runs.values() for run in group if not get_file(run.folder, num_steps).exists()]
    return [[*WORDS, f"train.max_steps={num_steps}", *run.words] for run in missing]


def judge_all(runs: Mapping[str, Sequence[PlannedRun]], num_splits: int, seed: int) -> dict[str, Any]:
    """Judge random splits of the good runs, and the spoilt runs, and list what is wrong."""
    good, *spoilt = ([run.folder for run in group] for group in runs.values())
    report: dict[str, Any] = {
        "errors": list_errors([folder for group in (good, *spoilt) for folder in group]),
        "possible_splits": comb(len(good), ARM) * comb(len(good) - ARM, ARM) // 2,
        "unpaired": count_false(good, num_splits, seed, is_paired=False),
        "paired": count_false(good, num_splits, seed, is_paired=True),
        "spoilt": {lr: judge_spoilt(good, group) for lr, group in zip([*runs][1:], spoilt, strict=True)},
    }
    wrong = [f"{name}: {report[name]}" for name in ("unpaired", "paired") if report[name]["share"] > MAX_FALSE_SHARE]
    for lr, verdicts in report["spoilt"].items():
        wrong += [f"{lr}, {name}: {text}" for name, text in verdicts.items() if not text.startswith("worse ")]
    return {**report, "wrong": wrong}


def list_errors(folders: Sequence[Path]) -> dict[str, float]:
    """Return the mean v error of each run at its last validation."""
    from sdxl_trainer.train.held_out.sample_errors import list_files, read_sample_errors

    last = {folder.name: list(list_files(folder).values())[-1] for folder in folders}
    return {name: round(float(read_sample_errors(file).columns["v_error"].mean()), 5) for name, file in last.items()}


def count_false(folders: Sequence[Path], num_splits: int, seed: int, is_paired: bool) -> dict[str, Any]:
    """Return the share of random splits whose verdict is not `undecided`, with its interval.

    Args:
        is_paired: the runs of a split get the seeds 0, 1 and 2 on both sides, so that they are judged in pairs.
    """
    from sdxl_trainer.train.evidence.comparison import UNDECIDED, compare_arms
    from sdxl_trainer.train.evidence.pairing import share_errors
    from sdxl_trainer.train.evidence.runs import SEED_KEY, Arm, open_runs
    from sdxl_trainer.train.held_out.sample_errors import WEIGHTS

    runs = open_runs(folders)
    tables = [run.read(max(run.validations)) for run in runs]
    shared = share_errors(tables, [run.name for run in runs], "v", WEIGHTS)
    random = np.random.default_rng(seed)

    def build_arm(numbers: np.ndarray) -> tuple[Arm, np.ndarray]:
        seeds = range(ARM) if is_paired else numbers
        chosen = [
            replace(runs[number], settings={**runs[number].settings, SEED_KEY: str(seed)})
            for number, seed in zip(numbers, seeds, strict=True)
        ]
        return Arm(label="", runs=chosen), numbers

    p_values, false = [], 0
    for _ in range(num_splits):
        first, second = np.split(random.permutation(len(runs))[: 2 * ARM], 2)
        setting = compare_arms(build_arm(first), build_arm(second), shared, {}).setting
        assert setting.is_paired == is_paired and setting.p_value is not None
        p_values.append(setting.p_value)
        false += setting.verdict != UNDECIDED
    low, high = compute_wilson_interval(false, num_splits)
    return {
        "false": false,
        "splits": num_splits,
        "share": false / num_splits,
        "low": round(low, 4),
        "high": round(high, 4),
        "smallest_p": round(min(p_values), 4),
        "samples": len(shared.samples),
    }


def judge_spoilt(good: Sequence[Path], spoilt: Sequence[Path]) -> dict[str, str]:
    """Return the verdicts on the spoilt runs, as the comparison prints them."""
    from sdxl_trainer.train.evidence.comparison import Options, compare_runs
    from sdxl_trainer.train.evidence.runs import open_runs
    from sdxl_trainer.train.evidence.text import describe_setting

    groups = {"same seeds": good[:ARM], "other seeds": good[ARM : 2 * ARM], "six of other seeds": good[ARM : 3 * ARM]}
    found = {}
    for name, baseline in groups.items():
        if not baseline:
            continue
        (arm,) = compare_runs(open_runs([*baseline, *spoilt]), Options(groups={})).arms
        found[name] = describe_setting(arm.setting, arm.weights.baseline)
    return found


def compute_wilson_interval(count: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927)."""
    middle = (count + z**2 / 2) / (total + z**2)
    margin = z / (total + z**2) * sqrt(count * (total - count) / total + z**2 / 4)
    return max(0.0, middle - margin), min(1.0, middle + margin)


if __name__ == "__main__":
    sys.exit(main())
