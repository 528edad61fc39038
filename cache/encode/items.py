"""The bytes of cached items as they were written, checked against the manifest."""

import hashlib
import os
from pathlib import Path

from sdxl_trainer.data.formats.latents import BadLatentError, parse_latents
from sdxl_trainer.data.formats.manifest import ManifestEntry
from sdxl_trainer.data.formats.shards import BadShardError, locate_shard, read_sample, read_text_member
from sdxl_trainer.data.formats.text_outputs import BadTextError, parse_text

Content = bytes | memoryview
ITEM_ERRORS = (OSError, BadLatentError, BadShardError, BadTextError)


def read_item(folder: Path, entry: ManifestEntry) -> tuple[Content, Content]:
    """(record, npz) of an item; an npz file of its own has an empty record.

    Raises:
        OSError: the file is missing or cannot be read.
        BadLatentError, BadShardError: a byte is not as the manifest says.
    """
    if entry.offset is None:
        record, content = b"{}", _read_file(folder / entry.file, entry.bytes)
    else:
        assert entry.record_bytes is not None, "a sample of a shard has a record"
        path = locate_shard(folder / entry.file)
        record, content = read_sample(path, entry.key, entry.record_bytes, entry.offset, entry.bytes)
        if hashlib.sha256(record).hexdigest() != entry.record_sha256:
            raise BadShardError("has another record than the manifest says")
    _check_bytes(content, entry.bytes, entry.sha256, BadLatentError)
    return record, content


def read_text_item(folder: Path, entry: ManifestEntry) -> Content | None:
    """The npz with an item's text encoder outputs, or None if it has none.

    Raises:
        OSError: the file is missing or cannot be read.
        BadTextError, BadShardError: a byte is not as the manifest says.
    """
    text = entry.text
    if text is None:
        return None
    if text.offset is None:
        content = _read_file(folder / text.file, text.bytes)
    else:
        content = read_text_member(locate_shard(folder / text.file), entry.key, text.offset, text.bytes)
    _check_bytes(content, text.bytes, text.sha256, BadTextError)
    return content


def verify_item(folder: Path, entry: ManifestEntry) -> str | None:
    """What is wrong with an item's latents, or None."""
    try:
        parse_latents(read_item(folder, entry)[1], entry.bucket, check_crc=False)  # the checksum said more already
    except ITEM_ERRORS as error:
        return _describe(entry.file, entry.key if entry.offset is not None else None, error)
    return None


def verify_text_item(folder: Path, entry: ManifestEntry) -> str | None:
    """What is wrong with an item's text encoder outputs, or None, also if it has none."""
    try:
        content = read_text_item(folder, entry)
        if entry.text is not None and content is not None:
            parse_text(content, entry.text.variants, check_crc=False)
    except ITEM_ERRORS as error:
        assert entry.text is not None, "without text nothing is read"
        return _describe(entry.text.file, entry.key if entry.text.offset is not None else None, error)
    return None


def _check_bytes(content: Content, size: int, sha256: str, kind: type[ValueError]) -> None:
    if len(content) != size:
        found = f"more than {size} bytes" if len(content) > size else f"{len(content)} bytes"
        raise kind(f"has {found} instead of {size}")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise kind("has another SHA-256 than the manifest says")


def _describe(file: str, key: str | None, error: Exception) -> str:
    reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
    return f"{file}: {reason}" if key is None else f"{file}: {key}: {reason}"


def _read_file(path: Path, size: int) -> bytes:
    """A file's bytes; one more than `size` is asked for, so that a longer one shows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, size + 1, 0)
    finally:
        os.close(descriptor)
