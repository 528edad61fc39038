"""Writes encoded batches while the next ones are encoded: a bounded number of items in flight, errors not lost."""

import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdxl_trainer.data.latents import LatentSample, write_latents
from sdxl_trainer.data.manifest import Entry, ManifestWriter
from sdxl_trainer.data.transforms import PreparedImage


@dataclass(frozen=True)
class EncodedItem:
    """One picture's latents, with all that its file and its line in the manifest need."""

    key: str
    image_path: str
    image: PreparedImage
    latents: np.ndarray  # [4, h, w]
    file: str  # relative to the cache folder


class LatentWriter:
    """Writes latent files on threads of its own and lists each in the manifest once it is on disk.

    Args:
        folder: the cache folder.
        manifest: where finished items are listed.
        num_threads: files written at once.
        max_in_flight: items accepted and not yet on disk; `submit` waits beyond it, so memory stays flat.
    """

    def __init__(self, folder: Path, manifest: ManifestWriter, num_threads: int = 4, max_in_flight: int = 32):
        self._folder = folder
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
        self._raise_error()
        self._pool.submit(self._write, item).add_done_callback(self._finish)

    def close(self) -> None:
        """Wait until everything is on disk and listed.

        Raises:
            OSError: an item could not be written.
        """
        self._pool.shutdown(wait=True)
        self._manifest.flush()
        self._raise_error()

    def _write(self, item: EncodedItem) -> None:
        sample = LatentSample(item.latents, item.image.original_size, item.image.placement.crop_ltrb)
        content = write_latents(self._folder / item.file, sample)
        entry = Entry(
            key=item.key,
            file=item.file,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            bucket=item.image.placement.bucket,
            original_size=item.image.original_size,
            crop=item.image.placement.crop_ltrb,
            source_path=item.image_path,
            source_bytes=item.image.source_bytes,
            source_mtime_ns=item.image.source_mtime_ns,
            source_sha256=item.image.source_sha256,
        )
        with self._lock:
            self._manifest.append(entry)
            self._manifest.flush()
            self.num_written += 1
            self.bytes_written += len(content)

    def _finish(self, future: Future) -> None:
        error = future.exception()
        if error is not None and self._error is None:
            self._error = error
        self._places.release()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
