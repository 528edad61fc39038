"""Lock of a folder that only one job may write at a time. It names the job that holds it."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from loguru import logger

from sdxl_trainer.configs.problems import FailedError, Problem, UserInputError

LOCK_FILE = ".lock"
MAX_HOLDER_BYTES = 500
_held: dict[Path, int] = {}  # lock file → its descriptor, of the locks that this process holds
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems without locks


@contextmanager
def lock_folder(folder: Path, key: str, cure: str) -> Iterator[None]:
    """Lock a folder within the context; the lock also ends with the process.

    The folder is created. The lock file is deleted at the end, and so is the folder if nothing was written into it. A
    file system without locks gives a warning and no lock.

    Args:
        key: the setting that names the folder.
        cure: what to do when another job holds the lock, besides waiting for it or stopping it.

    Raises:
        UserInputError: another job holds the lock, or the folder cannot be written.
    """
    file = folder / LOCK_FILE
    try:
        descriptor = _open_locked(file)
    except BlockingIOError:
        rule = f"is being written by another job{_describe_holder(file)}"
        raise UserInputError([Problem(key, folder, rule, f"wait for that job, stop it, or {cure}")]) from None
    except OSError as error:
        rule, cure = f"cannot be written: {error.strerror}", "choose a folder that you may write, on a disk with space"
        raise UserInputError([Problem(key, folder, rule, cure)]) from None
    if descriptor is None:
        yield
        return
    _held[file] = descriptor
    try:
        yield
    finally:
        descriptor = _held.pop(file)
        with suppress(OSError):
            # Deleted while it is locked: a job that has opened the file by now finds it gone and makes a new one.
            if _is_at(descriptor, file):
                file.unlink()
                folder.rmdir()
        os.close(descriptor)


def renew_locks() -> None:
    """Lock each folder of this process anew if its lock file was deleted, as with the whole folder. Takes microseconds.

    Raises:
        FailedError: another job has locked the folder since.
    """
    for file, descriptor in _held.items():
        with suppress(OSError):
            if _is_at(descriptor, file):
                continue
        try:
            renewed = _open_locked(file)
        except BlockingIOError:
            holder = _describe_holder(file)
            raise FailedError(
                f"{file.parent} was deleted, and another job writes it now{holder}: this one ends"
            ) from None
        except OSError:
            continue  # tried again at the next call
        if renewed is not None:
            _held[file] = renewed
            os.close(descriptor)


def _is_at(descriptor: int, file: Path) -> bool:
    """Return whether an open file is still the one at a path.

    Raises:
        FileNotFoundError: no file is there.
    """
    return os.path.samestat(os.fstat(descriptor), os.stat(file))


def _open_locked(file: Path) -> int | None:
    """Open the lock file, lock it, and write this job's name into it; None on a file system without locks.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be opened.
    """
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, file):
                break
        except FileNotFoundError:
            pass  # another job has ended meanwhile, and deleted the file
        except OSError as error:
            os.close(descriptor)
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("{} cannot be locked: {}. Let no other job write it", file.parent, error.strerror)
            return None
        os.close(descriptor)
    started = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    with suppress(OSError):  # on a full disk the lock has no name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"host {socket.gethostname()}, process {os.getpid()}, started {started}".encode(), 0)
    return descriptor


def _describe_holder(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            holder = stream.read(MAX_HOLDER_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    return f" ({holder})" if holder.isprintable() and holder else ""
