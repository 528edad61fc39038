"""Opening of files with data, atomic writes, checksums, retried reads, and ranges of bytes within a file.

Every reader of data opens files by `open_regular`, which refuses what could block or never end. A file is written under
a temporary name, flushed to disk, then renamed, and its folder is flushed. What the file replaces may be deleted after
that.
"""

import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from sdxl_trainer.data.counted_warnings import CountedWarnings

T = TypeVar("T")

# Errors of a network file system that a retry may cure. A missing or forbidden file is not among them.
TRANSIENT_ERRORS = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO),
    *(errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH),
}
WAITS_SECONDS = (0.5, 2.0)
_RETRIES = CountedWarnings("the storage failed, read again in a moment", "the log file")
# Errors of file systems on which folders cannot be flushed.
UNSUPPORTED_ERRORS = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.DOTALL)

# Kinds of files that are refused as data.
IRREGULAR_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
MAX_NAME_BYTES = 255  # of a file name, on all common file systems
TEMPORARY_BYTES = len("..01234567.tmp")  # that a temporary name adds to a file's name


class FileContent(NamedTuple):
    """The content of a file, and its modification time just before it was read."""

    content: bytes
    mtime_ns: int


def open_regular(path: Path | str, max_bytes: int | None = None) -> int:
    """Open a regular file for reading and return its descriptor.

    A pipe or a device could block for ever, and opening a device can have effects of its own.

    Args:
        max_bytes: a larger file is refused, such as a sparse one of a petabyte; None accepts any size.

    Raises:
        OSError: the file is missing, unreadable, too large or not a regular file, or no file can have such a name.
    """
    try:
        _verify_regular(os.stat(path), path, max_bytes)
        # Without blocking, because the file may have been replaced by a pipe.
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:  # a null character, or a character that UTF-8 cannot store
        raise OSError(errno.EINVAL, f"no file can have this name ({error})", repr(path)) from None


def open_stream(path: Path | str, max_bytes: int | None = None) -> IO[bytes]:
    """Like `open_regular`, but return a file object."""
    return os.fdopen(open_regular(path, max_bytes), "rb")


def open_text_stream(path: Path | str) -> IO[bytes]:
    """Like `open_stream`, for text of any length. A sparse file is refused: a damaged or fake text without line ends.

    Raises:
        OSError: as `open_regular`, or the file has a hole.
    """
    descriptor = open_regular(path)
    size = os.fstat(descriptor).st_size
    hole = os.lseek(descriptor, 0, os.SEEK_HOLE) if size else 0
    if hole < size:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"is damaged or sparse: holds no data from byte {hole} on", str(path))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path | str, max_bytes: int) -> FileContent:
    """Return the content of a regular file. Raises OSError as `open_regular` does."""
    with open_stream(path, max_bytes) as file:
        # Taken before the read, so that the next job notices a change during the read.
        status = os.fstat(file.fileno())
        # Files of /proc have no size and may never end.
        return FileContent(file.read(status.st_size), status.st_mtime_ns)


def _verify_regular(status: os.stat_result, path: Path | str, max_bytes: int | None) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        kind = IRREGULAR_KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
        raise OSError(errno.EINVAL, f"is {kind}, not a regular file", str(path))
    if max_bytes is not None and status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"has {status.st_size:,} bytes, more than {max_bytes:,}", str(path))


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
            _RETRIES.add(f"{name}: {error.strerror}")
        time.sleep(wait_seconds)
        if before_retry is not None:
            before_retry()
    return read()


@contextmanager
def open_temporary(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` for writing, and delete it at the end unless it was renamed.

    The file is hidden and in the same folder, because a rename is atomic only within one file system. It is locked
    while it is open: `remove_leftovers` deletes only files whose process has ended.
    """
    temporary = _name_temporary(path)
    file = open(temporary, "wb")
    while not _lock(file.fileno()):
        file.close()
        file = open(temporary, "wb")
    try:
        with file:
            yield file
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def open_atomic(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears as `path` only when the block ends without an error.

    Args:
        durable: flush the file and its name to disk, which takes time.
    """
    with open_temporary(path) as file:
        yield file
        file.flush()
        if durable:
            os.fsync(file.fileno())
            replace_file(Path(file.name), path)
        else:
            os.replace(file.name, path)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` atomically."""
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def open_atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, which replaces `folder` when the block ends without an error. Both are durable.

    The replaced folder is deleted last. A kill may leave it as `.<name>.replaced`, which only the next success deletes.
    """
    temporary, replaced = _name_temporary(folder), folder.with_name(f".{folder.name}.replaced")
    create_folder(temporary)
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield temporary
        sync_tree(temporary)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            replace_file(folder, replaced)
        replace_file(temporary, folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def usual_mode(path: Path) -> Iterator[Path]:
    """Give the file that the block writes as `path` the mode of other new files; safetensors leaves it 0600."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield path
    path.chmod(mode)


def commit_file(temporary: Path, path: Path) -> None:
    """Flush a finished temporary file to disk and rename it to `path`."""
    sync_path(temporary)
    replace_file(temporary, path)


def replace_file(source: Path, target: Path) -> None:
    """Rename a file or folder that is on disk, and flush the rename to disk too."""
    os.replace(source, target)
    sync_folder(target.parent)


def create_folder(folder: Path) -> None:
    """Create a folder and its parents, and flush their entries to disk."""
    if folder.is_dir():
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that renames in it survive a power cut.

    Some network file systems cannot, and a folder may be writable but not readable; both are no errors.
    """
    with suppress(PermissionError):
        sync_path(folder)


def sync_path(path: Path) -> None:
    """Flush a file's content or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRORS:
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush all files and folders below a folder to disk, and the folder itself."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync_path(Path(parent, name))
        sync_folder(Path(parent))


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that processes which were killed left in a folder.

    A file that a process is writing is locked and stays. On a file system without locks all stay.
    """
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if TEMPORARY_NAME.fullmatch(entry.name):
                with suppress(OSError):
                    _remove_unlocked(entry)


def _remove_unlocked(entry: os.DirEntry) -> None:
    is_folder = entry.is_dir(follow_symlinks=False)
    # An exclusive lock needs a file that is open for writing on some network file systems.
    descriptor = os.open(entry.path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_folder:
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)
    finally:
        os.close(descriptor)


def _name_temporary(path: Path) -> Path:
    # A name near the limit is cut, because the temporary name is longer.
    name = path.name.encode(errors="surrogateescape")[: MAX_NAME_BYTES - TEMPORARY_BYTES].decode(errors="ignore")
    return path.with_name(f".{name}.{uuid.uuid4().hex[:8]}.tmp")


def _lock(descriptor: int) -> bool:
    """Lock a new temporary file or folder, and return whether it still exists. Without locks it counts as locked."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return os.fstat(descriptor).st_nlink > 0


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


def describe_file(path: Path) -> list[Any]:
    """Return the path, size and modification time of a file, which reveal a change without reading the file."""
    status = os.stat(path)
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, which is read in pieces."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    descriptor = open_regular(path)
    try:
        while size := os.readv(descriptor, (buffer,)):
            digest.update(buffer[:size])
    finally:
        os.close(descriptor)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class HashedFile:
    """A file with the size, time and checksum that it had when it was read."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str
