"""Checks of folders that a program will write into."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from sdxl_trainer.configs.problems import Problem


def check_writable_file(key: str, file: Path) -> Iterator[Problem]:
    """Yield a problem if a file cannot be written. It may exist, and then it is replaced.

    Args:
        key: the setting or option that names the file.
    """
    if file.is_dir():
        yield Problem(key, file, "is a folder", "give the name of a file")
        return
    yield from check_writable(key, file.parent)


def build_index_problem(folder: Path, error: OSError) -> Problem:
    """Build the problem of an index that must be written, in a cache folder that cannot be.

    Raises:
        OSError: `error`, if it is another one.
    """
    is_denied = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
    if not is_denied or not str(error.filename or "").startswith(str(folder)):
        raise error
    rule = f"cannot be written ({error.strerror}), but data or cache have changed since its index was built"
    cure = "allow writing to its folder index/, or start once with the same settings where that is allowed"
    return Problem("cache.dir", folder, rule, cure)


def check_folder(key: str, folder: Path) -> Iterator[Problem]:
    """Yield a problem if a folder, which may not exist yet, or a part of its path is a file.

    Args:
        key: the setting that names the folder.
    """
    if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        yield _build_file_problem(key, folder, file)


def check_writable(key: str, folder: Path) -> Iterator[Problem]:
    """Yield a problem if files cannot be written into a folder, which may not exist yet.

    Args:
        key: the setting that names the folder.
    """
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        is_folder, allowed, disk = existing.is_dir(), os.access(existing, os.W_OK | os.X_OK), os.statvfs(existing)
    except OSError as error:
        yield Problem(key, folder, f"cannot be used: {error.strerror}", "give this user the right to it, or change it")
        return
    if not is_folder:
        yield _build_file_problem(key, folder, existing)
    elif disk.f_flag & os.ST_RDONLY:
        yield Problem(
            key, folder, f"cannot be written: {existing} is mounted read-only", "choose a folder on another disk"
        )
    elif not allowed:
        yield Problem(key, folder, f"cannot be written: this user may not write to {existing}", f"chmod u+w {existing}")
    elif (disk.f_blocks and not disk.f_bavail) or (disk.f_files and not disk.f_ffree):  # 0: the store has no such limit
        lack = "free space" if not disk.f_bavail else "place for more files (inodes)"
        yield Problem(
            key, folder, f"cannot be written: its disk has no {lack} left", "free some, or choose another disk"
        )


def _build_file_problem(key: str, folder: Path, existing: Path) -> Problem:
    return Problem(key, folder, f"cannot be a folder: {existing} is a file", "choose another folder")
