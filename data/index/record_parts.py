"""Parts of the record index: each holds the records of a metadata file, or of several small ones.

A part's name is a hash of its sources. A new index reuses all parts whose sources are the same, so that files that were
added, changed or removed cost only their own part.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sdxl_trainer.data.index.compressed_texts import BLOCK_ROWS, compress_texts, read_block, read_text
from sdxl_trainer.data.index.gather import RowGroups
from sdxl_trainer.data.index.index_file import IndexFile, regroup, write_index_file
from sdxl_trainer.data.index.key_hash import KeyHashes, hash_keys
from sdxl_trainer.data.index.schema import KEY_HASHES, PLACES, STORED_RECORDS
from sdxl_trainer.data.metadata.sqlite_file import list_changing_files

LARGE_BYTES = 4 << 20  # of a metadata file that has a part of its own
ONE_IN = 64  # of small files ends a part
KINDS = {field.name: field.type for field in [*STORED_RECORDS, *PLACES]}
NOT_SHOWN = ("texts", *KEY_HASHES)


@dataclass(frozen=True)
class RecordPart:
    """A part of the record index on disk."""

    name: str
    source: int  # number of the entry of the settings that its files belong to


class LengthLog:
    """Record batches, whose lengths are noted."""

    def __init__(self, batches: Iterable[pa.RecordBatch]):
        self._batches = batches
        self.lengths: list[int] = []

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self._batches:
            self.lengths.append(len(batch))
            yield batch


def group_files(files: Sequence[Path]) -> list[list[Path]]:
    """Divide the files of a source into parts.

    The names of small files decide where a part ends: a file that is added or removed changes no other part.
    """
    groups: list[list[Path]] = []
    is_open = False
    for file in files:
        is_large = _get_size(file) >= LARGE_BYTES and file.suffix.lower() != ".tar"
        if is_large or not is_open:
            groups.append([])
        groups[-1].append(file)
        is_open = not is_large and not hash_name(str(file)) % ONE_IN == 0
    return groups


def hash_name(name: str) -> int:
    """Return a number that is the same in all processes."""
    return int(hash_keys(pa.array([name], pa.string()))[0, 0])


def _get_size(file: Path) -> int:
    with suppress(OSError):
        return sum(os.path.getsize(part) for part in list_changing_files(file))
    return 0


def write_record_part(path: Path, batches: Iterable[pa.RecordBatch], with_places: bool) -> None:
    """Write rows of RECORD_SCHEMA.

    Args:
        with_places: store places in shards and the numbers of sources; without, all rows have the place of an image and
            the same source.
    """
    log = LengthLog(batches)
    schema = pa.schema([*STORED_RECORDS, *PLACES]) if with_places else STORED_RECORDS
    stored = (_store_batch(batch, schema) for batch in regroup(log))
    write_index_file(path, schema, stored, lambda: {"lengths": log.lengths})


def _store_batch(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    columns["texts"] = compress_texts(columns["record"].to_pylist())
    for name, hashes in zip(KEY_HASHES, hash_keys(columns["key"]), strict=True):
        columns[name] = pa.array(hashes)
    return pa.record_batch([columns[name] for name in schema.names], schema)


class RecordParts:
    """The rows of several parts, one after the other.

    Args:
        parts: the path and the source of each part.
    """

    def __init__(self, parts: Iterable[tuple[Path, int]]):
        self.files: list[IndexFile] = []
        self.counts: list[int] = []  # rows of each part
        batches, constants = [], _Constants()
        for path, source in parts:
            self.files.append(IndexFile(path))
            own = self.files[-1].read_batches()
            self.counts.append(sum(map(len, own)))
            batches += [_complete_batch(batch, source, constants) for batch in own]
        self.groups = RowGroups(batches)
        self.table = pa.Table.from_batches(batches, pa.schema(list(KINDS.items())))

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def hashes(self) -> KeyHashes:
        """The hashes of all keys."""
        return KeyHashes(*([chunk.to_numpy() for chunk in self.table.column(name).chunks] for name in KEY_HASHES))

    @property
    def lengths(self) -> list[int]:
        """The numbers of records that the readers of the sources returned at once."""
        return [length for file in self.files for length in file.read_description()["lengths"]]

    def row(self, number: int) -> dict[str, Any]:
        """Return the columns of RECORD_SCHEMA of a row."""
        group, at = self.groups.locate(number)
        columns = self.groups.columns[group]
        row = {name: column[at].as_py() for name, column in columns.items() if name not in NOT_SHOWN}
        return row | {"record": read_text(columns["texts"], at)}

    def take(self, name: str, rows: np.ndarray) -> pa.Array:
        """Return a column at the given rows."""
        return self.groups.gather(rows, lambda group, at: _take(self.groups.columns[group][name], at), KINDS[name])

    def read_contents(self, rows: np.ndarray) -> list[bytes]:
        """Return the JSON of records as their source holds it."""
        contents = [b""] * len(rows)
        for group, places, at in self.groups.split(rows):
            texts = self.groups.columns[group]["texts"]
            blocks: dict[int, list[bytes]] = {}
            for place, row in zip(places.tolist(), at.tolist(), strict=True):
                start = row - row % BLOCK_ROWS
                if start not in blocks:  # only the last block is kept: rows are mostly in order
                    blocks = {start: read_block(texts, start)}
                contents[place] = blocks[start][row - start]
        return contents


class _Constants:
    """Columns of one value, whose memory all batches share."""

    def __init__(self) -> None:
        self._columns: dict[tuple[str, int | None], pa.Array] = {}

    def get(self, field: pa.Field, value: int | None, length: int) -> pa.Array:
        """Return a column of `length` rows."""
        known = self._columns.get((field.name, value))
        if known is None or len(known) < length:
            known = pa.nulls(length, field.type) if value is None else pa.array(np.full(length, value), field.type)
            self._columns[field.name, value] = known
        return known.slice(0, length)


def _complete_batch(batch: pa.RecordBatch, source: int, constants: _Constants) -> pa.RecordBatch:
    """Return a part's batch with the columns that the part leaves out."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for field in PLACES:
        if field.name not in columns:
            columns[field.name] = constants.get(field, source if field.name == "source" else None, len(batch))
    return pa.record_batch([columns[name] for name in KINDS], pa.schema(list(KINDS.items())))


def _take(column: pa.Array, at: np.ndarray) -> pa.Array:
    """Return a column at the given places: a slice of it if they follow each other."""
    is_run = at[-1] - at[0] == len(at) - 1 and np.all(np.diff(at) == 1)
    return column.slice(int(at[0]), len(at)) if is_run else column.take(pa.array(at))
