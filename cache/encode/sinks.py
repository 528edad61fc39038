"""Where encoded items go: one npz file each, or tar shards of one bucket each."""

import hashlib
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from sdxl_trainer.cache.encode.items import read_item
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.formats.latents import LatentSample, pack_latents
from sdxl_trainer.data.formats.manifest import ManifestEntry
from sdxl_trainer.data.formats.shards import ShardWriter, list_partial_shards, recover_shard
from sdxl_trainer.data.formats.text_outputs import TextOutputs, pack_text

SHARD_FOLDER = "shards"


@dataclass(frozen=True)
class EncodedItem:
    """What was encoded of one image, with the line it will have in the manifest, all but places, sizes, checksums.

    Without a sample the latents stay as they are in the cache. With texts, `entry.text` says what they are of.
    """

    entry: ManifestEntry
    sample: LatentSample | None
    texts: tuple[TextOutputs, ...] = ()  # of each caption
    record: bytes = b"{}"  # JSON, travels with the latents in a shard


class Sink(Protocol):
    """Takes items from several threads at once; an item that `write` returned an entry for is on disk."""

    def write(self, item: EncodedItem) -> ManifestEntry:
        """Store one item and return its finished entry."""
        ...

    def store(self, entry: ManifestEntry, content: bytes, record: bytes, text: bytes | None = None) -> ManifestEntry:
        """The same with the npz made already, and that of its text if it has one."""
        ...

    def close(self) -> None:
        """Finish whatever is open."""
        ...


class NpzSink:
    """An item is an npz file at `entry.file` under the cache folder, and one at `entry.text.file`, each whole or not
    at all."""

    def __init__(self, folder: Path, dtype: str):
        self._folder = folder
        self._dtype = dtype

    def write(self, item: EncodedItem) -> ManifestEntry:
        text = pack_text(item.texts, self._dtype) if item.texts else None
        if item.sample is None:
            assert text is not None, "an item is latents, or text, or both"
            return self._store_text(item.entry, text)
        return self.store(item.entry, pack_latents(item.sample, self._dtype), item.record, text)

    def store(self, entry: ManifestEntry, content: bytes, record: bytes, text: bytes | None = None) -> ManifestEntry:
        """Without `text`, `entry.text` is kept: it lies in a file of its own."""
        self._write(entry.file, content)
        entry = entry if text is None else self._store_text(entry, text)
        digest = hashlib.sha256(content).hexdigest()
        return replace(entry, bytes=len(content), sha256=digest, offset=None, record_bytes=None, record_sha256=None)

    def _store_text(self, entry: ManifestEntry, text: bytes) -> ManifestEntry:
        assert entry.text is not None, "the line says what the text is of"
        self._write(entry.text.file, text)
        digest = hashlib.sha256(text).hexdigest()
        return replace(entry, text=replace(entry.text, bytes=len(text), sha256=digest, offset=None))

    def _write(self, file: str, content: bytes) -> None:
        path = self._folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)

    def close(self) -> None:
        pass


class ShardSink:
    """Tar shards `shards/<width>x<height>-<rank>-<n>.tar`, each of one bucket and of at most `shard_bytes`."""

    def __init__(self, folder: Path, dtype: str, rank: int, shard_bytes: int):
        self._root = folder
        self._folder = folder / SHARD_FOLDER
        self._files = NpzSink(folder, dtype)
        self._dtype = dtype
        self._rank = rank
        self._shard_bytes = shard_bytes
        self._open: dict[tuple[int, int], ShardWriter] = {}
        self._lock = threading.Lock()

    def write(self, item: EncodedItem) -> ManifestEntry:
        if item.sample is None and item.entry.offset is None:  # latents in a file of their own stay there
            return self._files.write(item)
        text = pack_text(item.texts, self._dtype) if item.texts else None
        if item.sample is None:  # a sample's parts lie side by side, so its latents move with the text
            content = bytes(read_item(self._root, item.entry)[1])
        else:
            content = pack_latents(item.sample, self._dtype)
        return self.store(item.entry, content, item.record, text)

    def store(self, entry: ManifestEntry, content: bytes, record: bytes, text: bytes | None = None) -> ManifestEntry:
        """Without `text` the entry keeps only one that lies in a file of its own."""
        digest, record_digest = hashlib.sha256(content).hexdigest(), hashlib.sha256(record).hexdigest()
        text_digest = "" if text is None else hashlib.sha256(text).hexdigest()
        with self._lock:  # packing and hashing above ran beside other threads; a tar grows one member at a time
            writer = self._open.get(entry.bucket)
            size = len(content) + len(text or b"")
            if writer is not None and writer.bytes_written + size > self._shard_bytes:
                self._open.pop(entry.bucket).close()
                writer = None
            if writer is None:
                writer = self._open[entry.bucket] = ShardWriter(self._choose_path(entry.bucket))
            place = writer.append(entry.key, record, content, text)
            end = writer.bytes_written
        writer.flush(end)
        file = f"{SHARD_FOLDER}/{place.shard}"
        part = entry.text if entry.text is not None and entry.text.offset is None else None
        if text is not None:
            assert entry.text is not None, "the line says what the text is of"
            part = replace(entry.text, file=file, bytes=len(text), sha256=text_digest, offset=place.text_offset)
        return replace(
            entry,
            file=file,
            bytes=place.size,
            sha256=digest,
            offset=place.offset,
            record_bytes=len(record),
            record_sha256=record_digest,
            text=part,
        )

    def close(self) -> None:
        """Finish all open shards; one that cannot be (the disk is full) is left for `recover_shards`.

        Raises:
            OSError: the first of them that could not be finished.
        """
        errors = []
        while self._open:
            _, writer = self._open.popitem()
            try:
                writer.close()
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _choose_path(self, bucket: tuple[int, int]) -> Path:
        prefix = f"{bucket[0]}x{bucket[1]}-{self._rank:05d}-"
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.tar")
        self._folder.mkdir(parents=True, exist_ok=True)
        names = (path.name.removeprefix(".").removesuffix(".partial") for path in self._folder.iterdir())
        used = [int(match[1]) for name in names if (match := pattern.fullmatch(name))]
        return self._folder / f"{prefix}{max(used, default=-1) + 1:05d}.tar"


def list_shards(folder: Path) -> list[str]:
    """The finished shards of a cache, as entries name them."""
    pattern = re.compile(r"\d+x\d+-\d+-\d+\.tar")
    return sorted(
        f"{SHARD_FOLDER}/{path.name}" for path in (folder / SHARD_FOLDER).glob("*.tar") if pattern.fullmatch(path.name)
    )


def recover_shards(folder: Path, entries: Iterable[ManifestEntry]) -> list[Path]:
    """Finish the shards that a killed job left, keeping every sample that the manifest lists. Returns their paths."""
    unfinished = list_partial_shards(folder / SHARD_FOLDER)
    ends = dict.fromkeys((f"{SHARD_FOLDER}/{path.name}" for path in unfinished), 0)
    for entry in entries if unfinished else ():
        if entry.file in ends and entry.offset is not None:
            ends[entry.file] = max(ends[entry.file], entry.offset + entry.bytes)
        if entry.text is not None and entry.text.offset is not None and entry.text.file in ends:
            ends[entry.text.file] = max(ends[entry.text.file], entry.text.offset + entry.text.bytes)
    for path in unfinished:
        recover_shard(path, ends[f"{SHARD_FOLDER}/{path.name}"])
    return unfinished
