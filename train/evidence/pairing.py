"""Errors that runs share: the same samples at the same noise levels, at comparable moments of their training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sdxl_trainer.configs.problems import Problem, UserInputError, format_count
from sdxl_trainer.train.evidence.runs import Axis, EvidenceRun
from sdxl_trainer.train.held_out.sample_errors import LATENT_TOLERANCE, NUM_BINS, ErrorTable

IDENTITY = ("key", "bucket_width", "bucket_height")  # columns of the fields of Sample
COLUMNS = {"x0": "x0_error", "v": "v_error", "loss": "loss"}


class Sample(NamedTuple):
    """A sample of the validation set."""

    key: str
    width: int  # px, of its bucket
    height: int

    @property
    def bucket(self) -> str:
        """The name of its bucket."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class SharedErrors:
    """Errors that all runs have."""

    samples: list[Sample]  # [N]
    sources: list[int]  # [N] number of each sample's entry in the metadata of the first run
    errors: np.ndarray  # [runs, N, NUM_BINS] mean error of a sample's timesteps in a bin; NaN: not shared
    notes: list[str]  # of what was left out

    @property
    def means(self) -> np.ndarray:
        """The mean over the bins of each sample, [runs, N]."""
        return np.nanmean(self.errors, axis=2)


def choose_steps(runs: Sequence[EvidenceRun], axis: Axis) -> list[list[int]]:
    """Return the moments at which runs are compared, ascending, each with the step of every run.

    By steps and by samples these are the values that all runs have. If there are none by samples, and by time always,
    it is one moment: the last that every run has reached, with each run's last validation up to it.

    Raises:
        UserInputError: the runs have no such moment.
    """
    places = [run.measure(axis) for run in runs]
    shared = sorted(set.intersection(*(set(found.values()) for found in places)))
    if shared and axis != "time":
        at_value = [{value: step for step, value in found.items()} for found in places]
        return [[steps[value] for steps in at_value] for value in shared]
    limit = min(max(found.values()) for found in places)
    reached = [[step for step, value in found.items() if value <= limit] for found in places]
    if axis == "steps" or not all(reached):
        cure = "compare by --at samples or --at time, or validate the runs at the same steps"
        raise UserInputError([Problem("--at", axis, "finds no validation that all runs have in common", cure)])
    return [[max(steps) for steps in reached]]


def share_errors(tables: Sequence[ErrorTable], names: Sequence[str], error: str, average: str) -> SharedErrors:
    """Return the errors that all runs have.

    Args:
        tables, names: of each run.
        error: a name in COLUMNS.
        average: decay of a moving average, or `weights`.

    Raises:
        UserInputError: the runs were validated with other seeds, or share nothing.
    """
    seeds = [table.facts.seed for table in tables]
    if len(set(seeds)) > 1:
        values = ", ".join(f"{name}: {seed}" for name, seed in zip(names, seeds, strict=True))
        rule = "differs: noise and timesteps of the runs are not the same"
        raise _refuse("validation.seed", values, rule, "compare runs with the same validation.seed")
    _verify_average(tables, names, average)
    read = [_read_cells(table, name, error, average) for table, name in zip(tables, names, strict=True)]
    known = [set(found) for _, found in read]
    in_all, notes = set.intersection(*known), []
    in_any = set.union(*known)
    if not in_all:
        cure = "compare runs with the same validation set"
        raise _refuse("RUN_FOLDER", ", ".join(names), "have no validation sample in common", cure)
    if len(in_all) < len(in_any):
        notes.append(
            f"compared on {len(in_all):,} of {format_count(len(in_any), 'sample')}: the others are not in all runs"
        )
    powers = {sample: [found[sample] for _, found in read] for sample in in_all}
    same = sorted(
        sample for sample, found in powers.items() if max(found) - min(found) <= LATENT_TOLERANCE * max(found)
    )
    if not same:
        rule = "holds other latents in each run: another VAE, or other latent statistics"
        raise _refuse("cache", ", ".join(names), rule, "compare runs of one VAE with equal settings of its latents")
    if len(same) < len(in_all):
        notes.append(
            f"{format_count(len(in_all) - len(same), 'sample')} left out, whose latents differ between the runs"
        )
    errors = np.array(
        [[[cells.get((s, number), np.nan) for number in range(NUM_BINS)] for s in same] for cells, _ in read]
    )
    errors[:, np.isnan(errors).any(axis=0)] = np.nan
    has_any = ~np.isnan(errors[0]).all(axis=1)
    if not has_any.any():
        cure = "compare runs whose timesteps reach the same noise levels, or raise validation.timesteps_per_sample"
        rule = "leads to no noise level that all runs were validated at"
        raise _refuse("objective", ", ".join(names), rule, cure)
    if not _have_equal_timesteps(tables, set(same), average):
        notes.append("the runs were validated at other timesteps; they are compared by noise level, not noise by noise")
    samples = [sample for sample, is_kept in zip(same, has_any.tolist(), strict=True) if is_kept]
    return SharedErrors(samples, _list_sources(tables[0], samples), errors[:, has_any], notes)


def has_diverged(table: ErrorTable, average: str) -> bool:
    """Return whether no loss of a validation is a finite number."""
    return not np.isfinite(table.columns["loss"][table.columns["average"] == average]).any()


def _read_cells(
    table: ErrorTable, name: str, error: str, average: str
) -> tuple[dict[tuple[Sample, int], float], dict[Sample, float]]:
    """Return the mean error of each sample in each bin, and the mean square of each sample's latents."""
    columns = table.columns
    chosen = columns["average"] == average
    if has_diverged(table, average):
        rule = "has diverged: no error of its validation is a finite number"
        raise UserInputError([Problem("RUN_FOLDER", name, rule, "leave it out")])
    fields = (*IDENTITY, "log_snr_bin", "x0_power", COLUMNS[error])
    cells: dict[tuple[Sample, int], list[float]] = {}
    powers: dict[Sample, float] = {}
    for *words, number, power, value in zip(*(columns[field][chosen].tolist() for field in fields), strict=True):
        sample = Sample(*words)
        powers[sample] = power
        if np.isfinite(value):
            cells.setdefault((sample, number), []).append(value)
    return {cell: sum(values) / len(values) for cell, values in cells.items()}, powers


def _list_sources(table: ErrorTable, samples: Sequence[Sample]) -> list[int]:
    rows = zip(*(table.columns[name].tolist() for name in (*IDENTITY, "source")), strict=True)
    sources = {Sample(*words): source for *words, source in rows}
    return [sources[sample] for sample in samples]


def _verify_average(tables: Sequence[ErrorTable], names: Sequence[str], average: str) -> None:
    """Raise UserInputError if a run was not validated with an average; name those that all runs have."""
    known = [set(table.columns["average"].tolist()) for table in tables]
    shared = ", ".join(sorted(set.intersection(*known)))
    for name, found in zip(names, known, strict=True):
        if average not in found:
            rule = f"is not among the weights that {name} was validated with: {', '.join(sorted(found))}"
            cure = "train with ema.decays or ema.lengths"
            raise _refuse("--average", average, rule, f"choose one of {shared}, or {cure}" if shared else cure)


def _have_equal_timesteps(tables: Sequence[ErrorTable], samples: set[Sample], average: str) -> bool:
    """Return whether the samples that are compared have the same timesteps in all runs."""

    def list_lines(table: ErrorTable) -> set[tuple]:
        columns = [table.columns[name].tolist() for name in (*IDENTITY, "turn", "log_snr", "average")]
        lines = [(Sample(*line[:3]), *line[3:5]) for line in zip(*columns, strict=True) if line[5] == average]
        return {line for line in lines if line[0] in samples}

    first, *others = map(list_lines, tables)
    return all(other == first for other in others)


def _refuse(key: str, value: str, rule: str, cure: str) -> UserInputError:
    return UserInputError([Problem(key, value, rule, cure)])
