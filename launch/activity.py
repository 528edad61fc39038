"""Activity of this rank, and a watchdog that ends the rank if its work stops.

A rank makes progress when its main thread finishes a piece of work: a batch, an image, a file, a step.
docs/RELIABILITY.md lists the pieces.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loguru import logger

from sdxl_trainer.launch.status import STATUS_FAILED, record_status

PUBLISH_SECONDS = FOLLOW_SECONDS = 1.0
LINE_SECONDS = 10.0  # between log lines about pieces of one phase
TICKS_PER_LIMIT, LONGEST_TICK_SECONDS = 20, 5.0


class Activity:
    """The current work of this rank, and a count of finished pieces.

    Attributes:
        phase: the work that other ranks may wait for, such as "validating".
        part: the part of a training step, or the pieces done, such as "2 of 8"; known to this rank alone.
        step: the last finished step, or None.
        count: pieces of work finished so far.
        background: pieces that another thread has finished. They count only while the main thread waits for that thread
            (`follow`); otherwise they could hide that it hangs.
    """

    def __init__(self) -> None:
        self.phase, self.part, self.count = "starting", "", 0
        self.step: int | None = None
        self.background = 0
        self._send: Callable[[str], None] | None = None
        self._sent_at = self._logged_at = 0.0

    def publish_by(self, send: Callable[[str], None] | None) -> None:
        """Publish progress through `send` from now on, at most once a second and at each new phase."""
        self._send = send
        self._publish()

    def note(self, part: str | None = None) -> None:
        """Note a finished piece of work, and the part of the step that begins. Main thread only."""
        self.count += 1
        if part is not None:
            self.part = part
        if self._send is not None and time.monotonic() - self._sent_at >= PUBLISH_SECONDS:
            self._publish()

    def note_piece(self, done: int, total: int) -> None:
        """Note a finished piece of work, the `done`-th of `total`, and log it every LINE_SECONDS. Main thread only."""
        self.note(f"{done} of {total}")
        if done < total and time.monotonic() - self._logged_at >= LINE_SECONDS:
            self._logged_at = time.monotonic()
            logger.bind(displayed=True).info("{}: {}", self.phase, self.part)

    def finish_step(self, step: int) -> None:
        """Note a finished training step."""
        self.step = step
        self.note("")

    def enter(self, phase: str) -> None:
        """Begin another phase."""
        self.phase, self.part = phase, ""
        self._logged_at = time.monotonic()
        self.count += 1
        self._publish()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Enter a phase, and the one before when the context ends."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def follow(self, wait: Callable[[float], bool]) -> None:
        """Wait for another thread, whose progress is this rank's meanwhile.

        Args:
            wait: waits up to the given number of seconds, and returns whether the wait is over.
        """
        seen = self.background
        while not wait(FOLLOW_SECONDS):
            if self.background != seen:
                seen = self.background
                self.note()

    def describe(self) -> str:
        """Describe the current work, such as "training (updating the weights), last finished step 12"."""
        part = f" ({self.part})" if self.part else ""
        step = "" if self.step is None else f", last finished step {self.step}"
        return f"{self.phase}{part}{step}"

    def _publish(self) -> None:
        self._sent_at = time.monotonic()
        if self._send is not None:
            # The count makes two texts of one phase differ.
            self._send(f"{self.count} {self.phase}")


ACTIVITY = Activity()


class Watchdog:
    """Context in which a thread ends the process with status 1 once the main thread makes no progress.

    The main thread may hang in a collective or wait for a device. Both release the interpreter, so the thread still
    runs. Time in which the whole process is stopped (SIGSTOP) does not count.

    Args:
        limit_seconds: longest time without progress.
        on_stall: called before the process ends, after the hung work is logged.
        stall_seconds: longest time that `on_stall` may take.
        first_extra_seconds: added to the limit until the first training step is finished, which may compile.
    """

    def __init__(
        self,
        limit_seconds: float,
        on_stall: Callable[[], object] = lambda: None,
        stall_seconds: float = 0.0,
        first_extra_seconds: float = 0.0,
    ):
        self._limit_seconds = limit_seconds
        self._on_stall = on_stall
        self._stall_seconds = stall_seconds
        self._first_extra_seconds = first_extra_seconds
        self._done = threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _run(self) -> None:
        tick_seconds = min(LONGEST_TICK_SECONDS, self._limit_seconds / TICKS_PER_LIMIT)
        seen, stalled_seconds = ACTIVITY.count, 0.0
        while not self._done.wait(tick_seconds):
            if ACTIVITY.count != seen:
                seen, stalled_seconds = ACTIVITY.count, 0.0
                continue
            # Ticks are counted instead of reading the clock, which also runs while the process is stopped.
            stalled_seconds += tick_seconds
            extra_seconds = self._first_extra_seconds if ACTIVITY.step is None else 0.0
            if stalled_seconds >= self._limit_seconds + extra_seconds:
                self._end(f"no progress for {stalled_seconds / 60:.3g} minutes in: {ACTIVITY.describe()}")
                return

    def _end(self, reason: str) -> None:
        # `on_stall` may hang too, for example on the same storage.
        last_resort = threading.Timer(self._stall_seconds, exit_with_failure)
        last_resort.daemon = True
        if self._stall_seconds:
            last_resort.start()
        try:
            logger.error(reason)
            self._on_stall()
        finally:
            exit_with_failure()


def exit_with_failure() -> None:
    """End the process with status 1 without cleaning up."""
    os._exit(record_status(STATUS_FAILED))
