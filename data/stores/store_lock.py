"""Lock of a cache on a store, which only one job may write at a time. It names the job that holds it.

The lock is an object `lock/<number>.json`. A job takes it by writing the next number, which only one of several jobs
can do, because the store refuses to replace an object. The holder writes its object again as its heartbeat, whose age
is measured by the store's clock, because the clocks of machines differ. The highest number holds the lock; a job whose
number is no longer the highest ends.
"""

import math
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
from loguru import logger

from sdxl_trainer.configs.problems import FailedError
from sdxl_trainer.data.stores.remote import StoreError
from sdxl_trainer.data.stores.uploads import delete_objects, describe_object, list_objects, put_bytes, read_bytes

LOCK_FOLDER = "lock"
HEARTBEAT_SECONDS = 60.0
STALE_SECONDS = 600.0  # without a heartbeat, after which another job takes the lock over


class HeldError(Exception):
    """Another job holds the lock; the message describes it."""


@dataclass(frozen=True)
class LockTicket:
    """The number by which a job holds the lock of a cache. Its ranks verify by it that the job still does."""

    url: str
    number: int

    @property
    def name(self) -> str:
        """URL of the lock."""
        return _name_lock(self.url, self.number)

    def verify(self) -> None:
        """Verify that no other job has taken the lock over.

        Raises:
            FailedError: another job has.
            StoreError: the store does not answer.
        """
        if _find_numbers(self.url)[-1:] != [self.number]:
            raise FailedError(f"{self.url}: another job has taken over the lock of this cache: this one ends")


class StoreLock:
    """The lock of a cache on a store, held until `release`.

    Raises:
        HeldError: another job holds it.
        FileNotFoundError: the bucket does not exist.
        StoreError: the store denies access, or does not answer.
    """

    def __init__(self, url: str):
        self._url = url
        self._fields = describe_process()
        self.ticket = self._take()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="store-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back."""
        self._is_over.set()
        self._thread.join()
        try:
            delete_objects([self.ticket.name])
        except StoreError as error:
            logger.warning("{} stays locked for 10 minutes: {}", self._url, error)

    def _take(self) -> LockTicket:
        numbers = _find_numbers(self._url)
        if numbers and (holder := _read_holder(_name_lock(self._url, numbers[-1]))) is not None:
            age_seconds = _measure_age(self._url, numbers[-1], holder)
            if is_held(holder, age_seconds):
                raise HeldError(describe_holder(holder, age_seconds))
            logger.warning("the lock of {} is taken over: {}", self._url, describe_holder(holder, age_seconds))
        ticket = LockTicket(self._url, numbers[-1] + 1 if numbers else 1)
        name = ticket.name
        if not put_bytes(self._dump(), name, only_if_absent=True):
            holder = _read_holder(name)
            raise HeldError("" if holder is None else describe_holder(holder, 0.0))
        if put_bytes(b"{}", name, only_if_absent=True):
            put_bytes(self._dump(), name)
            logger.warning("{} does not refuse to replace objects. Let no other job write it", self._url)
        delete_objects([_name_lock(self._url, number) for number in numbers])
        return ticket

    def _beat(self) -> None:
        while not self._is_over.wait(HEARTBEAT_SECONDS):
            try:
                self.ticket.verify()
                put_bytes(self._dump(), self.ticket.name)
            except FailedError:
                return  # the ranks find out before they list anything
            except (StoreError, OSError) as error:
                logger.warning("the heartbeat of the lock of {} failed: {}", self._url, error)

    def _dump(self) -> bytes:
        return orjson.dumps({**self._fields, "heartbeat": time.time()})


def describe_process() -> dict[str, Any]:
    """Describe this process, so that others can find out whether it still runs."""
    return {
        "host": socket.gethostname(),
        "machine": _identify_machine(),
        "process": os.getpid(),
        "process_start": _read_start(os.getpid()),
        "started": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z"),
        "token": secrets.token_hex(8),
    }


def is_held(holder: dict[str, Any], age_seconds: float) -> bool:
    """Return whether a job still holds the lock: it was alive 10 minutes ago, and has not ended here.

    Args:
        age_seconds: age of its heartbeat.
    """
    if age_seconds > STALE_SECONDS:
        return False
    ended_here = holder["machine"] == _identify_machine() and _read_start(holder["process"]) != holder["process_start"]
    return not ended_here


def describe_holder(holder: dict[str, Any], age_seconds: float) -> str:
    """Describe the job that holds a lock."""
    who = f"host {holder['host']}, process {holder['process']}, started {holder['started']}"
    return f"{who}, heartbeat {max(0.0, age_seconds):.0f} s ago"


def _measure_age(url: str, number: int, holder: dict[str, Any]) -> float:
    """Return the seconds since the heartbeat of a lock, by the clocks of both machines if the store names no times."""
    probe = f"{url}/{LOCK_FOLDER}/clock-{secrets.token_hex(8)}"
    put_bytes(b"{}", probe)
    try:
        beat, now = describe_object(_name_lock(url, number)).modified, describe_object(probe).modified
    except FileNotFoundError:
        return math.inf  # the lock has been given back
    finally:
        delete_objects([probe])
    return time.time() - float(holder["heartbeat"]) if beat is None or now is None else now - beat


def _find_numbers(url: str) -> list[int]:
    names = [item.url.rpartition("/")[2].removesuffix(".json") for item in list_objects(f"{url}/{LOCK_FOLDER}")]
    return sorted(int(name) for name in names if name.isdecimal())


def _name_lock(url: str, number: int) -> str:
    return f"{url}/{LOCK_FOLDER}/{number:08d}.json"


def _read_holder(name: str) -> dict[str, Any] | None:
    """Return the fields of a lock; None if it was given back, or is damaged."""
    try:
        fields = orjson.loads(read_bytes(name))
        known = {"host": str, "machine": str, "process": int, "process_start": str, "started": str, "heartbeat": float}
        return {field: kind(fields[field]) for field, kind in known.items()}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _identify_machine() -> str:
    """Return what processes that see each other share: this start of the machine, and their name space of ids."""
    try:
        return (
            f"{Path('/proc/sys/kernel/random/boot_id').read_text('utf-8').strip()} {os.readlink('/proc/self/ns/pid')}"
        )
    except OSError:
        return secrets.token_hex(8)  # no other process counts as one of this machine


def _read_start(process: int) -> str:
    """Return when a process started, in ticks since the machine did; "" if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
