"""Blocks of records as columns: the common form of all metadata formats, before images are found.

msgspec decodes a JSON object of records, the format of the largest sets, into the few fields that the index needs. Each
record's JSON is kept as it is in the file. That is five times as fast as building a dict for each record.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import msgspec
import orjson

from sdxl_trainer.data.images.image_files import get_image_stem
from sdxl_trainer.data.metadata.json_stream import JsonChunk, iterate_chunks
from sdxl_trainer.data.metadata.sources import (
    ShardSpan,
    SourceRecord,
    detect_format,
    parse_chunk,
    read_metadata_file,
)

SIZE_FIELDS = ("original_size", "image_size", "train_resolution")
SIDE_FIELDS = (("width", "height"), ("image_width", "image_height"))
TEXT_FIELDS = ("caption", "tags", "description", "nl_caption")
FIELDS = ("image_path", *TEXT_FIELDS, *SIZE_FIELDS, *(name for names in SIDE_FIELDS for name in names))

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

    def column(self, name: str) -> list[Any]:
        """Return one of the FIELDS as a list, with None for each record that lacks it."""
        if self.fields and isinstance(self.fields[0], dict):
            return [fields.get(name) for fields in self.fields]
        return list(map(attrgetter(name), self.fields))


def build_block(records: Sequence[SourceRecord]) -> RecordBlock:
    """Build a block from records of any format."""
    return RecordBlock(
        keys=[record.key for record in records],
        contents=[dump_json(record.fields) for record in records],
        base_folders=[record.base_folder for record in records],
        keyed_paths=[record.keyed_path for record in records],
        spans=[record.span for record in records],
        sources=[record.source for record in records],
        fields=[record.fields for record in records],
    )


def dump_json(value: Any) -> bytes:
    """Return a value as JSON. Values that JSON has no type for, such as dates of a Parquet table, become strings."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY, default=str)


def read_blocks(file: Path) -> Iterator[RecordBlock]:
    """Yield the records of one metadata file, in its order.

    Raises:
        ValueError: the file is malformed; the message names the file and the place in it.
    """
    if detect_format(file) != "json":
        yield from map(build_block, read_metadata_file(file))
        return
    for chunk in iterate_chunks(file):
        yield _decode_chunk(chunk, str(file.parent)) or build_block(parse_chunk(file, chunk))


def _decode_chunk(chunk: JsonChunk, base_folder: str) -> RecordBlock | None:
    """Build a block the fast way. Return None if anything is unusual: `parse_chunk` then accepts or refuses it."""
    escaped = b"\\u" in chunk.text  # most texts hold no escape, so that one search is enough
    if (escaped and any(mark in chunk.text for mark in SURROGATES)) or not _is_utf8(chunk.text):
        return None
    try:
        members = DECODER.decode(chunk.text)
    except msgspec.MsgspecError:
        return None
    # The counts differ if there is a trailing comma, or if a key occurs twice.
    if not members or not len(members) == len(chunk.starts) == len(chunk.ends):
        return None
    keys, records = list(members), list(members.values())
    if dict in {type(record.caption) for record in records}:  # pyright: ignore[reportAttributeAccessIssue]
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


def _is_utf8(text: bytes) -> bool:
    """Return whether a whole text is UTF-8. msgspec does not check the strings that it skips."""
    try:
        return text.isascii() or bool(text.decode())
    except UnicodeDecodeError:
        return False
