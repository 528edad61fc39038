"""Reads a cache back, every byte of it, and says which items are bad: `--verify`, and what `--repair` encodes again."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sdxl_trainer.cache.sinks import list_shards
from sdxl_trainer.data.latents import BadLatentError, parse_latents
from sdxl_trainer.data.manifest import Entry
from sdxl_trainer.data.shards import BadShardError, check_end, compute_sample_span, locate_shard, read_sample

CHUNK = 64  # items a thread takes at once; one by one, handing out work would cost more than checking it


@dataclass(frozen=True)
class VerifyResult:
    """What was read, and what was wrong: key → reason, and of shards as a whole, file → reason."""

    num_items: int
    bytes_read: int
    bad: dict[str, str]
    bad_shards: dict[str, str]


def verify_entries(folder: Path, entries: Mapping[str, Entry], num_threads: int | None = None) -> VerifyResult:
    """Check each item's bytes against the manifest, and that they are latents of the right shape with finite values.

    Hashing and reading let go of the interpreter's lock, so threads use all cores.
    """
    listed = sorted(entries.values(), key=lambda entry: (entry.file, entry.offset or 0))
    chunks = [listed[start : start + CHUNK] for start in range(0, len(listed), CHUNK)]
    bad: dict[str, str] = {}
    bytes_read = 0
    with ThreadPoolExecutor(num_threads or os.cpu_count() or 1, thread_name_prefix="verify") as pool:
        for found, size in pool.map(lambda chunk: _check_chunk(folder, chunk), chunks):
            bad |= found
            bytes_read += size
    return VerifyResult(len(listed), bytes_read, bad, check_shards(folder, entries.values()))


def check_entry(folder: Path, entry: Entry) -> str | None:
    """What is wrong with one item, or None."""
    try:
        parse_latents(read_item(folder, entry)[1], entry.bucket, check_crc=False)  # the checksum said more already
    except OSError as error:
        return f"{entry.file}: cannot be read: {error.strerror}"
    except (BadLatentError, BadShardError) as error:
        return f"{entry.file}: {entry.key}: {error}" if entry.offset is not None else f"{entry.file}: {error}"
    return None


def read_item(folder: Path, entry: Entry) -> tuple[bytes | memoryview, bytes | memoryview]:
    """(record, npz) of an item as they were written; an npz file of its own has an empty record.

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
    if len(content) != entry.bytes:
        found = f"more than {entry.bytes} bytes" if len(content) > entry.bytes else f"{len(content)} bytes"
        raise BadLatentError(f"has {found} instead of {entry.bytes}")
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise BadLatentError("has another SHA-256 than the manifest says")
    return record, content


def check_shards(folder: Path, entries: Iterable[Entry]) -> dict[str, str]:
    """What is wrong with finished shards as a whole, file → reason: bytes that no item accounts for, a wrong end."""
    taken = dict.fromkeys(list_shards(folder), 0)
    for entry in entries:
        if entry.file in taken and entry.offset is not None and entry.record_bytes is not None:
            start, end = compute_sample_span(entry.key, entry.record_bytes, entry.offset, entry.bytes)
            taken[entry.file] += end - start
    reasons = {file: check_end(folder / file, end) for file, end in taken.items()}
    return {file: f"{file}: {reason}" for file, reason in reasons.items() if reason is not None}


def _read_file(path: Path, size: int) -> bytes:
    """A file's bytes; one more than `size` is asked for, so that a longer one shows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, size + 1, 0)
    finally:
        os.close(descriptor)


def _check_chunk(folder: Path, entries: Iterable[Entry]) -> tuple[dict[str, str], int]:
    bad, size = {}, 0
    for entry in entries:
        reason = check_entry(folder, entry)
        if reason is not None:
            bad[entry.key] = reason
        size += entry.bytes
    return bad, size
