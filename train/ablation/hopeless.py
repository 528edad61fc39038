"""The rule by which an ablation stops an arm early."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.train.evidence.comparison import describe_differences
from sdxl_trainer.train.evidence.pairing import has_diverged, share_errors
from sdxl_trainer.train.held_out.sample_errors import WEIGHTS, list_files, read_sample_errors

FIRST_SHARE = 0.25  # of the steps, before which nothing is stopped: warm-up and early noise
MARGIN = 0.1  # of the baseline's error
NUM_IN_A_ROW = 2  # validations


class Hopeless(NamedTuple):
    """Why an arm was stopped: its v error above the baseline's, in shares of the latter; None if it has diverged."""

    step: int
    excess: float | None
    low: float | None  # end of the 95 % interval


def describe_hopeless(verdict: Hopeless) -> str:
    """Return why an arm was stopped, in a sentence."""
    if verdict.excess is None or verdict.low is None:
        return f"at step {verdict.step} its validation errors are not finite numbers: the weights have diverged"
    return (
        f"at step {verdict.step} its v error is {100 * verdict.excess:.0f} % above the baseline's "
        f"(95 % interval from {100 * verdict.low:.0f} %)"
    )


def find_diverged(run_folder: Path) -> Hopeless | None:
    """Return at which validation no error of a run is a finite number any more: the last one; None for a sound run."""
    for step, file in reversed(list_files(run_folder).items()):
        with suppress(OSError, ValueError):
            return Hopeless(step, None, None) if has_diverged(read_sample_errors(file), WEIGHTS) else None
    return None


def find_hopeless(run_folder: Path, baseline_folder: Path, num_steps: int) -> Hopeless | None:
    """Judge a run at the last validations that it shares with the baseline's run of the same seed.

    A run is hopeless if its errors are not finite numbers, or if, at two validations in a row after the first quarter
    of the steps, the lower end of the 95 % interval of the difference (bootstrap over samples) lies more than MARGIN
    above the baseline.

    Args:
        num_steps: optimizer steps of a whole run.
    """
    if diverged := find_diverged(run_folder):
        return diverged
    own, baseline = list_files(run_folder), list_files(baseline_folder)
    steps = [step for step in sorted(own.keys() & baseline.keys()) if step >= FIRST_SHARE * num_steps][-NUM_IN_A_ROW:]
    if len(steps) < NUM_IN_A_ROW:
        return None
    found = [_compare(own[step], baseline[step], step) for step in steps]
    return found[-1] if all(one is not None and one.low is not None and one.low > MARGIN for one in found) else None


def _compare(own: Path, baseline: Path, step: int) -> Hopeless | None:
    try:
        tables = [read_sample_errors(baseline), read_sample_errors(own)]
        means = share_errors(tables, ["baseline", "arm"], "v", WEIGHTS).means  # [2, N]
    except (OSError, ValueError, UserInputError):  # damaged, or without a noise level in common
        return None
    for difference in describe_differences(["all"], means[..., None]):
        if difference.baseline > 0:
            return Hopeless(step, difference.difference / difference.baseline, difference.low / difference.baseline)
    return None
