"""Verification of a cache: every byte is read and compared with the manifest (`--verify`, `--repair`)."""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from loguru import logger

from sdxl_trainer.cache.encode.storage import list_shards, verify_item, verify_text_item
from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.data.counted_warnings import CountedWarnings
from sdxl_trainer.data.formats.manifest import ManifestEntry, read_entries
from sdxl_trainer.data.formats.shards import compute_sample_span, compute_text_span, verify_shard_end
from sdxl_trainer.data.index.moved_keys import drop_replaced_entries
from sdxl_trainer.launch.activity import ACTIVITY

CHUNK = 64  # items per task; for single items the scheduling would cost more than the check


@dataclass(frozen=True)
class VerifyResult:
    """Result of a verification. `bad` and `bad_text` map key → reason, `bad_shards` maps file → reason."""

    num_items: int
    bytes_read: int
    bad: dict[str, str]  # latents
    bad_text: dict[str, str]  # text encoder outputs
    bad_shards: dict[str, str]

    @property
    def reasons(self) -> list[str]:
        """Reasons of all bad items."""
        return [*self.bad.values(), *self.bad_text.values()]


def verify_entries(folder: Path, entries: Mapping[str, ManifestEntry], num_threads: int | None = None) -> VerifyResult:
    """Compare each item's bytes with the manifest and check that they parse to finite values of the right shape.

    Left out are npz files that a later line, under another key of the same image, has replaced.

    Hashing and reading release the interpreter's lock, so threads use all cores.
    """
    listed = sorted(drop_replaced_entries(entries).values(), key=lambda entry: (entry.file, entry.offset or 0))
    chunks = [listed[start : start + CHUNK] for start in range(0, len(listed), CHUNK)]
    bad: dict[str, str] = {}
    bad_text: dict[str, str] = {}
    bytes_read = 0
    with ThreadPoolExecutor(num_threads or os.cpu_count() or 1, thread_name_prefix="verify") as pool:
        for checked in pool.map(lambda chunk: _verify_chunk(folder, chunk), chunks):
            ACTIVITY.note()
            bad |= checked.bad
            bad_text |= checked.bad_text
            bytes_read += checked.bytes_read
    return VerifyResult(
        num_items=len(listed),
        bytes_read=bytes_read,
        bad=bad,
        bad_text=bad_text,
        bad_shards=verify_shards(folder, entries.values()),
    )


def warn_of_bad_items(text: str, reasons: Iterable[str], folder: Path) -> None:
    """Warn of bad items of a cache: the first ones one by one, and all in the log file."""
    warnings = CountedWarnings(text, folder / "logs" / "cache.log")
    for reason in reasons:
        warnings.add(reason)
    warnings.close()


def verify_shards(folder: Path, entries: Iterable[ManifestEntry]) -> dict[str, str]:
    """Find finished shards that have a wrong end or hold bytes of no listed item; file → reason.

    A shard that no line of the manifest names, not even an outdated line, may be the user's and is no fault.
    """
    entries = list(entries)
    taken = compute_shard_ends(list_shards(folder), entries)
    reasons = {file: verify_shard_end(folder / file, end) for file, end in taken.items()}
    wrong = {file: f"{file}: {reason}" for file, reason in reasons.items() if reason is not None}
    lines = chain(entries, read_entries(folder)) if wrong else ()
    named = {file for entry in lines for file in list_entry_files(entry)}
    if others := sorted(wrong.keys() - named):
        found = format_count(len(others), "shard")
        logger.info("no line of the manifest names {}, such as {}: left unchanged", found, others[0])
    return {file: reason for file, reason in wrong.items() if file in named}


def list_entry_files(entry: ManifestEntry) -> list[str]:
    """List the files that hold an item: of its latents, and of its text encoder outputs if it has any."""
    return [entry.file] if entry.text is None else [entry.file, entry.text.file]


def compute_shard_ends(shards: Iterable[str], entries: Iterable[ManifestEntry]) -> dict[str, int]:
    """Return for each shard the bytes that the samples of some entries take in it with their frames."""
    taken = dict.fromkeys(shards, 0)
    for entry in entries:
        if entry.file in taken and entry.offset is not None and entry.record_bytes is not None:
            span = compute_sample_span(entry.key, entry.record_bytes, entry.offset, entry.bytes)
            taken[entry.file] += span.size
        if entry.text is not None and entry.text.offset is not None and entry.text.file in taken:
            taken[entry.text.file] += compute_text_span(entry.key, entry.text.offset, entry.text.bytes).size
    return taken


class _ChunkResult(NamedTuple):
    """Result of a few items; `bad` and `bad_text` map key → reason."""

    bad: dict[str, str]
    bad_text: dict[str, str]
    bytes_read: int


def _verify_chunk(folder: Path, entries: Iterable[ManifestEntry]) -> _ChunkResult:
    bad, bad_text, size = {}, {}, 0
    for entry in entries:
        for found, reason in ((bad, verify_item(folder, entry)), (bad_text, verify_text_item(folder, entry))):
            if reason is not None:
                found[entry.key] = reason
        size += entry.bytes + (entry.text.bytes if entry.text else 0)
    return _ChunkResult(bad, bad_text, size)
