"""Forms of metadata, each read a few thousand records at a time. docs/DATA.md shows an example of each.

A reader yields (key, fields) pairs; the key is the file stem of the image. What a record must remember of where it
was read is kept under names that no metadata have, until data/metadata/records.py has made use of it.
"""

import csv
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_trainer.data.formats.shard_samples import CATALOGUE_SUFFIX, ShardSample, load_catalogue, read_shard
from sdxl_trainer.data.images.image_files import strip_suffix
from sdxl_trainer.data.metadata.json_stream import JsonChunk, is_json_lines, iterate_chunks, iterate_lines
from sdxl_trainer.data.stores.remote import find_objects, is_remote

KeyedRecords = list[tuple[str, dict[str, Any]]]
Reader = Callable[[Path], Iterator[KeyedRecords]]

BASE = "//base"  # folder that a relative path of the record is relative to
NAME = "//name"  # the image's path, where it was the record's key
SOURCE = "//source"  # number of the setting's entry that the record comes from
NPZ = "//npz"  # (tar, offset, bytes) of the latents that came with the record
ROWS_AT_ONCE = 8192
PATH_FIELDS = ("image_path", "file_name")  # ours, and that of Hugging Face's image folders
MAX_CSV_FIELD = 1 << 24
KNOWN = ".json, .jsonl, .ndjson, .csv, .tsv, .parquet, .tar"


def list_source_files(patterns: Sequence[Path | str]) -> list[Path | str]:
    """The files that metadata settings name: `{000..012}` and `{a,b}` are expanded, and `*` and `?` looked up.

    URLs stay text, in which only `*` is looked up; those of `file://` become paths.

    Raises:
        StoreError: a store cannot be listed.
    """
    files: list[Path | str] = []
    for pattern in patterns:
        text = str(pattern).removeprefix("file://")
        if is_remote(text):
            for url in _expand_braces(text):
                files += (find_objects(url) if "*" in url else []) or [url]
        elif Path(text).exists():
            files.append(Path(text))
        else:
            for path in _expand_braces(text):
                found = sorted(glob(path)) if re.search(r"[*?]", path) else [path]
                files += [Path(name) for name in found or [path]]
    return files


def read_metadata_file(file: Path) -> Iterator[KeyedRecords]:
    """The records of one metadata file, in its order.

    Raises:
        ValueError: malformed; the file and the place in it are named.
    """
    for items in READERS[detect_format(file)](file):
        yield _note_base(items, file)


def detect_format(file: Path) -> str:
    """The name of a file's form, told by its suffix, and by its content where that is not enough."""
    suffix = file.suffix.lower()
    form = SUFFIXES.get(suffix)
    if form is None:
        with open(file, "rb") as stream:
            start = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        form = "parquet" if start[:4] == b"PAR1" else "json" if start[:1] in (b"{", b"[") else None
    if form is None:
        raise ValueError(f"{file}: has no form that is known; files may be called {KNOWN}")
    return "json_lines" if form == "json" and is_json_lines(file) else form


def parse_chunk(file: Path, piece: JsonChunk) -> KeyedRecords:
    """Some records of a JSON object, keyed by stem and holding `image_path`, or keyed by the image's path.

    Raises:
        ValueError: malformed; the file and the place in it are named.
    """
    items = []
    for key, fields in piece.parse().items():
        if not isinstance(fields, dict):
            raise ValueError(f"{file}: the record '{key}' must be a JSON object, not a {type(fields).__name__}")
        if fields.get(PATH_FIELDS[0]) is None:
            stem = strip_suffix(key)
            if stem != key:
                fields[NAME], key = key, stem
        items.append((key, fields))
    return _note_base(items, file)


def _read_object(file: Path) -> Iterator[KeyedRecords]:
    for piece in iterate_chunks(file):
        yield parse_chunk(file, piece)


def _note_base(items: KeyedRecords, file: Path) -> KeyedRecords:
    """The same, with the folder that relative paths in them are relative to.

    Raises:
        ValueError: a key is empty, or a caption an object.
    """
    base = str(file.parent)
    for key, fields in items:
        if not key:
            raise ValueError(f"{file}: a record has an empty key")
        if isinstance(fields.get("caption"), dict):
            raise ValueError(f"{file}: the record '{key}' has a caption that is an object, not a text or a list")
        if NAME in fields or fields.get(PATH_FIELDS[0]) is not None:
            fields[BASE] = base
    return items


def _read_lines(file: Path) -> Iterator[KeyedRecords]:
    for lines in iterate_lines(file):
        yield [_key_record(fields, f"{file}:{number}") for number, fields in lines]


def _read_csv(file: Path) -> Iterator[KeyedRecords]:
    """Comma-separated values (tab in a .tsv) under a line of names. An empty cell is no field; values stay text."""
    csv.field_size_limit(MAX_CSV_FIELD)
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            rows = csv.reader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
            names = next(rows, [])
            if twins := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"{file}:1: two columns have the name '{twins[0]}'")
            place = lambda: f"{file}:{rows.line_num}"  # noqa: E731
            while block := list(itertools.islice(_zip_rows(rows, names, place), ROWS_AT_ONCE)):
                yield block
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8: {error.reason} at byte {error.start} of a block") from None


def _zip_rows(rows: Any, names: list[str], place: Callable[[], str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        for row in rows:
            if row and len(row) != len(names):
                raise ValueError(f"{place()}: the row has {len(row)} values under {len(names)} names")
            if row:
                yield _key_record({name: value for name, value in zip(names, row, strict=True) if value != ""}, place())
    except csv.Error as error:
        raise ValueError(f"{place()}: malformed CSV: {error}") from None


def _read_parquet(file: Path) -> Iterator[KeyedRecords]:
    """A Parquet table, a row a record; a null is no field."""
    try:
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE):
            rows = batch.to_pylist()
            yield [
                _key_record(
                    {name: value for name, value in row.items() if value is not None}, f"{file}, row {number + at}"
                )
                for at, row in enumerate(rows)
            ]
            number += len(rows)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: no readable Parquet file: {error}") from None


def _read_shard(file: Path) -> Iterator[KeyedRecords]:
    """A webdataset shard: `key.npz` with `key.json` (the record), or with `key.txt` (the caption)."""
    with open(file, "rb") as stream:
        yield from _list_items(str(file.absolute()), read_shard(str(file), stream))


def _read_catalogue(file: Path) -> Iterator[KeyedRecords]:
    """What is known of a shard that lies on a store (data/catalogue.py)."""
    yield from _list_items(*load_catalogue(file))


def _list_items(shard: str, samples: list[ShardSample]) -> Iterator[KeyedRecords]:
    for start in range(0, len(samples), ROWS_AT_ONCE):
        some = samples[start : start + ROWS_AT_ONCE]
        places = [{} if each.offset is None else {NPZ: (shard, each.offset, each.size)} for each in some]
        yield [(each.key, {**each.record, **place}) for each, place in zip(some, places, strict=True)]


def _key_record(fields: dict[str, Any], place: str) -> tuple[str, dict[str, Any]]:
    """A row's key: the stem of its image's path, else its `key`."""
    name = next((str(fields[field]) for field in PATH_FIELDS if fields.get(field)), None)
    if name is not None:
        fields[PATH_FIELDS[0]] = name
        return strip_suffix(name, always=True), fields
    if fields.get("key"):
        return str(fields["key"]), fields
    raise ValueError(f"{place}: the record has no `image_path` (nor `file_name` or `key`)")


def _expand_braces(pattern: str) -> list[str]:
    """As a shell and webdataset expand `{000..012}` and `{a,b}`, leftmost first."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    options = (
        words.split(",")
        if words is not None
        else [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    )
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [path for option in options for path in _expand_braces(head + option + tail)]


READERS: dict[str, Reader] = {
    "json": _read_object,
    "json_lines": _read_lines,
    "csv": _read_csv,
    "parquet": _read_parquet,
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
    ".tar": "shard",
    CATALOGUE_SUFFIX: "catalogue",
}
