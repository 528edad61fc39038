"""Rows of the sample index: each resolution's samples in the order of their records, and their grouping by bucket."""

import hashlib
import os
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
SIDE_BITS, SIDE_MASK = np.uint64(32), np.uint64(0xFFFFFFFF)


def write_sample_index(path: Path, joined: JoinedLatents, records: Index) -> None:
    """Write the head of a sample index, whose other parts exist."""
    rows = {prefix: np.flatnonzero(rows >= 0).astype(np.int32) for prefix, rows in joined.row_of_record.items()}
    latents = np.concatenate([joined.row_of_record[prefix][at] for prefix, at in rows.items()])
    sizes = joined.latents.pack_sizes("bucket")
    buckets = _list_buckets(sizes, latents)
    bucket = np.empty(len(latents), np.int32)
    for start in range(0, len(latents), 1 << 20):
        at = slice(start, start + (1 << 20))
        bucket[at] = np.searchsorted(buckets, widen_sizes(sizes[latents[at]]))
    del sizes
    sides = np.stack([buckets >> SIDE_BITS, buckets & SIDE_MASK], axis=1).astype(np.int64)
    description: dict[str, Any] = {
        "records": os.path.relpath(records.path, path.parent),
        "latents": [file.name for file in joined.files],
        "prefixes": list(zip(rows, np.cumsum([len(at) for at in rows.values()]).tolist(), strict=True)),
        "buckets": sides.tolist(),
        "bucket_counts": np.bincount(bucket, minlength=len(buckets)).tolist(),
        "hash_rows": _hash_rows(records, rows, sides[bucket]),
        "summary": joined.summary.to_dict(),
    }
    record = np.concatenate(list(rows.values()))
    batch = pa.record_batch([record, latents, bucket, _sort_by_bucket(bucket)], STORED_SAMPLES)
    write_index_file(path, STORED_SAMPLES, [batch], lambda: description)


def _list_buckets(sizes: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """Return the sizes of all samples' buckets, ascending, [B] uint64."""
    parts = [np.unique(sizes[latents[start : start + (1 << 20)]]) for start in range(0, len(latents), 1 << 20)]
    return widen_sizes(np.unique(np.concatenate(parts))) if parts else np.empty(0, np.uint64)


def _sort_by_bucket(bucket: np.ndarray) -> np.ndarray:
    """Return the rows bucket after bucket, [N] int32. numpy sorts numbers of 16 bits in linear time."""
    narrow = bucket.astype(np.uint16) if bucket.max(initial=0) < 1 << 16 else bucket
    return np.argsort(narrow, kind="stable").astype(np.int32)


def _hash_rows(records: Index, rows: dict[str, np.ndarray], sides: np.ndarray) -> str:
    """Return the hash of all keys and buckets that `SampleIndex.hash_rows` describes.

    Args:
        rows: the rows of the records that have samples, by prefix.
        sides: [N, 2] (width, height) px of the samples' buckets.
    """
    digest = hashlib.sha256()
    for keys in _group_keys(records, rows):
        _, offsets, letters = keys.buffers()
        places = np.frombuffer(offsets, np.int32, len(keys) + 1, 4 * keys.offset)
        digest.update(np.diff(places).tobytes())
        digest.update(memoryview(letters or b"")[int(places[0]) : int(places[-1])])
    for side in range(2):
        digest.update(sides[:, side].astype(np.int32).tobytes())
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
