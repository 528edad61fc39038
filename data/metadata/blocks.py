"""Blocks of records as columns: the common form of all metadata formats, before images are found.

msgspec decodes a JSON object of records, the format of the largest sets, into the few fields that the index needs. Each
record's JSON is kept as it is in the file. That is five times as fast as building a dict for each record.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import orjson

from sdxl_trainer.data.images.image_files import get_image_stem
from sdxl_trainer.data.metadata.json_stream import JsonChunk, iterate_chunks
from sdxl_trainer.data.metadata.sources import (
    ShardSpan,
    SourceRecord,
    TableRows,
    detect_format,
    iterate_table_rows,
    parse_chunk,
    parse_table_rows,
    read_metadata_file,
)
from sdxl_trainer.data.metadata.values import (
    SIDE_FIELDS,
    TEXT_FIELDS,
    VALUE_READERS,
    RefusedValues,
    is_missing,
    is_refused,
)

FIELDS = tuple(VALUE_READERS)
SIDE_NAMES = set(chain.from_iterable(SIDE_FIELDS))
ITEM_TYPES = {str, int, float, type(None)}  # in lists of texts; the values of tags are the numbers among them

RecordFields = msgspec.defstruct("RecordFields", [(name, Any, None) for name in FIELDS], gc=False)
DECODER = msgspec.json.Decoder(dict[str, RecordFields])
SURROGATES = (b"\\ud", b"\\uD")  # orjson refuses half of a surrogate pair, which msgspec accepts


@dataclass(frozen=True)
class RecordBlock:
    """A block of records as columns: the fields of `SourceRecord`, each a list with one element for each record."""

    keys: list[str]
    contents: list[bytes]  # the record as JSON
    base_folders: list[str]
    keyed_paths: list[str | None]
    spans: list[ShardSpan | None]
    sources: list[int]
    fields: list[Any]  # the FIELDS of each record: a dict, or RecordFields
    columns: Mapping[str, list[Any]] | None = None  # those FIELDS that a table has

    def column(self, name: str) -> list[Any]:
        """Return one of the FIELDS as a list, with None for each record that lacks it."""
        if self.columns is not None:
            return self.columns.get(name) or [None] * len(self.keys)
        if self.fields and isinstance(self.fields[0], dict):
            return [fields.get(name) for fields in self.fields]
        return list(map(attrgetter(name), self.fields))


def build_block(records: Sequence[SourceRecord]) -> RecordBlock:
    """Build a block from records of any format."""
    return RecordBlock(
        keys=[record.key for record in records],
        contents=[dump_json(record.key, record.fields) for record in records],
        base_folders=[record.base_folder for record in records],
        keyed_paths=[record.keyed_path for record in records],
        spans=[record.span for record in records],
        sources=[record.source for record in records],
        fields=[record.fields for record in records],
    )


def dump_json(key: str, value: Any) -> bytes:
    """Return a record as JSON. Values that JSON has no type for, such as dates of a table, become strings.

    Raises:
        ValueError: the value is nested too deeply.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY, default=_convert)
    except TypeError:  # nested more than 254 levels deep, or an integer of more than 64 bits
        try:
            return json.dumps(value, default=_convert).encode()
        except RecursionError:
            raise ValueError(f"the record '{key}' is nested too deeply") from None


def _convert(value: Any) -> str | None:
    """Return a value that JSON has no type for as a text. Bytes that are not UTF-8, such as an image, become null."""
    if isinstance(value, bytes):
        return value.decode() if _is_utf8(value) else None
    return str(value)


def read_blocks(file: Path) -> Iterator[RecordBlock]:
    """Yield the records of one metadata file, in its order.

    Raises:
        ValueError: the file is malformed; the message names the file and the place in it.
    """
    form, refused = detect_format(file), RefusedValues(file)
    if form == "parquet":
        for rows in iterate_table_rows(file):
            yield _convert_rows(rows, str(file.parent)) or build_block(parse_table_rows(file, rows, refused))
        refused.raise_if_any()
        return
    if form != "json":
        yield from map(build_block, read_metadata_file(file))
        return
    for chunk in iterate_chunks(file):
        yield _decode_chunk(chunk, str(file.parent)) or build_block(parse_chunk(file, chunk, refused))
    refused.raise_if_any()


def _convert_rows(rows: TableRows, base_folder: str) -> RecordBlock | None:
    """Build a block of a table's rows the fast way. Return None if anything is unusual, as `_decode_chunk` does."""
    columns = {name: rows.columns[name] for name in FIELDS if name in rows.columns}
    paths = columns.get("image_path", [])
    if set(map(type, paths)) != {str} or not all(_is_usual(name, values) for name, values in columns.items()):
        return None
    keys = [get_image_stem(path, has_suffix=True) for path in paths]
    if "" in keys:
        return None
    fields = rows.list_fields()
    return RecordBlock(
        keys=keys,
        contents=[dump_json(key, record) for key, record in zip(keys, fields, strict=True)],
        base_folders=[base_folder] * len(keys),
        keyed_paths=[None] * len(keys),
        spans=[None] * len(keys),
        sources=[0] * len(keys),
        fields=fields,
        columns=columns,
    )


def _decode_chunk(chunk: JsonChunk, base_folder: str) -> RecordBlock | None:
    """Build a block the fast way. Return None if anything is unusual: `parse_chunk` then accepts or refuses it."""
    escaped = b"\\u" in chunk.text  # most texts hold no escape, so that one search is enough
    if (escaped and any(mark in chunk.text for mark in SURROGATES)) or not _is_utf8(chunk.text):
        return None
    if _has_large_exponent(chunk.text):
        return None
    try:
        members = DECODER.decode(chunk.text)
    except (msgspec.MsgspecError, RecursionError):
        return None
    # The counts differ if there is a trailing comma, or if a key occurs twice.
    if not members or not len(members) == len(chunk.starts) == len(chunk.ends):
        return None
    keys, records = list(members), list(members.values())
    if not all(_is_usual(name, list(map(attrgetter(name), records))) for name in FIELDS):
        return None
    base_folders, keyed_paths = [base_folder] * len(keys), cast(list[str | None], [None] * len(keys))
    for at, record in enumerate(records):
        if record.image_path is None:  # pyright: ignore[reportAttributeAccessIssue]
            stem = get_image_stem(keys[at])
            if stem == keys[at]:
                base_folders[at] = ""
            else:
                keyed_paths[at], keys[at] = keys[at], stem
    if "" in keys:
        return None
    spans = zip(chunk.starts.tolist(), (chunk.ends + 1).tolist(), strict=True)
    return RecordBlock(
        keys=keys,
        contents=[chunk.text[start:end] for start, end in spans],
        base_folders=base_folders,
        keyed_paths=keyed_paths,
        spans=[None] * len(keys),
        sources=[0] * len(keys),
        fields=records,
    )


def _is_usual(name: str, values: Sequence[Any]) -> bool:
    """Return whether the values of a field need no second look: all can be read, and none has to be replaced."""
    types = set(map(type, values))
    if types == {type(None)}:
        return True
    if name == "image_path":
        return types <= {str, type(None)} and not any(value is not None and is_missing(value) for value in values)
    if name == "is_reg":
        return types <= {bool, type(None)}
    if name in SIDE_NAMES and types <= {int, type(None)}:
        return True
    items = set(map(type, chain.from_iterable(values if types == {list} else (v for v in values if type(v) is list))))
    if name in TEXT_FIELDS:
        weights = set(map(type, chain.from_iterable(v.values() for v in values if type(v) is dict)))
        return types <= ITEM_TYPES | {list, dict} and items <= ITEM_TYPES and weights <= ITEM_TYPES - {str}
    if types == {list} and items == {int} and set(map(len, values)) == {2}:
        return True
    return not any(map(partial(is_refused, name), values))


def _has_large_exponent(text: bytes) -> bool:
    """Return whether an object holds an exponent of three digits. orjson refuses numbers that no float can hold, and
    msgspec accepts them in fields that it skips."""
    codes = np.frombuffer(text, np.uint8)
    at = np.flatnonzero(((codes[:-5] | 0x20) == ord("e")) & (codes[1:-4] - ord("+") <= ord("9") - ord("+")))
    at = at + (codes[at + 1] == ord("+"))
    for place in (1, 2, 3):
        at = at[codes[at + place] - ord("0") < 10]
    return at.size > 0


def _is_utf8(text: bytes) -> bool:
    """Return whether a whole text is UTF-8. msgspec does not check the strings that it skips."""
    try:
        return text.isascii() or bool(text.decode())
    except UnicodeDecodeError:
        return False
