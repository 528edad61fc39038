"""Write encoded items on threads while the device encodes the next items."""

import errno
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from sdxl_trainer.cache.encode.storage import EncodedItem, Storage
from sdxl_trainer.data.counted_warnings import CountedWarnings
from sdxl_trainer.data.formats.manifest import ManifestEntry

# Errors that concern the file of one item alone: its name is too long or cannot be stored, or is a folder's.
NAME_ERRORS = {errno.ENAMETOOLONG, errno.EILSEQ, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


def build_name_warnings() -> Callable[[ManifestEntry, OSError], None]:
    """Return a function that logs which latents are not stored, and counts them once there are many."""
    warnings = CountedWarnings("latents not stored", "the log file")
    return lambda entry, error: warnings.add(f"{entry.source_path}: {entry.file}: {error.strerror}")


class Manifest(Protocol):
    """Lists items that are stored."""

    def append(self, entry: ManifestEntry) -> None:
        """List an item that is on disk."""
        ...

    def sync(self) -> None:
        """Flush everything that was appended. What it replaces may be deleted afterwards."""
        ...

    def close(self) -> None:
        """Flush everything and end."""
        ...


class BackgroundWriter:
    """Stores items on its own threads and lists each in the manifest once it is on disk.

    Args:
        manifest: manifest that lists the finished items.
        num_threads: number of items written at once.
        skip_item: called, on one of the threads, with each item whose name no file can have, and the error; None logs
            it.
        max_in_flight: number of accepted items that are not yet on disk. At this number `submit` waits, which bounds
            the memory.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        skip_item: Callable[[ManifestEntry, OSError], None] | None = None,
        num_threads: int = 4,
        max_in_flight: int = 32,
    ):
        self._storage = storage
        self._manifest = manifest
        self._skip_item = skip_item or build_name_warnings()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="latent-writer")
        self._places = threading.Semaphore(max_in_flight)
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self.num_written = 0
        self.bytes_written = 0

    def submit(self, item: EncodedItem) -> None:
        """Accept an item; returns at once unless too many are in flight.

        Raises:
            OSError: an earlier item could not be written.
        """
        self._places.acquire()
        if self._error is not None:
            self._places.release()
            raise self._error
        self._pool.submit(self._write, item).add_done_callback(self._finish)

    def list_entry(self, entry: ManifestEntry) -> None:
        """Add an entry to the manifest without writing any file."""
        with self._lock:
            self._manifest.append(entry)

    def close(self) -> None:
        """Wait until all items are on disk and in the manifest.

        Raises:
            OSError: an item could not be written.
        """
        self._pool.shutdown(wait=True)
        try:
            self._storage.close()
        finally:
            self._manifest.close()
        if self._error is not None:
            raise self._error

    def _write(self, item: EncodedItem) -> None:
        # After an error such as a full disk, writing the other items in flight would fail too.
        if self._error is not None:
            return
        try:
            entry = self._storage.write(item)
        except OSError as error:
            if error.errno not in NAME_ERRORS:
                raise
            self._skip_item(item.entry, error)
            return
        with self._lock:
            self._manifest.append(entry)
            self.num_written += 1
            self.bytes_written += entry.bytes if item.sample is not None else 0
            self.bytes_written += entry.text.bytes if item.texts and entry.text is not None else 0

    def _finish(self, future: Future) -> None:
        error = future.exception()
        if error is not None and self._error is None:
            self._error = error
        self._places.release()
