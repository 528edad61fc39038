"""Emergency saves: the state is kept when a rank raises or dies, or blocks the others in a collective.

Each living rank writes its own shard of the state alone, in the form in which every checkpoint is built
(train/checkpoint/folder.py). If the shards of all ranks are of one step, the next start seals and resumes them. If a
rank was killed, its shard is missing, and the next start uses the newest sealed checkpoint.

A rank that is blocked inside a collective runs no Python signal handler, but a thread learns of each signal
(launch/signals.py). Another thread then gives the loop time to end normally, and saves without it. If no signal comes,
the watchdog of the run calls `save` (launch/activity.py). NCCL would end a process whose collective timed out or whose
peer is gone without raising anything in Python. Training turns that off (train/run/job.py); should a user turn it on,
the watchdog acts minutes before a time-out.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from loguru import logger

from sdxl_trainer.configs.problems import FailedError
from sdxl_trainer.data.files import remove_leftovers
from sdxl_trainer.launch.distributed import StuckRanksError
from sdxl_trainer.launch.signals import LISTENER, Interrupted, exit_at_once
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.engine.engine import Engine

# torchrun kills its ranks 30 s after SIGTERM.
DEADLINE_SECONDS = 25.0
# Shares of the deadline in which the loop may end normally, the current checkpoint be written, and the current update
# end. The rest is for writing.
PATIENCE_SHARE, CHECKPOINT_SHARE, UPDATE_SHARE = 0.4, 0.2, 0.2


class EmergencySaver:
    """Context around the training loop that writes this rank's shard at most once, from the main or another thread.

    An exception that leaves the loop is raised again after the state is saved. `Interrupted` and `FailedError` save
    nothing, because the loop has saved before it raises them; only `StuckRanksError` comes unforeseen.

    Args:
        read_state: returns the state after the given number of completed optimizer steps.
        export: writes the weights as a model file from this rank alone; None under ZeRO-3, where no rank has them all.
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
        self._has_signal = False

    def __enter__(self) -> "EmergencySaver":
        """Listen to stop signals. Entered on the main thread, after the signal handlers are set."""
        # A job that was killed while it wrote a model leaves these files behind.
        if self._writer.rank == 0:
            remove_leftovers(self._models_folder)
            for claim in self._models_folder.glob("*.claim"):
                claim.unlink(missing_ok=True)
        LISTENER.add(self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        is_saved = isinstance(error, (Interrupted, FailedError)) and not isinstance(error, StuckRanksError)
        if error is not None and not is_saved:
            self.save(f"{kind.__name__ if kind else 'error'}: {error}")
        self._done.set()
        LISTENER.remove(self._on_signal)

    def save(self, reason: str) -> Path | None:
        """Write this rank's shard, then the model file, without collectives.

        Returns the partial folder, or None if nothing was written: weights that are halfway through an update would be
        worse than an older checkpoint. An error of the disk or the device is logged and not raised, so that it does not
        hide the error that ends the job.
        """
        if not self._once.acquire(blocking=False):
            # Another thread is saving.
            self._done.wait(DEADLINE_SECONDS)
            return None
        try:
            return self._save(reason)
        except (OSError, RuntimeError) as error:
            resumes = "the shard cannot be written: {}; the next start resumes at {}"
            logger.error(resumes, error, self._describe_newest())
            return None
        finally:
            self._done.set()

    def _describe_newest(self) -> str:
        """Describe where the next start resumes without this rank's shard."""
        return f"step {self._writer.last_step}" if self._writer.last_step > 0 else "the beginning"

    def _save(self, reason: str) -> Path | None:
        started = time.monotonic()
        self._writer.wait_at_most(DEADLINE_SECONDS * CHECKPOINT_SHARE)
        logger.warning("{}: writing this rank's shard of the state", reason)
        partial = None
        with self._engine.hold_updates(DEADLINE_SECONDS * UPDATE_SHARE) as completed:
            if completed is None:
                logger.warning("an update is under way; the next start resumes at {}", self._describe_newest())
            elif saved := self._describe_saved(state := self._read_state(completed), started + DEADLINE_SECONDS):
                level = "SUCCESS" if state.step == self._writer.last_step else "WARNING"
                logger.log(level, "step {} {}", state.step, saved)
            elif completed > 0:
                last = self._describe_newest()
                # Updates are held, so state in host memory is written without copying it.
                captured = self._engine.capture_state(alone=True, lend=True)
                partial = self._writer.write_when_there_is_space(captured, state, try_first=True)
                logger.success(
                    "shard of step {} written in {:.1f} s; the next start resumes at that step if every rank has "
                    "written its shard, else at {}",
                    state.step,
                    time.monotonic() - started,
                    last,
                )
                self._export_once(state.step)
        return partial

    def _describe_saved(self, state: TrainState, deadline: float) -> str:
        """Describe what the checkpoint writer has written of the state's step; "" if nothing.

        If the checkpoint of this step is being written, it is waited for: a second one would write the same files.
        """
        if state.step != self._writer.last_step and self._writer.is_writing_step(state.step):
            self._writer.wait_at_most(max(0.0, deadline - time.monotonic()))
            if state.step != self._writer.last_step and self._writer.is_writing_step(state.step):
                return "is being written, and that does not end"
        return "is saved already" if state.step == self._writer.last_step else ""

    def _export_once(self, step: int) -> None:
        """Write the model file unless another living rank has claimed it."""
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
            logger.success("weights written to {}", path)
        except (OSError, RuntimeError) as error:
            logger.error("the weights cannot be written: {}", error)
        path.with_suffix(".claim").unlink()

    def _on_signal(self, number: int) -> None:
        if not self._has_signal:
            self._has_signal = True
            threading.Thread(target=self._save_late, args=(number,), name="emergency", daemon=True).start()

    def _save_late(self, number: int) -> None:
        """Save if the loop does not end by itself, and end the process."""
        if self._ends_by_itself():
            return
        try:
            self.save(f"{signal.Signals(number).name} received and the step does not end")
        finally:
            # The main thread may be blocked in a collective that never returns.
            exit_at_once(number)

    def _ends_by_itself(self) -> bool:
        """Return whether the loop ends in time. A checkpoint that waits for disk space may take its own time for it."""
        has_warned = False
        while not self._done.wait(DEADLINE_SECONDS * PATIENCE_SHARE):
            if not self._writer.waits_for_space:
                return False
            self._writer.make_room()
            if not has_warned:
                logger.warning("the newest checkpoint waits for disk space; free some, or the last steps are lost")
                has_warned = True
        return True
