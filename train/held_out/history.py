"""x0 errors over the steps of a run: those of all its validations that can be compared with each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdxl_trainer.train.held_out.sample_errors import LATENT_TOLERANCE, NUM_BINS, ErrorTable, read_sample_errors

TIMESTEP_TOLERANCE = 1e-2
MIN_SHARED = 0.9  # share of the newest validation's lines; a validation that has fewer is of another set
SMALLEST_ERROR = 1e-30
IDENTITY = ("key", "bucket_width", "bucket_height", "turn")  # columns that name a line of a validation


def average_logs(errors: np.ndarray) -> np.ndarray:
    """Return the mean over the bins of the logarithm of each sample's errors, [T, N].

    exp of its mean over samples is the x0 error.

    Errors of the noisiest bins are a thousand times those of the others, so that a plain mean would be theirs alone. Of
    logarithms, a change by 1 % counts alike in each bin, and errors of x0 and of v say the same.

    Args:
        errors: [T, N, NUM_BINS]; NaN for a bin without errors.
    """
    return np.nanmean(np.log(np.maximum(errors, SMALLEST_ERROR)), axis=2)


@dataclass(frozen=True, kw_only=True)
class ErrorHistory:
    """The x0 errors of the weights, or of one moving average, on the samples that the validations share."""

    steps: list[int]  # [T] ascending
    errors: np.ndarray  # [T, N, NUM_BINS] mean over the timesteps in a bin; NaN: none; infinite: the weights diverged

    @cached_property
    def log_errors(self) -> np.ndarray:
        """The mean over the bins of the logarithm of each sample's errors, [T, N]."""
        return average_logs(self.errors)

    @cached_property
    def means(self) -> np.ndarray:
        """The geometric mean of each validation's errors, [T]."""
        return np.exp(self.log_errors.mean(axis=1))

    @property
    def bin_means(self) -> np.ndarray:
        """The mean error of each validation in each bin, [T, NUM_BINS]; NaN for a bin without samples."""
        num_samples = (~np.isnan(self.errors[0])).sum(axis=0)
        with np.errstate(invalid="ignore"):
            return np.nansum(self.errors, axis=1) / num_samples


class Histories(NamedTuple):
    """The comparable validations of a run."""

    by_average: dict[str, ErrorHistory]  # that of the weights has the name WEIGHTS
    others: list[int]  # steps that were validated with another set, seed or other timesteps than the last one
    damaged: dict[int, str]  # steps whose files cannot be read, with the reason


def read_histories(files: Mapping[int, Path]) -> Histories:
    """Read validations. Those that can be compared with the last one count.

    They have the same seed, timesteps and latents, and at least MIN_SHARED of its samples. Only samples that are in all
    of them count.

    Args:
        files: of each validation by its step.
    """
    reference: _Reference | None = None
    found: dict[str, dict[int, np.ndarray]] = {}
    others, damaged = [], {}
    for step in sorted(files, reverse=True):
        try:
            table = read_sample_errors(files[step])
        except (OSError, ValueError) as error:
            damaged[step] = str(error)
            continue
        if reference is None:
            reference = _Reference(table)
        errors = reference.align(table)
        if not errors:
            others.append(step)
        for average, lines in errors.items():
            found.setdefault(average, {})[step] = lines
    histories = {
        average: history
        for average, lines in found.items()
        if reference is not None and (history := reference.build_history(average, lines)) is not None
    }
    return Histories(histories, sorted(others), damaged)


class _Reference:
    """The lines of the newest validation, which those of others are aligned with."""

    def __init__(self, table: ErrorTable):
        self._facts, self._lines = table.facts, {name: _select(table, name) for name in _list_averages(table)}

    def align(self, table: ErrorTable) -> dict[str, np.ndarray]:
        """Return the x0 errors of another validation in the order of this one's lines, [lines] for each average.

        NaN is an error that is undefined or not finite; -1 a line that is missing. Empty if they cannot be compared.
        """
        if (table.facts.seed, table.facts.timesteps_per_sample) != (self._facts.seed, self._facts.timesteps_per_sample):
            return {}
        found = {}
        for average in _list_averages(table):
            if average not in self._lines:
                continue
            own, other = self._lines[average], _select(table, average)
            rows = _match(own, other)  # of the other for each line of this one; -1: missing
            is_there = rows >= 0
            for column, tolerance in (("x0_power", LATENT_TOLERANCE), ("timestep", TIMESTEP_TOLERANCE)):
                is_there &= np.isclose(other[column][rows], own[column], rtol=tolerance, atol=1e-12)
            if is_there.mean() >= MIN_SHARED:
                errors = other["x0_error"][rows].astype(float)
                found[average] = np.where(is_there, np.where(np.isfinite(errors), errors, np.nan), -1.0)
        return found

    def build_history(self, average: str, lines: Mapping[int, np.ndarray]) -> ErrorHistory | None:
        """Return the history of an average; None if no error is defined.

        Args:
            lines: errors by step, as `align` returns them.
        """
        steps, own = sorted(lines), self._lines[average]
        errors = np.stack([lines[step] for step in steps])  # [T, lines]
        is_shared = (errors != -1).all(axis=0) & np.isfinite(errors).any(axis=0)
        if not is_shared.any():
            return None
        errors = np.where(np.isnan(errors), np.inf, errors)[:, is_shared]
        names = list(zip(*(own[name][is_shared].tolist() for name in IDENTITY[:3]), strict=True))
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        cells = np.array([numbers[name] for name in names]) * NUM_BINS + own["log_snr_bin"][is_shared]
        num_cells = len(numbers) * NUM_BINS
        counts = np.bincount(cells, minlength=num_cells)
        sums = np.stack([np.bincount(cells, row, num_cells) for row in errors])
        with np.errstate(invalid="ignore"):  # cells without a timestep become NaN
            means = sums / counts
        return ErrorHistory(steps=steps, errors=means.reshape(len(steps), len(numbers), NUM_BINS))


def _list_averages(table: ErrorTable) -> list[str]:
    return list(dict.fromkeys(table.columns["average"].tolist()))


def _select(table: ErrorTable, average: str) -> dict[str, np.ndarray]:
    """Return the columns of an average, without those that are not used."""
    chosen = table.columns["average"] == average
    names = (*IDENTITY, "log_snr_bin", "timestep", "x0_power", "x0_error")
    return {name: table.columns[name][chosen] for name in names}


def _match(own: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the place among the other's lines of each own line, -1 for a line that it lacks."""
    if all(np.array_equal(own[name], other[name]) for name in IDENTITY):  # nearly always
        return np.arange(len(own["key"]))
    places = {line: place for place, line in enumerate(_name_lines(other))}
    return np.array([places.get(line, -1) for line in _name_lines(own)], dtype=np.int64)


def _name_lines(lines: Mapping[str, np.ndarray]) -> list[tuple]:
    return list(zip(*(lines[name].tolist() for name in IDENTITY), strict=True))
