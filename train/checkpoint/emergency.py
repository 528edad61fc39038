"""Saving when nobody can agree any more: a rank raised or died, or the others are stuck in a collective with it.

Each living rank writes its own shard of the state by itself, in the form that any checkpoint is built in
(train/checkpoint/folder.py). If all shards of one step come together, the next start seals and resumes them; if a rank
was killed outright its shard is missing, and the newest sealed checkpoint is used.

A rank that is blocked inside a collective runs no Python signal handler. So signals are also written to a pipe
(`signal.set_wakeup_fd`), which a thread reads: it gives the loop time to end in good order, then saves without it.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from loguru import logger

from sdxl_trainer.configs.problems import FailedError
from sdxl_trainer.launch.signals import STOP_SIGNALS, Interrupted, exit_at_once
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.engine.engine import Engine

# torchrun kills its ranks 30 s after it told them to end.
DEADLINE_SECONDS = 25.0
# The part of it in which the loop may still end in good order, and then those for the checkpoint in hand and for the
# update in hand. The rest is for writing.
PATIENCE_SHARE, CHECKPOINT_SHARE, UPDATE_SHARE = 0.4, 0.2, 0.2


class EmergencySaver:
    """Writes this rank's shard at most once, from whichever thread comes first. A context around the training loop.

    An exception that leaves the loop is let through after the state is saved; a stop on request, and an end that was
    told in full, have saved already.

    Args:
        read_state: the state that belongs to so many completed optimizer steps.
        export: writes the weights as a model file from this rank alone, or None where no rank has them whole (ZeRO-3).
    """

    def __init__(
        self,
        engine: Engine,
        writer: CheckpointWriter,
        read_state: Callable[[int], TrainState],
        export: Callable[[Path], None] | None,
        models_folder: Path,
    ):
        self._engine = engine
        self._writer = writer
        self._read_state = read_state
        self._export = export
        self._models_folder = models_folder
        self._once = threading.Lock()
        self._done = threading.Event()
        self._receiver, self._sender = os.pipe()
        os.set_blocking(self._sender, False)

    def __enter__(self) -> "EmergencySaver":
        """Start the thread that reads signals. Entered on the main thread, after the handlers are set."""
        if self._writer.rank == 0:  # what a job left that was killed while it wrote a model
            for leftover in [*self._models_folder.glob("*.claim"), *self._models_folder.glob(".*.tmp")]:
                leftover.unlink(missing_ok=True)
        signal.set_wakeup_fd(self._sender, warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="emergency", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, (Interrupted, FailedError)):
            self.save(f"{kind.__name__ if kind else 'error'}: {error}")
        self._done.set()
        signal.set_wakeup_fd(-1)

    def save(self, reason: str) -> Path | None:
        """Write this rank's shard without any collective, then the model file; None if it cannot be done soundly.

        That is so while an update is under way: half-updated weights would be worse than an older checkpoint. An error
        of the disk or the device is told and not raised, so that it does not hide the one that ends the job.
        """
        if not self._once.acquire(blocking=False):
            self._done.wait(DEADLINE_SECONDS)  # the other thread is at it
            return None
        try:
            return self._save(reason)
        except (OSError, RuntimeError) as error:
            logger.error("the shard cannot be written: {}; the newest checkpoint is what remains", error)
            return None
        finally:
            self._done.set()

    def _save(self, reason: str) -> Path | None:
        started = time.monotonic()
        self._writer.join(DEADLINE_SECONDS * CHECKPOINT_SHARE)
        logger.error("{}: writing this rank's shard of the state", reason)
        partial = None
        with self._engine.hold_updates(DEADLINE_SECONDS * UPDATE_SHARE) as completed:
            if completed is None:
                logger.error("an update is under way; the newest checkpoint is what remains")
            elif (state := self._read_state(completed)).step == self._writer.last_step:
                logger.error("step {} is saved already", state.step)
            elif completed > 0:
                partial = self._writer.write(self._engine.capture_state(alone=True), state)
                logger.error("shard of step {} written in {:.1f} s", state.step, time.monotonic() - started)
                self._export_once(state.step)
        return partial

    def _export_once(self, step: int) -> None:
        """One of the living ranks writes the weights; the others see that it does."""
        if self._export is None:
            return
        path = self._models_folder / f"emergency-step-{step:08d}.safetensors"
        self._models_folder.mkdir(parents=True, exist_ok=True)
        try:
            claim = os.open(path.with_suffix(".claim"), os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return
        os.close(claim)
        try:
            self._export(path)
            logger.error("weights kept in {}", path)
        except (OSError, RuntimeError) as error:
            logger.error("the weights cannot be written: {}", error)
        path.with_suffix(".claim").unlink()

    def _run(self) -> None:
        while True:
            numbers = [number for number in os.read(self._receiver, 64) if number in STOP_SIGNALS]
            if numbers:
                break
        if self._done.wait(DEADLINE_SECONDS * PATIENCE_SHARE):
            return
        try:
            self.save(f"{signal.Signals(numbers[0]).name} came and the step does not end")
        finally:  # the main thread may be blocked for good
            exit_at_once(numbers[0])
