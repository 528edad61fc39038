"""Readers of every metadata format. docs/DATA.md shows an example of each format.

A reader yields lists of a few thousand records as their source holds them. data/metadata/records.py finds images,
captions and sizes later, for all formats alike.
"""

import ast
import csv
import io
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_trainer.configs.problems import describe_encoding
from sdxl_trainer.data.files import open_stream, open_text_stream
from sdxl_trainer.data.formats.shard_samples import CATALOGUE_SUFFIX, ShardSample, list_shard_samples, load_catalogue
from sdxl_trainer.data.images.image_files import get_image_stem
from sdxl_trainer.data.metadata.json_stream import JsonChunk, is_json_lines, iterate_chunks, iterate_lines
from sdxl_trainer.data.metadata.shard_list import expand_shard_list
from sdxl_trainer.data.metadata.sqlite_file import DATABASE_SUFFIXES, read_rows, split_table
from sdxl_trainer.data.metadata.values import (
    PATH_FIELDS,
    REGULARISATION_FIELD,
    TEXT_FIELDS,
    RefusedValues,
    is_missing,
    read_path,
    read_switch,
    show_value,
)
from sdxl_trainer.data.stores.remote import find_objects, is_remote
from sdxl_trainer.data.stores.streams import is_streamed

ROWS_AT_ONCE = 8192
# pyarrow raises these on damaged files: texts that are not UTF-8, dates beyond Python's, unknown types, huge pages.
PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, LookupError, MemoryError)
MAX_CSV_FIELD_CHARACTERS = 1 << 24
KNOWN_SUFFIXES = ".json, .jsonl, .ndjson, .csv, .tsv, .parquet, .sqlite3, .db, .tar"
SQLITE_START = b"SQLite format 3\0"


class ShardSpan(NamedTuple):
    """The place of a record's latents in a shard."""

    shard: str  # path or URL
    offset: int  # of the npz
    bytes: int


class SourceRecord(NamedTuple):
    """A record as its source holds it."""

    key: str  # file stem of the image
    fields: dict[str, Any]
    base_folder: str = ""  # folder that a relative image path is relative to
    keyed_path: str | None = None  # the image's path, if it was the record's key
    span: ShardSpan | None = None  # place of the latents that came with the record
    source: int = 0  # number of the record's source in the settings


Reader = Callable[[Path], Iterator[list[SourceRecord]]]


def list_source_files(patterns: Sequence[Path | str]) -> list[Path | str]:
    """List the metadata files that settings name: expand shard lists as webdataset does, and look up `*` and `?`.

    URLs and commands (`pipe:`) stay strings. Only `*` is looked up in a URL, and nothing in a command. A pattern that
    matches no file is returned unchanged.

    Raises:
        ShardListError: a shard list cannot be expanded, or names nothing.
        StoreError: a store cannot be listed.
    """
    files: list[Path | str] = []
    for pattern in map(str, patterns):
        if not is_remote(pattern) and Path(pattern).exists():
            files.append(Path(pattern))
            continue
        for name in expand_shard_list(pattern):
            if is_streamed(name):
                files.append(name)
            elif is_remote(name):
                files += (find_objects(name) if "*" in name else []) or [name]
            else:
                found = sorted(glob(name)) if re.search(r"[*?]", name) else []
                files += map(Path, found or [name])
    return files


def read_metadata_file(file: Path) -> Iterator[list[SourceRecord]]:
    """Yield the records of one metadata file, in its order.

    Raises:
        ValueError: the file is malformed (the message names the place in it), or values cannot be read (it names all).
    """
    refused = RefusedValues(file)
    for records in READERS[detect_format(file)](file):
        yield _complete_records(records, file, refused)
    refused.raise_if_any()


def detect_format(file: Path) -> str:
    """Return the name of a file's format, by its suffix, and by its content where the suffix is not enough.

    Raises:
        ValueError: the format is unknown.
    """
    name = SUFFIXES.get(split_table(file).file.suffix.lower())
    if name is None:
        with open_stream(file) as stream:
            start = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        name = "parquet" if start[:4] == b"PAR1" else "json" if start[:1] in (b"{", b"[") else None
        name = "sqlite" if start.startswith(SQLITE_START) else name
    if name is None:
        raise ValueError(f"{file}: has no known metadata format; the file name must end in one of {KNOWN_SUFFIXES}")
    return "json_lines" if name == "json" and is_json_lines(file) else name


def parse_chunk(file: Path, chunk: JsonChunk, refused: RefusedValues) -> list[SourceRecord]:
    """Return the records of a chunk of a JSON object. A record's key is its stem or, without `image_path`, its path.

    Args:
        refused: collects the values that cannot be read; their records are left out.

    Raises:
        ValueError: the chunk is malformed; the message names the file and the place in it.
    """
    return _complete_records(_list_members(file, chunk), file, refused)


def _read_object(file: Path) -> Iterator[list[SourceRecord]]:
    for chunk in iterate_chunks(file):
        yield _list_members(file, chunk)


def _list_members(file: Path, chunk: JsonChunk) -> list[SourceRecord]:
    records = []
    for key, fields in chunk.parse().items():
        if not isinstance(fields, dict):
            raise ValueError(f"{file}: the record '{key}' must be a JSON object, not a {type(fields).__name__}")
        stem = get_image_stem(key) if is_missing(fields.get(PATH_FIELDS[0])) else key
        records.append(SourceRecord(key=stem, fields=fields, keyed_path=None if stem == key else key))
    return records


def _complete_records(records: list[SourceRecord], file: Path, refused: RefusedValues) -> list[SourceRecord]:
    """Return the records with the folder that their relative image paths are relative to.

    Paths become texts, and `is_reg` true or false. Texts and sizes stay as they are, for the user's strategy.

    Args:
        refused: collects the values that cannot be read; their records are left out.

    Raises:
        ValueError: a key is empty.
    """
    completed = []
    for record in records:
        if not record.key:
            raise ValueError(f"{file}: a record has an empty key")
        if not refused.accepts(record.key, record.fields):
            continue
        for field, read in ((PATH_FIELDS[0], read_path), (REGULARISATION_FIELD, read_switch)):
            if record.fields.get(field) is not None:
                record.fields[field] = read(record.fields[field])
        has_path = record.keyed_path is not None or record.fields.get(PATH_FIELDS[0]) is not None
        completed.append(record._replace(base_folder=str(file.parent) if has_path else ""))
    return completed


def _read_lines(file: Path) -> Iterator[list[SourceRecord]]:
    for lines in iterate_lines(file):
        yield [_build_record(line.fields, f"{file}:{line.number}") for line in lines]


def _read_csv(file: Path) -> Iterator[list[SourceRecord]]:
    """Yield the records of a CSV file with a header line. The values of a `.tsv` file are separated by tabs.

    An empty cell is a missing field. Values stay text, except lists and mappings of tags (see `_parse_cell`).
    """
    csv.field_size_limit(MAX_CSV_FIELD_CHARACTERS)
    try:
        with io.TextIOWrapper(open_text_stream(file), encoding="utf-8-sig", newline="") as stream:
            rows = _iterate_csv_rows(file, stream)
            names = next(rows, _CsvRow(1, [])).values
            if duplicates := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"{file}:1: two columns have the name '{duplicates[0]}'")
            records = _iterate_csv_records(file, rows, names)
            while chunk := list(itertools.islice(records, ROWS_AT_ONCE)):
                yield chunk
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: {describe_encoding(error)}") from None
    except csv.Error as error:  # in the line of names
        raise ValueError(f"{file}:1: malformed CSV: {error}") from None


class _CsvRow(NamedTuple):
    """A row of a CSV file, and the number of its last line."""

    line: int
    values: list[str]


def _iterate_csv_rows(file: Path, stream: IO[str]) -> Iterator[_CsvRow]:
    rows = csv.reader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        for row in rows:
            yield _CsvRow(rows.line_num, row)
    except csv.Error as error:
        raise ValueError(f"{file}:{rows.line_num}: malformed CSV: {error}") from None


def _iterate_csv_records(file: Path, rows: Iterator[_CsvRow], names: list[str]) -> Iterator[SourceRecord]:
    for line, row in rows:
        place = f"{file}:{line}"
        if row and len(row) != len(names):
            raise ValueError(f"{place}: the row has {len(row)} values for {len(names)} columns")
        if row:
            cells = {name: _parse_cell(name, cell) for name, cell in zip(names, row, strict=True) if cell != ""}
            yield _build_record(cells, place)


def _parse_cell(name: str, cell: str) -> Any:
    """Return the value of a cell: its text or, in a field of texts, the list or mapping that the text spells out.

    pandas writes lists as Python does, `['cat', 'on a mat']`, and other programs as JSON.
    """
    if name not in TEXT_FIELDS or cell[0] + cell[-1] not in ("[]", "{}"):
        return cell
    for parse in (orjson.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Python's parser, such as "invalid decimal literal"
                value = parse(cell)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict):
            return {str(key): item for key, item in value.items()}
        if isinstance(value, list):
            return value
    return cell


def _read_parquet(file: Path) -> Iterator[list[SourceRecord]]:
    """Yield the rows of a Parquet table as records. A null is a missing field."""
    for rows in iterate_table_rows(file):
        yield _list_table_records(file, rows)


class TableRows(NamedTuple):
    """Some rows of a Parquet table. Columns of maps hold dicts."""

    first: int  # number of the first row
    columns: dict[str, list[Any]]  # name → value of each row, None for a null

    def list_fields(self) -> list[dict[str, Any]]:
        """Return the fields of each row that are not null."""
        names, values = list(self.columns), list(self.columns.values())
        if not any(None in column for column in values):
            return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
        return [
            {name: value for name, value in zip(names, row, strict=True) if value is not None}
            for row in zip(*values, strict=True)
        ]


def iterate_table_rows(file: Path) -> Iterator[TableRows]:
    """Yield the rows of a Parquet table, some thousands at a time.

    Raises:
        ValueError: the file cannot be read.
    """
    number = 0
    try:
        with open_stream(file) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(ROWS_AT_ONCE):
                names = zip(batch.schema.names, batch.columns, strict=True)
                yield TableRows(number, {name: _list_values(column) for name, column in names})
                number += len(batch)
    except PARQUET_ERRORS as error:
        raise ValueError(f"{file}: not a readable Parquet file: {error}") from None


def _list_values(column: pa.Array) -> list[Any]:
    """Return the values of a column. Arrow gives maps as lists of pairs, which become dicts."""
    values = column.to_pylist()
    if pa.types.is_map(column.type):
        return [{str(key): value for key, value in row or ()} for row in values]
    return values


def parse_table_rows(file: Path, rows: TableRows, refused: RefusedValues) -> list[SourceRecord]:
    """Return the records of rows of a Parquet table.

    Args:
        refused: collects the values that cannot be read; their records are left out.

    Raises:
        ValueError: a row has no key.
    """
    return _complete_records(_list_table_records(file, rows), file, refused)


def _list_table_records(file: Path, rows: TableRows) -> list[SourceRecord]:
    fields = enumerate(rows.list_fields(), rows.first)
    return [_build_record(record, f"{file}, row {number}") for number, record in fields]


def _read_sqlite(file: Path) -> Iterator[list[SourceRecord]]:
    """Yield the rows of a table of a SQLite database as records. A null is a missing field.

    Lists and mappings of tags are texts there (see `_parse_cell`).
    """
    for chunk in read_rows(file, ROWS_AT_ONCE):
        records = []
        for number, row in enumerate(chunk.rows, chunk.first):
            fields = {
                name: _parse_cell(name, value) if isinstance(value, str) and value else value
                for name, value in row.items()
            }
            records.append(_build_keyed_record(fields, chunk.key_column, f"{file}, row {number}"))
        yield records


def _build_keyed_record(fields: dict[str, Any], key_column: str | None, place: str) -> SourceRecord:
    """Build a record whose key stands in a column. Without `image_path`, the key may be the path of the image.

    Raises:
        ValueError: the key is missing, or not a text; the message starts with `place`.
    """
    if key_column is None:
        return _build_record(fields, place)
    try:
        key = read_path(fields.get(key_column))
    except ValueError as error:
        raise ValueError(
            f"{place}: the record has `{key_column}` = {show_value(fields[key_column])}, which {error}"
        ) from None
    if key is None:
        raise ValueError(f"{place}: the record has no `{key_column}`")
    if fields.get(PATH_FIELDS[0]) is None and fields.get(PATH_FIELDS[1]) is not None:
        fields[PATH_FIELDS[0]] = fields[PATH_FIELDS[1]]
    stem = get_image_stem(key) if is_missing(fields.get(PATH_FIELDS[0])) else key
    return SourceRecord(key=stem, fields=fields, keyed_path=None if stem == key else key)


def _read_shard(file: Path) -> Iterator[list[SourceRecord]]:
    """Yield the records of a webdataset shard: `key.npz` with `key.json` (the record) or `key.txt` (the caption)."""
    with open_stream(file) as stream:
        yield from _list_shard_records(str(file.absolute()), list_shard_samples(str(file), stream))


def _read_catalogue(file: Path) -> Iterator[list[SourceRecord]]:
    """Yield the records of a shard on a store, from its local catalogue."""
    yield from _list_shard_records(*load_catalogue(file))


def _list_shard_records(shard: str, samples: list[ShardSample]) -> Iterator[list[SourceRecord]]:
    for start in range(0, len(samples), ROWS_AT_ONCE):
        records = []
        for sample in samples[start : start + ROWS_AT_ONCE]:
            span = None
            if sample.offset is not None and sample.size is not None:
                span = ShardSpan(shard, sample.offset, sample.size)
            records.append(SourceRecord(key=sample.key, fields=sample.record, span=span))
        yield records


def _build_record(fields: dict[str, Any], place: str) -> SourceRecord:
    """Build a record from its fields. Its key is the stem of its image's path, or else its `key`.

    Raises:
        ValueError: the record has neither; the message starts with `place`.
    """
    names: dict[str, str | None] = {}
    for field in (*PATH_FIELDS, "key"):
        try:
            names[field] = read_path(fields.get(field))
        except ValueError as error:
            raise ValueError(
                f"{place}: the record has `{field}` = {show_value(fields[field])}, which {error}"
            ) from None
    path = names[PATH_FIELDS[0]] or names[PATH_FIELDS[1]]
    if path is not None:
        fields[PATH_FIELDS[0]] = path
        return SourceRecord(key=get_image_stem(path, has_suffix=True), fields=fields)
    if names["key"] is not None:
        return SourceRecord(key=names["key"], fields=fields)
    raise ValueError(f"{place}: the record has no `image_path` (nor `file_name` or `key`)")


READERS: dict[str, Reader] = {
    "json": _read_object,
    "json_lines": _read_lines,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "sqlite": _read_sqlite,
    "shard": _read_shard,
    "catalogue": _read_catalogue,
}
SUFFIXES = {
    ".json": "json",
    ".jsonl": "json_lines",
    ".ndjson": "json_lines",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    **dict.fromkeys(DATABASE_SUFFIXES, "sqlite"),
    ".tar": "shard",
    CATALOGUE_SUFFIX: "catalogue",
}
