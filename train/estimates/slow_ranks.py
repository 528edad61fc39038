"""Slow ranks: each rank's own time in a step, and the ranks whose own time is longer than the others'.

The ranks meet in the collectives of each step, so their steps take equally long, and step times do not show which rank
the others wait for. Two times are a rank's own:

- compute: text encoders, noise, forward pass and loss. On a GPU they are measured between two events of its stream, and
  so include time in which the GPU waits for a busy host to launch the next kernel.
- data wait: until the loader returns the next micro batch, which includes images that are encoded when needed.

The other parts of a step contain waits for other ranks. A rank that is slow only in its backward pass, its update (such
as an offloaded one on a busy host) or its network is therefore not found. At ZeRO 3 the forward pass waits for weights
of other ranks as well; only the data wait is compared there.
"""

import socket
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from loguru import logger

from sdxl_trainer.launch.distributed import Ranks, publish, read_published

SLOW_RATIO = 1.15  # of a rank's time to that of the median rank
NUM_SLOW_STEPS = 20  # that a rank is slow in a row until it is named, and that it is not until it counts as recovered
MAX_NAMED = 4  # ranks that one window warns of, and that one line lists
COMPUTE, DATA = "compute", "data"
PLACE_KEY = "rank-place/{}"


class RankTimes(NamedTuple):
    """Means of one rank over a window of steps, in seconds; 0 if not measured."""

    compute: float  # of a micro step
    data_wait: float  # of a step


class RankPart(NamedTuple):
    """A part of one rank's work: COMPUTE or DATA."""

    rank: int
    part: str


class Slowness(NamedTuple):
    """Excess of a part of a rank's work.

    Attributes:
        ratio: compute time relative to the median rank's; or of a step to the same step without the excess data wait.
        seconds: by which it exceeds the median rank's, a micro step (COMPUTE) or a step (DATA).
    """

    ratio: float
    seconds: float


class SlowRankChanges(NamedTuple):
    """Parts of ranks that have become slow, slowest first, and those that have recovered."""

    slow: list[RankPart]
    recovered: list[RankPart]


def compare_ranks(times: Sequence[RankTimes], step_seconds: float) -> dict[RankPart, Slowness]:
    """Compare each rank's times with those of the median rank, the faster of two in the middle.

    Args:
        times: of all ranks over one window, ordered by rank.
        step_seconds: mean duration of a step. A data wait is compared with it, because waits are near 0 without a
            fault, and ratios of them mean nothing.
    """
    median = RankTimes(*map(statistics.median_low, zip(*times, strict=True)))
    compared: dict[RankPart, Slowness] = {}
    for rank, own in enumerate(times):
        if median.compute > 0:
            compared[RankPart(rank, COMPUTE)] = Slowness(own.compute / median.compute, own.compute - median.compute)
        excess = own.data_wait - median.data_wait
        if step_seconds > excess:
            compared[RankPart(rank, DATA)] = Slowness(step_seconds / (step_seconds - excess), excess)
    return compared


class SlowRankTracker:
    """Parts of ranks that have been slow for `num_steps` steps in a row and for two windows, and have not recovered.

    Two windows, because one long pause would make a whole window slow.

    Attributes:
        slow: the slow parts, each with its slowness in its last slow window.
    """

    def __init__(self, num_steps: int, slow_ratio: float = SLOW_RATIO):
        self._num_steps, self._slow_ratio = num_steps, slow_ratio
        self.slow: dict[RankPart, Slowness] = {}
        self._slow_steps: Counter[RankPart] = Counter()  # in a row
        self._normal_steps: Counter[RankPart] = Counter()  # in a row, of slow parts

    def add_window(self, compared: Mapping[RankPart, Slowness], num_steps: int) -> SlowRankChanges:
        """Add a window of `num_steps` steps, as `compare_ranks` has judged it, and return what it has changed."""
        exceeding = {part: slowness for part, slowness in compared.items() if slowness.ratio > self._slow_ratio}
        self._slow_steps = Counter({part: self._slow_steps[part] + num_steps for part in exceeding})
        self._normal_steps = Counter(
            {part: self._normal_steps[part] + num_steps for part in self.slow if part not in exceeding}
        )
        recovered = [part for part, steps in self._normal_steps.items() if steps >= self._num_steps]
        for part in recovered:
            del self.slow[part], self._normal_steps[part]
        due = [part for part, steps in self._slow_steps.items() if num_steps < steps >= self._num_steps]
        new = sorted(set(due) - set(self.slow), key=lambda part: -exceeding[part].ratio)
        self.slow.update({part: slowness for part, slowness in exceeding.items() if part in new or part in self.slow})
        return SlowRankChanges(new, recovered)


class RankTimer:
    """Measures this rank's own times, without waiting for its device, and shares them by a sum over all ranks.

    A GPU's times are read some steps later, when it has passed the events. A single rank measures nothing.

    Args:
        sees_compute: the forward pass does not wait for other ranks.
    """

    def __init__(self, ranks: Ranks, sees_compute: bool):
        self._ranks = ranks
        self._is_on = ranks.world_size > 1
        self._sees_compute = sees_compute and self._is_on
        self._unread: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._compute_seconds: list[float] = []  # of the micro steps of this window
        self._wait_seconds: list[float] = []  # of the steps of this window
        if self._is_on:
            publish(PLACE_KEY.format(ranks.rank), describe_place(ranks.device))

    @contextmanager
    def measure_compute(self) -> Iterator[None]:
        """Measure the work within the context as this rank's compute time of one micro step."""
        if not self._sees_compute:
            yield
        elif self._ranks.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._unread.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._compute_seconds.append(time.perf_counter() - started)

    def finish_step(self, wait_seconds: float, is_due: bool) -> list[float]:
        """Close a step.

        Args:
            wait_seconds: that this rank has waited for data in it.
            is_due: the window ends with this step; equal on all ranks.

        Returns:
            Numbers whose sums over all ranks `read_rank_times` takes; none within a window or on a single rank.
        """
        if not self._is_on:
            return []
        self._read_events()
        self._wait_seconds.append(wait_seconds)
        if not is_due:
            return []
        shared = [0.0] * (len(RankTimes._fields) * self._ranks.world_size)
        first = len(RankTimes._fields) * self._ranks.rank
        compute = statistics.fmean(self._compute_seconds) if self._compute_seconds else 0.0
        shared[first : first + len(RankTimes._fields)] = RankTimes(compute, statistics.fmean(self._wait_seconds))
        self._compute_seconds.clear()
        self._wait_seconds.clear()
        return shared

    def _read_events(self) -> None:
        """Read the events that the GPU has passed. Those of earlier steps are among them once their loss is read."""
        while self._unread and self._unread[0][1].query():
            start, end = self._unread.popleft()
            self._compute_seconds.append(start.elapsed_time(end) / 1000)


def read_rank_times(sums: Sequence[float]) -> list[RankTimes]:
    """Return the times of all ranks from sums over all ranks of what `RankTimer.finish_step` returned."""
    return [RankTimes(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]


def describe_place(device: torch.device) -> str:
    """Describe where this process computes, such as "node7, cuda:3 NVIDIA H100 80GB HBM3"."""
    name = f" {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{socket.gethostname()}, {device}{name}"


class SlowRanks:
    """Slow ranks of a run, on rank 0: warns of each once, and again only after it has recovered.

    Args:
        num_steps: that a rank is slow in a row until it is named.
    """

    def __init__(self, num_steps: int):
        self._tracker = SlowRankTracker(num_steps)

    def add_window(self, times: Sequence[RankTimes], step_seconds: float, num_steps: int) -> dict[str, float]:
        """Log what a window of steps has changed, and return its metrics.

        Args:
            times: of all ranks, ordered by rank.
            step_seconds: mean duration of a step.
            num_steps: of the window.
        """
        compared = compare_ranks(times, step_seconds)
        slow, recovered = self._tracker.add_window(compared, num_steps)
        for part in slow[:MAX_NAMED]:
            _warn(part, compared[part], times[part.rank])
        if len(slow) > MAX_NAMED:
            logger.warning("{} more ranks are slow", len(slow) - MAX_NAMED)
        for part in recovered:
            if part.part == COMPUTE:
                logger.info("rank {}: its forward pass is no longer slow", part.rank)
            else:
                logger.info("rank {}: it no longer waits long for data", part.rank)
        metrics = {"num_slow_ranks": float(len({rank for rank, _ in self._tracker.slow}))}
        if compared:
            slowest = max(compared, key=lambda part: compared[part].ratio)
            metrics |= {"slowest_rank": float(slowest.rank), "slowest_rank_ratio": compared[slowest].ratio}
        return metrics

    def describe(self) -> str:
        """Return the slow ranks in a few words, such as "3 (compute 1.31 x), 5 (data 1.20 x)"; "" without one."""
        slow = sorted(self._tracker.slow.items(), key=lambda item: -item[1].ratio)
        shown = ", ".join(f"{rank} ({part} {slowness.ratio:.2f} x)" for (rank, part), slowness in slow[:MAX_NAMED])
        return shown + (", …" if len(slow) > MAX_NAMED else "")


def _warn(slow: RankPart, slowness: Slowness, times: RankTimes) -> None:
    place = read_published(PLACE_KEY.format(slow.rank)) or "unknown host"
    if slow.part == COMPUTE:
        logger.warning(
            "rank {} ({}) holds up the other ranks: its forward pass takes {:.4g} s, {:.2f} times as long as the "
            "median rank's. Look at the clock and temperature of its device and at other programs on its host",
            slow.rank,
            place,
            times.compute,
            slowness.ratio,
        )
    else:
        logger.warning(
            "rank {} ({}) holds up the other ranks: it waits {:.4g} s a step for data, {:.4g} s more than the median "
            "rank. Look at the storage and the CPU load of its host, and at data.num_workers",
            slow.rank,
            place,
            times.data_wait,
            slowness.seconds,
        )
