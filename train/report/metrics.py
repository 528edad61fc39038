"""What training reports of itself: metrics.jsonl, TensorBoard, and wandb if it is asked for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from sdxl_trainer.data.files import write_atomic


class MetricsLog:
    """One line a step, and one a validation, in `metrics.jsonl`, and the same as TensorBoard scalars and at wandb.

    Args:
        folder: the run's log folder.
        first_step: lines of later steps, left by a run that went further than its last checkpoint, are dropped.

    Attributes:
        wandb_log: what sends them to wandb as well, if they are to go there.
    """

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "metrics.jsonl"
        if self.file.is_file():
            kept = [line for line in read_lines(self.file) if line["step"] <= first_step]
            write_atomic(self.file, b"".join(orjson.dumps(line) + b"\n" for line in kept))
        self._lines = open(self.file, "ab")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self.wandb_log: WandbLog | None = None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the numbers of a finished step."""
        self._lines.write(orjson.dumps({"step": step, **values}) + b"\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self.wandb_log is not None:
            self.wandb_log.write(step, values)

    def close(self) -> None:
        """Flush and close all."""
        self._lines.close()
        self._board.close()
        if self.wandb_log is not None:
            self.wandb_log.close()


class WandbLog:
    """A run at wandb, from `wandb.init`."""

    def __init__(self, run: Any):
        self._run = run
        # wandb's own count of steps refuses those that a resumed run does again.
        run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the numbers of a finished step."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def read_metrics(file: Path, having: str = "loss") -> Iterator[dict[str, Any]]:
    """The lines of a metrics file that hold such a number: `loss` of steps, `validation/loss` of validations."""
    return (line for line in read_lines(file) if having in line)


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """All lines; a torn last one is passed over."""
    with open(file, "rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield orjson.loads(line)
