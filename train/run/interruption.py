"""What people and schedulers ask of a running job: stop, or save and go on; by signal or by a file in the run folder.

A rank only notes what it was asked. The ranks learn of each other's notes with the loss of the next step, so all of
them act at the same step boundary.
"""

import os
import signal
import time
from pathlib import Path

from sdxl_trainer.launch.distributed import Ranks, close_ranks, gather_objects
from sdxl_trainer.launch.signals import Interrupted, StopRequest

STOP_FILE, SAVE_FILE = "stop", "save"
STOP_CAUSE = f"the file {STOP_FILE}"


class Requests:
    """Notes of one rank: SIGINT, SIGTERM and SIGHUP stop, SIGUSR1 saves, and on rank 0 the files `stop` and `save`.

    Args:
        save_every_minutes: rank 0 asks for a save so long after the last one; 0 for never.
    """

    def __init__(self, folder: Path, ranks: Ranks, save_every_minutes: float = 0.0):
        self._folder = folder
        self._is_main = ranks.is_main
        self._save = False
        self._stop_cause: str | None = None
        self._save_every_seconds = 60 * save_every_minutes
        self._saved_at = time.monotonic()
        self._stop = StopRequest(on_save=self._note_save)

    def collect(self) -> list[float]:
        """[stop, save] as 0 or 1, to be summed over the ranks. The `save` file is taken away when it is read, the
        `stop` file by the next start: see `obey_stop_file`."""
        if self._is_main:
            self._save |= self._take(SAVE_FILE) or self._is_time_up()
            if (self._folder / STOP_FILE).exists() and self._stop.signal_number is None:
                self._stop.signal_number, self._stop_cause = signal.SIGTERM, STOP_CAUSE
        save, self._save = self._save, False
        return [float(self._stop.signal_number is not None), float(save)]

    def note_save(self) -> None:
        """A save has begun; the time to the next one runs from now."""
        self._saved_at = time.monotonic()

    def seconds_to_save(self) -> float | None:
        """How soon the clock asks for a save; None if it never does."""
        if not self._save_every_seconds:
            return None
        return max(0.0, self._saved_at + self._save_every_seconds - time.monotonic())

    def interrupt(self) -> None:
        """End the job in good order, as all ranks have agreed.

        Raises:
            Interrupted: always, with the request of the first rank that got one.
        """
        requests = gather_objects((self._stop.signal_number, self._stop_cause))
        number, cause = next(request for request in requests if request[0] is not None)
        close_ranks()  # all are here; threads of a group that is left open can abort the process as it ends
        raise Interrupted(number, cause)

    def _is_time_up(self) -> bool:
        waited = time.monotonic() - self._saved_at
        return 0 < self._save_every_seconds <= waited

    def _note_save(self) -> None:
        self._save = True

    def _take(self, name: str) -> bool:
        try:
            (self._folder / name).unlink()
        except FileNotFoundError:
            return False
        return True


def obey_stop_file(folder: Path) -> None:
    """At a start: take away the `stop` file of a run that has been stopped; but if it is torchrun that starts the job
    anew, because to it any stop looks like a failure, stop at once.

    Raises:
        Interrupted: the job is to stay stopped.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (folder / STOP_FILE).exists():
        raise Interrupted(signal.SIGTERM, STOP_CAUSE)
    (folder / STOP_FILE).unlink(missing_ok=True)
