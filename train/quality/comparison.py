"""Measures of all models from their features and validation files, with the baseline's beside them."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import Ranks, gather_objects
from sdxl_trainer.train.evidence.pairing import share_errors
from sdxl_trainer.train.held_out.history import average_logs
from sdxl_trainer.train.held_out.inference import adjust_by_holm
from sdxl_trainer.train.held_out.sample_errors import WEIGHTS, get_file, read_sample_errors
from sdxl_trainer.train.quality.models import MeasuredModel
from sdxl_trainer.train.quality.resampling import (
    CLIP_ONLY,
    MEASURES,
    NUM_SUBSETS,
    Estimate,
    Resampled,
    draw_counts,
    draw_subsets,
    halve,
    resample_measure,
)
from sdxl_trainer.train.quality.result import UNDECIDED, Floor, Line, Subsets, judge

X0_ERROR = "x0 error"
NEVER_NEGATIVE = {X0_ERROR, "FID", "CMMD"}  # KID can be: it is right on average


class FeatureSet(NamedTuple):
    """Features of one feature model, [n, D] each, in the order of the samples."""

    name: str
    is_clip: bool
    drawn: list[torch.Tensor]  # of each model
    reference: torch.Tensor


def measure_features(features: FeatureSet, ranks: Ranks) -> dict[str, Resampled]:
    """Compute the measures with their resamples, which the ranks share. All ranks call it together."""
    counts = draw_counts(len(features.reference)).to(features.reference.device)
    found = {}
    for name, measure in MEASURES.items():
        if name in CLIP_ONLY and not features.is_clip:
            continue
        values = np.array([float(measure(x, features.reference, None, None)) for x in features.drawn])
        ACTIVITY.note()
        mine = counts[ranks.rank :: ranks.world_size]
        parts = gather_objects(resample_measure(measure, features.drawn, features.reference, mine))
        found[name] = Resampled(values, np.concatenate(parts), len(features.reference))
        ACTIVITY.note()
    return found


def list_subsets(features: FeatureSet, labels: Sequence[str]) -> list[Subsets]:
    """Return KID over subsets of each model's images."""
    pairs = [counts.to(features.reference.device) for counts in draw_subsets(len(features.reference))]
    found = []
    for label, x in zip(labels, features.drawn, strict=True):
        values = MEASURES["KID"](x, features.reference, *pairs)
        found.append(
            Subsets(
                features=features.name,
                model=label,
                num_subsets=NUM_SUBSETS,
                num_images=int(pairs[0][0].sum()),
                mean=float(values.mean()),
                deviation=float(values.std()),
            )
        )
    return found


def list_floors(features: FeatureSet, names: Sequence[str], labels: Sequence[str]) -> list[Floor]:
    """Return measures between two halves of the validation images: what remains without any difference.

    Beside them are those of each model's images for the captions of the first half, against the second half. They are
    of as many images, and of other captions too.
    """
    first, second = halve(len(features.reference))

    def compute(name: str, images: torch.Tensor) -> float:
        return float(MEASURES[name](images[first], features.reference[second], None, None))

    return [
        Floor(
            measure=name,
            features=features.name,
            num_images=len(first),
            value=compute(name, features.reference),
            models={label: compute(name, x) for label, x in zip(labels, features.drawn, strict=True)},
        )
        for name in names
    ]


def list_lines(measure: str, features: str, labels: Sequence[str], resampled: Resampled) -> list[Line]:
    """Return the lines of a measure, the baseline's first. Their p-values are not corrected yet."""
    lines = []
    for number, label in enumerate(labels):
        own = resampled.estimate(number)
        low = max(own.low, 0.0) if measure in NEVER_NEGATIVE else own.low
        line = Line(
            measure=measure,
            features=features,
            model=label,
            num_images=resampled.num_images,
            value=own.value,
            low=low,
            high=own.high,
        )
        lines.append(_add_difference(line, resampled.estimate_difference(number, 0)) if number else line)
    return lines


def _add_difference(line: Line, difference: Estimate) -> Line:
    return msgspec.structs.replace(
        line,
        difference=difference.value,
        difference_low=difference.low,
        difference_high=difference.high,
        p_value=difference.p_value,
        verdict=UNDECIDED,
    )


def correct_verdicts(lines: Sequence[Line]) -> list[Line]:
    """Return lines whose p-values hold for all of them together (Holm), with the verdicts that follow."""
    compared = [line for line in lines if line.difference is not None and line.p_value is not None]
    adjusted = iter(adjust_by_holm([line.p_value for line in compared if line.p_value is not None]))
    corrected = []
    for line in lines:
        if line.difference is not None:
            p_value = next(adjusted)
            line = msgspec.structs.replace(line, p_value=p_value, verdict=judge(line.difference, p_value))
        corrected.append(line)
    return corrected


def measure_x0(models: Sequence[MeasuredModel], keys: set[str]) -> tuple[list[Line], list[str]]:
    """Return the lines of the x0 error, by the validations of the runs at the steps of their checkpoints, and notes.

    It is the geometric mean over noise levels and samples, as a run logs it (train/held_out/history.py). Only samples
    that are measured, and that all validations have, count. Models that are no runs have no validation; without the
    baseline's there are no lines.
    """
    measured, tables, notes = [], [], []
    for model in models:
        file = None if model.run_folder is None else get_file(model.run_folder, model.step or 0)
        if file is None or not file.is_file():
            notes.append(f"x0 error: {model.label} is not a checkpoint of a run that was validated at its step")
            continue
        try:
            tables.append(read_sample_errors(file))
            measured.append(model)
        except ValueError as error:
            notes.append(f"x0 error: {error}")
    if not measured or measured[0] is not models[0]:
        return [], notes
    labels = [model.label for model in measured]
    try:
        shared = share_errors(tables, labels, "x0", models[0].average or WEIGHTS)
    except UserInputError as error:
        return [], [*notes, *(f"x0 error: {problem.value} {problem.rule}" for problem in error.problems)]
    chosen = [number for number, sample in enumerate(shared.samples) if sample.key in keys]
    if len(chosen) < 2:
        return [], [*notes, "x0 error: the validations hold other samples"]
    logs = torch.from_numpy(average_logs(shared.errors[:, chosen]))  # [models, n]
    counts = draw_counts(len(chosen)).double()
    resampled = Resampled(logs.mean(1).exp().numpy(), (counts @ logs.T / len(chosen)).exp().numpy(), len(chosen))
    return list_lines(X0_ERROR, "", labels, resampled), notes
