"""How far the cache job is: every rank publishes its numbers, rank 0 shows one bar for each."""

import json
import sys
import threading
import time
from dataclasses import asdict, dataclass

from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sdxl_trainer.launch.distributed import Ranks, publish, read_published

SHOW_EVERY_SECONDS = 0.5
FIRST_LINE_SECONDS, LINE_EVERY_SECONDS = 2.0, 10.0  # the first one tells early how long it will take


@dataclass
class RankProgress:
    """One rank's numbers so far. `wait_seconds`: how long its device had nothing to do."""

    total: int
    done: int = 0
    bad: int = 0
    bytes_written: int = 0
    wait_seconds: float = 0.0
    seconds: float = 1e-9


class ProgressReporter:
    """Publishes this rank's progress, and on rank 0 shows that of all ranks until it is closed.

    On a terminal there is a live bar for each rank; elsewhere (a file, Slurm) a line soon and then every ten seconds.
    """

    def __init__(self, ranks: Ranks, total: int):
        self.progress = RankProgress(total)
        self._ranks = ranks
        self._started = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Show the last numbers and end."""
        self._closing.set()
        self._thread.join()
        self.progress.seconds = time.monotonic() - self._started

    def _run(self) -> None:
        if not self._ranks.is_main:
            while not self._closing.wait(SHOW_EVERY_SECONDS):
                self._publish()
            self._publish()
        elif sys.stderr.isatty():
            self._show_bars()
        else:
            wait_seconds = FIRST_LINE_SECONDS
            while not self._closing.wait(wait_seconds):
                self._log_line()
                wait_seconds = LINE_EVERY_SECONDS

    def _publish(self) -> None:
        self.progress.seconds = time.monotonic() - self._started
        publish(f"cache-progress/{self._ranks.rank}", json.dumps(asdict(self.progress)))

    def _collect(self) -> list[RankProgress]:
        self.progress.seconds = time.monotonic() - self._started
        others = (read_published(f"cache-progress/{rank}") for rank in range(1, self._ranks.world_size))
        return [self.progress, *(RankProgress(**json.loads(text)) for text in others if text is not None)]

    def _show_bars(self) -> None:
        columns = (
            TextColumn("rank {task.fields[rank]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            tasks = {}
            while not self._closing.wait(SHOW_EVERY_SECONDS):
                for rank, numbers in enumerate(self._collect()):
                    if rank not in tasks:
                        tasks[rank] = bars.add_task("", total=numbers.total, rank=rank, numbers="")
                    bars.update(tasks[rank], completed=numbers.done, numbers=describe(numbers))

    def _log_line(self) -> None:
        ranks = self._collect()
        whole = RankProgress(
            total=sum(r.total for r in ranks),
            done=sum(r.done for r in ranks),
            bad=sum(r.bad for r in ranks),
            bytes_written=sum(r.bytes_written for r in ranks),
            wait_seconds=sum(r.wait_seconds for r in ranks) / len(ranks),
            seconds=max(r.seconds for r in ranks),
        )
        rate = whole.done / whole.seconds
        left = f", {(whole.total - whole.done) / rate:.0f} s left" if rate else ""
        logger.info("{} of {} images, {}{}", whole.done, whole.total, describe(whole), left)


def describe(numbers: RankProgress) -> str:
    """Rate, device idle share, bytes written and bad images in words."""
    bad = f", {numbers.bad} bad" if numbers.bad else ""
    return (
        f"{numbers.done / numbers.seconds:.1f}/s, device waits {numbers.wait_seconds / numbers.seconds:.0%}, "
        f"{numbers.bytes_written / 1e6:.0f} MB written{bad}"
    )
