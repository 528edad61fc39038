"""State of a run in `logs/status.json`. The run writes it every few seconds; pages that show runs read it."""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from sdxl_trainer.data.files import open_atomic, read_regular

STATUS_FILE = "status.json"  # in the log folder
RUNNING, STOPPED, FAILED, FINISHED = "running", "stopped", "failed", "finished"
WRITE_SECONDS = 5.0  # between two writes of a running job
MAX_STATUS_BYTES = 1 << 16


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """State and progress of a run at one moment. Readers ignore fields that they do not know."""

    state: str  # one of the four above
    reason: str = ""  # why it stopped or failed
    step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    now: str = ""  # current activity
    seconds_left: float | None = None
    images_per_second: float | None = None
    data_wait_share: float | None = None
    loss: float | None = None  # average of the last steps
    memory: str = ""  # peak of rank 0
    num_bad: int = 0
    num_non_finite: int = 0
    num_ranks: int = 1
    slow_ranks: str = ""  # that the others wait for
    over_fitting: str = ""  # since which step the last validation finds it
    has_prompts: bool = False  # whether a request for generated images has an effect
    host: str = ""
    machine: str = ""  # identifies the system in which `process` is valid
    process: int = 0
    process_started: int = 0  # in ticks after the system's start
    started: float = 0.0  # Unix time of the job's start
    written: float = 0.0  # Unix time of this state


def write_status(file: Path, status: RunStatus) -> None:
    """Write a run's state. The file appears whole, but is not flushed to disk, which would take time every few seconds.

    Raises:
        OSError: the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(file, durable=False) as temporary:
        temporary.write(msgspec.json.encode(status))


def read_status(file: Path) -> RunStatus | None:
    """Read a run's state; None if the file is missing or damaged."""
    try:
        return msgspec.json.decode(read_regular(file, MAX_STATUS_BYTES).content, type=RunStatus)
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        return None


def identify_machine() -> str:
    """Return a text that two processes share if they have the same process numbers; "" if the system has none."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def read_process_start(process: int) -> int:
    """Return when a process of this machine was started, in ticks after the system's start; 0 if it does not run."""
    try:
        content = Path(f"/proc/{process}/stat").read_bytes()
        state, *fields = content.rpartition(b")")[2].split()  # the name before may hold spaces and brackets
        return 0 if state in (b"Z", b"X") else int(fields[18])
    except (OSError, ValueError, IndexError):
        return 0


def describe_process() -> dict[str, str | int | float]:
    """Return the fields of a status that identify this process."""
    process = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": identify_machine(),
        "process": process,
        "process_started": read_process_start(process),
        "started": time.time(),
    }


def is_process_alive(status: RunStatus) -> bool | None:
    """Return whether the process that wrote a state still runs; None if it ran on another machine."""
    if not status.machine or status.machine != identify_machine():
        return None
    return read_process_start(status.process) == status.process_started != 0
