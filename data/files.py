"""Atomic writes, checksums, retried reads, and ranges of bytes within a file.

A file is written under a temporary name, flushed to disk, then renamed.
"""

import errno
import hashlib
import io
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

from loguru import logger

T = TypeVar("T")

# Errors of a network file system that a retry may cure. A missing or forbidden file is not among them.
TRANSIENT_ERRORS = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO),
    *(errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH),
}
WAITS_SECONDS = (0.5, 2.0)


def read_with_retries(read: Callable[[], T], name: Path | str, before_retry: Callable[[], None] | None = None) -> T:
    """Return the result of `read()`. After a transient error of the storage, call `read` again.

    Args:
        name: name of the file, for the warning.
        before_retry: called before each further attempt, to release what the failed one left.

    Raises:
        OSError: the error of the last attempt, or a permanent error.
    """
    for wait_seconds in WAITS_SECONDS:
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT_ERRORS:
                raise
            logger.warning("{}: {}; read again in {:g} s", name, error.strerror, wait_seconds)
        time.sleep(wait_seconds)
        if before_retry is not None:
            before_retry()
    return read()


@contextmanager
def open_atomic(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears as `path` only when the block ends without an error.

    The temporary file is hidden and in the same folder, because a rename is atomic only within one file system.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` atomically."""
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that renames in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Span(NamedTuple):
    """A range of bytes in a file."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        """The offset after the last byte."""
        return self.offset + self.size


class SeekableBytes(io.RawIOBase):
    """Base of file objects over a range of bytes. A subclass reads from `_place` on and moves it.

    Args:
        size: of the range, in bytes.
    """

    def __init__(self, size: int):
        super().__init__()
        self._bytes, self._place = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._bytes}[whence]
        self._place = max(0, start + offset)
        return self._place


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, which is read in pieces."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class HashedFile:
    """A file with the size, time and checksum that it had when it was read."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str
