"""What training reports of itself: metrics.jsonl, TensorBoard, and the loss plot."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sdxl_trainer.data.files import open_atomic, write_atomic


class MetricsLog:
    """One line a step, and one a validation, in `metrics.jsonl`, and the same as TensorBoard scalars.

    Args:
        folder: the run's log folder.
        first_step: lines of later steps, left by a run that went further than its last checkpoint, are dropped.
    """

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "metrics.jsonl"
        if self.file.is_file():
            kept = [line for line in _read_lines(self.file) if line["step"] <= first_step]
            write_atomic(self.file, b"".join(orjson.dumps(line) + b"\n" for line in kept))
        self._lines = open(self.file, "ab")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the numbers of a finished step."""
        self._lines.write(orjson.dumps({"step": step, **values}) + b"\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._lines.close()
        self._board.close()


def read_metrics(file: Path, having: str = "loss") -> Iterator[dict[str, Any]]:
    """The lines of a metrics file that hold such a number: `loss` of steps, `validation/loss` of validations."""
    return (line for line in _read_lines(file) if having in line)


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """All lines; a torn last one is passed over."""
    with open(file, "rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield orjson.loads(line)


def plot_loss(metrics_file: Path, picture: Path) -> None:
    """Draw the loss over the steps, raw and averaged, as PNG."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a screen

    lines = [line for line in read_metrics(metrics_file) if line["loss"] is not None]  # null: it was not finite
    steps = np.array([line["step"] for line in lines])
    losses = np.array([line["loss"] for line in lines])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9db4c8", linewidth=0.8, label="loss of the step")
    axes.plot(steps, smooth(losses), color="#1f4e79", linewidth=2, label="moving average")
    axes.set(xlabel="step", ylabel="loss", title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(picture) as file:
        figure.savefig(file, format="png", dpi=120)


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Exponential moving average over about `share` of all values, corrected for its start. [N] in and out."""
    decay = 1 - 1 / max(1.0, share * len(values))
    average, weight, result = 0.0, 0.0, np.empty(len(values))
    for place, value in enumerate(values):
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result[place] = average / weight if weight else value
    return result
