"""A loss or gradient that is not finite is never trained through: no update is made, and the samples are named.

The engine makes no update of a gradient that is not finite, and all ranks learn so at once. The fp16 loss scaler works
by such steps: where it alone is the reason, nothing is wrong.
"""

import math
from typing import NamedTuple

import orjson
import torch
from loguru import logger

from sdxl_trainer.configs.problems import FailedError
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.loading.dataset import MicroBatch
from sdxl_trainer.launch.distributed import gather_objects
from sdxl_trainer.train.run.run import Run

MAX_SHOWN = 8


class NonFiniteError(FailedError):
    """Loss or gradient was not finite, and the settings do not allow to go on. The state before the step is saved."""


class Suspect(NamedTuple):
    """A sample of a step without an update."""

    key: str
    file: str
    reason: str


def spread_non_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss itself, but so that the gradient of one that is not finite is NaN everywhere.

    A difference of infinity has a finite gradient under `l1`, and one whose square overflows has under `l2`.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def find_suspects(index: Index, seen: list[tuple[MicroBatch, torch.Tensor]], loss: float) -> list[Suspect]:
    """This rank's samples that may be the reason: those whose loss is not finite, or all if it was the gradient.

    Args:
        seen: this rank's micro batches of the step, with each sample's loss [B].
        loss: of the step, over all ranks.
    """
    suspects = []
    for batch, losses in seen:
        for row, value in zip(batch.rows.tolist(), losses.tolist(), strict=True):
            sample = index.row(row)
            if not math.isfinite(value):
                suspects.append(Suspect(sample["key"], sample["file"], f"its loss is {value}"))
            elif math.isfinite(loss):
                suspects.append(Suspect(sample["key"], sample["file"], "the gradient of its batch is not finite"))
    return suspects


def give_up_update(run: Run, loss: float, suspects: list[Suspect]) -> None:
    """Deal with a step that made no update, before it is counted: name its samples, and go on or stop.

    Raises:
        NonFiniteError: by `train.on_non_finite` or its budget. The state before the step is saved.
    """
    if run.engine.loss_scale is not None and math.isfinite(loss):
        logger.info("step {}: a gradient overflowed, the loss scale is now {:g}", run.state.step, run.engine.loss_scale)
        return
    write_suspects(run, suspects)
    parts = gather_objects(list(dict.fromkeys(suspect.key for suspect in suspects))[: MAX_SHOWN + 1])
    keys = list(dict.fromkeys(key for part in parts for key in part))
    shown = ", ".join(keys[:MAX_SHOWN]) + (", ..." if len(keys) > MAX_SHOWN else "")
    what = "gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
    train, state = run.config.train, run.state
    if train.on_non_finite == "skip" and state.num_non_finite < train.max_non_finite_steps:
        state.num_non_finite += 1
        logger.warning(
            "step {} made no update: its {}; samples: {} ({} of at most {} such steps)",
            state.step,
            what,
            shown,
            state.num_non_finite,
            train.max_non_finite_steps,
        )
        return
    run.checkpoints.wait()
    if run.checkpoints.last_step != state.step:
        run.checkpoints.save(run.engine, state)
        run.checkpoints.wait()
    cure = (
        "train.on_non_finite: skip leaves such steps out"
        if train.on_non_finite == "stop"
        else f"train.max_non_finite_steps = {train.max_non_finite_steps} are used up"
    )
    raise NonFiniteError(
        f"the {what} in step {state.step}, which made no update; the state before it is saved.\n"
        f"samples: {shown}; see {run.folder / 'logs'}/bad_samples*.jsonl\n"
        f"cure: mend these samples, or lower optim.lr if steps before went wrong already; {cure}"
    )


def write_suspects(run: Run, suspects: list[Suspect]) -> None:
    """Append them to this rank's bad_samples file."""
    suffix = "" if run.ranks.is_main else f"-rank{run.ranks.rank}"
    with open(run.folder / "logs" / f"bad_samples{suffix}.jsonl", "ab") as file:
        for suspect in suspects:
            file.write(orjson.dumps({"step": run.state.step, **suspect._asdict()}) + b"\n")
