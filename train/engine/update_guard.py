"""Keep saves that run beside the training loop away from weights that are halfway through an update.

An update has two parts. First the ranks agree on the norm of the gradients, by collectives in which a rank may hang.
Then each rank changes its weights. A save may run beside the first part, and never beside the second.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

QUERY_SECONDS = 0.01


class UpdateGuard:
    """The lock between updates and saves.

    Attributes:
        completed_steps: optimizer steps since the engine was built, skipped updates included.
    """

    def __init__(self, device: torch.device):
        self.completed_steps = 0
        self.mark = WriteMark(device)
        self._lock = threading.Lock()
        self._is_held_by_update = False
        # True while the weights are halfway through an update. An error during an update leaves it True.
        self._halfway = False

    @contextmanager
    def update(self) -> Iterator[None]:
        """Context of an optimizer step. Within it, `begin_writing` is called before the first weight is changed."""
        try:
            yield
            self.begin_writing()  # for a step whose update was skipped
            self.completed_steps += 1
            self.mark.record()
            self._halfway = False
        finally:
            if self._is_held_by_update:
                self._is_held_by_update = False
                self._lock.release()

    def begin_writing(self) -> None:
        """Wait until no save reads the weights, and keep saves from starting until the step ends."""
        if not self._is_held_by_update:
            self._lock.acquire()
            self._is_held_by_update = self._halfway = True

    @contextmanager
    def hold(self, timeout_seconds: float) -> Iterator[int | None]:
        """Keep weights from being changed within the context, and yield the number of completed steps.

        Copies from the device that are made within it do not wait for work that was started after the last update,
        such as a collective that hangs.

        Yields None if the weights are halfway through an update that does not end in time, on the host or the device.
        """
        deadline = time.monotonic() + timeout_seconds
        self.mark.choose_device()
        held = self._lock.acquire(timeout=timeout_seconds)
        try:
            if held and not self._halfway and self.mark.is_passed(deadline - time.monotonic()):
                with self.mark.copy_stream():
                    yield self.completed_steps
            else:
                yield None
        finally:
            if held:
                self._lock.release()


class WriteMark:
    """A mark in the device's queue of work behind the last change to the weights. On a CPU it does nothing.

    With CUDA a hung collective blocks all later work of its stream, and `copy_stream` is the way around it: an event is
    recorded behind each change, and copies on a stream of their own wait for that event alone.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        # Made in advance: a device that hangs may not make one.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def choose_device(self) -> None:
        """Choose the device for this thread. PyTorch's choice holds for a single thread.

        Without it, calls of CUDA by a new thread would take memory of the first GPU, which another rank has filled.
        """
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def record(self) -> None:
        """Move the mark behind all work that this thread has started so far."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def is_passed(self, timeout_seconds: float) -> bool:
        """Wait until the device has passed the mark; return False if it does not in time."""
        deadline = time.monotonic() + timeout_seconds
        while self._event is not None and not self._event.query():
            if time.monotonic() > deadline:
                return False
            time.sleep(QUERY_SECONDS)
        return True

    @contextmanager
    def copy_stream(self) -> Iterator[None]:
        """Make this thread's work on the device wait for the mark alone. The work is finished when the context ends."""
        if self._event is None or self._stream is None:
            yield
            return
        self._stream.wait_event(self._event)
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()
