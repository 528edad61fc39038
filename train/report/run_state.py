"""State of a run, derived from its files: running, stopped, failed or finished. Imports no torch."""

import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sdxl_trainer.data.files import read_regular
from sdxl_trainer.launch.folder_lock import LOCK_FILE, MAX_HOLDER_BYTES
from sdxl_trainer.train.report.run_status import (
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    RunStatus,
    is_process_alive,
    read_process_start,
)

SILENT_SECONDS = 60.0  # a job on another machine that has written no state for so long has ended
HOLDER = re.compile(r"host (\S+), process (\d{1,10}), started ")
LOCK_SLACK_SECONDS = 5.0  # that a lock may seem older than the process that holds it
STARTING = "starting"


class RunState(NamedTuple):
    """State of a run, and in words why it is in it or what it does."""

    state: str
    text: str = ""


class Holder(NamedTuple):
    """The process that the lock file of a run folder names."""

    process: int
    is_alive: bool


def resolve_state(
    status: RunStatus | None, holder: Holder | None, seconds_silent: float, last_step: int, max_steps: int
) -> RunState:
    """Derive a run's state.

    Args:
        status: the state that the run wrote last; None for runs of earlier versions, and before the first step.
        holder: the process that the run folder's lock names, if it has one.
        seconds_silent: time since the run wrote its state, or without one its metrics.
        last_step, max_steps: 0 if they are not known.
    """
    living = holder.process if holder is not None and holder.is_alive else None
    if status is not None and status.state == RUNNING:
        is_alive = is_process_alive(status)
        is_silent = seconds_silent >= SILENT_SECONDS
        if is_alive or (is_alive is None and not is_silent):
            silence = f"{status.now}; no sign of life for {seconds_silent / 60:.0f} min"
            return RunState(RUNNING, silence if is_silent else status.now)
        if living is None:
            return RunState(FAILED, f"ended without a word after step {max(status.step, last_step):,}")
    if living is not None and (status is None or status.state == RUNNING or status.process != living):
        return RunState(RUNNING, STARTING)
    if status is not None:
        return RunState(status.state if status.state in (STOPPED, FAILED, FINISHED) else STOPPED, status.reason)
    if last_step >= max_steps > 0:
        return RunState(FINISHED)
    if last_step and seconds_silent < SILENT_SECONDS:
        return RunState(RUNNING)
    return RunState(STOPPED, f"after step {last_step:,}" if last_step else "before the first step")


def read_holder(folder: Path) -> Holder | None:
    """Read which process holds the lock of a run folder; None without a lock file that names one of this host.

    The lock is not tried, because trying it could refuse a job that starts at this moment.
    """
    file = folder / LOCK_FILE
    try:
        content, mtime_ns = read_regular(file, MAX_HOLDER_BYTES)
    except OSError:
        return None
    found = HOLDER.match(content.decode("utf-8", "replace"))
    if found is None or found[1] != socket.gethostname():
        return None
    started = compute_start_time(int(found[2]))
    return Holder(int(found[2]), started is not None and started <= mtime_ns / 1e9 + LOCK_SLACK_SECONDS)


def compute_start_time(process: int) -> float | None:
    """Compute the Unix time at which a process was started; None if it does not run."""
    ticks = read_process_start(process)
    with suppress(OSError, ValueError):
        uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK") if ticks else None
    return None
