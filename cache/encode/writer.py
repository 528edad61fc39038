"""Writes encoded items while the next ones are encoded: a bounded number in flight, errors not lost."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from sdxl_trainer.cache.encode.sinks import EncodedItem, Sink
from sdxl_trainer.data.formats.manifest import ManifestEntry, ManifestWriter


class LatentWriter:
    """Stores items on threads of its own and lists each in the manifest once it is on disk.

    Args:
        sink: where items go.
        manifest: where finished items are listed.
        num_threads: items written at once.
        max_in_flight: items accepted and not yet on disk; `submit` waits beyond it, so memory stays flat.
    """

    def __init__(self, sink: Sink, manifest: ManifestWriter, num_threads: int = 4, max_in_flight: int = 32):
        self._sink = sink
        self._manifest = manifest
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="latent-writer")
        self._places = threading.Semaphore(max_in_flight)
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self.num_written = 0
        self.bytes_written = 0

    def submit(self, item: EncodedItem) -> None:
        """Hand an item over; returns at once unless too many are in flight.

        Raises:
            OSError: an earlier item could not be written.
        """
        self._places.acquire()
        if self._error is not None:
            self._places.release()
            raise self._error
        self._pool.submit(self._write, item).add_done_callback(self._finish)

    def list_entry(self, entry: ManifestEntry) -> None:
        """Add a line to the manifest that holds as it is."""
        with self._lock:
            self._manifest.append(entry)

    def close(self) -> None:
        """Wait until everything is on disk and listed.

        Raises:
            OSError: an item could not be written.
        """
        self._pool.shutdown(wait=True)
        try:
            self._sink.close()
        finally:
            self._manifest.close()
        if self._error is not None:
            raise self._error

    def _write(self, item: EncodedItem) -> None:
        if self._error is not None:
            return  # the disk is full, say: what is still in flight would only fail too
        entry = self._sink.write(item)
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
