"""How far training is: a live display on a terminal, lines elsewhere. Fed by the loop with numbers that it has anyway.

Nothing here talks to other ranks or waits for a device. `display.py` lays it out, `launch/logger.py` draws it.
"""

import math
import resource
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from loguru import logger

from sdxl_trainer.configs.checkpoint import CheckpointConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.launch.logger import SCREEN
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.estimates.flops import MfuReference
from sdxl_trainer.train.run.display import Display
from sdxl_trainer.train.run.interruption import Requests

AVERAGED_STEPS = 100
NUM_ROWS = 14  # of the display at 80 columns: a frame, the bar, four rows of numbers, six of lines, the cursor's
UNKNOWN = "-"


@dataclass(frozen=True)
class StepNumbers:
    """What the console keeps of a step."""

    loss: float
    seconds: float
    data_wait_seconds: float
    num_images: int
    flops: float  # 0 where no MFU is told


class Averages:
    """Means over some steps; NaN over none. Losses that are not finite are left out."""

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
    """What the console shows of a run. On ranks other than 0 nothing is shown, and no numbers come.

    Args:
        mfu_reference: for MFU; None where it is not told.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        state: TrainState,
        checkpoints: CheckpointWriter,
        requests: Requests,
        mfu_reference: MfuReference | None,
    ):
        self.started = self._updated = time.monotonic()
        self.first_step = state.step
        self.train_seconds = self.data_wait_seconds = 0.0
        self._config, self._ranks, self._state = config, ranks, state
        self._checkpoints, self._requests, self._mfu_reference = checkpoints, requests, mfu_reference
        self._recent: deque[StepNumbers] = deque(maxlen=AVERAGED_STEPS)
        self._values: Mapping[str, float] = {}  # of the last step
        self._doing = "training"

    @property
    def averages(self) -> Averages:
        """Over the last steps."""
        return Averages(list(self._recent))

    @property
    def has_mfu(self) -> bool:
        """Whether MFU is told."""
        return self._mfu_reference is not None

    @contextmanager
    def show(self) -> Iterator[None]:
        """Show the display, if there is a terminal, until the context ends, however it does."""
        self.started = self._updated = time.monotonic()
        with SCREEN.show_live(self, NUM_ROWS, self._ranks.rank):
            try:
                yield
            finally:
                self._doing = "ended"  # what the last drawing, which stays, says

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Say what training waits for."""
        before, self._doing = self._doing, what
        try:
            yield
        finally:
            self._doing = before

    def update(self, values: Mapping[str, float], latent_size: tuple[int, int]) -> None:
        """Take in the numbers of a finished step, by their names in metrics.jsonl, and its images' latent (h, w)."""
        num_images, seconds = self._config.train.global_batch_size, values["step_seconds"]
        flops = num_images * self._mfu_reference.count.compute(latent_size) if self._mfu_reference else 0.0
        wait_seconds = values["data_wait_share"] * seconds
        self._recent.append(StepNumbers(values["loss"], seconds, wait_seconds, num_images, flops))
        self._values, self._updated = values, time.monotonic()
        self.train_seconds += seconds
        self.data_wait_seconds += wait_seconds

    def log_line(self) -> None:
        """Write the last step's numbers as a line; the console does without it while the display is there."""
        averages, values = self.averages, self._values
        mfu = f", MFU {self.describe_mfu(averages)}" if self.has_mfu else ""
        logger.bind(displayed=True).info(
            "step {}/{} loss {:.4f} (average {:.4f}) lr {} |g| {:.3f}, {:.1f} images/s, waits for data {:.0%}{}, {}, "
            "{} left, next checkpoint {}",
            self._state.step,
            self._config.train.max_steps,
            values["loss"],
            averages.loss,
            describe_rates(self._config.optim, values["lr"]),
            values["grad_norm"],
            averages.images_per_second,
            averages.data_wait_share,
            mfu,
            describe_memory(self._ranks.device),
            self.describe_time_left(averages),
            self.describe_next_save(averages),
        )

    def __rich__(self) -> Display:
        """The display of the moment."""
        state, max_steps, averages = self._state, self._config.train.max_steps, self.averages
        gone = format_seconds(time.monotonic() - self.started)
        left, right = self.list_numbers(averages)
        lines = {
            "time": f"{gone} gone, {self.describe_time_left(averages)} left",
            "learning rate": describe_rates(self._config.optim, self._values["lr"]) if self._values else UNKNOWN,
            "next checkpoint": self.describe_next_save(averages),
            "now": self._doing + (", writing a checkpoint" if self._checkpoints.is_writing() else ""),
        }
        if state.num_bad or state.num_non_finite:
            lines["left out"] = describe_left_out(state)
        title, pairs = f"step {state.step} of {max_steps}", zip(left.items(), right.items(), strict=True)
        return Display(title, self._config.run.name, state.step / max_steps, list(pairs), lines)

    def list_numbers(self, averages: Averages) -> tuple[dict[str, str], dict[str, str]]:
        """The display's two columns of numbers, name → value."""
        values, state, known = self._values, self._state, bool(self._values)
        left = {
            "loss": f"{values['loss']:.4f}" if known else UNKNOWN,
            f"average of {averages.num_steps}": f"{averages.loss:.4f}" if known else UNKNOWN,
            "gradient norm": f"{values['grad_norm']:.3f}" if known else UNKNOWN,
            "epoch": f"{state.epoch + state.index / max(1, state.epoch_batches):.2f}",
        }
        right = {
            "images/s": f"{averages.images_per_second:.1f}" if known else UNKNOWN,
            "data wait": f"{averages.data_wait_share:.1%}" if known else UNKNOWN,
            "MFU": self.describe_mfu(averages) if known else UNKNOWN,
            "memory": describe_memory(self._ranks.device),
        }
        return left, right

    def describe_mfu(self, averages: Averages) -> str:
        """What of all devices' peak was made use of."""
        return f"{averages.flops_per_second / self._mfu_reference.peak_flops:.1%}" if self._mfu_reference else UNKNOWN

    def describe_time_left(self, averages: Averages) -> str:
        """By the last steps, and by what validation, samples and checkpoints have taken between steps so far."""
        steps_left = self._config.train.max_steps - self._state.step
        pauses = self._updated - self.started - self.train_seconds
        seconds = averages.step_seconds + max(0.0, pauses) / max(1, self._state.step - self.first_step)
        return format_seconds(steps_left * seconds) if steps_left else format_seconds(0)

    def describe_next_save(self, averages: Averages) -> str:
        """The step of the next checkpoint and how soon it comes, or how soon the clock asks for one."""
        if self._state.step == self._config.train.max_steps:
            return UNKNOWN
        step = find_next_save(self._config.checkpoint, self._state, self._config.train.max_steps)
        seconds = (step - self._state.step) * averages.step_seconds
        by_clock = self._requests.seconds_to_save()
        if by_clock is not None and not seconds <= by_clock:
            return f"in {format_seconds(by_clock)}"
        return f"at step {step}, in {format_seconds(seconds)}"


def find_next_save(config: CheckpointConfig, state: TrainState, max_steps: int) -> int:
    """The step after which steps, epochs or the end ask for a checkpoint. Epochs to come count as long as this one."""
    due = [max_steps]
    if config.every_steps:
        due.append((state.step // config.every_steps + 1) * config.every_steps)
    if config.every_epochs:
        further = config.every_epochs - state.epoch % config.every_epochs - 1
        due.append(state.step + state.epoch_batches - state.index + further * state.epoch_batches)
    return min(due)


def describe_rates(config: OptimConfig, lr: float) -> str:
    """All learning rates at a step where the U-Net's is `lr`: the schedule moves them in proportion."""
    rates = {"U-Net": [config.lr] if config.block_lrs is None else config.block_lrs}
    rates |= {"text 1": [config.text_encoder_lr], "text 2": [config.text_encoder_2_lr]}
    rates["patterns"] = [group.lr for group in config.groups if group.lr]
    shown = {}
    for name, peaks in rates.items():
        scaled = sorted({peak * lr / config.lr for peak in peaks if peak})
        if scaled:
            shown[name] = f"{scaled[0]:.2e}" + (f" to {scaled[-1]:.2e}" if len(scaled) > 1 else "")
    return shown["U-Net"] if list(shown) == ["U-Net"] else ", ".join(" ".join(item) for item in shown.items())


def describe_left_out(state: TrainState) -> str:
    """What training has done without so far."""
    return f"{state.num_bad:,} bad samples, {state.num_non_finite:,} steps that were not finite"


def describe_memory(device: torch.device) -> str:
    """The most that this rank has held: of its GPU through torch's allocator, of the host where there is no GPU."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} of {total / 2**30:.1f} GiB"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"  # Linux counts in KiB


def format_seconds(seconds: float) -> str:
    """H:MM:SS, with days before it if there are any."""
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else UNKNOWN
