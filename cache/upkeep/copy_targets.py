"""Targets of a copy: folders, and places on a store. Files appear there whole, and are checked there."""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from sdxl_trainer.cache.encode.cache_setup import lock_cache
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.data.checks.folders import check_writable
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.stores.remote import is_remote

NUMBERED = re.compile(r"(?:manifest/part-(\d+)[.\-].*|shards/\d+x\d+-(\d+)-\d+\.tar)")
JOURNAL = ".copy"  # in a target that is a folder


class CopyTarget(Protocol):
    """A place that a cache is copied to. Names are relative to it, as in a manifest."""

    root: Path  # local folder that the files of the target are built in
    journal: Path  # local folder that says what has arrived, until the copy is complete

    def lock(self) -> AbstractContextManager[None]:
        """Keep other jobs out of the target, and delete what was built outside of it."""
        ...

    def list_names(self) -> set[str]:
        """List the files of a cache that are there."""
        ...

    def has(self, name: str) -> bool:
        """Return whether a file is there."""
        ...

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file; None if it is not there."""
        ...

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file from the target."""
        ...

    def publish(self, names: Iterable[str], verify: Callable[[], None]) -> None:
        """Make files that were built in `root` appear at the target, and check them there.

        Args:
            verify: compares the files in `root` with their checksums.
        """
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Delete files."""
        ...

    def free_bytes(self) -> int | None:
        """Return the space that is left; None if there is no limit."""
        ...


class FolderTarget:
    """A folder, in which files are built in their place."""

    def __init__(self, folder: Path):
        self.root, self.journal = folder, folder / JOURNAL

    @contextmanager
    def lock(self) -> Iterator[None]:
        with lock_cache(self.root):
            yield

    def list_names(self) -> set[str]:
        found = (path for place in ("manifest", "shards") for path in (self.root / place).glob("[!.]*"))
        return {path.relative_to(self.root).as_posix() for path in found}

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def read(self, name: str) -> bytes | None:
        path = self.root / name
        return path.read_bytes() if path.is_file() else None

    def fetch(self, name: str, path: Path) -> None:
        shutil.copyfile(self.root / name, path)

    def publish(self, names: Iterable[str], verify: Callable[[], None]) -> None:
        """Drop the files from the memory of this machine, so that the check reads the disk."""
        for name in names:
            descriptor = os.open(self.root / name, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        verify()

    def write(self, name: str, content: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self.root / name).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(next(path for path in (self.root, *self.root.parents) if path.exists())).free


def check_target(target: str, source: Path) -> Iterator[Problem]:
    """Yield a problem if a cache cannot be copied to a target: it is the cache itself, or cannot be written."""
    if is_remote(target):
        yield Problem("--copy-to", target, "is a URL, and a copy goes to a folder", "copy to a folder, and upload that")
        return
    folder, own = Path(target).absolute().resolve(), source.absolute().resolve()
    if folder == own or own in folder.parents:
        yield Problem("--copy-to", target, "lies in the cache that is copied", "give a folder outside of it")
    else:
        yield from check_writable("--copy-to", folder)


def open_target(target: str, work: Path) -> CopyTarget:
    """Return the target that a folder names."""
    return FolderTarget(Path(target))


def choose_number(names: Iterable[str]) -> int:
    """Return the number of a further part of the manifest and its shards, which no file of a target has."""
    matches = filter(None, map(NUMBERED.fullmatch, names))
    return max((int(match[1] or match[2]) for match in matches), default=-1) + 1
