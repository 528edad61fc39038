"""Stop signals: the first one asks the work to end at a safe place, a second one ends the process at once."""

import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sdxl_trainer.launch.status import clear_status, record_status

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Ctrl-C reaches a rank from the terminal and again from torchrun; only a later signal is a second request.
REPEAT_SECONDS = 2.0


class Interrupted(Exception):  # noqa: N818 (not an error)
    """The work ended on request, and everything done so far is saved.

    Args:
        signal_number: the signal that asked for it, or the one whose exit status applies.
        cause: the origin of the request, if it was not a signal.
    """

    def __init__(self, signal_number: int, cause: str | None = None):
        self.signal_number = signal_number
        super().__init__(f"stopped by {cause or signal.Signals(signal_number).name}")


class InterruptedAlone(Interrupted):  # noqa: N818 (not an error)
    """A stop signal ended this rank's wait for ranks that did not stop too.

    A launcher also sends the signal to the ranks that are left when another one has died.
    """


class StopRequest:
    """Record of a stop signal. Create it on the main thread, where Python allows signal handlers.

    Args:
        on_save: called on SIGUSR1, which asks to save and continue; None leaves that signal alone.
    """

    def __init__(self, on_save: Callable[[], None] | None = None) -> None:
        self.signal_number: int | None = None
        self._first_time = 0.0
        for number in list_stop_signals():
            signal.signal(number, self._handle)
        if on_save is not None:
            signal.signal(signal.SIGUSR1, lambda number, frame: on_save())

    def raise_if_received(self) -> None:
        """Raise Interrupted if a stop signal was received. Call it where stopping loses nothing."""
        if self.signal_number is not None:
            raise Interrupted(self.signal_number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        now = time.monotonic()
        if self.signal_number is None:
            self.signal_number, self._first_time = number, now
        elif now - self._first_time > REPEAT_SECONDS:
            exit_at_once(self.signal_number)


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """End the process at once on a stop signal, with its exit status, until a StopRequest handles signals."""
    before = {number: signal.signal(number, _exit_before_work) for number in list_stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def list_stop_signals() -> list[int]:
    """List the signals that end the work.

    SIGHUP, which a closing terminal sends, does not count under nohup. From torchrun it always counts, because torchrun
    kills its ranks 30 s later.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        return list(STOP_SIGNALS)
    return [number for number in STOP_SIGNALS if number != signal.SIGHUP]


def exit_at_once(signal_number: int) -> None:
    """End the process without cleaning up."""
    os._exit(record_status(128 + signal_number))


def _leave_terminal() -> None:
    """Redirect output to /dev/null if the terminal has gone, because writing to it would raise."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _exit_before_work(number: int, frame: FrameType | None) -> None:
    clear_status()
    os._exit(128 + number)
