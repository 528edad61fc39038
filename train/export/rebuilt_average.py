"""Post-hoc EMA: an average of any length, summed up from the snapshots of a run (arXiv 2312.02696, section 3)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger
from safetensors import safe_open

from sdxl_trainer.configs.problems import Problem, UserInputError, format_count
from sdxl_trainer.configs.schema import MAX_EMA_LENGTH
from sdxl_trainer.train.engine.power_profiles import Fit, Profile, compute_gamma, fit_profile
from sdxl_trainer.train.export.average_snapshots import Snapshot, SnapshotFacts, list_snapshots

# A sum whose profile differs by more is another average than the one that was asked for.
MAX_RESIDUAL = 0.1
# An average that was added to a run later holds the weights of that moment, by this share at most.
MAX_JOINED_SHARE = 1e-3
SMALLEST_COEFFICIENT = 1e-9  # below the rounding of a sum in fp32
TRIED_LENGTHS = np.geomspace(0.005, MAX_EMA_LENGTH, 81)
MAX_NAMED = 6  # steps that a message lists


@dataclass(frozen=True, kw_only=True)
class RebuiltAverage:
    """A sum of snapshots whose profile is that of another length."""

    length: float
    step: int
    snapshots: Sequence[Snapshot]
    fit: Fit

    def describe(self) -> str:
        """Describe the sum, and how near it comes to the average of that length."""
        lengths = ", ".join(f"{length:g}" for length in sorted({s.facts.length for s in self.snapshots}))
        types = ", ".join(sorted({s.facts.dtype for s in self.snapshots}))
        files = format_count(len(self.snapshots), "file")
        return (
            f"average of length {self.length:g} at step {self.step:,} from {files} of the lengths {lengths}: its "
            f"profile differs by {self.fit.residual:.2%}, and rounding of {types} counts {self.fit.rounding:.2g} times"
        )

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the model file."""
        return {
            "sdxl_trainer.ema_length": f"{self.length:g}",
            "sdxl_trainer.step": str(self.step),
            "sdxl_trainer.ema_residual": f"{self.fit.residual:.2g}",
        }

    def open_weights(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Map the name of each trained weight to a function that sums it up in fp32, one snapshot after the other."""
        used = [
            (float(coefficient), safe_open(snapshot.file, "pt"))
            for coefficient, snapshot in zip(self.fit.coefficients, self.snapshots, strict=True)
            if abs(coefficient) > SMALLEST_COEFFICIENT
        ]
        return {name: partial(_sum_up, name, used) for name in self.snapshots[0].shapes}


def _sum_up(name: str, used: Sequence[tuple[float, Any]]) -> torch.Tensor:
    total: torch.Tensor | None = None
    for coefficient, file in used:
        part = file.get_tensor(name).float()
        # Not in place: the part may be the file itself, mapped into memory.
        total = part * coefficient if total is None else total.add_(part, alpha=coefficient)
    assert total is not None, "coefficients add up to 1"
    return total


def rebuild_average(run_folder: Path, length: float, step: int | None = None) -> RebuiltAverage:
    """Find the sum of a run's snapshots that is the average of a length.

    Args:
        step: at which the average ends; there must be a snapshot of it. Default: the last one.

    Raises:
        UserInputError: the snapshots at hand do not reach the length or the step.
    """
    snapshots = list_snapshots(run_folder) if run_folder.is_dir() else []
    problems = list(check_request(run_folder, snapshots, length, step))
    if problems:
        raise UserInputError(problems)
    step = snapshots[-1].facts.step if step is None else step
    updates = next(snapshot.facts.updates for snapshot in snapshots if snapshot.facts.step == step)
    chosen = choose_snapshots(snapshots, step)
    if not chosen:
        rule = f"cannot be computed at step {step}: its averages had only just been added to the run"
        raise UserInputError([Problem("--ema-length", length, rule, "train on, or give another --step")])
    profiles, wanted = [snapshot.profile for snapshot in chosen], Profile(updates, length)
    fit = fit_profile(profiles, wanted)
    if fit.residual > MAX_RESIDUAL:
        raise UserInputError([build_problem(profiles, wanted, fit.residual)])
    return RebuiltAverage(length=length, step=step, snapshots=chosen, fit=fit)


def check_request(
    run_folder: Path, snapshots: Sequence[Snapshot], length: float, step: int | None
) -> Iterator[Problem]:
    """Yield a problem if the run has no snapshots, or none at the step, or if no average has that length."""
    if not 0 < length <= MAX_EMA_LENGTH:
        rule = f"must be above 0 and at most {MAX_EMA_LENGTH:g}: a share of the training"
        yield Problem("--ema-length", length, rule, "give a length such as 0.1")
    steps = sorted({snapshot.facts.step for snapshot in snapshots})
    if not steps:
        rule = f"needs the snapshots of a run, and {run_folder}/snapshots has none"
        yield Problem("--ema-length", length, rule, "give the folder of a run that was trained with ema.lengths")
    elif step is not None and step not in steps:
        shown = [str(number) for number in steps]
        if len(shown) > MAX_NAMED:
            shown = [*shown[:2], "…", *shown[-3:]]
        yield Problem("--step", step, "has no snapshot", f"give one of {', '.join(shown)}")


def choose_snapshots(snapshots: Sequence[Snapshot], step: int) -> list[Snapshot]:
    """Return the snapshots up to a step that can be summed up: of one clock, and with the same weights.

    Those of averages that were added later are left out while they hold the weights of that moment.
    """
    last = next(snapshot for snapshot in snapshots if snapshot.facts.step == step)
    chosen: dict[Profile, Snapshot] = {}
    num_left = 0
    for snapshot in snapshots:
        if snapshot.facts.step > step:
            continue
        if snapshot.shapes == last.shapes and is_usable(snapshot.facts, last.facts.first_step):
            chosen[snapshot.profile] = snapshot
        else:
            num_left += 1
    if num_left:
        logger.info("{} left out: of averages that began later, or of other weights", format_count(num_left, "file"))
    return list(chosen.values())


def is_usable(facts: SnapshotFacts, first_step: int) -> bool:
    """Return whether a snapshot is of the clock that started at `first_step`, and nearly free of its first weights."""
    if facts.updates < 1 or facts.first_step != first_step:
        return False
    return (facts.joined / facts.updates) ** (compute_gamma(facts.length) + 1) <= MAX_JOINED_SHARE


def build_problem(profiles: Sequence[Profile], wanted: Profile, residual: float) -> Problem:
    """Build the problem of a length out of reach, which names the nearest lengths within it."""
    length = wanted.length
    reached = [
        float(tried)
        for tried in TRIED_LENGTHS
        if fit_profile(profiles, wanted._replace(length=float(tried))).residual <= MAX_RESIDUAL
    ]
    near = [
        *([f"{max(below):.2g}"] if (below := [tried for tried in reached if tried < length]) else []),
        *([f"{min(above):.2g}"] if (above := [tried for tried in reached if tried > length]) else []),
    ]
    rule = f"is out of reach of these snapshots: the profile would differ by {residual:.0%}, and may by 10 %"
    cure = f"give {' or '.join(near)}" if near else "train with more snapshots (ema.snapshot_every_steps)"
    return Problem("--ema-length", length, rule, cure)
