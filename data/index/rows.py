"""Open indexes: rows of records, and rows of samples, which join records with latents.

An index is a small head that names its parts. Parts are shared: a new index reuses those whose sources are the same.
"""

import fcntl
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_trainer.data.index.index_file import IndexFile
from sdxl_trainer.data.index.latent_files import LatentFiles
from sdxl_trainer.data.index.record_parts import KINDS, RecordParts
from sdxl_trainer.data.index.schema import LATENT_COLUMNS, PARTS, SAMPLE_SCHEMA, JoinSummary
from sdxl_trainer.data.metadata.records import Record, parse_record

ROWS_AT_ONCE = 8192
SAMPLE_KINDS = KINDS | dict(zip(SAMPLE_SCHEMA.names, SAMPLE_SCHEMA.types, strict=True))
RECORD_COLUMNS = ("key", "image_path", "record", "source")
BUCKET_COLUMNS = ("bucket_width", "bucket_height")


class ShardGroups(NamedTuple):
    """Rows of an index by the shard that holds their latents."""

    shard_of_row: np.ndarray  # [N] int64 number of each row's shard
    names: list[str]  # name of each number, sorted


class BucketMembers(NamedTuple):
    """Rows grouped by bucket."""

    rows: np.ndarray  # [N] int32, bucket after bucket
    buckets: list[tuple[int, int]]  # (width, height) px, ascending
    counts: list[int]  # rows of each bucket


class Index:
    """An open index of records or of samples. While it is open, no process deletes its files.

    Raises:
        DamagedIndexError: a file is cut short.
        FileNotFoundError: the index or one of its parts does not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = os.open(path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        head = IndexFile(path, self._lock)
        self._description = head.read_description()
        if "latents" in self._description:
            self._record_index = Index(path.parent / self._description["records"])
            self.records = self._record_index.records
            self._samples = _Samples(path, head, self._description)
        else:
            parts = self._description["parts"]
            self.records = RecordParts([(path.parent / PARTS / name, source) for name, source in parts])
            self._samples = None

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            os.close(self._lock)

    def __len__(self) -> int:
        return len(self.records) if self._samples is None else len(self._samples.record)

    def __reduce__(self) -> tuple:
        return (Index, (self.path,))  # a worker maps the files itself instead of receiving copies

    @property
    def fingerprint(self) -> str:
        """Hash of the sources that the index was built from, the end of its file name."""
        return self.path.stem.rsplit("-", 1)[-1]

    def row(self, number: int) -> dict[str, Any]:
        """Return all columns of a row."""
        samples = self._samples
        if samples is None:
            return self.records.row(number)
        record = self.records.row(int(samples.record[number]))
        latents = samples.latents.row(int(samples.latent_rows[number]))
        key = samples.get_prefix(number) + record["key"]
        return {**{name: record[name] for name in RECORD_COLUMNS}, **latents, "key": key}

    def record(self, number: int) -> Record:
        """Return the whole record of a row."""
        return parse_record(self.row(number))

    def record_json(self, number: int) -> bytes:
        """Return the whole record of a row as JSON, for files whose readers have no index."""
        return orjson.dumps(self.record(number))

    def iterate_records(self) -> Iterator[Record]:
        """Yield all records in the order of the index, with a few thousand of them in memory."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            rows = np.arange(start, min(start + ROWS_AT_ONCE, len(self)))
            keys, paths = (self.arrow_column(name, start, ROWS_AT_ONCE) for name in ("key", "image_path"))
            columns = zip(keys.to_pylist(), paths.to_pylist(), self.read_contents(rows), strict=True)
            for key, path, content in columns:
                yield parse_record({"key": key, "image_path": path, "record": content})

    def read_contents(self, rows: np.ndarray) -> list[bytes]:
        """Return the JSON of the records of the given rows, as their source holds it."""
        return self.records.read_contents(rows if self._samples is None else self._samples.record[rows])

    def column(self, name: str) -> np.ndarray:
        """Return a numeric column, [N]."""
        if self._samples is not None and name in BUCKET_COLUMNS:
            return self._samples.list_sides(BUCKET_COLUMNS.index(name))
        return self.arrow_column(name).to_numpy()

    def arrow_column(self, name: str, start: int = 0, number: int | None = None) -> pa.ChunkedArray:
        """Return a column of any type, or `number` of its rows from `start` on.

        The columns of records stay in the mapped files; those of samples are put together.
        """
        if self._samples is None:
            return self.records.table.column(name).slice(start, number)
        end = len(self) if number is None else min(start + number, len(self))
        ranges = (np.arange(first, min(first + ROWS_AT_ONCE, end)) for first in range(start, end, ROWS_AT_ONCE))
        return pa.chunked_array(
            [self._samples.read_column(name, rows, self.records) for rows in ranges], SAMPLE_KINDS[name]
        )

    @property
    def table(self) -> pa.Table:
        """The columns of an index of records, which stay in the mapped files."""
        assert self._samples is None, "samples have no table of their own"
        return self.records.table

    @property
    def reader_lengths(self) -> list[int]:
        """The numbers of records that the readers of an index of records returned at once."""
        return self._description["lengths"]

    def group_by_bucket(self) -> BucketMembers:
        """Return the samples by bucket; their rows stay in the mapped file."""
        assert self._samples is not None, "records have no bucket"
        return self._samples.members

    def group_by_shard(self) -> ShardGroups:
        """Group the samples by the shard that holds their latents. All npz files together count as the shard ""."""
        assert self._samples is not None, "records have no latents"
        return self._samples.group_by_shard()

    def has_values(self, name: str) -> np.ndarray:
        """Return whether a column of the samples' latents holds a value, [N] bool."""
        assert self._samples is not None, "records have no latents"
        return self._samples.has_values(name)

    @cached_property
    def summary(self) -> JoinSummary:
        """Counts and findings of the join that built an index of samples."""
        return JoinSummary.from_dict(self._description["summary"])

    def hash_rows(self) -> str:
        """Return a hash of all samples' keys and buckets in their order.

        They decide which sample a plan's row number means: a resumed run has the same order of batches as long as the
        hash stays the same. The location of the data and all other columns do not affect the hash.
        """
        return self._description["hash_rows"]

    def list_parts(self) -> list[IndexFile]:
        """Return the files of the index besides its head."""
        return [*self.records.files, *(self._samples.latents.files if self._samples else [])]

    def release_pages(self) -> None:
        """Drop the pages read so far. All processes share them, but they count as each process' own memory."""
        for file in self.list_parts():
            file.release_pages()


class _Samples:
    """Which record and which latents make each sample. Both lie in files that indexes share."""

    def __init__(self, path: Path, head: IndexFile, description: dict[str, Any]):
        self.latents = LatentFiles(path.parent / PARTS / name for name in description["latents"])
        [batch] = head.read_batches()
        self.record, self.latent_rows, self._bucket, rows = (column.to_numpy() for column in batch.columns)
        buckets = [(width, height) for width, height in description["buckets"]]
        self.members = BucketMembers(rows, buckets, description["bucket_counts"])
        self._prefixes: list[tuple[str, int]] = description["prefixes"]  # (prefix, its last row + 1)

    def get_prefix(self, number: int) -> str:
        """Return the prefix of a row's key."""
        return next(prefix for prefix, end in self._prefixes if number < end)

    def list_sides(self, side: int) -> np.ndarray:
        """Return the width (0) or height (1) of each row's bucket, [N] int32."""
        sides = np.array([bucket[side] for bucket in self.members.buckets], np.int32)
        return sides[self._bucket]

    def read_column(self, name: str, rows: np.ndarray, records: RecordParts) -> pa.Array:
        """Return a column at rows that follow each other."""
        if name in LATENT_COLUMNS:
            return self.latents.take(name, self.latent_rows[rows])
        if name == "record":
            return pa.array(records.read_contents(self.record[rows]), pa.binary())
        values = records.take(name, self.record[rows])
        return values if name != "key" else self._add_prefixes(values, rows)

    def _add_prefixes(self, keys: pa.Array, rows: np.ndarray) -> pa.Array:
        ends = np.clip([end - rows[0] for _, end in self._prefixes], 0, len(rows)).tolist()
        spans = zip(self._prefixes, [0, *ends[:-1]], ends, strict=True)
        parts = [add_prefix(prefix, keys.slice(start, end - start)) for (prefix, _), start, end in spans if end > start]
        return parts[0] if len(parts) == 1 else pa.concat_arrays(parts)

    def group_by_shard(self) -> ShardGroups:
        """Group the rows by the shard that holds their latents."""
        numbers, names = self.latents.number_shards()
        numbers = numbers[self.latent_rows]
        order = sorted(np.unique(numbers).tolist(), key=names.__getitem__)
        places = np.zeros(len(names), np.int64)
        places[order] = np.arange(len(order))
        return ShardGroups(places[numbers], [names[number] for number in order])

    def has_values(self, name: str) -> np.ndarray:
        """Return whether a column of the latents holds a value, [N] bool."""
        parts = [
            pc.call_function("is_valid", [batch.column(name)]).to_numpy(zero_copy_only=False)
            for batch in self.latents.batches
        ]
        return np.concatenate([np.empty(0, bool), *parts])[self.latent_rows]


def add_prefix(prefix: str, keys: Any) -> Any:
    """Return the keys of samples at a resolution, given the keys of their records."""
    return pc.call_function("binary_join_element_wise", [pa.scalar(prefix), keys, pa.scalar("")]) if prefix else keys
