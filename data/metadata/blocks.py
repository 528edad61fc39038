"""Blocks of records as columns: what every form of metadata becomes before images are found and captions settled.

A JSON object of records, the form of the largest sets, is decoded by msgspec into the few fields that the index needs,
and each record's bytes are kept as they stand in the file. That is five times as fast as a dict for each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import msgspec
import orjson

from sdxl_trainer.data.images.image_files import strip_suffix
from sdxl_trainer.data.metadata.json_stream import JsonChunk, iterate_chunks
from sdxl_trainer.data.metadata.sources import (
    BASE,
    NAME,
    NPZ,
    SOURCE,
    KeyedRecords,
    detect_format,
    parse_chunk,
    read_metadata_file,
)

Place = tuple[str, int, int]  # tar, offset and bytes of latents that came with a record

SIZE_FIELDS = ("original_size", "image_size", "train_resolution")
SIDE_FIELDS = (("width", "height"), ("image_width", "image_height"))
TEXT_FIELDS = ("caption", "tags", "description", "nl_caption")
FIELDS = ("image_path", *TEXT_FIELDS, *SIZE_FIELDS, *(name for names in SIDE_FIELDS for name in names))

Fields = msgspec.defstruct("Fields", [(name, Any, None) for name in FIELDS], gc=False)
DECODER = msgspec.json.Decoder(dict[str, Fields])
SURROGATES = (b"\\ud", b"\\uD")  # orjson refuses half a pair


@dataclass
class Block:
    """Some records, each list with one element a record."""

    keys: list[str]
    contents: list[bytes]  # the record as JSON
    bases: list[str]  # folder that a relative path of the record is relative to
    names: list[str | None]  # the image's path, where it was the record's key
    places: list[Place | None]
    sources: list[int]  # number of the setting's entry
    rows: list[Any]  # holds the FIELDS: dicts, or Fields

    def column(self, name: str) -> list[Any]:
        """One of the FIELDS, None where a record lacks it."""
        if self.rows and isinstance(self.rows[0], dict):
            return [row.get(name) for row in self.rows]
        return list(map(attrgetter(name), self.rows))


def build_block(items: KeyedRecords) -> Block:
    """Records of any form as a block."""
    special = (BASE, NAME, NPZ, SOURCE)
    bases, names, places, sources = ([fields.pop(name, None) for _, fields in items] for name in special)
    return Block(
        keys=[key for key, _ in items],
        contents=[orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY, default=str) for _, fields in items],
        bases=[base or "" for base in bases],
        names=names,
        places=places,
        sources=[source or 0 for source in sources],
        rows=[fields for _, fields in items],
    )


def read_blocks(file: Path) -> Iterator[Block]:
    """The records of one metadata file, in its order.

    Raises:
        ValueError: malformed; the file and the place in it are named.
    """
    if detect_format(file) != "json":
        yield from map(build_block, read_metadata_file(file))
        return
    for piece in iterate_chunks(file):
        yield _decode_piece(piece, str(file.parent)) or build_block(parse_chunk(file, piece))


def _decode_piece(piece: JsonChunk, base: str) -> Block | None:
    """The fast way, or None where something is out of the ordinary: orjson then tells what."""
    escaped = b"\\u" in piece.text  # most texts have none, and are searched but once
    if (escaped and any(mark in piece.text for mark in SURROGATES)) or not _is_utf8(piece.text):
        return None
    try:
        members = DECODER.decode(piece.text)
    except msgspec.MsgspecError:
        return None
    if not members or not len(members) == len(piece.starts) == len(piece.ends):  # a trailing comma, a key that is twice
        return None
    keys, rows = list(members), list(members.values())
    if dict in {type(row.caption) for row in rows}:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    bases, names = [base] * len(keys), cast(list[str | None], [None] * len(keys))
    for at, row in enumerate(rows):
        if row.image_path is None:  # pyright: ignore[reportAttributeAccessIssue]
            stem = strip_suffix(keys[at])
            if stem == keys[at]:
                bases[at] = ""
            else:
                names[at], keys[at] = keys[at], stem
    if "" in keys:
        return None
    spans = zip(piece.starts.tolist(), (piece.ends + 1).tolist(), strict=True)
    contents = [piece.text[start:end] for start, end in spans]
    return Block(keys, contents, bases, names, [None] * len(keys), [0] * len(keys), rows)


def _is_utf8(text: bytes) -> bool:
    """Whether all of it is, also the strings that msgspec passes over."""
    try:
        return text.isascii() or bool(text.decode())
    except UnicodeDecodeError:
        return False
