"""Writing of report pages in a separate process: no step waits for it, and its failure does not end the run."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import orjson
from loguru import logger

from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.loading.counts import count_buckets, count_tokens
from sdxl_trainer.data.loading.loader import build_dataset
from sdxl_trainer.data.order.plan import Plan
from sdxl_trainer.data.text.strategy import load_strategy
from sdxl_trainer.data.text.tokens import Tokenizers
from sdxl_trainer.launch.append_file import LossCount
from sdxl_trainer.train.objective.objective import Objective
from sdxl_trainer.train.report.noise_levels import NoiseLevelCurves, write_noise_levels

SECONDS_BETWEEN = 180  # minimum interval between two reports during training
MAX_SECONDS = 120  # time limit of a report
MAX_ERROR_BYTES = 20_000  # of the end of its errors that are logged


class ReportProcess:
    """Starts `python -m sdxl_trainer.train.report` on a run folder.

    Args:
        folder: the run folder.
        seconds_between: minimum interval between the run's start and the first report that `update` starts, and between
            two such reports.
        describe_noise_levels: returns the curves of the loss feedback when a report starts; None without feedback.
    """

    def __init__(
        self,
        folder: Path,
        seconds_between: float = SECONDS_BETWEEN,
        describe_noise_levels: Callable[[], NoiseLevelCurves | None] = lambda: None,
    ):
        self._folder, self._seconds_between = folder, seconds_between
        self._describe_noise_levels = describe_noise_levels
        self._process: subprocess.Popen[bytes] | None = None
        # A file and not a pipe: nobody reads while the report is written, and a full pipe would stop it.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object lives
        self._started = time.monotonic()
        self._losses = LossCount(folder / "report" / "report.html", "report")

    def update(self) -> None:
        """Start a report, unless another is still being written or the last one is recent."""
        if self._process is not None and self._process.poll() is None:
            return
        if time.monotonic() - self._started >= self._seconds_between:
            self._end_process()
            self._start("--background")

    def finish(self) -> None:
        """Write the last report and wait for it."""
        self._end_process()
        self._start()
        if self._end_process():
            logger.info("report: {}", self._folder / "report" / "report.html")
        self._losses.end("is not up to date")

    def _start(self, *options: str) -> None:
        try:
            write_noise_levels(self._folder / "report", self._describe_noise_levels())
        except OSError as error:
            self._losses.add(str(error))
        self._start_program([sys.executable, "-m", "sdxl_trainer.train.report", str(self._folder), *options])

    def _start_program(self, command: list[str]) -> None:
        self._started = time.monotonic()
        self._errors.seek(0)
        self._errors.truncate()
        try:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C must reach only the training process
            )
        except OSError as error:
            self._losses.add(f"the program cannot be started: {error}")

    def _end_process(self) -> bool:
        """Wait for a report that was started, and return whether it is written. An error is logged."""
        if self._process is None:
            return False
        process, self._process = self._process, None
        try:
            process.wait(timeout=MAX_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            self._losses.add(f"the program was stopped after {MAX_SECONDS} s")
            return False
        if process.returncode:
            self._losses.add(self._read_errors() or f"the program ended with status {process.returncode}")
            return False
        self._losses.end()
        return True

    def _read_errors(self) -> str:
        """Return the end of what the report has written to its standard error."""
        end = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, end - MAX_ERROR_BYTES))
        return self._errors.read().decode(errors="replace").strip()


def open_report(
    config: Config, index: Index, plan: Plan, tokenizers: Tokenizers, objective: Objective
) -> ReportProcess:
    """Store the counts of the training set for the report, and return the process that writes the report."""
    # A separate instance of the strategy: training must call its own equally often on all ranks.
    strategy = load_strategy(config.data.strategy) if config.data.strategy else None
    dataset = build_dataset(config, index, tokenizers, strategy)
    counts = {"buckets": count_buckets(plan), "tokens": asdict(count_tokens(dataset))}
    folder = config.run.folder / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "data.json", orjson.dumps(counts, option=orjson.OPT_INDENT_2))
    except OSError as error:
        logger.warning("the counts of the training set cannot be stored for the report: {}", error)

    def describe_noise_levels() -> NoiseLevelCurves | None:
        described = objective.describe_noise_levels()
        return None if described is None else NoiseLevelCurves(**described)

    return ReportProcess(config.run.folder, describe_noise_levels=describe_noise_levels)
