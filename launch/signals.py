"""Stopping on request: the first signal asks the work to end at a safe place, a second one ends the process at once."""

import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sdxl_trainer.launch.status import forget_status, record_status

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Ctrl-C reaches a rank from the terminal and again from torchrun; only what comes later is a second wish.
REPEAT_SECONDS = 2.0


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """The work was ended on request, with everything done so far kept.

    Args:
        signal_number: by which signal, or by which one it is as if.
        cause: what asked for it, if that was no signal.
    """

    def __init__(self, signal_number: int, cause: str | None = None):
        self.signal_number = signal_number
        super().__init__(f"stopped by {cause or signal.Signals(signal_number).name}")


class StopRequest:
    """Remembers that a stop signal came. Made on the main thread, as Python asks of whoever handles signals.

    Args:
        on_save: called when SIGUSR1 asks to save and go on; None leaves that signal alone.
    """

    def __init__(self, on_save: Callable[[], None] | None = None) -> None:
        self.signal_number: int | None = None
        self._first_time = 0.0
        for number in list_stop_signals():
            signal.signal(number, self._handle)
        if on_save is not None:
            signal.signal(signal.SIGUSR1, lambda number, frame: on_save())

    def raise_if_received(self) -> None:
        """Raise Interrupted if a stop signal has come; called where stopping loses nothing."""
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
def exiting_on_signals() -> Iterator[None]:
    """Stop signals end the process at once, with their status, unless a StopRequest takes them over meanwhile."""
    before = {number: signal.signal(number, _exit_before_work) for number in list_stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def list_stop_signals() -> list[int]:
    """The signals that end the work. SIGHUP, of a terminal that is closed, is none to what nohup has started; but from
    torchrun, which then ends in any case, it comes with 30 s to live."""
    if "TORCHELASTIC_RUN_ID" in os.environ or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        return list(STOP_SIGNALS)
    return [number for number in STOP_SIGNALS if number != signal.SIGHUP]


def exit_at_once(signal_number: int) -> None:
    """End the process without any cleaning up."""
    os._exit(record_status(128 + signal_number))


def _leave_terminal() -> None:
    """Send what is still to be said nowhere if the terminal is gone, where each word would be an error."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _exit_before_work(number: int, frame: FrameType | None) -> None:
    forget_status()
    os._exit(128 + number)
