"""Progress of a run: a live display on a terminal, log lines elsewhere.

Uses only numbers that the loop already has: nothing here communicates with other ranks or waits for a device.
`launch/logger.py` draws the display between log lines.
"""

import math
import resource
import textwrap
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from loguru import logger
from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.text import Text

from sdxl_trainer.configs.checkpoint import CheckpointConfig
from sdxl_trainer.configs.language.translate import translate, translate_label
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import format_count, format_rate
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.launch.logger import SCREEN
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.estimates.flops import MfuReference
from sdxl_trainer.train.run.interruption import Requests

NUM_AVERAGED_STEPS = 100
NUM_ROWS = 14  # of the display on 80 columns: two of frame, one of bar, four of numbers, six of lines, one of cursor
UNKNOWN = "-"

FRAME_COLUMNS = 4  # a line and a space on either side
MIN_COLUMNS_FOR_PAIRS = 70  # on fewer columns each number gets a row of its own
MIN_COLUMNS_TO_WRAP = 12  # on fewer columns rows are cut off
GAP_COLUMNS = 2
# (done, to do), by whether the terminal shows UTF-8; they differ without colours too.
BAR_CHARACTERS = {True: ("━", "─"), False: ("=", "-")}


@dataclass(frozen=True, kw_only=True)
class Display:
    """A snapshot of progress that rich can draw: a bar, numbers in two columns, and lines that wrap.

    It is drawn as one text, which takes a third of the time of rich's tables; training needs the interpreter too.

    Args:
        title, subtitle: text in the upper and the lower edge of the frame.
        share: full part of the bar, 0 to 1.
        left, right: name → value, as many on either side; short enough for half of 80 columns.
        lines: name → value of any length.
    """

    title: str
    subtitle: str
    share: float
    left: Mapping[str, str]
    right: Mapping[str, str]
    lines: Mapping[str, str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = options.max_width - FRAME_COLUMNS
        text = Text(no_wrap=True, overflow="ellipsis")
        self._add_bar(text, width, not options.ascii_only)
        left, right, lines = map(translate_rows, (self.left, self.right, self.lines))
        label_columns = max(map(cell_len, [*left, *right, *lines])) + GAP_COLUMNS
        right_label_columns = max(map(cell_len, right)) + GAP_COLUMNS
        for (name, value), (right_name, right_value) in zip(left.items(), right.items(), strict=True):
            if width < MIN_COLUMNS_FOR_PAIRS:
                _add_row(text, name, label_columns, value)
                _add_row(text, right_name, label_columns, right_value)
            else:
                _add_row(text, name, label_columns, _pad(value, width // 2 - label_columns))
                text.append(_pad(right_name, right_label_columns), "dim").append(right_value, "bold")
        for name, value in lines.items():
            value_columns = max(width - label_columns, MIN_COLUMNS_TO_WRAP)
            for number, part in enumerate(_wrap(value, value_columns)):
                _add_row(text, "" if number else name, label_columns, part)
        title, subtitle = Text(translate(self.title), "bold"), Text(self.subtitle)
        yield Panel(
            text, title=title, subtitle=subtitle, title_align="left", subtitle_align="right", border_style="cyan"
        )

    def _add_bar(self, text: Text, width: int, has_utf8: bool) -> None:
        percent = f"{GAP_COLUMNS * ' '}{self.share:.0%}"
        length = max(0, width - len(percent))
        full = int(length * self.share)
        done, to_do = BAR_CHARACTERS[has_utf8]
        text.append(done * full, "cyan").append(to_do * (length - full), "dim").append(percent)


def _add_row(text: Text, name: str, label_columns: int, value: str) -> None:
    text.append("\n" + _pad(name, label_columns), "dim").append(value, "bold")


def _pad(text: str, columns: int) -> str:
    """Return a text with spaces up to `columns`; Chinese characters take two each."""
    return text + " " * (columns - cell_len(text))


def _wrap(text: str, columns: int) -> list[str]:
    """Return the lines of a text on `columns` columns. In a wide script a line may end behind each character."""
    if text.isascii():
        return textwrap.wrap(text, columns, break_on_hyphens=False)
    return [part for word in textwrap.wrap(text, 4 * columns) for part in chop_cells(word, columns)]


def translate_rows(rows: Mapping[str, str]) -> dict[str, str]:
    """Return rows of names and values in the user's language."""
    return {translate_label(name): translate(value) for name, value in rows.items()}


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """Numbers of one step that averages are taken over."""

    loss: float
    seconds: float
    data_wait_seconds: float
    num_images: int
    flops: float  # 0 if MFU is not shown


class Averages:
    """Means over some steps, NaN over none. A loss that is not finite is skipped."""

    def __init__(self, steps: list[StepNumbers]):
        seconds = sum(step.seconds for step in steps) or math.nan
        losses = [step.loss for step in steps if math.isfinite(step.loss)]
        self.num_steps = len(steps)
        self.loss = sum(losses) / len(losses) if losses else math.nan
        self.step_seconds = seconds / len(steps) if steps else math.nan
        self.images_per_second = sum(step.num_images for step in steps) / seconds
        self.data_wait_share = sum(step.data_wait_seconds for step in steps) / seconds
        self.flops_per_second = sum(step.flops for step in steps) / seconds


class Progress:
    """Progress of a run, for the display, the log lines and the summary. Ranks other than 0 show nothing.

    Args:
        num_steps: of the whole run.
        mfu_reference: the peak FLOP/s that MFU is relative to; None if the device is not known.

    Attributes:
        started: time of the run's start, on the monotonic clock.
        first_step: the step that the run started or resumed from.
        train_seconds: time spent in steps so far.
        data_wait_seconds: time spent waiting for data so far.
        slow_ranks: the ranks that the others wait for, as text; "" without one.
        over_fitting: since which step the last validation finds over-fitting, as text; "" if it finds none.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        state: TrainState,
        num_steps: int,
        checkpoints: CheckpointWriter,
        requests: Requests,
        mfu_reference: MfuReference | None,
    ):
        self.started = self._updated = time.monotonic()
        self.first_step = state.step
        self.train_seconds = self.data_wait_seconds = 0.0
        self.slow_ranks = self.over_fitting = ""
        self._config, self._ranks, self._state, self._num_steps = config, ranks, state, num_steps
        self._checkpoints, self._requests, self._mfu_reference = checkpoints, requests, mfu_reference
        self._recent: deque[StepNumbers] = deque(maxlen=NUM_AVERAGED_STEPS)
        self._values: Mapping[str, float] = {}  # metrics of the last step
        self._activity = "training"

    @property
    def averages(self) -> Averages:
        """Averages over the last steps."""
        return Averages(list(self._recent))

    @property
    def now(self) -> str:
        """The current activity and the pieces done, and whether a checkpoint is being written beside it."""
        pieces = f", {ACTIVITY.part}" if ACTIVITY.phase == self._activity != "training" and ACTIVITY.part else ""
        return f"{self._activity}{pieces}" + (", writing a checkpoint" if self._checkpoints.is_writing() else "")

    @property
    def has_mfu(self) -> bool:
        """True if MFU is shown."""
        return self._mfu_reference is not None

    @contextmanager
    def show(self) -> Iterator[None]:
        """Show the display until the context ends, if there is a terminal. The last drawing stays on the screen."""
        self.started = self._updated = time.monotonic()
        with SCREEN.show_live(self, NUM_ROWS, self._ranks.rank):
            try:
                yield
            finally:
                self._activity = "ended"

    @contextmanager
    def activity(self, name: str) -> Iterator[None]:
        """Show and publish `name` as the current activity within the context; training waits for it."""
        before, self._activity = self._activity, name
        try:
            with ACTIVITY.during(name):
                yield
        finally:
            self._activity = before

    def update(self, values: Mapping[str, float], latent_area: int) -> None:
        """Record a finished step.

        Args:
            values: its metrics, named as in metrics.jsonl.
            latent_area: h x w of its latents.
        """
        num_images, seconds = self._config.train.global_batch_size, values["step_seconds"]
        wait_seconds = values["data_wait_share"] * seconds
        step = StepNumbers(
            loss=values["loss"],
            seconds=seconds,
            data_wait_seconds=wait_seconds,
            num_images=num_images,
            flops=num_images * self._mfu_reference.count.compute(latent_area) if self._mfu_reference else 0.0,
        )
        self._recent.append(step)
        self._values, self._updated = values, time.monotonic()
        self.train_seconds += seconds
        self.data_wait_seconds += wait_seconds

    def log_line(self) -> None:
        """Log the last step's numbers in a line. The console omits the line while the display shows the same."""
        averages, values = self.averages, self._values
        mfu = f", MFU {self.describe_mfu(averages)}" if self.has_mfu else ""
        logger.bind(displayed=True).info(
            "step {}/{}: loss {:.4f} (average {:.4f}), lr {}, gradient norm {}, {}, "
            "data wait {:.0%}{}, memory {}, {} left, next checkpoint {}",
            self._state.step,
            self._num_steps,
            values["loss"],
            averages.loss,
            describe_learning_rates(self._config.optim, values["lr"]),
            self._describe_norm(),
            format_rate(averages.images_per_second),
            averages.data_wait_share,
            mfu,
            describe_peak_memory(self._ranks.device),
            self.describe_time_left(averages),
            self.describe_next_checkpoint(averages),
        )

    def __rich__(self) -> Display:
        """Return the display of this moment."""
        state, averages = self._state, self.averages
        elapsed = format_seconds(time.monotonic() - self.started)
        rates = describe_learning_rates(self._config.optim, self._values["lr"]) if self._values else UNKNOWN
        lines = {
            "time": f"{elapsed} elapsed, {self.describe_time_left(averages)} left",
            "learning rate": rates,
            "next checkpoint": self.describe_next_checkpoint(averages),
            "now": self.now,
        }
        if state.num_bad or state.num_non_finite:
            lines["skipped"] = describe_skipped(state)
        if self.slow_ranks:
            lines["slow ranks"] = self.slow_ranks
        if self.over_fitting:
            lines["over-fitting"] = self.over_fitting
        return Display(
            title=f"step {state.step} of {self._num_steps}",
            subtitle=self._config.run.name,
            share=state.step / self._num_steps,
            left=self._list_step_numbers(averages),
            right=self._list_speed_numbers(averages),
            lines=lines,
        )

    def _describe_norm(self) -> str:
        norm = self._values.get("grad_norm")
        return UNKNOWN if norm is None else f"{norm:.3f}"

    def _list_step_numbers(self, averages: Averages) -> dict[str, str]:
        values, state = self._values, self._state
        return {
            "loss": f"{values['loss']:.4f}" if values else UNKNOWN,
            f"average of {averages.num_steps}": f"{averages.loss:.4f}" if values else UNKNOWN,
            "gradient norm": self._describe_norm(),
            "epoch": f"{state.epoch + state.index / max(1, state.epoch_batches):.2f}",
        }

    def _list_speed_numbers(self, averages: Averages) -> dict[str, str]:
        has_values = bool(self._values)
        return {
            "speed": format_rate(averages.images_per_second) if has_values else UNKNOWN,
            "data wait": f"{averages.data_wait_share:.1%}" if has_values else UNKNOWN,
            "MFU": self.describe_mfu(averages) if has_values else UNKNOWN,
            "memory": describe_peak_memory(self._ranks.device),
        }

    def describe_mfu(self, averages: Averages) -> str:
        """Return MFU over the averaged steps: the share of all devices' peak FLOP/s that was used."""
        return f"{averages.flops_per_second / self._mfu_reference.peak_flops:.1%}" if self._mfu_reference else UNKNOWN

    def estimate_seconds_left(self, averages: Averages) -> float:
        """Estimate the time left from the last steps and from the time spent between steps so far; NaN before steps."""
        steps_left = self._num_steps - self._state.step
        between_steps = self._updated - self.started - self.train_seconds
        seconds = averages.step_seconds + max(0.0, between_steps) / max(1, self._state.step - self.first_step)
        return steps_left * seconds if steps_left else 0.0

    def describe_time_left(self, averages: Averages) -> str:
        """Return the estimated time left as text."""
        return format_seconds(self.estimate_seconds_left(averages))

    def describe_next_checkpoint(self, averages: Averages) -> str:
        """Return the step of the next checkpoint and the time until then; by the clock, the time alone."""
        if self._state.step == self._num_steps:
            return UNKNOWN
        step = find_next_checkpoint_step(self._config.checkpoint, self._state, self._num_steps)
        seconds = (step - self._state.step) * averages.step_seconds
        by_clock = self._requests.seconds_to_save()
        if by_clock is not None and not seconds <= by_clock:
            return f"in {format_seconds(by_clock)}"
        return f"at step {step}, in {format_seconds(seconds)}"


def find_next_checkpoint_step(config: CheckpointConfig, state: TrainState, num_steps: int) -> int:
    """Find the next step after which steps, epochs or the end ask for a checkpoint.

    Later epochs are assumed to have as many batches as the current one.
    """
    due = [num_steps]
    if config.every_steps:
        due.append((state.step // config.every_steps + 1) * config.every_steps)
    if config.every_epochs:
        whole_epochs = config.every_epochs - state.epoch % config.every_epochs - 1
        due.append(state.step + state.epoch_batches - state.index + whole_epochs * state.epoch_batches)
    return min(due)


def describe_learning_rates(config: OptimConfig, lr: float) -> str:
    """Return all learning rates of a step.

    Args:
        lr: the U-Net's at this step; the schedule scales the others in proportion.
    """
    rates = {"U-Net": [config.lr] if config.block_lrs is None else config.block_lrs}
    rates |= {"text 1": [config.text_encoder_lr], "text 2": [config.text_encoder_2_lr]}
    if any(group.match == "" for group in config.groups):
        rates = {}  # the patterns decide the rate of every weight
    rates["patterns"] = [group.lr for group in config.groups if group.lr]
    shown = {}
    for name, peaks in rates.items():
        scaled = sorted({peak * lr / config.lr for peak in peaks if peak})
        if scaled:
            shown[name] = f"{scaled[0]:.2e}" + (f" to {scaled[-1]:.2e}" if len(scaled) > 1 else "")
    return shown["U-Net"] if list(shown) == ["U-Net"] else ", ".join(" ".join(item) for item in shown.items())


def describe_skipped(state: TrainState) -> str:
    """Return the numbers of samples and updates skipped so far."""
    return f"{format_count(state.num_bad, 'bad sample')}, {format_count(state.num_non_finite, 'non-finite update')}"


def describe_peak_memory(device: torch.device) -> str:
    """Return the peak memory of this rank: of its GPU in torch's allocator, or of the process without a GPU."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} of {total / 2**30:.1f} GiB"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"  # Linux counts in KiB


def format_seconds(seconds: float) -> str:
    """Return a duration as H:MM:SS, with days before it if it has any; "-" if it is not finite."""
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else UNKNOWN
