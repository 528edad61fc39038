"""Metrics of a run: metrics.jsonl, TensorBoard, and Weights & Biases if `log.wandb` is set."""

import importlib.metadata
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.data.files import write_atomic

WANDB_ID_FILE = "wandb_id.txt"  # in the log folder: a resumed run keeps its id


class WandbLog:
    """A run at Weights & Biases.

    Args:
        run: the result of `wandb.init`.
    """

    def __init__(self, run: Any):
        self._run = run
        # wandb's own step counter rejects the steps that a resumed run repeats.
        run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the metrics of a finished step."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Send the remaining metrics and end the run at wandb."""
        self._run.finish()


class MetricsLog:
    """Writes the metrics of each step and validation to `metrics.jsonl`, to TensorBoard and to wandb.

    Args:
        folder: the log folder of the run.
        last_step: the step that the run resumes from. Lines of later steps, left by a run that stopped after its last
            checkpoint, are dropped.
        wandb_log: None if `log.wandb` is not set.
    """

    def __init__(self, folder: Path, last_step: int, wandb_log: WandbLog | None = None):
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "metrics.jsonl"
        if self.file.is_file():
            kept = [line for line in read_all_metrics(self.file) if line["step"] <= last_step]
            write_atomic(self.file, b"".join(orjson.dumps(line) + b"\n" for line in kept))
        self._lines = open(self.file, "ab")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)
        self._wandb_log = wandb_log

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the metrics of a finished step."""
        self._lines.write(orjson.dumps({"step": step, **values}) + b"\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb_log is not None:
            self._wandb_log.write(step, values)

    def close(self) -> None:
        """Flush and close all logs."""
        self._lines.close()
        self._board.close()
        if self._wandb_log is not None:
            self._wandb_log.close()


def read_metrics(file: Path, metric: str = "loss") -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics file that contain a metric: `loss` for steps, `validation/loss` for validations."""
    return (line for line in read_all_metrics(file) if metric in line)


def read_all_metrics(file: Path) -> Iterator[dict[str, Any]]:
    """Yield all lines of a metrics file; a last line without a line break is skipped."""
    with open(file, "rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield orjson.loads(line)


def check_wandb(project: str | None) -> Iterator[Problem]:
    """Yield a problem if `log.wandb` is set and wandb is not installed."""
    try:
        if project is not None:
            # Not an import: it would succeed on the plain folder wandb/ that wandb creates where it runs.
            importlib.metadata.version("wandb")
    except importlib.metadata.PackageNotFoundError:
        yield Problem("log.wandb", project, "needs the package wandb", "pip install wandb, or leave it out")


def open_wandb(project: str, run_name: str, folder: Path, settings: dict[str, Any]) -> WandbLog:
    """Start or resume the run at Weights & Biases.

    Args:
        folder: the log folder of the run, where the run's id at wandb is stored.
        settings: all settings, shown as the run's config at wandb.

    Raises:
        UserInputError: wandb raises an error, for example because the user is not logged in.
    """
    import wandb  # pyright: ignore[reportMissingImports]  (an optional package)

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / WANDB_ID_FILE
    if not file.is_file():
        file.write_text(uuid.uuid4().hex[:8])
    try:
        run = wandb.init(
            project=project,
            name=run_name,
            id=file.read_text(),
            resume="allow",
            dir=str(folder),
            config=settings,
            settings=wandb.Settings(console="off"),  # the run's own display uses the terminal
        )
    except wandb.Error as error:
        cure = "run wandb login, or set WANDB_MODE=offline in the environment"
        raise UserInputError([Problem("log.wandb", project, f"wandb raised: {error}", cure)]) from error
    return WandbLog(run)
