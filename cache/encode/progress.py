"""Progress of the cache job: numbers of every rank, bars or log lines on rank 0, and the report at the end."""

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from loguru import logger
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sdxl_trainer.configs.language.translate import translate
from sdxl_trainer.configs.problems import describe_seconds, format_rate
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.formats.manifest import ManifestEntry
from sdxl_trainer.launch.distributed import Ranks, publish, read_published
from sdxl_trainer.launch.logger import SCREEN, TranslatedTable, is_terminal

BAR_INTERVAL_SECONDS = 0.5
# The first log line comes early because it holds the time left.
FIRST_LINE_SECONDS, LINE_INTERVAL_SECONDS = 2.0, 10.0


@dataclass
class RankProgress:
    """Progress of one rank; `wait_seconds` is the time in which its device was idle."""

    total: int
    done: int = 0
    bad: int = 0
    bytes_written: int = 0
    wait_seconds: float = 0.0
    seconds: float = 1e-9


class _Bars:
    """A progress bar of each rank, for the live display."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("rank {task.fields[rank]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        self._tasks: dict[int, TaskID] = {}

    def update(self, ranks: Sequence[RankProgress]) -> None:
        """Set the bars to the progress of each rank."""
        for rank, progress in enumerate(ranks):
            if rank not in self._tasks:
                self._tasks[rank] = self._bars.add_task("", total=progress.total, rank=rank, numbers="")
            numbers = translate(describe_progress(progress))
            self._bars.update(self._tasks[rank], completed=progress.done, numbers=numbers)

    def __rich__(self) -> RenderableType:
        return self._bars.get_renderable()


class ProgressReporter:
    """Publishes this rank's progress; rank 0 also shows the progress of all ranks until `close`.

    On a terminal each rank has a live bar. Elsewhere (in a file, under Slurm) a log line is printed after two seconds
    and then every ten seconds.
    """

    def __init__(self, ranks: Ranks, total: int):
        self.progress = RankProgress(total=total)
        self._ranks = ranks
        self._started = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Publish or show the last numbers and stop the thread."""
        self._closing.set()
        self._thread.join()
        self.progress.seconds = time.monotonic() - self._started

    def _run(self) -> None:
        rank, num_rows = self._ranks.rank, self._ranks.world_size + 1  # of all bars, and one of the cursor
        if not self._ranks.is_main:
            with SCREEN.show_live("", num_rows, rank):
                while not self._closing.wait(BAR_INTERVAL_SECONDS):
                    self._publish()
            self._publish()
        elif is_terminal():
            bars = _Bars()
            with SCREEN.show_live(bars, num_rows, rank):
                while not self._closing.wait(BAR_INTERVAL_SECONDS):
                    bars.update(self._collect())
                bars.update(self._collect())
        else:
            wait_seconds = FIRST_LINE_SECONDS
            while not self._closing.wait(wait_seconds):
                self._log_line()
                wait_seconds = LINE_INTERVAL_SECONDS

    def _publish(self) -> None:
        self.progress.seconds = time.monotonic() - self._started
        publish(f"cache-progress/{self._ranks.rank}", json.dumps(asdict(self.progress)))

    def _collect(self) -> list[RankProgress]:
        self.progress.seconds = time.monotonic() - self._started
        others = (read_published(f"cache-progress/{rank}") for rank in range(1, self._ranks.world_size))
        return [self.progress, *(RankProgress(**json.loads(text)) for text in others if text is not None)]

    def _log_line(self) -> None:
        whole = combine_progress(self._collect())
        rate = whole.done / whole.seconds
        left = f", {describe_seconds((whole.total - whole.done) / rate)} left" if rate else ""
        logger.info("{} of {} images, {}{}", whole.done, whole.total, describe_progress(whole), left)


def combine_progress(ranks: Sequence[RankProgress]) -> RankProgress:
    """Return the progress of all ranks together. Idle time is their mean, and the duration that of the slowest rank."""
    return RankProgress(
        total=sum(rank.total for rank in ranks),
        done=sum(rank.done for rank in ranks),
        bad=sum(rank.bad for rank in ranks),
        bytes_written=sum(rank.bytes_written for rank in ranks),
        wait_seconds=sum(rank.wait_seconds for rank in ranks) / len(ranks),
        seconds=max(rank.seconds for rank in ranks),
    )


def describe_progress(progress: RankProgress) -> str:
    """Return speed, idle share of the device, megabytes written and number of bad images as text."""
    bad = f", {progress.bad} bad" if progress.bad else ""
    return (
        f"{format_rate(progress.done / progress.seconds)}, device idle {progress.wait_seconds / progress.seconds:.0%}, "
        f"{progress.bytes_written / 1e6:.0f} MB written{bad}"
    )


def write_cache_report(folder: Path, ranks: Sequence[RankProgress], entries: Mapping[str, ManifestEntry]) -> None:
    """Write the finished job's numbers to `cache_report.json` and print them as tables."""
    buckets = Counter(f"{entry.bucket[0]}x{entry.bucket[1]}" for entry in entries.values())
    whole = combine_progress(ranks)
    report = {
        "cached": len(entries),
        "encoded": whole.done,
        "bad": whole.bad,
        "seconds": round(whole.seconds, 3),
        "bytes_written": whole.bytes_written,
        "images_per_second": round(whole.done / whole.seconds, 3),
        "device_idle_share": round(sum(rank.wait_seconds for rank in ranks) / sum(rank.seconds for rank in ranks), 4),
        "buckets": dict(sorted(buckets.items())),
        "ranks": [asdict(rank) for rank in ranks],
    }
    write_atomic(folder / "cache_report.json", orjson.dumps(report, option=orjson.OPT_INDENT_2))
    _print_report(folder, report)


def _print_report(folder: Path, report: Mapping[str, Any]) -> None:
    totals = TranslatedTable(title=f"latent cache {folder}", show_header=False)
    rows = {
        "latents in the cache": report["cached"],
        "encoded now": report["encoded"],
        "bad images": report["bad"],
        "seconds": f"{report['seconds']:.1f}",
        "speed": format_rate(report["encoded"] / report["seconds"] if report["seconds"] else 0),
        "device idle": f"{report['device_idle_share']:.1%}",
        "written": f"{report['bytes_written'] / 1e6:.1f} MB",
    }
    for name, value in rows.items():
        totals.add_row(name, translate(str(value)))
    buckets = TranslatedTable("bucket", "latents", title="buckets")
    for name, count in report["buckets"].items():
        buckets.add_row(name, str(count))
    Console(stderr=True).print(totals, buckets)
