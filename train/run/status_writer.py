"""Writing of a run's state to `logs/status.json` by a thread, and of how the run has ended."""

import math
import threading
import time
from types import TracebackType

import msgspec

from sdxl_trainer.launch.append_file import LossCount
from sdxl_trainer.launch.failures import explain_failure
from sdxl_trainer.launch.signals import Interrupted, InterruptedAlone
from sdxl_trainer.train.report.run_status import (
    FAILED,
    FINISHED,
    RUNNING,
    STATUS_FILE,
    STOPPED,
    WRITE_SECONDS,
    RunStatus,
    describe_process,
    write_status,
)
from sdxl_trainer.train.run.console import describe_peak_memory
from sdxl_trainer.train.run.run import Run

MAX_REASON = 500  # characters


class StatusWriter:
    """Context in which a thread of rank 0 writes the run's state. At its end the state says how the run has ended.

    A file that cannot be written, as on a full disk, gives one warning and ends nothing.
    """

    def __init__(self, run: Run):
        self._run, self._file = run, run.folder / "logs" / STATUS_FILE
        self._losses = LossCount(self._file, "state")
        self._base = RunStatus(
            state=RUNNING,
            max_steps=run.num_steps,
            num_ranks=run.ranks.world_size,
            has_prompts=run.config.sample.has_prompts,
            **describe_process(),  # pyright: ignore[reportArgumentType]
        )
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="status", daemon=True)

    def __enter__(self) -> "StatusWriter":
        if self._run.ranks.is_main:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._run.ranks.is_main:
            self._end.set()
            self._thread.join()
            self._write(*describe_end(error))
            self._losses.end("is not up to date")

    def _repeat(self) -> None:
        while True:
            self._write(RUNNING, "")
            if self._end.wait(WRITE_SECONDS):
                return

    def _write(self, state: str, reason: str) -> None:
        try:
            write_status(self._file, self._build_status(state, reason))
        except OSError as error:
            self._losses.add(error.strerror or str(error))
        else:
            self._losses.end()

    def _build_status(self, state: str, reason: str) -> RunStatus:
        progress, position = self._run.progress, self._run.state
        averages = progress.averages
        return msgspec.structs.replace(
            self._base,
            state=state,
            reason=reason,
            step=position.step,
            epoch=position.epoch + position.index / max(1, position.epoch_batches),
            now=progress.now if state == RUNNING else "",
            seconds_left=_require_finite(progress.estimate_seconds_left(averages)) if state == RUNNING else None,
            images_per_second=_require_finite(averages.images_per_second),
            data_wait_share=_require_finite(averages.data_wait_share),
            loss=_require_finite(averages.loss),
            memory=describe_peak_memory(self._run.ranks.device),
            num_bad=position.num_bad,
            num_non_finite=position.num_non_finite,
            slow_ranks=progress.slow_ranks,
            over_fitting=progress.over_fitting,
            written=time.time(),
        )


def describe_end(error: BaseException | None) -> tuple[str, str]:
    """Return state and reason of a run that ends with an error or without one."""
    if error is None:
        return FINISHED, ""
    if isinstance(error, InterruptedAlone):
        return FAILED, f"{error}, and other ranks do not answer"
    if isinstance(error, Interrupted):
        return STOPPED, str(error)
    first_line = next(iter(str(error).strip().splitlines()), "")
    reason = explain_failure(error) or f"{type(error).__name__}: {first_line}".removesuffix(": ")
    return FAILED, reason[:MAX_REASON]


def _require_finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
