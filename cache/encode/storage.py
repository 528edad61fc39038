"""Write, read and verify cached items, stored as npz files or in tar shards of one bucket."""

import hashlib
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from loguru import logger

from sdxl_trainer.data.files import Span, create_folder, open_regular, remove_leftovers, write_atomic
from sdxl_trainer.data.formats.latents import BadLatentError, LatentSample, pack_latents, parse_latents
from sdxl_trainer.data.formats.manifest import ManifestEntry, read_entries
from sdxl_trainer.data.formats.shards import (
    BadShardError,
    ShardWriter,
    compute_sample_span,
    list_partial_shards,
    locate_shard,
    parse_sample,
    read_sample,
    read_text_member,
    recover_shard,
)
from sdxl_trainer.data.formats.text_outputs import BadTextError, TextOutputs, pack_text, parse_text_outputs
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.stores.remote import RemoteSpan, read_spans
from sdxl_trainer.launch.activity import ACTIVITY

SHARD_FOLDER = "shards"
SHARD_NAME = re.compile(r"\d+x\d+-\d+-\d+\.tar")
ITEM_ERRORS = (OSError, BadLatentError, BadShardError, BadTextError)

Content = bytes | memoryview


class StoredItem(NamedTuple):
    """The bytes of an item's latents in the cache."""

    record: Content  # JSON; `{}` for an npz file of its own
    npz: Content


@dataclass(frozen=True)
class EncodedItem:
    """An image's encoder outputs and its manifest entry, whose files, sizes and checksums the storage fills in.

    Without `sample` the cached latents stay unchanged. With `texts`, `entry.text` describes the captions.
    """

    entry: ManifestEntry
    sample: LatentSample | None
    texts: tuple[TextOutputs, ...] = ()  # one for each caption
    record: bytes = b"{}"  # JSON, stored beside the latents in a shard


class Storage(Protocol):
    """Stores items from several threads at once. An item is on disk once a method has returned its entry."""

    def write(self, item: EncodedItem) -> ManifestEntry:
        """Pack one item, store it, and return its finished entry."""
        ...

    def write_packed(
        self, entry: ManifestEntry, content: bytes, record: bytes, text: bytes | None = None
    ) -> ManifestEntry:
        """Store an item that is already packed, and return its finished entry.

        Args:
            content: npz of the latents.
            record: JSON of the image's record.
            text: npz of the text encoder outputs.
        """
        ...

    def close(self) -> None:
        """Finish all open files."""
        ...


class NpzStorage:
    """Stores each item in npz files under the cache folder, written whole or not at all.

    The latents go to `entry.file`, the text encoder outputs to `entry.text.file`.
    """

    def __init__(self, folder: Path, dtype: str):
        self._folder = folder
        self._dtype = dtype

    def write(self, item: EncodedItem) -> ManifestEntry:
        text = pack_text(item.texts, self._dtype) if item.texts else None
        if item.sample is None:
            assert text is not None, "an item has latents, text, or both"
            return self._store_text(item.entry, text)
        return self.write_packed(item.entry, pack_latents(item.sample, self._dtype), item.record, text)

    def write_packed(
        self, entry: ManifestEntry, content: bytes, record: bytes, text: bytes | None = None
    ) -> ManifestEntry:
        """Store an item that is already packed. Without `text`, `entry.text` is kept, because it has its own file."""
        # First, because its name is longer: an image for which it is too long must leave no latents behind.
        entry = entry if text is None else self._store_text(entry, text)
        self._write(entry.file, content)
        digest = hashlib.sha256(content).hexdigest()
        return replace(entry, bytes=len(content), sha256=digest, offset=None, record_bytes=None, record_sha256=None)

    def _store_text(self, entry: ManifestEntry, text: bytes) -> ManifestEntry:
        assert entry.text is not None, "the entry describes the text"
        self._write(entry.text.file, text)
        digest = hashlib.sha256(text).hexdigest()
        return replace(entry, text=replace(entry.text, bytes=len(text), sha256=digest, offset=None))

    def _write(self, file: str, content: bytes) -> None:
        path = self._folder / file
        create_folder(path.parent)
        write_atomic(path, content)

    def close(self) -> None:
        pass


class ShardStorage:
    """Stores items in tar shards `shards/<width>x<height>-<rank>-<n>.tar`, each of one bucket.

    Args:
        shard_bytes: largest size of a shard.
    """

    def __init__(self, folder: Path, dtype: str, rank: int, shard_bytes: int):
        self._root = folder
        self._folder = folder / SHARD_FOLDER
        self._files = NpzStorage(folder, dtype)
        self._dtype = dtype
        self._rank = rank
        self._shard_bytes = shard_bytes
        self._open: dict[Size, ShardWriter] = {}
        self._lock = threading.Lock()

    def write(self, item: EncodedItem) -> ManifestEntry:
        # Latents that have an npz file of their own stay there.
        if item.sample is None and item.entry.offset is None:
            return self._files.write(item)
        text = pack_text(item.texts, self._dtype) if item.texts else None
        # The parts of a sample lie side by side in a shard, so its latents move with the text.
        if item.sample is None:
            content = self._read_latents(item.entry)
        else:
            content = pack_latents(item.sample, self._dtype)
        return self.write_packed(item.entry, content, item.record, text)

    def write_packed(
        self, entry: ManifestEntry, content: bytes, record: bytes, text: bytes | None = None
    ) -> ManifestEntry:
        """Store an item that is already packed. Without `text`, `entry.text` is kept only if it has its own file."""
        digest, record_digest = hashlib.sha256(content).hexdigest(), hashlib.sha256(record).hexdigest()
        text_digest = "" if text is None else hashlib.sha256(text).hexdigest()
        # Threads pack and hash side by side, but a tar grows by one member at a time.
        with self._lock:
            writer = self._open.get(entry.bucket)
            size = len(content) + len(text or b"")
            if writer is not None and writer.bytes_written + size > self._shard_bytes:
                self._finish(self._open.pop(entry.bucket))
                writer = None
            if writer is None:
                writer = self._open[entry.bucket] = ShardWriter(self._choose_path(entry.bucket))
            place = writer.append(entry.key, record, content, text)
            end = writer.bytes_written
        writer.flush(end)
        file = f"{SHARD_FOLDER}/{place.shard}"
        part = entry.text if entry.text is not None and entry.text.offset is None else None
        if text is not None:
            assert entry.text is not None, "the entry describes the text"
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
        """Finish all open shards. `recover_shards` can finish a shard that fails here, for example on a full disk.

        Raises:
            OSError: the first error of a shard that could not be finished.
        """
        errors = []
        while self._open:
            _, writer = self._open.popitem()
            try:
                self._finish(writer)
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _finish(self, writer: ShardWriter) -> None:
        writer.close()

    def _read_latents(self, entry: ManifestEntry) -> bytes:
        return bytes(read_item(self._root, entry).npz)

    def _choose_path(self, bucket: Size) -> Path:
        prefix = f"{bucket[0]}x{bucket[1]}-{self._rank:05d}-"
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.tar")
        create_folder(self._folder)
        names = (path.name.removeprefix(".").removesuffix(".partial") for path in self._folder.iterdir())
        used = [int(match[1]) for name in names if (match := pattern.fullmatch(name))]
        return self._folder / f"{prefix}{max(used, default=-1) + 1:05d}.tar"


def list_shards(folder: Path) -> list[str]:
    """List the finished shards of a cache by the names that entries use."""
    names = (path.name for path in (folder / SHARD_FOLDER).glob("*.tar"))
    return sorted(f"{SHARD_FOLDER}/{name}" for name in names if SHARD_NAME.fullmatch(name))


def recover_shards(folder: Path, entries: Iterable[ManifestEntry]) -> list[Path]:
    """Finish the shards of a killed job, keeping every sample in the manifest, and return the paths of the shards."""
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


def clear_leftovers(folder: Path) -> None:
    """Finish the shards of a killed job and delete its temporary files."""
    for shard in recover_shards(folder, read_entries(folder)):
        ACTIVITY.note()
        logger.info("finished {}, left by an interrupted job", shard)
    for place in (folder, folder / "manifest", folder / "logs", folder / SHARD_FOLDER):
        remove_leftovers(place)


def clear_item_leftovers(folder: Path, files: Iterable[str]) -> None:
    """Delete the temporary files that a killed job left beside npz files, given by their names in the manifest."""
    for place in {(folder / file).parent for file in files}:
        ACTIVITY.note()
        remove_leftovers(place)


def read_item(folder: Path, entry: ManifestEntry) -> StoredItem:
    """Read the bytes of an item's latents and check them against the manifest.

    Raises:
        OSError: the file is missing or cannot be read.
        BadLatentError, BadShardError: a byte differs from the manifest.
    """
    if entry.offset is None:
        record, npz = b"{}", _read_file(folder / entry.file, entry.bytes)
    else:
        assert entry.record_bytes is not None, "a sample of a shard has a record"
        path = locate_shard(folder / entry.file)
        record, npz = read_sample(path, entry.key, entry.record_bytes, entry.offset, entry.bytes)
    return _verify_item_bytes(entry, StoredItem(record, npz))


def read_remote_item(url: str, entry: ManifestEntry) -> StoredItem:
    """Read the bytes of an item's latents of a cache on a store. Raises like `read_item`, and StoreError."""
    if entry.offset is None:  # of a copy; one byte more shows that a file is too long
        npz = read_remote_bytes(url, entry.file, Span(0, entry.bytes + 1))
        return _verify_item_bytes(entry, StoredItem(b"{}", npz))
    assert entry.record_bytes is not None, "a sample of a shard has a record"
    span = compute_sample_span(entry.key, entry.record_bytes, entry.offset, entry.bytes)
    content = memoryview(read_remote_bytes(url, entry.file, span))
    sample = parse_sample(content, entry.key, entry.record_bytes, entry.offset, entry.bytes)
    return _verify_item_bytes(entry, StoredItem(sample.record, sample.npz))


def read_remote_text_item(url: str, entry: ManifestEntry) -> Content | None:
    """Read the npz of an item's text encoder outputs of a cache on a store; None if the item has none.

    Raises like `read_text_item`, and StoreError.
    """
    text = entry.text
    if text is None:
        return None
    span = Span(0, text.bytes + 1) if text.offset is None else Span(text.offset, text.bytes)
    content = read_remote_bytes(url, text.file, span)
    _verify_bytes(content, text.bytes, text.sha256, BadTextError)
    return content


def read_remote_bytes(url: str, file: str, span: Span) -> bytes:
    """Read a span of a file of a cache on a store; fewer bytes if the file ends before.

    Raises:
        FileNotFoundError: the file does not exist.
        StoreError: the store denies access, or does not answer.
    """
    [content] = read_spans([RemoteSpan(f"{url}/{file}", span.offset, span.size)])
    if isinstance(content, FileNotFoundError):
        raise content
    return content


def read_text_item(folder: Path, entry: ManifestEntry) -> Content | None:
    """Read the npz of an item's text encoder outputs and check it against the manifest; None if the item has none.

    Raises:
        OSError: the file is missing or cannot be read.
        BadTextError, BadShardError: a byte differs from the manifest.
    """
    text = entry.text
    if text is None:
        return None
    if text.offset is None:
        content = _read_file(folder / text.file, text.bytes)
    else:
        content = read_text_member(locate_shard(folder / text.file), entry.key, text.offset, text.bytes)
    _verify_bytes(content, text.bytes, text.sha256, BadTextError)
    return content


def verify_item(folder: Path, entry: ManifestEntry) -> str | None:
    """Return the fault of an item's latents as a message, or None if they are intact."""
    try:
        # The manifest's SHA-256 has been compared already, so the weaker checksum is not needed.
        parse_latents(read_item(folder, entry).npz, entry.bucket, check_crc=False)
    except ITEM_ERRORS as error:
        return _describe_fault(entry.file, entry.key if entry.offset is not None else None, error)
    return None


def verify_text_item(folder: Path, entry: ManifestEntry) -> str | None:
    """Return the fault of an item's text encoder outputs as a message; None if they are intact or there are none."""
    try:
        content = read_text_item(folder, entry)
        if entry.text is not None and content is not None:
            parse_text_outputs(content, entry.text.variants, check_crc=False)
    except ITEM_ERRORS as error:
        assert entry.text is not None, "an item without text reads nothing"
        return _describe_fault(entry.text.file, entry.key if entry.text.offset is not None else None, error)
    return None


def _verify_item_bytes(entry: ManifestEntry, item: StoredItem) -> StoredItem:
    if entry.offset is not None and hashlib.sha256(item.record).hexdigest() != entry.record_sha256:
        raise BadShardError("record differs from the manifest")
    _verify_bytes(item.npz, entry.bytes, entry.sha256, BadLatentError)
    return item


def _verify_bytes(content: Content, size: int, sha256: str, error_type: type[ValueError]) -> None:
    if len(content) != size:
        found = f"more than {size} bytes" if len(content) > size else f"{len(content)} bytes"
        raise error_type(f"has {found} instead of {size}")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise error_type("SHA-256 differs from the manifest")


def _describe_fault(file: str, key: str | None, error: Exception) -> str:
    reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
    return f"{file}: {reason}" if key is None else f"{file}: {key}: {reason}"


def _read_file(path: Path, size: int) -> bytes:
    """Read up to `size` + 1 bytes of a file; the additional byte shows that a file is too long."""
    descriptor = open_regular(path)
    try:
        return os.pread(descriptor, size + 1, 0)
    finally:
        os.close(descriptor)
