"""Latents of rows of an index, wherever they lie: files, shards on disk, shards on a store."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loguru import logger

from sdxl_trainer.data.files import read_patiently
from sdxl_trainer.data.formats.latents import BadLatentError, LatentSample, parse_latents
from sdxl_trainer.data.formats.shards import OpenFile, OpenShards
from sdxl_trainer.data.stores.remote import NoRangesError, Span, is_remote, read_spans
from sdxl_trainer.data.stores.shard_copies import ShardCopies

Row = Mapping[str, Any]
Bucket = tuple[int, int]
Found = LatentSample | BadLatentError
NUM_FETCHED_AT_ONCE = 2  # shards, by each process that reads


class LatentStore:
    """Reads latents: one `pread` a sample of shards on disk, one ranged read of those on a store, where all that a
    micro batch needs is asked for at once.

    Args:
        folder: the cache's, which file names are relative to.
        copies: local copies of what was read from stores, if they are kept.
    """

    def __init__(self, folder: Path, copies: ShardCopies | None = None):
        self._folder = str(folder)
        self._copies = copies
        self._shards = OpenShards()
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[str, Future[None]] = {}
        self._not_copied: set[str] = set()

    def __reduce__(self) -> tuple:
        return (
            LatentStore,
            (Path(self._folder), self._copies),
        )  # a worker opens its own files and starts its own threads

    def fetch(self, shards: Sequence[str]) -> None:
        """Copy whole shards while reading goes on, unless they are here or another process does it."""
        wanted = [shard for shard in shards if is_remote(shard)]
        if self._copies is None or not wanted:
            return
        self._pool = self._pool or ThreadPoolExecutor(NUM_FETCHED_AT_ONCE)
        for shard in wanted:
            coming = self._coming.get(shard)
            if shard in self._not_copied or (coming is not None and not coming.done()):
                continue
            if coming is not None and (error := coming.exception()) is not None:
                logger.warning("{} is read by the sample, because it could not be copied: {}", shard, error)
                self._not_copied.add(shard)
            elif not self._copies.has(shard):
                self._coming[shard] = self._pool.submit(self._copies.fetch, shard, wait=False)

    def read(self, rows: Sequence[Row], bucket: Bucket) -> list[Found]:
        """The latents of each row, or why they cannot be trained on.

        Raises:
            StoreError: a store cannot be reached, which is no fault of the samples.
        """
        remote = iter(self._read_remote([row for row in rows if is_remote(row["file"])], bucket))
        return [next(remote) if is_remote(row["file"]) else self._read_local(row, bucket) for row in rows]

    def _read_local(self, row: Row, bucket: Bucket) -> Found:
        path = os.path.join(self._folder, row["file"])

        def read() -> memoryview:
            if row["offset"] is not None:
                return self._shards.open(path).read(row["offset"], row["bytes"])
            return OpenFile(path).read()

        try:
            return parse_latents(read_patiently(read, path, before_retry=lambda: self._shards.forget(path)), bucket)
        except OSError as error:
            return BadLatentError(f"{path}: cannot be read: {error.strerror}")
        except BadLatentError as error:
            return BadLatentError(f"{path}: {error}")

    def _read_remote(self, rows: Sequence[Row], bucket: Bucket) -> list[Found]:
        samples: list[LatentSample | BadLatentError | None] = [self._read_copy(row, bucket) for row in rows]
        missing = [at for at, sample in enumerate(samples) if sample is None]
        spans = [(rows[at]["file"], rows[at]["offset"], rows[at]["bytes"]) for at in missing]
        for at, span, content in zip(missing, spans, self._read_spans(spans), strict=True):
            samples[at] = sample = _parse(span, content, bucket)
            if self._copies is not None and isinstance(sample, LatentSample) and isinstance(content, bytes):
                self._copies.keep(span[0], span[1], content)
        return [sample for sample in samples if sample is not None]

    def _read_spans(self, spans: Sequence[Span]) -> Sequence[bytes | memoryview | FileNotFoundError]:
        """From the store; where it sends whole files only, by copying the shards."""
        try:
            return read_spans(spans) if spans else []
        except NoRangesError:
            if self._copies is None:
                raise
        return [_read_whole(self._copies, span) for span in spans]

    def _read_copy(self, row: Row, bucket: Bucket) -> LatentSample | None:
        """From the local copy, if it is there; its checksums tell whether it is whole."""
        content = None if self._copies is None else self._copies.read(row["file"], row["offset"], row["bytes"])
        sample = None if content is None else _parse((row["file"], row["offset"], row["bytes"]), content, bucket)
        return sample if isinstance(sample, LatentSample) else None


def _read_whole(copies: ShardCopies, span: Span) -> bytes | memoryview | FileNotFoundError:
    try:
        copies.fetch(span[0])
    except FileNotFoundError as error:
        return error
    return copies.read(*span) or b""


def _parse(
    span: Span, content: bytes | memoryview | FileNotFoundError, bucket: Bucket
) -> LatentSample | BadLatentError:
    url, offset, size = span
    place = f"{url} at byte {offset}"
    if isinstance(content, FileNotFoundError):
        return BadLatentError(f"{place}: cannot be read: {content}")
    if len(content) != size:
        return BadLatentError(f"{place}: is cut short: {len(content)} of {size} bytes are there")
    try:
        return parse_latents(content, bucket)
    except BadLatentError as error:
        return BadLatentError(f"{place}: {error}")
