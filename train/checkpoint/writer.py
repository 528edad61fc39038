"""Write checkpoints in the background: the state is copied to host memory, and a thread writes it to disk."""

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from loguru import logger

from sdxl_trainer.configs.problems import FailedError
from sdxl_trainer.data.files import create_folder, sync_folder
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import broadcast_object, wait_for_ranks
from sdxl_trainer.train.checkpoint.direct_file import DirectFile
from sdxl_trainer.train.checkpoint.folder import (
    get_part_file,
    get_partial_folder,
    prune_checkpoints,
    require_files,
    seal_checkpoint,
    write_part,
)
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.engine.engine import Engine

SEAL_PATIENCE_SECONDS = 1800.0
SPARE_BYTES = 64 << 20  # disk space that a save needs besides the tensors
SPACE_POLL_SECONDS = 5.0
WRITER_NICENESS = 10
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
MAX_ATTEMPTS = 3  # to write a checkpoint whose files vanish


@dataclass
class CheckpointWriter:
    """Write the checkpoints of one rank, one at a time; rank 0 seals each once all ranks' parts are there.

    Args:
        folder: folder of all checkpoints of the run.
        token: identifies this start of the job; equal on all ranks.
        wait_for_space_seconds: how long a checkpoint waits for space on a full disk before that is an error.

    Attributes:
        last_step: step of the checkpoint that the run resumed from, or of the newest one whose part this rank has
            written, or -1. On rank 0 it is also -1 after a checkpoint that could not be sealed.
        waits_for_space: a checkpoint waits for space on a full disk.
    """

    folder: Path
    rank: int
    world_size: int
    token: str
    keep_last: int
    keep_every_steps: int = 0
    keep_best: int = 0
    wait_for_space_seconds: float = 0.0
    last_step: int = field(default=-1, init=False)
    waits_for_space: bool = field(default=False, init=False)
    _is_lost: bool = field(default=False, init=False)
    _writing_step: int = field(default=-1, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _error: BaseException | None = field(default=None, init=False)

    def save(self, engine: Engine, state: TrainState) -> None:
        """Copy the state and write it in the background. All ranks call it at the same step.

        Waits for the previous checkpoint, if it is still being written. Optimizer state that is in host memory is not
        copied: the engine's next update waits until it is written.

        Raises:
            OSError: the previous checkpoint could not be written.
        """
        self.wait()
        # A rank may wait long for space on its disk or, as rank 0, for the parts of the others.
        wait_for_ranks("the previous checkpoint")
        # The previous copy has been written, so its memory is free.
        self.start_writing(engine.capture_state(reuse=True, lend=True), replace(state), engine.release_state)

    def save_whole(self, engine: Engine, state: TrainState) -> None:
        """Save the state unless that is done, and wait until its checkpoint is sealed. All ranks call it together.

        Raises:
            OSError: a checkpoint could not be written.
            FailedError: files of the checkpoint were deleted in each attempt.
        """
        for _ in range(MAX_ATTEMPTS):
            self.wait()
            if broadcast_object(self.last_step) == state.step:
                return
            self.save(engine, state)
        self.wait()
        if broadcast_object(self.last_step) != state.step:
            raise FailedError(
                f"{self.folder}: files of the checkpoint vanish while it is written; see who deletes them"
            )

    def take_repeat(self) -> bool:
        """Return whether a checkpoint was lost since the last call, because its files were deleted. Rank 0 knows it."""
        is_lost, self._is_lost = self._is_lost, False
        return is_lost

    def make_room(self) -> None:
        """Delete the checkpoint that the waiting one would replace, for a job that was asked to stop on a full disk.

        One checkpoint always stays. Only rank 0 deletes.
        """
        if self.waits_for_space and self.rank == 0:
            prune_checkpoints(self.folder, max(1, self.keep_last - 1), self.keep_every_steps, self.keep_best)

    def prune(self) -> None:
        """Delete the checkpoints that are not kept, once none is being written. Only rank 0 deletes.

        Each new checkpoint does so too, but before its own step is validated.
        """
        if self.rank == 0:
            prune_checkpoints(self.folder, self.keep_last, self.keep_every_steps, self.keep_best)

    def start_writing(
        self, files: dict[str, Any], state: TrainState, release: Callable[[], None] = lambda: None
    ) -> None:
        """Write captured files on a thread.

        Args:
            release: called once the files are not read any more, whether or not they could be written.
        """
        self._writing_step = state.step
        self._thread = threading.Thread(target=self._run, args=(files, state, release), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the current checkpoint is on disk, and on rank 0 sealed.

        Raises:
            OSError: it could not be written.
        """
        if self._thread is not None:
            ACTIVITY.follow(partial(_join, self._thread))
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def is_writing(self) -> bool:
        """Return whether a checkpoint is being written."""
        # Read once: the console calls this from a thread of its own.
        thread = self._thread
        return thread is not None and thread.is_alive()

    def is_writing_step(self, step: int) -> bool:
        """Return whether the checkpoint of this step is being written."""
        return self.is_writing() and self._writing_step == step

    def wait_at_most(self, timeout_seconds: float) -> None:
        """Wait some time for the current checkpoint, and ignore its errors. Its wait for disk space does not count."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            while self.waits_for_space and self._thread.is_alive():
                self._thread.join(SPACE_POLL_SECONDS)

    def write_shard(self, files: dict[str, Any], state: TrainState) -> Path:
        """Write this rank's files, the state and this rank's part, without collectives. Returns the partial folder.

        Raises:
            FileNotFoundError: files were deleted meanwhile.
            OSError: a file cannot be written.
        """
        partial = get_partial_folder(self.folder, state.step, self.token)
        create_folder(partial)
        written = {}
        for name, content in files.items():
            path = partial / name
            create_folder(path.parent)
            file = save_hashed(path, content)
            written[name] = {"bytes": file.bytes, "sha256": file.sha256}
            ACTIVITY.background += 1
        require_files(partial, written)
        for folder in {(partial / name).parent for name in files}:
            sync_folder(folder)
        # Equal on every rank, so every living rank may write it.
        state.save(partial)
        write_part(partial, self.rank, self.world_size, written)
        self.last_step = state.step
        return partial

    def describe_lack_of_space(self, files: dict[str, Any]) -> str | None:
        """Describe the disk space that all ranks' files need and that is free; None if the files fit."""
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = estimate_bytes(files, self.world_size) + SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if needed <= free:
            return None
        return f"{self.folder}: a checkpoint needs about {needed:,} bytes, {free:,} are free"

    def _run(self, files: dict[str, Any], state: TrainState, release: Callable[[], None]) -> None:
        # Training has priority over the writer on the same core.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
        try:
            try:
                partial = self.write_when_there_is_space(files, state)
            finally:
                release()
            if self.rank == 0:
                self._seal(partial, state.step)
        except FileNotFoundError as error:
            if self.rank == 0:
                self._give_up(state.step, error)
            else:
                self._error = error
        except (OSError, RuntimeError) as error:
            self._error = error
        except BaseException as error:
            # A bug of the program, which the main thread must see too.
            self._error = error
            raise

    def write_when_there_is_space(self, files: dict[str, Any], state: TrainState, try_first: bool = False) -> Path:
        """Write the shard once the disk has space for it; wait again, without the files, if it fills up meanwhile.

        Files that are deleted meanwhile are written again.

        Args:
            try_first: write at once, even if the disk seems to have no space for the files of all ranks.

        Raises:
            FileNotFoundError: files are deleted again and again.
            OSError: there is no space after `wait_for_space_seconds`.
        """
        deadline = time.monotonic() + self.wait_for_space_seconds
        # Rank 0 does not know whether the parts of other ranks were deleted too.
        attempts_left = 1 if self.rank == 0 and self.world_size > 1 else MAX_ATTEMPTS
        while True:
            lack = None if try_first else self.describe_lack_of_space(files)
            try_first = False
            if lack is None:
                self.waits_for_space = False
                try:
                    return self.write_shard(files, state)
                except FileNotFoundError as error:
                    attempts_left -= 1
                    if not attempts_left:
                        raise
                    logger.warning("the checkpoint of step {} is written again: {}", state.step, error)
                    continue
                except OSError as error:
                    if error.errno not in FULL_DISK:
                        raise
                    lack = f"{self.folder}: {error}"
                    self._discard(files, state.step)
            self._wait_for_space(lack, deadline, state.step)

    def _wait_for_space(self, lack: str, deadline: float, step: int) -> None:
        """Wait a moment, and warn at the first time.

        Raises:
            OSError: the deadline is over.
        """
        if time.monotonic() >= deadline:
            self.waits_for_space = False
            raise OSError(errno.ENOSPC, lack)
        if not self.waits_for_space:
            logger.warning("{}; the checkpoint of step {} waits for space", lack, step)
            self.waits_for_space = True
        time.sleep(min(SPACE_POLL_SECONDS, self.wait_for_space_seconds))
        ACTIVITY.background += 1  # this wait has a limit of its own, and so has the one for other ranks' parts

    def _discard(self, files: dict[str, Any], step: int) -> None:
        """Delete this rank's files of a checkpoint that did not fit on the disk."""
        partial = get_partial_folder(self.folder, step, self.token)
        for name in files:
            (partial / name).unlink(missing_ok=True)

    def _seal(self, partial: Path, step: int) -> None:
        """Wait for the other ranks' parts on the shared folder, and for space for the manifest, then seal.

        Raises:
            FileNotFoundError: files were deleted meanwhile.
            OSError: there is no space after `wait_for_space_seconds`.
        """
        space_deadline = time.monotonic() + self.wait_for_space_seconds
        deadline = space_deadline + SEAL_PATIENCE_SECONDS
        while True:
            try:
                sealed = seal_checkpoint(partial)
            except OSError as error:
                if error.errno not in FULL_DISK:
                    raise
                self._wait_for_space(f"{self.folder}: {error}", space_deadline, step)
                continue
            self.waits_for_space = False
            if sealed is not None:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"{partial}: not every rank has written its part")
            get_part_file(partial, self.rank).stat()  # this rank has written it
            time.sleep(0.05)
            ACTIVITY.background += 1
        logger.info("checkpoint {} is saved", sealed)
        self.prune()

    def _give_up(self, step: int, error: FileNotFoundError) -> None:
        """Drop a checkpoint whose files were deleted. It is not announced, older ones stay, and another is saved."""
        self._is_lost, self.last_step = True, -1
        logger.error("the checkpoint of step {} is lost, its files were deleted: {}; another is saved", step, error)
        shutil.rmtree(get_partial_folder(self.folder, step, self.token), ignore_errors=True)


def _join(thread: threading.Thread, timeout_seconds: float) -> bool:
    """Wait for a thread for some time, and return whether it has ended."""
    thread.join(timeout_seconds)
    return not thread.is_alive()


class WrittenFile(NamedTuple):
    """A file that was written."""

    sha256: str
    bytes: int


def save_hashed(path: Path, content: Any) -> WrittenFile:
    """Write `content` by torch.save, and return the file's hash and size.

    Raises:
        OSError: the file cannot be written; torch alone would raise a RuntimeError that hides the cause.
    """
    file = DirectFile(path)
    try:
        torch.save(content, cast(Any, file))
        return WrittenFile(file.close(), file.size)
    except RuntimeError as error:
        raise file.error or error from None
    finally:
        file.abandon()


def estimate_bytes(files: dict[str, Any], world_size: int) -> int:
    """Estimate the bytes of all ranks' files from those of one rank.

    Shares of the optimizer's state have one size; other files, such as the module's weights, are written once.
    """
    shared = [content for name, content in files.items() if "pp_rank_" not in name]
    return count_tensor_bytes(list(files.values())) * world_size - count_tensor_bytes(shared) * (world_size - 1)


def count_tensor_bytes(content: Any) -> int:
    """Return the bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(count_tensor_bytes(value) for value in content.values())
    if isinstance(content, (list, tuple)):
        return sum(count_tensor_bytes(value) for value in content)
    return 0
