"""Targets of a copy: folders, and places on a store. Files appear there whole, and are checked there."""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from sdxl_trainer.cache.encode.cache_setup import lock_cache
from sdxl_trainer.cache.encode.store_setup import hold_lock
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.data.checks.folders import check_writable
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.stores.cache_mirror import read_store_url
from sdxl_trainer.data.stores.remote import StoreError, download, is_remote
from sdxl_trainer.data.stores.store_lock import LockTicket
from sdxl_trainer.data.stores.uploads import delete_objects, list_objects, put_bytes, read_bytes, upload_file

NUM_UPLOADS = 8  # at once
NUMBERED = re.compile(r"(?:manifest/part-(\d+)[.\-].*|shards/\d+x\d+-(\d+)-\d+\.tar)")
JOURNAL = ".copy"  # in a target that is a folder
PERMISSION_CURE = "give the credentials the right to read and write it, or check the address"


class CopyTarget(Protocol):
    """A place that a cache is copied to. Names are relative to it, as in a manifest."""

    root: Path  # local folder that the files of the target are built in
    journal: Path  # local folder that says what has arrived, until the copy is complete

    def lock(self) -> AbstractContextManager[None]:
        """Keep other jobs out of the target, and delete what was built outside of it."""
        ...

    def verify_lock(self) -> None:
        """Verify that no other job has taken the lock over."""
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

    def verify_lock(self) -> None:
        pass  # the system keeps the lock of a folder as long as this process runs

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


class StoreTarget:
    """A place on a store. Files are built in a local folder, uploaded, compared with what the store holds, and deleted.

    Args:
        url: of the target, without a slash at its end.
        work: local folder for the journal and for what is being uploaded.
    """

    def __init__(self, url: str, work: Path):
        self._url = url
        self.root, self.journal = work / "upload", work
        self._names: set[str] | None = None  # what is there, when it was last listed
        self._ticket: LockTicket | None = None

    @contextmanager
    def lock(self) -> Iterator[None]:
        with hold_lock(self._url, "--copy-to") as self._ticket:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                yield
            finally:
                shutil.rmtree(self.root, ignore_errors=True)

    def verify_lock(self) -> None:
        assert self._ticket is not None, "the target is locked"
        self._ticket.verify()

    def list_names(self) -> set[str]:
        self._names = {item.url.removeprefix(f"{self._url}/") for item in list_objects(self._url)}
        return self._names

    def has(self, name: str) -> bool:
        return name in (self.list_names() if self._names is None else self._names)

    def read(self, name: str) -> bytes | None:
        try:
            return read_bytes(f"{self._url}/{name}")
        except FileNotFoundError:
            return None

    def fetch(self, name: str, path: Path) -> None:
        download(f"{self._url}/{name}", path)

    def publish(self, names: Iterable[str], verify: Callable[[], None]) -> None:
        verify()

        def upload(name: str) -> None:
            upload_file(self.root / name, f"{self._url}/{name}")
            (self.root / name).unlink()

        with ThreadPoolExecutor(NUM_UPLOADS, thread_name_prefix="upload") as pool:
            list(pool.map(upload, names))

    def write(self, name: str, content: bytes) -> None:
        put_bytes(content, f"{self._url}/{name}")

    def delete(self, names: Iterable[str]) -> None:
        delete_objects([f"{self._url}/{name}" for name in names])

    def free_bytes(self) -> int | None:
        return None


def check_target(target: str, source: Path) -> Iterator[Problem]:
    """Yield a problem if a cache cannot be copied to a target: it is the cache itself, or cannot be written."""
    if is_remote(target):
        url = read_store_url(source)
        if url is not None and f"{target.rstrip('/')}/".startswith(f"{url}/"):
            yield Problem("--copy-to", target, "lies in the cache that is copied", "give an address outside of it")
        try:
            list_objects(target.rstrip("/"))
        except (StoreError, OSError) as error:
            yield Problem("--copy-to", target, f"cannot be used: {error}", PERMISSION_CURE)
        return
    folder, own = Path(target).absolute().resolve(), source.absolute().resolve()
    if folder == own or own in folder.parents:
        yield Problem("--copy-to", target, "lies in the cache that is copied", "give a folder outside of it")
    else:
        yield from check_writable("--copy-to", folder)


def open_target(target: str, work: Path) -> CopyTarget:
    """Return the target that a folder or a URL names.

    Args:
        work: local folder for a copy to a store.
    """
    return StoreTarget(target.rstrip("/"), work) if is_remote(target) else FolderTarget(Path(target))


def choose_number(names: Iterable[str]) -> int:
    """Return the number of a further part of the manifest and its shards, which no file of a target has."""
    matches = filter(None, map(NUMBERED.fullmatch, names))
    return max((int(match[1] or match[2]) for match in matches), default=-1) + 1
