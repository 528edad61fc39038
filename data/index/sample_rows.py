"""Rows of the sample index: each resolution's samples in the order of their records, and their grouping by bucket."""

import hashlib
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sdxl_trainer.data.index.index_file import write_index_file
from sdxl_trainer.data.index.join import JoinedLatents
from sdxl_trainer.data.index.latent_files import widen_sizes
from sdxl_trainer.data.index.rows import Index, add_prefix
from sdxl_trainer.data.index.schema import STORED_SAMPLES

# Rows whose keys are hashed together. Checkpoints hold the hash, so that this number must stay.
HASHED_ROWS = 8192
ROWS_AT_ONCE = 1 << 20
SIDE_BITS, SIDE_MASK = np.uint64(32), np.uint64(0xFFFFFFFF)


def write_sample_index(path: Path, joined: JoinedLatents, records: Index) -> None:
    """Write the head of a sample index, whose other parts exist."""
    ends = np.cumsum([np.count_nonzero(rows >= 0) for rows in joined.row_of_record.values()]).tolist()
    record, latents, bucket, member = (_allocate_scratch(path.parent, ends[-1]) for _ in STORED_SAMPLES)
    spans = zip(joined.row_of_record, [0, *ends[:-1]], ends, strict=True)
    rows = {prefix: record[start:end] for prefix, start, end in spans}
    _fill_rows(joined.row_of_record, record, latents)
    buckets = _fill_buckets(joined.latents.pack_sizes("bucket"), latents, bucket)
    counts = _fill_members(bucket, len(buckets), member)
    sides = np.stack([buckets >> SIDE_BITS, buckets & SIDE_MASK], axis=1).astype(np.int64)
    description: dict[str, Any] = {
        "records": os.path.relpath(records.path, path.parent),
        "latents": [file.name for file in joined.files],
        **{name: [list(part) for part in parts] for name, parts in joined.matched.items()},
        "prefixes": list(zip(rows, ends, strict=True)),
        "buckets": sides.tolist(),
        "bucket_counts": counts.tolist(),
        "hash_rows": _hash_rows(records, rows, sides, bucket),
        "summary": joined.summary.to_dict(),
    }
    batch = pa.record_batch([record, latents, bucket, member], STORED_SAMPLES)
    write_index_file(path, STORED_SAMPLES, [batch], lambda: description)


def _fill_rows(row_of_record: dict[str, np.ndarray], record: np.ndarray, latents: np.ndarray) -> None:
    """Fill in the record and the latents of each sample."""
    end = 0
    for rows in row_of_record.values():
        for part in _cut(len(rows)):
            own = rows[part]
            at = np.flatnonzero(own >= 0)
            start, end = end, end + len(at)
            record[start:end] = part.start + at
            latents[start:end] = own[at]


def _fill_buckets(sizes: np.ndarray, latents: np.ndarray, bucket: np.ndarray) -> np.ndarray:
    """Fill in the number of each sample's bucket, and return the size of each number, ascending, [B] uint64.

    Args:
        sizes: of all latents' buckets, as `LatentFiles.pack_sizes` returns them.
    """
    parts = [np.unique(sizes[latents[part]]) for part in _cut(len(latents))]
    buckets = np.unique(np.concatenate([sizes[:0], *parts]))
    for part in _cut(len(latents)):
        bucket[part] = np.searchsorted(buckets, sizes[latents[part]])
    return widen_sizes(buckets)


def _fill_members(bucket: np.ndarray, num_buckets: int, member: np.ndarray) -> np.ndarray:
    """Fill in the rows bucket after bucket, and return the number of each bucket's rows, [B] int64."""
    counts = np.zeros(num_buckets, np.int64)
    for part in _cut(len(bucket)):
        counts += np.bincount(bucket[part], minlength=num_buckets)
    ends = np.cumsum(counts) - counts
    for part in _cut(len(bucket)):
        # numpy sorts numbers of 16 bits in linear time.
        order = np.argsort(bucket[part].astype(np.uint16) if num_buckets <= 1 << 16 else bucket[part], kind="stable")
        own = bucket[part][order]
        firsts = np.flatnonzero(np.diff(own, prepend=-1))
        for first, rows in zip(firsts.tolist(), np.split(order, firsts[1:]), strict=True):
            start = int(ends[own[first]])
            ends[own[first]] += len(rows)
            member[start : start + len(rows)] = part.start + rows
    return counts


def _allocate_scratch(folder: Path, length: int) -> np.ndarray:
    """Return an array in a deleted file under `folder`, [length] int32: the system can write its pages to disk.

    Raises:
        OSError: the disk is full.
    """
    if not length:
        return np.empty(0, np.int32)
    num_bytes = length * np.dtype(np.int32).itemsize
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        # A write into a hole of a mapped file would end the process when the disk is full.
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        return np.frombuffer(mmap.mmap(file.fileno(), num_bytes), np.int32)


def _cut(length: int) -> Iterator[slice]:
    """Yield the spans of a million rows each."""
    return (slice(start, min(start + ROWS_AT_ONCE, length)) for start in range(0, length, ROWS_AT_ONCE))


def _hash_rows(records: Index, rows: dict[str, np.ndarray], sides: np.ndarray, bucket: np.ndarray) -> str:
    """Return the hash of all keys and buckets that `SampleIndex.hash_rows` describes.

    Args:
        rows: the rows of the records that have samples, by prefix.
        sides: [B, 2] (width, height) px of the buckets.
        bucket: [N] number of each sample's bucket.
    """
    digest = hashlib.sha256()
    for keys in _group_keys(records, rows):
        _, offsets, letters = keys.buffers()
        places = np.frombuffer(offsets, np.int32, len(keys) + 1, 4 * keys.offset)
        digest.update(np.diff(places).tobytes())
        digest.update(memoryview(letters or b"")[int(places[0]) : int(places[-1])])
    for side in sides.astype(np.int32).T:
        for part in _cut(len(bucket)):
            digest.update(side[bucket[part]].tobytes())
    return digest.hexdigest()[:16]


def _group_keys(records: Index, rows: dict[str, np.ndarray]) -> Iterator[pa.Array]:
    """Yield the keys of all samples in the groups that are hashed together."""
    ends = np.cumsum(group_lengths(records.reader_lengths))
    waiting: list[pa.Array] = []
    for prefix, at in rows.items():
        cuts = np.searchsorted(at, ends)
        for start, end in zip([0, *cuts[:-1].tolist()], cuts.tolist(), strict=True):
            if end > start:
                waiting.append(add_prefix(prefix, records.records.take("key", at[start:end])))
            if sum(map(len, waiting)) >= HASHED_ROWS:
                yield pa.concat_arrays(waiting)
                waiting = []
    if waiting:
        yield pa.concat_arrays(waiting)


def group_lengths(lengths: Sequence[int]) -> list[int]:
    """Join numbers of rows to groups of at least HASHED_ROWS."""
    groups, waiting = [], 0
    for length in lengths:
        waiting += length
        if waiting >= HASHED_ROWS:
            groups.append(waiting)
            waiting = 0
    return [*groups, waiting] if waiting else groups
