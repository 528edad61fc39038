"""Where encoded items go: one npz file each, or tar shards of one bucket each."""

import hashlib
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.latents import LatentSample, pack_latents
from sdxl_trainer.data.manifest import Entry
from sdxl_trainer.data.shards import ShardWriter, list_partial_shards, recover_shard

SHARD_FOLDER = "shards"


@dataclass(frozen=True)
class EncodedItem:
    """One picture's latents with the line they will have in the manifest, all but place, size and checksum."""

    sample: LatentSample
    entry: Entry
    record: bytes = b"{}"  # JSON, travels with the latents in a shard


class Sink(Protocol):
    """Takes items from several threads at once; an item that `write` returned an entry for is on disk."""

    def write(self, item: EncodedItem) -> Entry:
        """Store one item and return its finished entry."""
        ...

    def store(self, entry: Entry, content: bytes, record: bytes) -> Entry:
        """The same with the npz made already."""
        ...

    def close(self) -> None:
        """Finish whatever is open."""
        ...


class NpzSink:
    """One npz file an item, at `entry.file` under the cache folder, whole or not at all."""

    def __init__(self, folder: Path, dtype: str):
        self._folder = folder
        self._dtype = dtype

    def write(self, item: EncodedItem) -> Entry:
        return self.store(item.entry, pack_latents(item.sample, self._dtype), item.record)

    def store(self, entry: Entry, content: bytes, record: bytes) -> Entry:
        path = self._folder / entry.file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
        digest = hashlib.sha256(content).hexdigest()
        return replace(entry, bytes=len(content), sha256=digest, offset=None, record_bytes=None, record_sha256=None)

    def close(self) -> None:
        pass


class ShardSink:
    """Tar shards `shards/<width>x<height>-<rank>-<n>.tar`, each of one bucket and of at most `shard_bytes`."""

    def __init__(self, folder: Path, dtype: str, rank: int, shard_bytes: int):
        self._folder = folder / SHARD_FOLDER
        self._dtype = dtype
        self._rank = rank
        self._shard_bytes = shard_bytes
        self._open: dict[tuple[int, int], ShardWriter] = {}
        self._lock = threading.Lock()

    def write(self, item: EncodedItem) -> Entry:
        return self.store(item.entry, pack_latents(item.sample, self._dtype), item.record)

    def store(self, entry: Entry, content: bytes, record: bytes) -> Entry:
        digest, record_digest = hashlib.sha256(content).hexdigest(), hashlib.sha256(record).hexdigest()
        with self._lock:  # packing and hashing above ran beside other threads; a tar grows one member at a time
            writer = self._open.get(entry.bucket)
            if writer is not None and writer.bytes_written + len(content) > self._shard_bytes:
                self._open.pop(entry.bucket).close()
                writer = None
            if writer is None:
                writer = self._open[entry.bucket] = ShardWriter(self._choose_path(entry.bucket))
            place = writer.append(entry.key, record, content)
            writer.flush()
        return replace(
            entry, file=f"{SHARD_FOLDER}/{place.shard}", bytes=place.size, sha256=digest,
            offset=place.offset, record_bytes=len(record), record_sha256=record_digest,
        )  # fmt: skip

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
    return sorted(f"{SHARD_FOLDER}/{path.name}" for path in (folder / SHARD_FOLDER).glob("*.tar")
                  if pattern.fullmatch(path.name))  # fmt: skip


def recover_shards(folder: Path, entries: Iterable[Entry]) -> list[Path]:
    """Finish the shards that a killed job left, keeping every sample that the manifest lists. Returns their paths."""
    unfinished = list_partial_shards(folder / SHARD_FOLDER)
    ends = dict.fromkeys((f"{SHARD_FOLDER}/{path.name}" for path in unfinished), 0)
    for entry in entries:
        if entry.file in ends and entry.offset is not None:
            ends[entry.file] = max(ends[entry.file], entry.offset + entry.bytes)
    for path in unfinished:
        recover_shard(path, ends[f"{SHARD_FOLDER}/{path.name}"])
    return unfinished
