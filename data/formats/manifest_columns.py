"""A manifest as columns: Parquet files with the same entries as the lines of `manifest/part-<rank>.jsonl`.

A line takes 500 bytes and more, an entry in columns about 90, most of them checksums. Cache jobs append lines; columns
are written from them when no job runs (`--compact`), and small files of columns are merged. Any reader of Parquet can
audit a cache with them. Each page has a checksum, and a damaged group of rows is skipped as damaged lines are.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_trainer.data.files import open_atomic, sync_folder

SUFFIX = ".parquet"
ROWS_PER_GROUP = 65_536
MERGED = "part-merged-"  # beginning of the names of merged files
SMALL_ROWS = 1 << 20  # files with fewer rows are merged
HIGHEST = b"highest_number"
SIZES = ("bucket", "original_size", "resized")
DIGEST = pa.binary(32)
HASHES = ("sha256", "source_sha256", "record_sha256")
MASK = pa.struct([("path", pa.string()), ("bytes", pa.int64()), ("mtime_ns", pa.int64()), ("sha256", pa.string())])
TEXT = pa.struct(
    [
        ("file", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("identity", pa.string()),
        ("captions_sha256", pa.string()),
        ("variants", pa.int32()),
        ("offset", pa.int64()),
    ]
)
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", DIGEST),
        *((f"{name}_{side}", pa.int64()) for name in SIZES for side in ("width", "height")),
        *((f"crop_{side}", pa.float64()) for side in ("left", "top", "right", "bottom")),
        ("identity", pa.string()),
        ("source_path", pa.string()),
        ("source_bytes", pa.int64()),
        ("source_mtime_ns", pa.int64()),
        ("source_sha256", DIGEST),
        ("record_bytes", pa.int64()),
        ("record_sha256", DIGEST),
        ("adopted", pa.bool_()),
        ("flipped", pa.bool_()),
        ("text", TEXT),
        ("mask", MASK),
        ("listed_ns", pa.int64()),
    ]
)
# Numbers that mostly rise by little, and texts that begin like the one before them, are stored as differences.
ENCODINGS = {
    **dict.fromkeys(HASHES, "PLAIN"),
    "offset": "DELTA_BINARY_PACKED",
    "source_bytes": "DELTA_BINARY_PACKED",
    "source_mtime_ns": "DELTA_BINARY_PACKED",
    "listed_ns": "DELTA_BINARY_PACKED",
    "key": "DELTA_BYTE_ARRAY",
    "source_path": "DELTA_BYTE_ARRAY",
}
DICTIONARIES = ["file", "bytes", "identity", "record_bytes"]
DICTIONARIES += [name for name in SCHEMA.names if name.startswith((*SIZES, "crop_"))]
# pyarrow raises these on damaged files.
PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, LookupError, MemoryError)


def write_columns(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write batches of SCHEMA to a file."""
    highest = 0
    with open_atomic(path) as file:
        options: dict[str, Any] = {"use_dictionary": DICTIONARIES, "column_encoding": ENCODINGS, "version": "2.6"}
        with pq.ParquetWriter(
            file, SCHEMA, compression="zstd", write_statistics=False, write_page_checksum=True, **options
        ) as writer:
            for batch in batches:
                writer.write_batch(batch, row_group_size=ROWS_PER_GROUP)
                numbers = batch.column("listed_ns").to_numpy()
                highest = max(highest, int(numbers.max(initial=0)))
            writer.add_key_value_metadata({HIGHEST: str(highest)})


def write_entries(path: Path, entries: Iterable[Any]) -> None:
    """Write entries of a manifest as columns."""
    rows = iter(entries)
    write_columns(path, iter(lambda: build_columns(list(islice(rows, ROWS_PER_GROUP))), build_columns([])))


def build_columns(entries: Sequence[Any]) -> pa.RecordBatch:
    """Return entries of a manifest (`ManifestEntry` of data/formats/manifest.py) as columns.

    Raises:
        ValueError: a SHA-256 is none.
    """
    columns: dict[str, list[Any]] = {
        name: [getattr(entry, name) for entry in entries]
        for name in SCHEMA.names
        if not name.startswith((*(f"{size}_" for size in SIZES), "crop_"))
    }
    for name in SIZES:
        for side, label in enumerate(("width", "height")):
            columns[f"{name}_{label}"] = [getattr(entry, name)[side] for entry in entries]
    for side, label in enumerate(("left", "top", "right", "bottom")):
        columns[f"crop_{label}"] = [entry.crop[side] for entry in entries]
    for name in HASHES:
        columns[name] = [bytes.fromhex(value) if value else None for value in columns[name]]
    for name in ("text", "mask"):
        columns[name] = [None if value is None else asdict(value) for value in columns[name]]
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in SCHEMA], SCHEMA)


def read_columns(path: Path, damaged: list[str], names: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a file. A damaged group of rows is skipped.

    Args:
        damaged: list to which the place of each damaged group, or of the whole file, is appended.
        names: the columns to read; None reads all.
    """
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        num_groups = file.num_row_groups
    except PARQUET_ERRORS as error:
        damaged.append(f"{path}: {error}")
        return
    for group in range(num_groups):
        try:
            batches = file.read_row_group(group, columns=names).cast(_select(names)).to_batches()
        except PARQUET_ERRORS as error:
            damaged.append(f"{path}, group of rows {group}: {error}")
            continue
        yield from batches


def _select(names: Sequence[str] | None) -> pa.Schema:
    return SCHEMA if names is None else pa.schema([SCHEMA.field(name) for name in names])


def read_fields(path: Path, damaged: list[str], warn: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yield the fields of each entry, as `ManifestEntry` has them. Damaged groups of rows are skipped."""
    known = len(damaged)
    for batch in read_columns(path, damaged):
        yield from list_fields(batch)
    for place in damaged[known:]:
        warn(place)


def drop_damaged_groups(path: Path) -> None:
    """Write a file without its damaged groups of rows; delete it if none is whole."""
    damaged: list[str] = []
    num_rows = sum(map(len, read_columns(path, damaged)))
    if damaged and num_rows:
        write_columns(path, read_columns(path, []))
    elif damaged:
        path.unlink()


def merge_small_files(paths: Sequence[Path]) -> list[Path]:
    """Merge files of fewer than SMALL_ROWS rows into files of at least that many, and return all files.

    Of several rows of a key the last one in a file counts, so that merged rows are in the order of their numbers. Files
    that are damaged, or whose numbers do not rise, stay as they are.
    """
    kept: list[Path] = []
    waiting: list[tuple[Path, pa.Table]] = []
    for path in paths:
        table = _read_ordered(path)
        if table is None:
            kept.append(path)
            continue
        waiting.append((path, table))
        if sum(len(table) for _, table in waiting) >= SMALL_ROWS:
            kept.append(_merge_files(waiting))
            waiting = []
    return [*kept, *([_merge_files(waiting)] if waiting else [])]


def _read_ordered(path: Path) -> pa.Table | None:
    """Return the rows of a small file whose numbers rise, or None. A merged file has equal numbers of several ranks."""
    try:
        if pq.read_metadata(path).num_rows >= SMALL_ROWS:
            return None
    except PARQUET_ERRORS:
        return None
    damaged: list[str] = []
    table = pa.Table.from_batches(read_columns(path, damaged), SCHEMA)
    least_rise = 0 if path.name.startswith(MERGED) else 1
    is_ordered = not damaged and np.all(np.diff(table.column("listed_ns").to_numpy()) >= least_rise)
    return table if is_ordered else None


def _merge_files(files: Sequence[tuple[Path, pa.Table]]) -> Path:
    """Write the rows of several files as one file, delete the others, and return the new one."""
    if len(files) == 1:
        return files[0][0]
    table = pa.concat_tables([table for _, table in files])
    table = table.take(np.argsort(table.column("listed_ns").to_numpy(), kind="stable"))
    highest = table.column("listed_ns")[-1].as_py()
    # Parts of several ranks may have the same highest number.
    merged = files[0][0].with_name(f"{MERGED}{highest:x}-{secrets.token_hex(4)}{SUFFIX}")
    write_columns(merged, table.to_batches(max_chunksize=ROWS_PER_GROUP))
    sync_folder(merged.parent)
    for path, _ in files:
        path.unlink()
    return merged


def list_fields(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Yield the fields of each row's entry, as `ManifestEntry` has them. Sizes and crops are tuples."""
    for row in batch.to_pylist():
        for name in SIZES:
            row[name] = (row.pop(f"{name}_width"), row.pop(f"{name}_height"))
        edges = (row.pop(f"crop_{side}") for side in ("left", "top", "right", "bottom"))
        row["crop"] = tuple(int(edge) if edge.is_integer() else edge for edge in edges)
        for name in HASHES:
            row[name] = row[name].hex() if row[name] else None if name == "record_sha256" else ""
        yield row


def read_highest_number(path: Path) -> int:
    """Return the highest number of a file's entries; 0 if the file is damaged."""
    try:
        return int((pq.read_metadata(path).metadata or {}).get(HIGHEST, b"0"))
    except PARQUET_ERRORS:
        return 0
