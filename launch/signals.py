"""Stop signals: the first one asks the work to end at a safe place, a second one ends the process at once.

Python handles a signal on the main thread, between two of its instructions. A main thread that computes or waits in a
collective would notice it seconds later, so signals are also written to a pipe (`signal.set_wakeup_fd`), which a
thread reads.
"""

import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from sdxl_trainer.configs.language.translate import translate
from sdxl_trainer.launch.status import clear_status, record_status

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Ctrl-C reaches a rank from the terminal and again from torchrun; only a later signal is a second request.
REPEAT_SECONDS = 1.0


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


class BrokenOff(Exception):  # noqa: N818 (not an error)
    """Validation, image generation or an export ended between two forward passes, on all ranks, because one was asked
    to stop."""


class SignalListener:
    """A thread that learns of stop signals at once, also while the main thread is blocked."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[int], None]] = []
        self._receiver = self._sender = -1

    def add(self, listener: Callable[[int], None]) -> None:
        """Call `listener` with the number of each stop signal, on the thread. It must not block. Main thread only."""
        if self._sender < 0:
            self._receiver, self._sender = os.pipe()
            os.set_blocking(self._sender, False)
            threading.Thread(target=self._run, name="signals", daemon=True).start()
        self._listeners.append(listener)
        signal.set_wakeup_fd(self._sender, warn_on_full_buffer=False)

    def remove(self, listener: Callable[[int], None]) -> None:
        """Stop calling a listener."""
        if listener in self._listeners:
            self._listeners.remove(listener)
        if not self._listeners:
            self.clear()

    def clear(self) -> None:
        """Stop calling any listener."""
        self._listeners.clear()
        signal.set_wakeup_fd(-1)

    def _run(self) -> None:
        while True:
            for number in os.read(self._receiver, 64):
                if number in STOP_SIGNALS:
                    for listener in tuple(self._listeners):
                        listener(number)


LISTENER = SignalListener()


class StopRequest:
    """Record of a stop signal. Create it on the main thread, where Python allows signal handlers.

    Args:
        work: what is finished after the first signal, such as "the step", for rank 0's message.
        announce: logs the message, on a thread of its own; None for no message.
        on_save: called on SIGUSR1, which asks to save and continue; None leaves that signal alone.
    """

    def __init__(
        self,
        work: str = "",
        announce: Callable[[str], None] | None = None,
        on_save: Callable[[], None] | None = None,
    ) -> None:
        self.signal_number: int | None = None
        self._work, self._announce = work, announce
        self._first_seconds: dict[bool, float] = {}  # by whether the main thread noticed it
        for number in list_stop_signals():
            signal.signal(number, self._handle)
        if on_save is not None:
            signal.signal(signal.SIGUSR1, lambda number, frame: on_save())
        LISTENER.add(self._listen)

    def raise_if_received(self) -> None:
        """Raise Interrupted if a stop signal was received. Call it where stopping loses nothing."""
        if self.signal_number is not None:
            raise Interrupted(self.signal_number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number, on_main_thread=True)

    def _listen(self, number: int) -> None:
        is_first = self._note(number, on_main_thread=False)
        if is_first and self._announce is not None and int(os.environ.get("RANK", 0)) == 0:
            again = "a second Ctrl-C" if number == signal.SIGINT else "a second signal"
            name = signal.Signals(number).name
            self._announce(f"{name}: {self._work} is being finished and saved; {again} ends the job at once")

    def _note(self, number: int, on_main_thread: bool) -> bool:
        """Note a signal, and end the process on the second one. Returns whether it is the first.

        Both threads notice each signal, the main thread perhaps too late.
        """
        if number == signal.SIGHUP:
            _leave_terminal()
        now = time.monotonic()
        if on_main_thread not in self._first_seconds:
            self._first_seconds[on_main_thread] = now
            self.signal_number = self.signal_number or number
            return True
        if now - self._first_seconds[on_main_thread] > REPEAT_SECONDS:
            exit_at_once(self.signal_number or number)
        return False


@contextmanager
def exit_on_signals(resumes: bool = False) -> Iterator[None]:
    """End the process at once on a stop signal, with its exit status, until a StopRequest handles signals.

    Args:
        resumes: the same command continues the work; without it, the work begins again.
    """
    handler = _exit_within_work if resumes else _exit_before_work
    before = {number: signal.signal(number, handler) for number in list_stop_signals()}
    try:
        yield
    finally:
        LISTENER.clear()
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
    name = signal.Signals(number).name
    _exit_with(number, f"stopped by {name}; the same command starts again")


def _exit_within_work(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    _exit_with(number, f"stopped by {name}; what is done is kept; the same command resumes")


def _exit_with(number: int, message: str) -> None:
    clear_status()
    if int(os.environ.get("RANK", 0)) == 0:
        with suppress(OSError):
            os.write(2, f"\n{translate(message)}\n".encode(errors="backslashreplace"))
    os._exit(128 + number)
