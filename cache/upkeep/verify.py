"""Reads a cache back, every byte of it, and says which items are bad: `--verify`, and what `--repair` encodes again."""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sdxl_trainer.cache.encode.storage import list_shards, verify_item, verify_text_item
from sdxl_trainer.data.formats.manifest import ManifestEntry
from sdxl_trainer.data.formats.shards import compute_sample_span, compute_text_span, verify_shard_end

CHUNK = 64  # items a thread takes at once; one by one, handing out work would cost more than checking it


@dataclass(frozen=True)
class VerifyResult:
    """What was read, and what was wrong: key → reason, and of shards as a whole, file → reason."""

    num_items: int
    bytes_read: int
    bad: dict[str, str]  # latents
    bad_text: dict[str, str]  # text encoder outputs
    bad_shards: dict[str, str]

    @property
    def reasons(self) -> list[str]:
        """All that is wrong with items."""
        return [*self.bad.values(), *self.bad_text.values()]


def verify_entries(folder: Path, entries: Mapping[str, ManifestEntry], num_threads: int | None = None) -> VerifyResult:
    """Check each item's bytes against the manifest, and that they are of the right form and shape with finite values.

    Hashing and reading let go of the interpreter's lock, so threads use all cores.
    """
    listed = sorted(entries.values(), key=lambda entry: (entry.file, entry.offset or 0))
    chunks = [listed[start : start + CHUNK] for start in range(0, len(listed), CHUNK)]
    bad: dict[str, str] = {}
    bad_text: dict[str, str] = {}
    bytes_read = 0
    with ThreadPoolExecutor(num_threads or os.cpu_count() or 1, thread_name_prefix="verify") as pool:
        for found, found_text, size in pool.map(lambda chunk: _check_chunk(folder, chunk), chunks):
            bad |= found
            bad_text |= found_text
            bytes_read += size
    return VerifyResult(len(listed), bytes_read, bad, bad_text, check_shards(folder, entries.values()))


def check_shards(folder: Path, entries: Iterable[ManifestEntry]) -> dict[str, str]:
    """What is wrong with finished shards as a whole, file → reason: bytes that no item accounts for, a wrong end."""
    taken = dict.fromkeys(list_shards(folder), 0)
    for entry in entries:
        if entry.file in taken and entry.offset is not None and entry.record_bytes is not None:
            start, end = compute_sample_span(entry.key, entry.record_bytes, entry.offset, entry.bytes)
            taken[entry.file] += end - start
        if entry.text is not None and entry.text.offset is not None and entry.text.file in taken:
            start, end = compute_text_span(entry.key, entry.text.offset, entry.text.bytes)
            taken[entry.text.file] += end - start
    reasons = {file: verify_shard_end(folder / file, end) for file, end in taken.items()}
    return {file: f"{file}: {reason}" for file, reason in reasons.items() if reason is not None}


def _check_chunk(folder: Path, entries: Iterable[ManifestEntry]) -> tuple[dict[str, str], dict[str, str], int]:
    bad, bad_text, size = {}, {}, 0
    for entry in entries:
        for found, reason in ((bad, verify_item(folder, entry)), (bad_text, verify_text_item(folder, entry))):
            if reason is not None:
                found[entry.key] = reason
        size += entry.bytes + (entry.text.bytes if entry.text else 0)
    return bad, bad_text, size
