"""Runs that are compared: their validations, and the arms that they form. An arm is one setting with several seeds."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.train.held_out.sample_errors import ErrorTable, list_files, read_sample_errors
from sdxl_trainer.train.report.charts import read_series
from sdxl_trainer.train.report.settings import read_settings

Axis = Literal["steps", "samples", "time"]
AXES: dict[str, Axis] = {"steps": "steps", "samples": "samples", "time": "time"}
SEED_KEY = "run.seed"
# Settings that do not change what a run learns.
NEUTRAL_SETTINGS = ("run.", "log.", "checkpoint.", "sample.", "validation.every_steps", "validation.at_start")


@dataclass(frozen=True, kw_only=True)
class EvidenceRun:
    """A run with its validations."""

    folder: Path
    name: str  # of the folder, or its path if another run's folder has that name
    settings: dict[str, str]  # by dotted key
    validations: dict[int, Path]  # files by step, ascending
    seconds: dict[int, float]  # of training, by the step of each validation

    @property
    def seed(self) -> str:
        """The seed of the run."""
        return self.settings.get(SEED_KEY, "")

    @property
    def learned_by(self) -> dict[str, str]:
        """The settings that change what a run learns, without its seed."""
        return {key: value for key, value in self.settings.items() if not key.startswith(NEUTRAL_SETTINGS)}

    def read(self, step: int) -> ErrorTable:
        """Read the errors of a validation. Raises OSError or ValueError."""
        return read_sample_errors(self.validations[step])

    def measure(self, axis: Axis) -> dict[int, float]:
        """Return the place of each validation on an axis, by its step: steps, samples seen, or seconds of training."""
        if axis == "steps":
            return {step: float(step) for step in self.validations}
        if axis == "time":
            return self.seconds
        return {step: float(self.read(step).facts.samples_seen) for step in self.validations}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs whose settings differ only in their seed."""

    label: str
    runs: list[EvidenceRun]

    @property
    def num_seeds(self) -> int:
        """The number of different seeds."""
        return len({run.seed for run in self.runs})


def check_runs(folders: Sequence[Path]) -> Iterator[Problem]:
    """Yield a problem for each folder that is no run with stored validations."""
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            yield Problem(
                "RUN_FOLDER", folder, "is not a run folder: it contains no config.yaml", "name a run's folder"
            )
        elif not list_files(folder):
            cure = "train it again, or resume it, with validation.share or a set of its own (docs/EVIDENCE.md)"
            yield Problem("RUN_FOLDER", folder, "has no validations in logs/validation", cure)
    if len(set(map(Path.resolve, folders))) < len(folders):
        yield Problem("RUN_FOLDER", folders[-1], "names a run twice", "name each run once")


def open_runs(folders: Sequence[Path]) -> list[EvidenceRun]:
    """Open runs that `check_runs` has accepted."""
    names = [folder.resolve().name for folder in folders]
    has_own_name = [names.count(name) == 1 for name in names]
    found = zip(folders, names, has_own_name, strict=True)
    return [_open_run(folder, name if is_own else str(folder)) for folder, name, is_own in found]


def _open_run(folder: Path, name: str) -> EvidenceRun:
    files = list_files(folder)
    series = read_series(folder / "logs" / "metrics.jsonl").get("step_seconds")
    steps, sums = ([], [0.0])
    if series is not None:
        steps, sums = series.steps.tolist(), [0.0, *np.cumsum(np.nan_to_num(series.values)).tolist()]
    return EvidenceRun(
        folder=folder,
        name=name,
        settings=read_settings(folder / "config.yaml"),
        validations=files,
        seconds={step: sums[bisect.bisect_right(steps, step)] for step in files},
    )


def list_differences(runs: Sequence[EvidenceRun]) -> dict[str, list[str]]:
    """Return the settings that differ between runs and change what they learn, with each run's value ("" for none)."""
    keys = dict.fromkeys(key for run in runs for key in run.learned_by)
    values = {key: [run.settings.get(key, "") for run in runs] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def form_arms(runs: Sequence[EvidenceRun]) -> list[Arm]:
    """Group runs into arms, in the order of their first runs.

    Runs that differ only in their seeds become arms of one run each: nothing but their weights can be compared.
    """
    groups: dict[tuple, list[EvidenceRun]] = {}
    for run in runs:
        groups.setdefault(tuple(sorted(run.learned_by.items())), []).append(run)
    if len(groups) == 1:
        return [Arm(label=run.name, runs=[run]) for run in runs]
    differing = list_differences(runs)
    return [Arm(label=_name_arm(group, differing), runs=group) for group in groups.values()]


def _name_arm(group: Sequence[EvidenceRun], differing: dict[str, list[str]]) -> str:
    settings = group[0].learned_by
    words = [f"{key}={settings[key]}" for key in differing if key in settings]
    return " ".join(words) if 0 < len(words) <= 3 else ", ".join(run.name for run in group)
