"""Metrics of a run: metrics.jsonl, TensorBoard, and Weights & Biases if `log.wandb` is set."""

import importlib.metadata
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import orjson
from loguru import logger

from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.data.files import read_regular
from sdxl_trainer.launch.append_file import AppendFile
from sdxl_trainer.train.held_out.over_fitting import Losses

BOARD_NAME = "events.out.tfevents."  # TensorBoard expects it
CHANGES_FILE = "changes.jsonl"  # in the log folder: what each resume changed
MAX_CHANGES_BYTES = 1 << 20
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


class BoardFile:
    """An event file of TensorBoard.

    Args:
        folder: TensorBoard's folder of the run.
        first_step: TensorBoard hides what earlier files hold of this step and later ones.
    """

    def __init__(self, folder: Path, first_step: int):
        # Imported here, because other programs read metrics without writing them.
        # Their classes are made when they are imported.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

        self._event, self._summary, self._compute_crc = Event, Summary, masked_crc32c
        self._file = AppendFile(folder / f"{BOARD_NAME}{_choose_number(folder):010d}.{socket.gethostname()}")
        start = Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START))
        # Written before the first metrics that can be written.
        self._head = self._pack(Event(wall_time=time.time(), file_version="brain.Event:2")) + self._pack(start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the metrics of a finished step."""
        shown = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=shown))
        if self._file.append(self._head + self._pack(event)):
            self._head = b""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _pack(self, event: Any) -> bytes:
        """Return an event in TensorFlow's record format: length and content, each followed by its checksum."""
        content = event.SerializeToString()
        length = len(content).to_bytes(8, "little")
        checksums = [self._compute_crc(part).to_bytes(4, "little") for part in (length, content)]
        return b"".join((length, checksums[0], content, checksums[1]))


def _choose_number(folder: Path) -> int:
    """Return the second in the name of a new event file. TensorBoard reads the files in the order of their names.

    It is later than that of each other file, even if the clock was set back.
    """
    seconds = [path.name.removeprefix(BOARD_NAME).partition(".")[0] for path in folder.glob(f"{BOARD_NAME}*")]
    return max([int(time.time()), *(int(second) + 1 for second in seconds if second.isdecimal())])


class MetricsLog:
    """Writes the metrics of each step and validation to `metrics.jsonl`, to TensorBoard and to wandb.

    A full disk or a deleted file ends no run (launch/append_file.py).

    Args:
        folder: the log folder of the run.
        last_step: the step that the run resumes from. Lines of later steps, left by a run that stopped after its last
            checkpoint, are dropped.
        wandb_log: None if `log.wandb` is not set.
        changes: settings and data that differ from those of the checkpoint at `last_step`.
    """

    def __init__(self, folder: Path, last_step: int, wandb_log: WandbLog | None = None, changes: Sequence[str] = ()):
        self._folder, self._last_step, self._changes = folder, last_step, changes
        self._lines = AppendFile(folder / "metrics.jsonl")
        self._board: BoardFile | None = None
        self._wandb_log = wandb_log

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the metrics of a finished step."""
        if self._board is None:  # the first write: until then nothing is changed
            drop_later_lines(self._lines.path, self._last_step)
            write_changes(self._folder / CHANGES_FILE, self._last_step, self._changes)
            self._board = BoardFile(self._folder / "tensorboard", self._last_step + 1)
        self._lines.append(orjson.dumps({"step": step, **values}) + b"\n")
        self._board.write(step, values)
        if self._wandb_log is not None:
            self._wandb_log.write(step, values)

    def sync(self) -> None:
        """Flush `metrics.jsonl` to disk: a checkpoint must not outlast the metrics of its steps in a power cut."""
        self._lines.sync()

    def close(self) -> None:
        """Close all logs."""
        self.close_files()
        if self._wandb_log is not None:
            self._wandb_log.close()

    def close_files(self) -> None:
        """Close the files, and log how much could not be written."""
        self._lines.close()
        if self._board is not None:
            self._board.close()


def drop_later_lines(file: Path, last_step: int) -> None:
    """Cut a metrics file, in place, before its first line of a step after `last_step`, or before a torn last line.

    Cutting needs no space, so a run resumes on a full disk too. Lines that are damaged otherwise are kept.
    """
    if not file.is_file():
        return
    end = 0
    with open(file, "r+b") as lines:
        for line in lines:
            if not line.endswith(b"\n") or _read_step(line) > last_step:
                lines.truncate(end)
                break
            end += len(line)


def write_changes(file: Path, step: int, changes: Sequence[str]) -> None:
    """Append what a start changed at a step, in place of what earlier starts from this step and later ones changed."""
    drop_later_lines(file, step - 1)
    if changes:
        lines = AppendFile(file)
        lines.append(orjson.dumps({"step": step, "changes": changes}) + b"\n")
        lines.close()


def read_changes(file: Path) -> dict[int, list[str]]:
    """Return what each resume changed, by step. Damaged lines are skipped; without the file nothing has changed."""
    changes: dict[int, list[str]] = {}
    try:
        lines = read_regular(file, MAX_CHANGES_BYTES).content.splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            values = orjson.loads(line)
            changes[int(values["step"])] = [str(change) for change in values["changes"]]
        except (ValueError, TypeError, KeyError):
            continue
    return changes


def _read_step(line: bytes) -> float:
    """Return the step of a line of a metrics file; -1 if the line is damaged."""
    try:
        step = orjson.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return -1
    return step if isinstance(step, (int, float)) else -1


def read_metrics(file: Path, metric: str = "loss") -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics file that contain a metric: `loss` for steps, `validation/loss` for validations."""
    return (line for line in read_all_metrics(file) if metric in line)


def read_all_metrics(file: Path) -> Iterator[dict[str, Any]]:
    """Yield all lines of a metrics file, each with its step and numbers.

    Damaged lines are skipped with a warning, and a last line without a line break without one.
    """
    damaged: list[int] = []
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            values = _parse_line(line) if line.endswith(b"\n") else {}
            if values:
                yield values
            elif values is None:
                damaged.append(number)
    if damaged:
        logger.warning("{}: {} damaged lines are skipped, first line {}", file, len(damaged), damaged[0])


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the values of a line of a metrics file, None if it is damaged."""
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    is_whole = isinstance(values, dict) and isinstance(values.get("step"), int) and values["step"] < 1 << 63
    # A value is null if it was not finite.
    return values if is_whole and all(isinstance(value, (int, float, NoneType)) for value in values.values()) else None


class Course(NamedTuple):
    """The course of a run from one step to another."""

    losses: Losses  # of training
    over_fitting: set[int]  # best steps since which validations named over-fitting


def read_course(file: Path, first_step: int, last_step: int) -> Course:
    """Read the finite training losses after a first step, and the best steps of all over-fitting that was named."""
    losses, named = {}, set()
    for line in read_all_metrics(file) if file.is_file() else ():
        loss, best_step = line.get("loss"), line.get("validation/over_fitting")
        if line["step"] > last_step:
            break  # left by a run that stopped after its last checkpoint
        if loss is not None and line["step"] > first_step:
            losses[line["step"]] = loss  # the last line of a step counts
        if best_step is not None:
            named.add(int(best_step))
    steps = np.array(sorted(losses), np.int64)
    return Course(Losses(steps, np.array([losses[step] for step in steps.tolist()])), named)


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
        file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    try:
        run = wandb.init(
            project=project,
            name=run_name,
            id=file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=settings,
            settings=wandb.Settings(console="off"),  # the run's own display uses the terminal
        )
    except wandb.Error as error:
        cure = "run wandb login, or set WANDB_MODE=offline in the environment"
        raise UserInputError([Problem("log.wandb", project, f"wandb raised: {error}", cure)]) from error
    return WandbLog(run)
