"""Latents of rows of an index, wherever they lie: files, shards on disk, shards on a store."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_trainer.data.latents import BadLatentError, LatentSample, parse_latents, read_latents
from sdxl_trainer.data.remote import is_remote, read_spans
from sdxl_trainer.data.shard_copies import ShardCopies

Row = Mapping[str, Any]
Bucket = tuple[int, int]


class LatentStore:
    """Reads latents: one `pread` a sample of shards on disk, one ranged read of those on a store, where all that a
    micro batch needs is asked for at once.

    Args:
        folder: the cache's, which file names are relative to.
        copies: local copies of what was read from stores, if they are kept.
    """

    def __init__(self, folder: Path, copies: ShardCopies | None = None):
        self._folder = folder
        self._copies = copies

    def read(self, rows: Sequence[Row], bucket: Bucket) -> list[LatentSample | BadLatentError]:
        """The latents of each row, or why they cannot be trained on.

        Raises:
            StoreError: a store cannot be reached, which is no fault of the samples.
        """
        remote = [row for row in rows if is_remote(row["file"])]
        contents = iter(self._read_remote(remote, bucket))
        return [next(contents) if is_remote(row["file"]) else self._read_local(row, bucket) for row in rows]

    def _read_local(self, row: Row, bucket: Bucket) -> LatentSample | BadLatentError:
        span = None if row["offset"] is None else (row["offset"], row["bytes"])
        try:
            return read_latents(self._folder / row["file"], bucket, span)
        except BadLatentError as error:
            return error

    def _read_remote(self, rows: Sequence[Row], bucket: Bucket) -> list[LatentSample | BadLatentError]:
        samples = [self._read_copy(row, bucket) for row in rows]
        missing = [at for at, sample in enumerate(samples) if sample is None]
        spans = [(rows[at]["file"], rows[at]["offset"], rows[at]["bytes"]) for at in missing]
        for at, span, content in zip(missing, spans, read_spans(spans) if spans else [], strict=True):
            samples[at] = sample = _parse(span, content, bucket)
            if self._copies is not None and isinstance(sample, LatentSample) and isinstance(content, bytes):
                self._copies.keep(span[0], span[1], content)
        return [sample for sample in samples if sample is not None]

    def _read_copy(self, row: Row, bucket: Bucket) -> LatentSample | None:
        """From the local copy, if it is there; its checksums tell whether it is whole."""
        content = None if self._copies is None else self._copies.read(row["file"], row["offset"], row["bytes"])
        sample = None if content is None else _parse((row["file"], row["offset"], row["bytes"]), content, bucket)
        return sample if isinstance(sample, LatentSample) else None


def _parse(
    span: tuple[str, int, int], content: bytes | FileNotFoundError, bucket: Bucket
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
