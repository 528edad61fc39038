"""Steps whose loss or gradient is not finite: no update is made, and the samples are listed.

The engine makes no update with a gradient that is not finite, on all ranks alike. The fp16 loss scaler finds its scale
by such steps: if only the scale was too large, nothing is wrong.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from loguru import logger

from sdxl_trainer.configs.problems import FailedError
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.loading.micro_batch import MicroBatch
from sdxl_trainer.launch.distributed import gather_objects
from sdxl_trainer.train.checkpoint.folder import find_fallback, list_checkpoints
from sdxl_trainer.train.objective.loss_feedback import MicroLosses, NoiseLevels
from sdxl_trainer.train.run.run import Run

MAX_SHOWN = 8
MIN_BROKEN_STEPS = 3  # in a row without an update, from which on the weights and not the samples are suspected


class NonFiniteError(FailedError):
    """The loss or the gradient was not finite, and the settings do not allow another such step."""


class MicroStep(NamedTuple):
    """A micro batch of this rank, and the loss of each sample."""

    batch: MicroBatch
    losses: torch.Tensor  # [B], weighted
    plain_losses: torch.Tensor  # [B], without weights of samples and learned ones
    levels: NoiseLevels | None  # None without loss feedback

    def detach(self) -> "MicroStep":
        """Return the micro step without the graph of its losses."""
        return self._replace(losses=self.losses.detach(), plain_losses=self.plain_losses.detach())

    def list_losses(self) -> MicroLosses:
        """Return what the loss feedback needs."""
        assert self.levels is not None, "the objective has loss feedback"
        return MicroLosses(self.plain_losses, self.batch.positions, self.batch.weights, self.levels)


class NonFiniteSample(NamedTuple):
    """A sample whose loss is not finite, or whose batch has a gradient that is not."""

    key: str
    file: str
    reason: str


def propagate_non_finite(loss: torch.Tensor) -> torch.Tensor:
    """Return the loss unchanged, but with a gradient of NaN everywhere if the loss is not finite.

    Otherwise an infinite difference has a finite gradient under `l1`, and so has one whose square overflows under `l2`.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def find_non_finite_samples(index: Index, micro_steps: Sequence[MicroStep], loss: float) -> list[NonFiniteSample]:
    """Return this rank's samples whose loss is not finite; if only the gradient is not, all samples of the step.

    Args:
        micro_steps: this rank's micro steps of the optimizer step.
        loss: mean loss of the optimizer step, over all ranks.
    """
    found = []
    for step in micro_steps:
        for row, value in zip(step.batch.rows.tolist(), step.losses.tolist(), strict=True):
            sample = index.row(row)
            if not math.isfinite(value):
                found.append(NonFiniteSample(sample["key"], sample["file"], f"its loss is {value}"))
            elif math.isfinite(loss):
                reason = "the gradient of its batch is not finite"
                found.append(NonFiniteSample(sample["key"], sample["file"], reason))
    return found


def handle_skipped_update(run: Run, loss: float, samples: Sequence[NonFiniteSample]) -> None:
    """List the samples of a step that made no update, and continue or stop as `train.on_non_finite` says.

    Called before the step is counted, by all ranks together.

    Raises:
        NonFiniteError: no further such step is allowed. The state before the step is saved.
    """
    engine, state, train = run.engine, run.state, run.config.train
    if engine.loss_scale is not None and math.isfinite(loss):
        logger.info("step {}: a gradient overflowed; the loss scale is now {:g}", state.step, engine.loss_scale)
        return
    run.bad_samples.append(state.step, [sample._asdict() for sample in samples])
    keys = describe_keys(sample.key for sample in samples)
    cause = "gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
    if train.on_non_finite == "skip" and state.num_non_finite < train.max_non_finite_steps:
        state.num_non_finite += 1
        logger.warning(
            "step {} made no update: its {}; samples: {} ({} of at most {} such steps)",
            state.step,
            cause,
            keys,
            state.num_non_finite,
            train.max_non_finite_steps,
        )
        return
    run.checkpoints.save_whole(engine, state)
    limit = (
        "set train.on_non_finite: skip to skip such steps"
        if train.on_non_finite == "stop"
        else f"raise train.max_non_finite_steps, of which all {train.max_non_finite_steps} are used"
    )
    cure = f"repair or remove these samples; lower optim.lr if the loss rose in earlier steps; or {limit}"
    fallback = find_fallback(list_checkpoints(run.checkpoints.folder))
    if fallback is not None and state.step - state.num_until_update >= MIN_BROKEN_STEPS - 1:
        cure = (
            f"the last update, that of step {state.num_until_update - 1}, has probably broken the weights. Delete the "
            f"checkpoints after {fallback} and lower optim.lr; the same command resumes from there"
        )
    raise NonFiniteError(
        f"the {cause} in step {state.step}, which made no update; the state before it is saved.\n"
        f"samples: {keys}; see {run.folder / 'logs'}/bad_samples*.jsonl\n"
        f"cure: {cure}"
    )


def describe_keys(keys: Iterable[str]) -> str:
    """Return the first few keys of all ranks, each once. All ranks call it together."""
    parts = gather_objects(list(dict.fromkeys(keys))[: MAX_SHOWN + 1])
    unique = list(dict.fromkeys(key for part in parts for key in part))
    return ", ".join(unique[:MAX_SHOWN]) + (", ..." if len(unique) > MAX_SHOWN else "")
