"""Wait for ranks that work on their own, for as long as they make progress.

A collective ends after a fixed time, although a rank may rightly work for hours before it joins. So ranks wait
through the store of the process group: each publishes its progress there (launch/activity.py) and arrives there.
"""

import time
from collections.abc import Callable, Iterator
from typing import Protocol

from loguru import logger

from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.signals import Interrupted, InterruptedAlone

FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.001, 1.0
REPORT_SECONDS, REPEAT_REPORT_SECONDS = 10.0, 60.0  # until the first and between further lines about missing ranks
LOOKS_PER_LIMIT, RANKS_PER_LOOK = 10, 32  # how often the progress of missing ranks is read
MAX_SHOWN_RANKS = 8
STOP_PATIENCE_SECONDS = 10.0  # that a waiting rank which was asked to stop gives the others to stop too
FAREWELL_SECONDS = 20.0  # that rank 0 keeps the store for ranks that have not read the end of a wait

# Counts over all waits. The first name with a rank behind it holds the number of waits that the rank has begun.
ARRIVED_KEY, LEFT_KEY = "ranks that have arrived", "ranks that have left"
ACTIVITY_KEY = "activity of rank"


class Store(Protocol):
    """The methods of `torch.distributed.Store` that waiting needs."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def add(self, key: str, value: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...


class RankWaits:
    """The waits of this rank for all others.

    No rank begins its next wait before all have begun the present one, so a single count serves all waits.
    """

    def __init__(self, store: Store, rank: int, world_size: int):
        self._store, self._rank, self._world_size = store, rank, world_size
        self._num_begun = self._num_ended = 0
        self._published: dict[int, str] = {}  # last progress seen of each missing rank
        self._changed_at: dict[int, float] = {}  # when it was first seen

    def publish_activity(self, text: str) -> None:
        """Publish this rank's progress: a count, a space, and its phase."""
        self._store.set(f"{ACTIVITY_KEY} {self._rank}", text)

    def arrive(self) -> None:
        """Begin the next wait."""
        self._num_begun += 1
        self._store.set(f"{ARRIVED_KEY} {self._rank}", str(self._num_begun))
        self._store.add(ARRIVED_KEY, 1)

    def until_all_arrive(self, purpose: str, limit_seconds: float, raise_if_stopped: Callable[[], None]) -> str:
        """Wait for the other ranks as long as each missing one makes progress, and log which ranks are missing.

        Args:
            purpose: what the ranks wait for.
            limit_seconds: longest time without progress of a missing rank.
            raise_if_stopped: called while waiting; raises to stop.

        Returns:
            The ranks that made no progress in time, as text; empty if all ranks have arrived.
        """
        self._published, self._changed_at = {}, {}
        # All waiting ranks ask the store about all others, so the more there are, the less often they ask.
        look_seconds = min(
            REPORT_SECONDS * max(1.0, self._world_size / RANKS_PER_LOOK), limit_seconds / LOOKS_PER_LIMIT
        )
        start, next_look, next_report = time.monotonic(), look_seconds, REPORT_SECONDS
        for _ in poll(raise_if_stopped):
            if self._store.add(ARRIVED_KEY, 0) >= self._num_begun * self._world_size:
                return ""
            ACTIVITY.count += 1  # for this rank's watchdog: the limit is kept here
            waited = time.monotonic() - start
            if waited < next_look:
                continue
            next_look = waited + look_seconds
            missing = self._find_missing()
            stuck = [rank for rank in missing if time.monotonic() - self._changed_at[rank] > limit_seconds]
            if stuck:
                return self._describe(stuck)
            if missing and waited >= next_report:
                next_report = waited + REPEAT_REPORT_SECONDS
                self._report(purpose, missing)
        raise AssertionError("polling has no end")

    def leave(self) -> None:
        """End a wait in which all ranks have arrived. Rank 0, which may keep the store, leaves last."""
        self._num_ended += 1
        if self._rank:
            self._store.add(LEFT_KEY, 1)
            return
        deadline = time.monotonic() + FAREWELL_SECONDS
        for _ in poll(lambda: None):
            all_left = self._store.add(LEFT_KEY, 0) >= self._num_ended * (self._world_size - 1)
            if all_left or time.monotonic() > deadline:
                return

    def _find_missing(self) -> list[int]:
        """Return the ranks that have not begun this wait, and note which of them have made progress."""
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        missing = [rank for rank in others if int(self._read(f"{ARRIVED_KEY} {rank}") or 0) < self._num_begun]
        for rank in missing:
            text = self._read(f"{ACTIVITY_KEY} {rank}")
            if rank not in self._published or text != self._published[rank]:
                self._published[rank], self._changed_at[rank] = text, time.monotonic()
        return missing

    def _read(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _report(self, purpose: str, missing: list[int]) -> None:
        """Log which ranks are missing, on the first rank that is not."""
        if self._rank == min(set(range(self._world_size)) - set(missing)):
            shown = self._describe(missing)
            logger.warning("{}: waiting for {} of {} ranks: {}", purpose, len(missing), self._world_size, shown)

    def _describe(self, ranks: list[int]) -> str:
        """Return the ranks, each with its phase if it has published one, as text."""
        phases = {rank: self._published[rank].partition(" ")[2] for rank in ranks[:MAX_SHOWN_RANKS]}
        shown = ", ".join(f"{rank} ({phase})" if phase else str(rank) for rank, phase in phases.items())
        return shown + (", ..." if len(ranks) > MAX_SHOWN_RANKS else "")


def poll(raise_if_stopped: Callable[[], None]) -> Iterator[None]:
    """Yield at growing intervals, without end. `raise_if_stopped` is called before each pause."""
    pause_seconds = FIRST_POLL_SECONDS
    while True:
        yield
        raise_if_stopped()
        time.sleep(pause_seconds)
        pause_seconds = min(1.5 * pause_seconds, LAST_POLL_SECONDS)


def give_patience(raise_if_stopped: Callable[[], None]) -> Callable[[], None]:
    """Return a function that raises InterruptedAlone, `STOP_PATIENCE_SECONDS` after `raise_if_stopped` first raised.

    A signal usually reaches all ranks. If the others stop too, they all end in good order.
    """
    first_time: float | None = None

    def raise_later() -> None:
        nonlocal first_time
        try:
            raise_if_stopped()
        except Interrupted as request:
            first_time = first_time or time.monotonic()
            if time.monotonic() - first_time > STOP_PATIENCE_SECONDS:
                raise InterruptedAlone(request.signal_number) from None

    return raise_later
