"""Writer of large files that bypasses the page cache and hashes the bytes it writes."""

import errno
import fcntl
import hashlib
import mmap
import os
from pathlib import Path

import numpy as np

BLOCK_BYTES = 4 << 20
DIRECT = getattr(os, "O_DIRECT", 0)  # exists on Linux only


class DirectFile:
    """New file that is written from front to back, bypassing the page cache where the file system supports it.

    The cache would hold a copy that nobody reads, and evict the latents that training reads. Writing through it costs
    training CPU time (docs/TRIALS.md has the measurement).

    `torch.save` accepts it as a file, because it calls `write` and `flush` only.

    Raises:
        OSError: `write` or `close` failed.
    """

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(path, flags | DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o644)
        # Direct writes need memory that is aligned to the device's blocks; pages of mmap are.
        self._block = np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8)
        self._filled = 0
        self._hash = hashlib.sha256()
        self.size = 0
        # Error of a failed write; torch.save raises another error in its place.
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        left = np.frombuffer(data, np.uint8)
        while len(left):
            chunk = left[: BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + len(chunk)] = chunk
            self._filled += len(chunk)
            left = left[len(chunk) :]
            if self._filled == BLOCK_BYTES:
                self._write_block()
        return len(data)

    def flush(self) -> None:
        """Do nothing: `close` writes everything to the disk."""

    def close(self) -> str:
        """Write the rest to the disk, and return the file's SHA-256 in hexadecimal digits."""
        try:
            # The last block may be smaller, and direct writes need whole blocks.
            self._clear_direct()
            self._write_block()
            os.fsync(self._descriptor)
        finally:
            self.abandon()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close the file as it is. Does nothing on a closed file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write_block(self) -> None:
        block, self._filled = self._block[: self._filled].data, 0
        self._hash.update(block)
        self.size += len(block)
        while len(block):
            try:
                block = block[os.write(self._descriptor, block) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._clear_direct():
                    self.error = error
                    raise

    def _clear_direct(self) -> bool:
        """Clear O_DIRECT and return whether it was set."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~DIRECT)
        return bool(flags & DIRECT)
