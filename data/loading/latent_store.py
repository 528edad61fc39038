"""Read the latents of rows of an index from npz files, from shards on disk, and from shards on a store."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sdxl_trainer.data.counted_warnings import CountedWarnings
from sdxl_trainer.data.files import read_with_retries
from sdxl_trainer.data.formats.latents import BadLatentError, LatentSample, parse_latents
from sdxl_trainer.data.formats.shards import OpenFile, OpenShards
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.stores.remote import NoRangesError, RemoteSpan, is_remote, read_spans
from sdxl_trainer.data.stores.shard_copies import ShardCopies
from sdxl_trainer.data.stores.streams import is_streamed

Row = Mapping[str, Any]  # of the index, as Index.row returns it
ReadResult = LatentSample | BadLatentError
Content = bytes | memoryview | FileNotFoundError  # of a span on a store
NUM_COPIES_AT_ONCE = 2  # shards that each reading process copies at a time


class LatentStore:
    """Reads latents: by one `pread` from a shard on disk, by one ranged request from a store.

    All requests of a micro batch are sent to the store at once.

    Args:
        folder: the cache folder, to which file names are relative.
        copies: local copies of remote samples and shards; None keeps no copies.
        channels: number of latent channels of the VAE; None accepts any number.
    """

    def __init__(self, folder: Path, copies: ShardCopies | None = None, channels: int | None = None):
        self._folder = str(folder)
        self._copies = copies
        self._channels = channels
        self._shards = OpenShards()
        self._pool: ThreadPoolExecutor | None = None
        self._running: dict[str, Future[None]] = {}
        self._not_copied: set[str] = set()
        self._warnings = CountedWarnings("shard not copied, so its samples are read one by one", "the log file")

    def __reduce__(self) -> tuple:
        # A worker opens its own files and starts its own threads.
        return (LatentStore, (Path(self._folder), self._copies, self._channels))

    def fetch(self, shards: Sequence[str]) -> None:
        """Start copying whole remote shards in the background, except shards that are local or being copied."""
        wanted = [shard for shard in shards if is_remote(shard)]
        if self._copies is None or not wanted:
            return
        self._pool = self._pool or ThreadPoolExecutor(NUM_COPIES_AT_ONCE)
        for shard in wanted:
            running = self._running.get(shard)
            if shard in self._not_copied or (running is not None and not running.done()):
                continue
            if running is not None and (error := running.exception()) is not None:
                self._warnings.add(f"{shard}: {error}")
                self._not_copied.add(shard)
            elif not self._copies.has(shard):
                self._running[shard] = self._pool.submit(self._copies.fetch, shard, wait=False)

    def read(self, rows: Sequence[Row], bucket: Size) -> list[ReadResult]:
        """Read the latents of each row; a BadLatentError in the list gives the reason why a sample cannot be used.

        Raises:
            StoreError: a store cannot be reached.
        """
        remote = iter(self._read_remote([row for row in rows if is_remote(row["file"])], bucket))
        return [next(remote) if is_remote(row["file"]) else self._read_local(row, bucket) for row in rows]

    def _read_local(self, row: Row, bucket: Size) -> ReadResult:
        path = os.path.join(self._folder, row["file"])

        def read() -> memoryview:
            if row["offset"] is not None:
                return self._shards.open(path).read(row["offset"], row["bytes"])
            return OpenFile(path).read()

        try:
            content = read_with_retries(read, path, before_retry=lambda: self._shards.forget(path))
            return parse_latents(content, bucket, channels=self._channels)
        except OSError as error:
            return BadLatentError(f"{path}: cannot be read: {error.strerror}")
        except BadLatentError as error:
            return BadLatentError(f"{path}: {error}")

    def _read_remote(self, rows: Sequence[Row], bucket: Size) -> list[ReadResult]:
        samples: list[ReadResult | None] = [self._read_copy(row, bucket) for row in rows]
        missing = [place for place, sample in enumerate(samples) if sample is None]
        spans = [_get_span(rows[place]) for place in missing]
        for place, span, content in zip(missing, spans, self._read_spans(spans), strict=True):
            samples[place] = sample = _parse(span, content, bucket, self._channels)
            if self._copies is not None and isinstance(sample, LatentSample) and isinstance(content, bytes):
                self._copies.keep(span.url, span.offset, content)
        return [sample for sample in samples if sample is not None]

    def _read_spans(self, spans: Sequence[RemoteSpan]) -> Sequence[Content]:
        """Read spans from the store, or from copies of whole shards for streams and stores without ranges."""
        ranged = [span for span in spans if self._copies is None or not is_streamed(span.url)]
        try:
            contents = dict(zip(ranged, read_spans(ranged) if ranged else [], strict=True))
        except NoRangesError:
            if self._copies is None:
                raise
            contents = {}
        return [contents[span] if span in contents else _read_whole(self._copies, span) for span in spans]

    def _read_copy(self, row: Row, bucket: Size) -> LatentSample | None:
        """Read a sample from its local copy; None if there is no copy, or if the copy's checksums do not match.

        Without a catalogue of the shard, only the manifest's checksum tells a copy of an earlier cache at the same URL.
        """
        content = None if self._copies is None else self._copies.read(*_get_span(row))
        if self._copies is None or content is None:
            return None
        if row["sha256"] and hashlib.sha256(content).digest() != row["sha256"]:
            self._copies.drop_whole(row["file"])
            return None
        sample = _parse(_get_span(row), content, bucket, self._channels)
        return sample if isinstance(sample, LatentSample) else None


def _get_span(row: Row) -> RemoteSpan:
    return RemoteSpan(row["file"], row["offset"], row["bytes"])


def _read_whole(copies: ShardCopies | None, span: RemoteSpan) -> Content:
    assert copies is not None, "check_copies requires copies for streams"
    try:
        copies.fetch(span.url)
    except FileNotFoundError as error:
        return error
    return copies.read(*span) or b""


def _parse(span: RemoteSpan, content: Content, bucket: Size, channels: int | None) -> ReadResult:
    url, offset, size = span
    location = f"{url} at byte {offset}"
    if isinstance(content, FileNotFoundError):
        return BadLatentError(f"{location}: cannot be read: {content}")
    if len(content) != size:
        return BadLatentError(f"{location}: is truncated: has {len(content)} of {size} bytes")
    try:
        return parse_latents(content, bucket, channels=channels)
    except BadLatentError as error:
        return BadLatentError(f"{location}: {error}")
