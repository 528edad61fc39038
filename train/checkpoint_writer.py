"""Writes checkpoints while training goes on: the state is copied to host memory, a thread brings it to disk."""

import hashlib
import os
import shutil
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from loguru import logger

from sdxl_trainer.train.checkpoint import get_partial_folder, prune_checkpoints, seal_checkpoint, write_part
from sdxl_trainer.train.engine import Engine
from sdxl_trainer.train.state import TrainState

SEAL_PATIENCE_SECONDS = 1800.0
# What a save needs besides the tensors themselves.
SPARE_BYTES = 64 << 20


@dataclass
class CheckpointWriter:
    """Saves checkpoints of one rank, one at a time; rank 0 seals each when all ranks' parts are there.

    Args:
        folder: of all checkpoints of the run.
        token: names this start of the job, the same on all ranks.
        blocking: write before `save` returns, instead of on a thread.
    """

    folder: Path
    rank: int
    world_size: int
    token: str
    keep_last: int
    keep_every_steps: int = 0
    blocking: bool = False
    last_step: int = -1  # of the newest checkpoint whose part this rank has written
    _thread: threading.Thread | None = None
    _error: BaseException | None = None

    def save(self, engine: Engine, state: TrainState) -> None:
        """Copy the state now, write it in the background. All ranks call it at the same step.

        Waits for the checkpoint before, if it is still being written.

        Raises:
            OSError: the disk has too little space, or the checkpoint before could not be written.
        """
        self.wait()
        files = engine.capture_state()
        self.start_writing(files, replace(state))
        if self.blocking:
            self.wait()

    def start_writing(self, files: dict[str, Any], state: TrainState) -> None:
        """Write captured files on a thread."""
        self.check_space(files)
        self._thread = threading.Thread(target=self._run, args=(files, state), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint in hand is on disk, and on rank 0 sealed.

        Raises:
            OSError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self, timeout_seconds: float) -> None:
        """Give the checkpoint in hand some time, whatever becomes of it."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def write(self, files: dict[str, Any], state: TrainState) -> Path:
        """Write this rank's files and its part, and rank 0's the state. Returns the partial folder. No collectives."""
        partial = get_partial_folder(self.folder, state.step, self.token)
        partial.mkdir(parents=True, exist_ok=True)
        written = {}
        for name, content in files.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                hashed = _HashedFile(file)
                torch.save(content, cast(Any, hashed))  # torch asks for no more than write and flush
                file.flush()
                os.fsync(file.fileno())
            written[name] = {"bytes": hashed.size, "sha256": hashed.digest.hexdigest()}
        state.save(partial)  # the same on every rank, so whoever lives writes it
        write_part(partial, self.rank, self.world_size, written)
        self.last_step = state.step
        return partial

    def check_space(self, files: dict[str, Any]) -> None:
        """Stop before writing what cannot fit.

        Raises:
            OSError: the ranks' files together need more than the disk has free.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = count_tensor_bytes(files) * self.world_size + SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(f"{self.folder}: a checkpoint needs about {needed:,} bytes, {free:,} are free")

    def _run(self, files: dict[str, Any], state: TrainState) -> None:
        try:
            partial = self.write(files, state)
            if self.rank == 0:
                self._seal(partial)
        except (OSError, RuntimeError) as error:
            self._error = error

    def _seal(self, partial: Path) -> None:
        """Wait for the other ranks' parts on the shared folder, then seal."""
        deadline = time.monotonic() + SEAL_PATIENCE_SECONDS
        while (sealed := seal_checkpoint(partial)) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{partial}: not every rank has written its part")
            time.sleep(0.05)
        logger.info("checkpoint {}", sealed)
        prune_checkpoints(self.folder, self.keep_last, self.keep_every_steps)


class _HashedFile:
    """A file that torch.save writes to, hashed on the way. torch writes a file opened so from front to back."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        self._file.write(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def count_tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(count_tensor_bytes(value) for value in content.values())
    if isinstance(content, (list, tuple)):
        return sum(count_tensor_bytes(value) for value in content)
    return 0
