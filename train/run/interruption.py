"""Requests to a running job, by signal or by a file in the run folder: stop, or save and continue.

A rank only notes its requests. The ranks exchange their notes with the loss of each step, so all of them act at the
same step boundary.
"""

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

from sdxl_trainer.launch.distributed import Ranks, close_ranks, gather_objects
from sdxl_trainer.launch.signals import Interrupted, StopRequest

STOP_FILE, SAVE_FILE = "stop", "save"
STOP_CAUSE = f"the file {STOP_FILE}"


class Requested(NamedTuple):
    """Requests that one rank has received."""

    stop: bool
    save: bool


class Requests:
    """Requests to one rank: SIGINT, SIGTERM and SIGHUP stop, SIGUSR1 saves, and on rank 0 the files `stop` and `save`.

    Args:
        folder: the run folder.
        save_every_minutes: rank 0 requests a checkpoint this long after the last one; 0 for never.
    """

    def __init__(self, folder: Path, ranks: Ranks, save_every_minutes: float = 0.0):
        self._folder = folder
        self._is_main = ranks.is_main
        self._save = False
        self._stop_cause: str | None = None
        self._save_every_seconds = 60 * save_every_minutes
        self._saved_at = time.monotonic()
        self._stop = StopRequest(on_save=self._request_save)

    def collect(self) -> Requested:
        """Return the requests since the last call.

        Reading the `save` file removes it; the next start removes the `stop` file (see `obey_stop_file`).
        """
        if self._is_main:
            self._save |= self._remove(SAVE_FILE) or self._is_time_up()
            if (self._folder / STOP_FILE).exists() and self._stop.signal_number is None:
                self._stop.signal_number, self._stop_cause = signal.SIGTERM, STOP_CAUSE
        save, self._save = self._save, False
        return Requested(stop=self._stop.signal_number is not None, save=save)

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

    def _is_time_up(self) -> bool:
        waited = time.monotonic() - self._saved_at
        return 0 < self._save_every_seconds <= waited

    def _request_save(self) -> None:
        self._save = True

    def _remove(self, name: str) -> bool:
        try:
            (self._folder / name).unlink()
        except FileNotFoundError:
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
