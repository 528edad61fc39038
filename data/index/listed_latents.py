"""Latents that the cache's manifest lists, in files of latents that are kept for the next index.

A part of the manifest only grows, so each file holds a span of a part, and lines that were appended get a file of their
own. Each span has at least twice the bytes of the next one: a new file takes over the lines of smaller spans before it.
A part that grows every day for a year has about ten files, and each of its lines is read about ten times. The CRC-32 of
the span is in the file's name: a part that was written anew is read anew.

A manifest of millions of lines is decoded many lines at a time, which is five times as fast as `read_part`. If a line
is damaged, `read_part` reads the part instead: it names damaged lines and skips them.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import orjson
import pyarrow as pa
from isal.isal_zlib import crc32

from sdxl_trainer.data.counted_warnings import CountedWarnings
from sdxl_trainer.data.formats import manifest_columns
from sdxl_trainer.data.formats.manifest import CRC_MARK, ManifestEntry, list_manifest_parts, read_part
from sdxl_trainer.data.formats.manifest_columns import read_columns
from sdxl_trainer.data.index.index_file import open_undamaged
from sdxl_trainer.data.index.latent_files import write_latent_file
from sdxl_trainer.data.index.schema import LISTED_SCHEMA, VERSION, build_batch
from sdxl_trainer.data.stores.cache_mirror import read_store_url

ENTRIES_AT_ONCE = 16_384
PART_BYTES = 8 << 20  # of a manifest part, decoded at once
TAIL_BYTES = 64 << 10
# Columns of a manifest, and of latents where they have another name.
RENAMED = {
    "original_size_width": "original_width",
    "original_size_height": "original_height",
    "crop_left": "crop_left",
    "crop_top": "crop_top",
}
COLUMNS = [*RENAMED, *(name for name in LISTED_SCHEMA.names if name not in RENAMED.values())]
SPAN_NAME = re.compile(r"listed-([0-9a-f]+)-(\d+)-(\d+)-([0-9a-f]{8})\.arrow")
CRC_TAIL = len(CRC_MARK) + len('"00000000"}\n')  # bytes of a line's last field


class DamagedLineError(ValueError):
    """A line of the manifest is damaged."""


class ManifestLine(msgspec.Struct, gc=False):
    """The fields of a manifest line that the index needs, as in `ManifestEntry` of data/formats/manifest.py."""

    key: str
    file: str
    bytes: int
    sha256: str
    bucket: tuple[int, int]
    original_size: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int, int, int]
    identity: str
    listed_ns: int = 0
    offset: int | None = None
    flipped: bool | None = None
    text: dict[str, Any] | None = None


DECODER = msgspec.json.Decoder(ManifestLine)


class ListedLatents(NamedTuple):
    """Files of latents that hold all lines of a manifest."""

    paths: list[Path]
    parts: list[int]  # number of the manifest's part that each file is of, ascending


class _Span(NamedTuple):
    """The bytes of a part of the manifest that a file of latents holds."""

    start: int
    end: int
    crc: int


def build_listed_latents(cache_folder: Path, folder: Path) -> ListedLatents:
    """Return files of latents with all lines of the manifest. Those that do not exist in `folder` are written."""
    listed, base = ListedLatents([], []), read_store_url(cache_folder) or ""
    known = _list_spans(folder)
    for number, part in enumerate(list_manifest_parts(cache_folder)):
        paths = _build_part(part, folder, base, known)
        listed.paths.extend(paths)
        listed.parts.extend([number] * len(paths))
    return listed


def _list_spans(folder: Path) -> dict[str, list[_Span]]:
    """List the spans of parts of the manifest that have files, by the name of the part in them."""
    spans: dict[str, list[_Span]] = {}
    for path in folder.glob("listed-*.arrow"):
        if match := SPAN_NAME.fullmatch(path.name):
            spans.setdefault(match[1], []).append(_Span(int(match[2]), int(match[3]), int(match[4], 16)))
    return spans


def _build_part(part: Path, folder: Path, base: str, known: Mapping[str, list[_Span]]) -> list[Path]:
    """Return the files of a part of the manifest, with the URL `base` before its shards.

    Args:
        known: spans that have files, by the name of the part (`_list_spans`).
    """
    name = hashlib.sha256(orjson.dumps([VERSION, os.path.abspath(part)])).hexdigest()[:16]
    if part.suffix == manifest_columns.SUFFIX:
        return [_build_columns(part, folder, name, base)]
    end = _find_last_line_end(part)
    spans = _find_spans(part, folder, name, end, known.get(name, []))
    start = spans[-1].end if spans else 0
    if start < end:
        while spans and spans[-1].end - spans[-1].start < 2 * (end - start):
            start = spans.pop().start
    paths = [folder / _build_name(name, span) for span in spans]
    if start == end:
        return paths
    span = _Span(start, end, _compute_crc(part, start, end))
    try:
        path = folder / _build_name(name, span)
        write_latent_file(path, lambda: _decode_span(part, span), is_listed=True, base=base)
        return [*paths, path]
    except DamagedLineError:
        path = folder / _build_name(name, _Span(0, end, _compute_crc(part, 0, end)))
        write_latent_file(path, lambda: _read_undamaged_lines(part), is_listed=True, base=base)
        return [path]


def _build_columns(part: Path, folder: Path, name: str, base: str) -> Path:
    """Return the file of a part of the manifest that is stored as columns."""
    status = os.stat(part)
    path = folder / f"listed-{name}-{status.st_size}-{status.st_mtime_ns}.arrow"
    if open_undamaged(path, is_part=True) is None:
        warnings = CountedWarnings("damaged line skipped", "the log file")
        damaged: list[str] = []
        write_latent_file(
            path, lambda: map(_list_columns, read_columns(part, damaged, COLUMNS)), is_listed=True, base=base
        )
        for place in dict.fromkeys(damaged):
            warnings.add(place)
    return path


def _list_columns(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return columns of a manifest as columns of LISTED_SCHEMA."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for stored, name in RENAMED.items():
        columns[name] = columns[stored]
    arrays = [
        pa.array(columns[field.name].to_pylist(), field.type)
        if field.name == "text" and columns["text"].null_count < len(batch)
        else columns[field.name].cast(field.type)
        for field in LISTED_SCHEMA
    ]
    return pa.record_batch(arrays, LISTED_SCHEMA)


def _build_name(name: str, span: _Span) -> str:
    return f"listed-{name}-{span.start}-{span.end}-{span.crc:08x}.arrow"


def _find_spans(part: Path, folder: Path, name: str, end: int, spans: Sequence[_Span]) -> list[_Span]:
    """Return the spans from the beginning of a part that have files, one after the other, and have not changed."""
    chain: list[_Span] = []
    place = 0
    while following := [span for span in spans if span.start == place and place < span.end <= end]:
        for span in sorted(following, reverse=True):
            is_same = _compute_crc(part, span.start, span.end) == span.crc
            if is_same and open_undamaged(folder / _build_name(name, span), is_part=True) is not None:
                chain.append(span)
                place = span.end
                break
        else:
            break
    return chain


def _find_last_line_end(part: Path) -> int:
    """Return the end of the last whole line. A job may be writing the line after it, or was killed while it did."""
    with open(part, "rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - TAIL_BYTES)
            stream.seek(start)
            newline = stream.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def _compute_crc(part: Path, start: int, end: int) -> int:
    crc = 0
    with open(part, "rb") as stream:
        stream.seek(start)
        while start < end and (block := stream.read(min(PART_BYTES, end - start))):
            crc, start = crc32(block, crc), start + len(block)
    return crc


def _decode_span(part: Path, span: _Span) -> Iterator[pa.RecordBatch]:
    """Yield the lines of a span as columns.

    Raises:
        DamagedLineError: a line is damaged, or lacks a field.
    """
    with open(part, "rb") as stream:
        stream.seek(span.start)
        while stream.tell() < span.end:
            lines = stream.readlines(min(PART_BYTES, span.end - stream.tell()))
            yield _decode_lines(lines)


def _decode_lines(lines: list[bytes]) -> pa.RecordBatch:
    verify_lines(lines)
    try:
        return _build_listed_batch(DECODER.decode_lines(b"".join(lines)))
    except (ValueError, msgspec.MsgspecError):
        raise DamagedLineError from None


def verify_lines(lines: list[bytes]) -> None:
    """Verify that each line ends with the CRC-32 of the rest of it.

    Raises:
        DamagedLineError: the CRC-32 of a line differs or is missing. (`read_part` accepts lines without one.)
    """
    crcs = np.array([crc32(line[:-CRC_TAIL] + b"}") for line in lines], np.uint32)
    tails = b"".join([line[-CRC_TAIL:] for line in lines])
    if tails != b"".join([CRC_MARK + b'"%08x"}\n' % crc for crc in crcs.tolist()]):
        raise DamagedLineError


def _read_undamaged_lines(part: Path) -> Iterator[pa.RecordBatch]:
    """Yield the undamaged lines of a part as columns."""
    entries = read_part(part)
    while chunk := list(islice(entries, ENTRIES_AT_ONCE)):
        yield _build_listed_batch(chunk)


def _build_listed_batch(entries: Sequence[ManifestLine] | Sequence[ManifestEntry]) -> pa.RecordBatch:
    """Return lines of the manifest as columns of LISTED_SCHEMA.

    Raises:
        ValueError: a SHA-256 is not hexadecimal.
    """
    columns = [
        [entry.key for entry in entries],
        [entry.listed_ns for entry in entries],
        [entry.identity for entry in entries],
        [entry.file for entry in entries],
        [entry.bucket[0] for entry in entries],
        [entry.bucket[1] for entry in entries],
        [entry.original_size[0] for entry in entries],
        [entry.original_size[1] for entry in entries],
        [entry.resized[0] for entry in entries],
        [entry.crop[0] for entry in entries],
        [entry.crop[1] for entry in entries],
        [entry.offset for entry in entries],
        [entry.bytes for entry in entries],
        [bytes.fromhex(entry.sha256) or None for entry in entries],
        [entry.flipped for entry in entries],
        [entry.text if entry.text is None or isinstance(entry.text, dict) else asdict(entry.text) for entry in entries],
    ]
    return build_batch(columns, LISTED_SCHEMA)
