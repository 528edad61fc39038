"""A record of the calls that make files durable: nothing may be deleted or listed before its successor is on disk."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sdxl_trainer.data.files import TEMPORARY_NAME
from sdxl_trainer.data.formats.manifest import ManifestEntry, ManifestWriter
from sdxl_trainer.data.formats.shards import get_partial_path


class DiskCalls:
    """Watches fsync, replace and unlink of this process.

    Attributes:
        faults: calls that would lose data in a power cut.
        num_renames, num_deletions: calls watched.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.faults: list[str] = []
        self.num_renames = self.num_deletions = 0
        self._durable: set[str] = set()  # files and folders flushed to disk
        self._renamed: dict[str, str] = {}  # name whose folder is not flushed yet → the folder
        self._unsynced_parts: set[str] = set()
        self._fsync, self._replace, self._unlink, self._append = os.fsync, os.replace, os.unlink, ManifestWriter.append
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", self.replace)
        monkeypatch.setattr(os, "unlink", self.unlink)
        monkeypatch.setattr(ManifestWriter, "append", lambda writer, entry: self.append(writer, entry))

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self._durable.add(path)
        self._renamed = {name: folder for name, folder in list(self._renamed.items()) if folder != path}
        self._unsynced_parts.discard(path)

    def replace(self, source: str | Path, target: str | Path) -> None:
        self.num_renames += 1
        files = [path for path in Path(source).rglob("*") if path.is_file()] if os.path.isdir(source) else [source]
        self.faults += [f"{path} renamed before its content is on disk" for path in files if not self._is_flushed(path)]
        moved = [os.path.relpath(path, source) for path in files]
        self._replace(source, target)
        self._durable |= {os.path.realpath(os.path.join(target, path)) for path in moved}
        self._renamed[os.path.realpath(target)] = os.path.realpath(os.path.dirname(target))

    def unlink(self, path: str | Path, *, dir_fd: int | None = None) -> None:
        full = path if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        existed = os.path.exists(full)
        self._unlink(path, dir_fd=dir_fd)
        if existed and not TEMPORARY_NAME.fullmatch(os.path.basename(full)):
            self.num_deletions += 1
            if self._renamed or self._unsynced_parts:
                self.faults.append(f"{full} deleted before {[*self._renamed, *self._unsynced_parts]} is on disk")

    def append(self, writer: ManifestWriter, entry: ManifestEntry) -> None:
        part = Path(os.readlink(f"/proc/self/fd/{writer._file.fileno()}"))
        files = [entry.file] if entry.text is None else [entry.file, entry.text.file]
        for path in (part.parents[1] / file for file in files):
            partial = get_partial_path(path)
            if not self._is_flushed(path) and not self._is_flushed(partial):
                self.faults.append(f"{path} listed before its content is on disk")
            if os.path.realpath(path) in self._renamed or os.path.realpath(path.parent) not in self._durable:
                self.faults.append(f"{path} listed before its name is on disk")
        self._append(writer, entry)
        self._unsynced_parts.add(str(part))

    def _is_flushed(self, path: str | Path) -> bool:
        return os.path.realpath(path) in self._durable


@contextmanager
def limit_file_size(num_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as on a full disk: the part that fits is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
