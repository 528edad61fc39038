"""Local copies of remote shards: of single samples as they are read, or of whole shards.

Single samples are written into a sparse file at their offset in the shard. The checksums of an npz show whether the
file holds the sample. All ranks of a node share the folder. If it is full, the least recently used copies are deleted.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from loguru import logger

from sdxl_trainer.configs.schema import RemoteShardsConfig
from sdxl_trainer.data.formats.shards import OpenFile
from sdxl_trainer.data.stores.remote import download
from sdxl_trainer.data.stores.remote_sources import name_shard_version

WHOLE_SUFFIX, SPARSE_SUFFIX = ".tar", ".holes"
SAMPLES_PER_CLEANUP = 1000


def open_copies(settings: RemoteShardsConfig, index_folder: Path) -> "ShardCopies | None":
    """Open the folder of copies, or return None if the settings ask for none.

    Args:
        index_folder: folder of the indexes, in the cache folder.
    """
    folder = settings.copies_dir or (index_folder.parent / "copies" if settings.shuffle_shards else None)
    if folder is None:
        return None
    return ShardCopies(folder, int(settings.copies_gb * 1e9), partial(name_shard_version, index_folder))


class ShardCopies:
    """Copies of remote shards in a folder.

    Args:
        limit_bytes: maximum number of bytes that the folder may take on disk.
        name_version: returns a file stem that identifies the version of a shard, given its URL.
    """

    def __init__(self, folder: Path, limit_bytes: int, name_version: Callable[[str], str]):
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._name_version = name_version
        self._num_kept = 0
        self._is_writable = True
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, url: str, offset: int, size: int) -> memoryview | None:
        """Return the bytes of a copy at an offset, with zeros in holes; None if there is no copy that can be read."""
        for suffix in (WHOLE_SUFFIX, SPARSE_SUFFIX):
            with suppress(OSError):
                return OpenFile(self._get_path(url, suffix)).read(offset, size)
        return None

    def keep(self, url: str, offset: int, content: bytes) -> None:
        """Write one sample into the sparse copy of its shard.

        After an error such as a full disk, no more samples are written: copies save time but are not needed.
        """
        if not self._is_writable:
            return
        try:
            self._write(url, offset, content)
        except OSError as error:
            logger.warning("samples are no longer copied to {}, which cannot be written: {}", self._folder, error)
            self._is_writable = False

    def _write(self, url: str, offset: int, content: bytes) -> None:
        if self._num_kept % SAMPLES_PER_CLEANUP == 0:
            self._clean_up()
        self._num_kept += 1
        descriptor = os.open(self._get_path(url, SPARSE_SUFFIX), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, content, offset)
        finally:
            os.close(descriptor)

    def has(self, url: str) -> bool:
        """Return whether a copy of the whole shard exists."""
        return self._get_path(url, WHOLE_SUFFIX).exists()

    def drop_whole(self, url: str) -> None:
        """Delete the copy of a whole shard, which has other bytes than the shard."""
        self._get_path(url, WHOLE_SUFFIX).unlink(missing_ok=True)

    def fetch(self, url: str, wait: bool = True) -> None:
        """Copy a whole shard unless a copy exists. Only one process at a time copies a shard.

        Args:
            wait: wait while another process copies the shard; False returns at once.

        Raises:
            FileNotFoundError: the shard no longer exists.
            StoreError: the store does not answer.
        """
        path = self._get_path(url, WHOLE_SUFFIX)
        if path.exists():
            os.utime(path)
            return
        try:
            with FileLock(path.with_suffix(".lock")).acquire(timeout=-1 if wait else 0):
                if not path.exists():
                    self._clean_up()
                    download(url, path)
                    self._get_path(url, SPARSE_SUFFIX).unlink(missing_ok=True)
        except Timeout:
            return

    def _get_path(self, url: str, suffix: str) -> Path:
        return self._folder / (self._name_version(url) + suffix)

    def _clean_up(self) -> None:
        """Delete the least recently used copies until there is room for one more copy of the largest size."""
        files = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another rank may clean up, too
                    status = entry.stat()
                    files.append((status.st_mtime_ns, status.st_blocks * 512, entry))
        excess = sum(size for _, size, _ in files) + max((size for _, size, _ in files), default=0) - self._limit_bytes
        for _, size, entry in sorted(files, key=lambda file: file[0]):
            if excess <= 0:
                break
            if entry.name.endswith((WHOLE_SUFFIX, SPARSE_SUFFIX)):
                Path(entry.path).unlink(missing_ok=True)
                excess -= size
