"""The step of a run with the lowest x0 error on its validation samples, and the steps that are not measurably worse.

Errors are geometric means over noise levels and samples (train/held_out/history.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdxl_trainer.train.held_out.history import ErrorHistory, read_histories
from sdxl_trainer.train.held_out.inference import MIN_SAMPLES, Interval, bootstrap_together
from sdxl_trainer.train.held_out.sample_errors import list_files


class Excess(NamedTuple):
    """The error of a step above that of the best step, in shares of the latter, with its interval."""

    step: int
    mean: float
    low: float
    high: float
    is_worse: bool  # measurably


@dataclass(frozen=True, kw_only=True)
class BestStep:
    """The step with the lowest mean error."""

    step: int
    error: float
    excesses: list[Excess]  # of each step whose error is finite, ascending; 0 for the best step itself

    @property
    def equals(self) -> list[int]:
        """The steps that are not measurably worse than the best one, and the best step."""
        return [excess.step for excess in self.excesses if not excess.is_worse]


class Ranking(NamedTuple):
    """Validated steps of a run, best first."""

    steps: list[int]
    damaged: dict[int, str]  # steps whose validation cannot be read, with the reason


def find_lowest(means: np.ndarray) -> int | None:
    """Return the place of the lowest finite mean, the first one of equals; None if none is finite."""
    return int(np.where(np.isfinite(means), means, np.inf).argmin()) if np.isfinite(means).any() else None


def find_best_step(history: ErrorHistory) -> BestStep | None:
    """Return the best step of the weights, or of an average; None if no validation has a finite error.

    Steps are compared with the best one sample by sample (bootstrap over samples). The intervals hold for all steps
    together, because the best step is chosen among them.
    """
    means = history.means
    best = find_lowest(means)
    if best is None:
        return None
    known = np.flatnonzero(np.isfinite(means))
    differences = (history.log_errors[known] - history.log_errors[best]).T  # [N, finite steps]
    if len(differences) > 1:
        intervals = bootstrap_together(differences)
    else:
        intervals = [Interval(mean, math.nan, math.nan, 1.0) for mean in differences[0].tolist()]
    excesses = [
        Excess(
            history.steps[place],
            *map(math.expm1, interval[:3]),
            is_worse=interval.low > 0 and len(differences) >= MIN_SAMPLES,
        )
        for place, interval in zip(known.tolist(), intervals, strict=True)
    ]
    return BestStep(step=history.steps[best], error=float(means[best]), excesses=excesses)


def rank_steps(run_folder: Path, steps: Sequence[int]) -> Ranking:
    """Rank steps by their validations, lowest x0 error first, the earlier one of equals.

    A step counts with the lower of the errors of its weights and its averages, because a checkpoint holds all of them.
    Steps without a validation, or with errors that are not finite, are missing. If validations cannot be compared,
    because the validation set has changed, steps that were validated like the last one come first.
    """
    known = list_files(run_folder)
    files = {step: known[step] for step in steps if step in known}
    order, damaged = [], {}
    while files:
        histories = read_histories(files)
        damaged |= histories.damaged
        errors: dict[int, float] = {}
        for history in histories.by_average.values():
            for step, mean in zip(history.steps, history.means.tolist(), strict=True):
                errors[step] = min(mean, errors.get(step, math.inf))
        order += sorted((step for step in errors if math.isfinite(errors[step])), key=lambda step: (errors[step], step))
        newest = max(files)  # dropped in any case, so that the loop ends
        files = {step: files[step] for step in histories.others if step != newest}
    return Ranking(order, damaged)
