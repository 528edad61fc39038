"""Requests to a running job, by signal or by a file in the run folder: stop, save, or generate images.

A rank only notes its requests. The ranks exchange their notes with the loss of each step, so all of them act at the
same step boundary.
"""

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import torch
from loguru import logger

from sdxl_trainer.launch.distributed import (
    Ranks,
    close_ranks,
    gather_objects,
    publish,
    read_published,
    reduce_sum,
)
from sdxl_trainer.launch.signals import BrokenOff, Interrupted, StopRequest

STOP_FILE, SAVE_FILE, SAMPLE_FILE = "stop", "save", "sample"
STOP_CAUSE = f"the file {STOP_FILE}"
STOP_KEY = "a rank was asked to stop"


class Requested(NamedTuple):
    """Requests that one rank has received."""

    stop: bool
    save: bool
    sample: bool = False


class Requests:
    """Requests to one rank: SIGINT, SIGTERM and SIGHUP stop, SIGUSR1 saves, and on rank 0 the files `stop`, `save` and
    `sample`.

    Args:
        folder: the run folder.
        save_every_minutes: rank 0 requests a checkpoint this long after the last one; 0 for never.
    """

    def __init__(self, folder: Path, ranks: Ranks, save_every_minutes: float = 0.0):
        self._folder = folder
        self._ranks = ranks
        self._save = False
        self._stop_cause: str | None = None
        self._save_every_seconds = 60 * save_every_minutes
        self._saved_at = time.monotonic()
        self._stop = StopRequest("the step", logger.warning, self._request_save)

    def collect(self) -> Requested:
        """Return the requests since the last call.

        Reading the files `save` and `sample` removes them; the next start removes the `stop` file (see
        `obey_stop_file`).
        """
        sample = False
        if self._ranks.is_main:
            self._save |= self._remove(SAVE_FILE) or self._is_time_up()
            sample = self._remove(SAMPLE_FILE)
        save, self._save = self._save, False
        return Requested(stop=self._is_stop_requested(), save=save, sample=sample)

    def break_off_if_stopped(self, in_lockstep: bool) -> None:
        """Raise BrokenOff if a rank was asked to stop. Call it between two forward passes that are no training.

        Args:
            in_lockstep: all ranks call it equally often, because their passes are collectives; all then raise at the
                same one. Otherwise other ranks learn of a request some passes later, and the caller must agree with
                them at its end.
        """
        stop = self._is_stop_requested()
        if in_lockstep:
            stop = reduce_sum(torch.tensor(float(stop), device=self._ranks.device)).item() > 0
        elif stop:
            publish(STOP_KEY, "stop")
        else:
            stop = read_published(STOP_KEY) is not None
        if stop:
            raise BrokenOff

    def restart_save_timer(self) -> None:
        """Count the time to the next checkpoint from now, because one is being saved."""
        self._saved_at = time.monotonic()

    def seconds_to_save(self) -> float | None:
        """Return the time until the clock requests a checkpoint, or None if it never does."""
        if not self._save_every_seconds:
            return None
        return max(0.0, self._saved_at + self._save_every_seconds - time.monotonic())

    def interrupt(self) -> None:
        """Leave the process group and end the job. All ranks call it together.

        Raises:
            Interrupted: always, with the request of the first rank that has one.
        """
        requests = gather_objects((self._stop.signal_number, self._stop_cause))
        number, cause = next(request for request in requests if request[0] is not None)
        close_ranks()  # threads of an open process group can abort the process while it exits
        raise Interrupted(number, cause)

    def _is_stop_requested(self) -> bool:
        """Return whether this rank was asked to stop: by a signal, or on rank 0 by the file."""
        if self._stop.signal_number is None and self._ranks.is_main and (self._folder / STOP_FILE).exists():
            self._stop.signal_number, self._stop_cause = signal.SIGTERM, STOP_CAUSE
        return self._stop.signal_number is not None

    def _is_time_up(self) -> bool:
        waited = time.monotonic() - self._saved_at
        return 0 < self._save_every_seconds <= waited

    def _request_save(self) -> None:
        self._save = True

    def _remove(self, name: str) -> bool:
        try:
            (self._folder / name).unlink()
        except OSError:  # a folder of this name, or one that cannot be deleted, would ask again at each step
            return False
        return True


def obey_stop_file(folder: Path) -> None:
    """Remove the `stop` file of a run that was stopped, at its next start by the user.

    torchrun takes any stop for a failure and restarts the job. The file then remains, and the job ends at once.

    Raises:
        Interrupted: torchrun restarted a job that was asked to stop.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (folder / STOP_FILE).exists():
        raise Interrupted(signal.SIGTERM, STOP_CAUSE)
    (folder / STOP_FILE).unlink(missing_ok=True)
