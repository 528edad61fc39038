"""What the faults of faults.py share: outcomes, jobs that are forked with the libraries loaded, disks, and moments.

A job is struck in the middle of a chosen operation on files (its n-th rename, fsync, deletion, ...), which hits the
short dangerous moments as often as the long harmless ones.
"""

import ctypes
import fcntl
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from rank_port import find_rank_port  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
# The promises that a fault is tried against.
TORN, LOST, WRONG, HANG, MESSAGE = "nothing torn", "nothing lost", "nothing wrong", "no hang", "file and cure named"
HANG_SECONDS = 60.0
GRACE_SECONDS = 30.0  # torchrun's, for the other ranks after one has failed
OPERATIONS = ("replace", "rename", "unlink", "remove", "fsync", "mkdir", "rmdir", "truncate", "ftruncate", "pwrite")
EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2
TRACEBACK = "Traceback (most recent call last)"


@dataclass
class Outcome:
    """A fault and what it broke: promise → what was seen. A fault that cannot be tried here is skipped."""

    fault: str
    problems: dict[str, str] = field(default_factory=dict)
    skipped: str = ""

    def check(self, promise: str, holds: bool, seen: object) -> None:
        """Note that a promise was broken unless it holds; the first thing seen counts."""
        if not holds:
            self.problems.setdefault(promise, str(seen)[:300])


class SkippedError(Exception):
    """A fault cannot be tried on this machine; the message is the reason."""


@dataclass(frozen=True)
class Base:
    """What all cases start from: a set, its caches by form, a whole run, and the settings of both programs."""

    folder: Path
    hashes: dict[str, str]  # key → SHA-256 of the latents of an unbroken job
    losses: dict[int, float]  # step → loss of an unbroken run
    operations: dict[str, int]  # job → operations on files

    @property
    def settings(self) -> Path:
        """The settings file."""
        return self.folder / "settings.yaml"


@dataclass(frozen=True)
class Case:
    """One case: a folder of its own, and its random numbers."""

    base: Base
    folder: Path
    rng: random.Random

    def words(self, **settings: object) -> list[str]:
        """Return the arguments of a program; `cache_dir` stands for `cache.dir`."""
        return [
            "--cfg",
            str(self.base.settings),
            *(f"{key.replace('_', '.', 1)}={value}" for key, value in settings.items()),
        ]


Plant = Callable[[int], None]  # called in each rank before the program starts, with the rank's number


class Job:
    """A program that runs in forked ranks, in a process group of their own.

    Args:
        program: `cache` or `train`.
        plant: called in each rank before the program starts.
    """

    def __init__(self, program: str, words: list[str], log: Path, ranks: int = 1, plant: Plant | None = None):
        self.log = log
        self._from = log.stat().st_size if log.exists() else 0
        self._statuses: dict[int, int] = {}
        self.processes: list[int] = []
        port = find_rank_port() if ranks > 1 else 0
        for rank in range(ranks):
            process = os.fork()
            if process == 0:
                os.setpgid(0, self.processes[0] if self.processes else 0)
                _be_rank(program, words, log, (rank, ranks, port), plant)
            os.setpgid(process, self.processes[0] if self.processes else process)
            self.processes.append(process)

    def poll(self) -> bool:
        """Return whether all ranks have ended."""
        for process in self.processes:
            if process not in self._statuses:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self._statuses[process] = os.waitstatus_to_exitcode(status)
        return len(self._statuses) == len(self.processes)

    def wait(self, timeout_seconds: float = HANG_SECONDS) -> int | None:
        """Return the status of the first rank that failed, or 0; None if it hangs, after killing it."""
        deadline, warned_at = time.monotonic() + timeout_seconds, None
        hangs = False
        while not self.poll():
            now = time.monotonic()
            if warned_at is None and any(self._statuses.values()):
                warned_at = now
                self.send(signal.SIGTERM)
            if warned_at is not None and now > warned_at + GRACE_SECONDS:
                self.send(signal.SIGKILL)
            if now > deadline:
                hangs = True
                self.send(signal.SIGKILL)
            time.sleep(0.005)
        failed = [status for status in self._statuses.values() if status]
        return None if hangs else failed[0] if failed else 0

    def send(self, number: int) -> None:
        """Send a signal to the ranks that live."""
        for process in self.processes:
            if process not in self._statuses:
                os.kill(process, number)

    def read_log(self) -> str:
        """Return what this job printed."""
        return self.log.read_bytes()[self._from :].decode(errors="replace")


def _be_rank(program: str, words: list[str], log: Path, place: tuple[int, int, int], plant: Plant | None) -> None:
    """Run a program as this process, and end with its status."""
    status = 1
    rank, ranks, port = place
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the campaign
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ["OMP_NUM_THREADS"] = "1"
        if ranks > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.argv = [program, *words]
        if program == "cache":
            from sdxl_trainer.cache.main import main
        else:
            from sdxl_trainer.train.main import main
        if plant is not None:
            plant(rank)
        status = main(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # as Python itself would do it, but nothing of the parent's may run on in its copy
        traceback.print_exc()
        raise
    finally:
        sys.stderr.flush()
        os._exit(status)


class SharedCounter:
    """A number that forked processes share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)
        self._lock = threading.Lock()

    def next(self) -> int:
        """Add one and return the number."""
        with self._lock:
            number = self.value + 1
            self._memory[:8] = struct.pack("<q", number)
            return number

    @property
    def value(self) -> int:
        """The number."""
        return struct.unpack("<q", self._memory[:8])[0]


def plant_at(number: int, action: Callable[[], None], counter: SharedCounter | None = None, victim: int = 0) -> Plant:
    """Return a plant that calls `action` in a rank, just before or after the rank's n-th operation on files.

    Args:
        counter: counts the operations.
        victim: the rank.
    """
    counter = counter or SharedCounter()

    def plant(rank: int) -> None:
        if rank != victim:
            return
        for name in OPERATIONS:
            setattr(os, name, _watch(getattr(os, name), number, action, counter))

    return plant


def _watch(operation: Callable, number: int, action: Callable[[], None], counter: SharedCounter) -> Callable:
    def watched(*args: Any, **kwargs: Any) -> Any:
        is_moment = counter.next() == number
        if is_moment and number % 2:
            action()
        result = operation(*args, **kwargs)
        if is_moment and not number % 2:
            action()
        return result

    return watched


def kill_group(number: int = signal.SIGKILL) -> None:
    """Send a signal to all ranks of this job."""
    os.killpg(os.getpgrp(), number)


def kill_self() -> None:
    """Kill this rank."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(folder: Path) -> None:
    """Leave no byte free on the disk of a folder."""
    with open(folder / "filler", "ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            write_until_full(file, size)


def write_until_full(file: IO[bytes], size: int) -> None:
    """Append blocks of `size` bytes until the disk takes no further one."""
    with suppress(OSError):
        while True:
            file.write(bytes(size))


class Disk:
    """An ext4 file system in a file, whose power can be cut: what it had not written by then is lost."""

    def __init__(self, folder: Path, megabytes: int = 512):
        self._image, self.place = folder / "disk.img", folder / "disk"
        self.place.mkdir()
        with open(self._image, "wb") as file:
            file.truncate(megabytes << 20)
        _run_tool("mkfs.ext4", "-q", "-F", str(self._image))
        self._mount()

    def _mount(self) -> None:
        _run_tool("mount", "-o", "loop", str(self._image), str(self.place))

    def cut_power(self) -> None:
        """Stop all writing at once, as a power cut does, and kill the job that calls this."""
        descriptor = os.open(self.place, os.O_RDONLY)
        fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        kill_group()

    def restart(self) -> None:
        """Mount the disk again; ext4 replays its journal."""
        self.close()
        self._mount()

    def close(self) -> None:
        """Unmount the disk."""
        for _ in range(100):
            if subprocess.run(["umount", str(self.place)], capture_output=True).returncode == 0:
                return
            time.sleep(0.05)
        _run_tool("umount", "--lazy", str(self.place))


@contextmanager
def open_disk(folder: Path) -> Iterator[Disk]:
    """Mount an ext4 file system whose power can be cut. Raises SkippedError where it cannot be mounted."""
    disk = Disk(folder)
    try:
        yield disk
    finally:
        disk.close()


@contextmanager
def open_small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """Mount a tmpfs of this size. Raises SkippedError where it cannot be mounted."""
    place = folder / "small"
    place.mkdir()
    _run_tool("mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place))
    try:
        yield place
    finally:
        _run_tool("umount", "--lazy", str(place))


def _run_tool(*command: str) -> None:
    if shutil.which(command[0]) is None:
        raise SkippedError(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SkippedError(f"{' '.join(command[:1])} fails here: {done.stderr.strip()[:200]}")


def describe_end(outcome: Outcome, job: Job, status: int | None, expected: set[int]) -> bool:
    """Check how a job ended: no hang, an expected status, and no traceback. Return whether it is so."""
    printed = job.read_log()
    outcome.check(HANG, status is not None, f"no end within {HANG_SECONDS:.0f} s: {printed[-200:]}")
    if status is None:
        return False
    last = " | ".join(printed.strip().splitlines()[-2:])
    outcome.check(LOST, status in expected, f"status {status}: {last}")
    outcome.check(MESSAGE, TRACEBACK not in printed, f"traceback: {last}")
    return status in expected and TRACEBACK not in printed
