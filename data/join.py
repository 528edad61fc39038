"""Records joined with their latents: those that the cache's manifest lists, and those that no manifest does."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from isal.isal_zlib import crc32

from sdxl_trainer.data.manifest import CRC_MARK, list_parts, read_entries
from sdxl_trainer.data.merge import stage
from sdxl_trainer.data.records import RECORD_SCHEMA
from sdxl_trainer.data.unlisted import Header, Place, find_unlisted, place_unlisted, read_headers

ENTRIES_AT_ONCE = 16_384
MAX_NAMED = 100_000  # bad files that are named
PLACE_FIELDS = [
    ("file", pa.string()),  # relative to the cache folder, or absolute
    ("bucket_width", pa.int32()),
    ("bucket_height", pa.int32()),
    ("original_width", pa.int32()),
    ("original_height", pa.int32()),
    ("resized_width", pa.int32()),
    ("crop_left", pa.int32()),
    ("crop_top", pa.int32()),
    ("offset", pa.int64()),  # of the npz in the shard; null: a file of its own
    ("bytes", pa.int64()),
    ("sha256", pa.binary()),  # of the npz; null: no manifest lists it
]
RECORD_COLUMNS = ["key", "image_path", "caption", "record"]
LATENT_SCHEMA = pa.schema([*(RECORD_SCHEMA.field(name) for name in RECORD_COLUMNS), *PLACE_FIELDS])
LISTED_SCHEMA = pa.schema([("key", pa.string()), ("listed_ns", pa.int64()), *PLACE_FIELDS])
PART_BYTES = 8 << 20
CRC_TAIL = len(CRC_MARK) + len('"00000000"}\n')
FOUND_SCHEMA = pa.schema([("row", pa.int64()), *PLACE_FIELDS])


class DamagedLineError(ValueError):
    """A line of the manifest is not whole."""


class Line(msgspec.Struct, gc=False):
    """What of a manifest's line is wanted; `Entry` of data/manifest.py says what it means."""

    key: str
    file: str
    bytes: int
    sha256: str
    bucket: tuple[int, int]
    original_size: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int, int, int]
    listed_ns: int = 0
    offset: int | None = None


DECODER = msgspec.json.Decoder(Line)


@dataclass(frozen=True)
class Joined:
    """Which latents each record has."""

    places: list[pa.Table]  # with the PLACE_FIELDS, one after the other
    place_of_record: np.ndarray  # [N] row of the places, -1 without latents


@contextmanager
def join_latents(folder: Path, records: pa.Table, captioned_only: bool) -> Iterator[tuple[Joined, dict[str, Any]]]:
    """Find the latents of all records; also what is to be noted about it (data/index.py, `open_latent_index`).

    Args:
        folder: the cache's.
        captioned_only: leave out records without a caption.
    """
    work = folder / "index"
    watched: set[str] = set()
    notes: dict[str, Any] = {"num_assumed_sizes": 0, "bad": []}
    with _stage_entries(folder, work) as listed:
        place_of_record = _match_entries(listed, records.column("key"))
        wanted = place_of_record < 0
        if captioned_only:
            uncaptioned = records.column("caption").is_null().to_numpy()
            place_of_record[uncaptioned] = -1
            wanted &= ~uncaptioned
        places = find_unlisted(records, np.flatnonzero(wanted), folder, watched)
        with stage(work, FOUND_SCHEMA, _list_found(read_headers(places, work), records, notes)) as found:
            place_of_record[found.column("row").to_numpy()] = len(listed) + np.arange(len(found))
            notes |= {"num_unlisted": len(found), "watched": sorted(watched)}
            tables = [table.select([name for name, _ in PLACE_FIELDS]) for table in (listed, found)]
            yield Joined(tables, place_of_record), notes


def iterate_joined(joined: Joined, records: pa.Table, release: Callable[[], None]) -> Iterator[pa.RecordBatch]:
    """The records that have latents, with them, in their order.

    Args:
        release: gives the mapped pages of the records back, which have been copied.
    """
    table = pa.concat_tables(joined.places)
    columns = [table.column(name).combine_chunks() for name, _ in PLACE_FIELDS]
    start = 0
    for batch in records.select(RECORD_COLUMNS).to_batches():
        places = joined.place_of_record[start : start + len(batch)]
        start += len(batch)
        rows = np.flatnonzero(places >= 0)
        left = batch if len(rows) == len(batch) else batch.take(pa.array(rows))
        right = [column.take(pa.array(places[rows])) for column in columns]
        yield pa.record_batch([*left.columns, *right], LATENT_SCHEMA)
        release()


@contextmanager
def _stage_entries(folder: Path, work: Path) -> Iterator[pa.Table]:
    """The manifest's lines as columns."""
    with ExitStack() as stack:
        try:
            yield stack.enter_context(stage(work, LISTED_SCHEMA, _parse_parts(folder)))
        except DamagedLineError:
            yield stack.enter_context(stage(work, LISTED_SCHEMA, _list_entries(folder)))


def _parse_parts(folder: Path) -> Iterator[pa.RecordBatch]:
    """The manifest's lines, many at once: five times as fast as one by one. Their CRC-32 is checked as ever.

    Raises:
        DamagedLineError: a line is damaged, and `read_entries` has to tell which.
    """
    for part in list_parts(folder):
        with open(part, "rb") as stream:
            while lines := stream.readlines(PART_BYTES):
                if not lines[-1].endswith(b"\n"):  # torn, or being written just now
                    lines.pop()
                if lines:
                    yield _build_listed(lines)


def check_lines(lines: list[bytes]) -> None:
    """Raises DamagedLineError unless each line's last field is the CRC-32 of the rest. One without may be whole too."""
    crcs = np.array([crc32(line[:-CRC_TAIL] + b"}") for line in lines], np.uint32)
    tails = b"".join([line[-CRC_TAIL:] for line in lines])
    if tails != b"".join([CRC_MARK + b'"%08x"}\n' % crc for crc in crcs.tolist()]):
        raise DamagedLineError


def _build_listed(lines: list[bytes]) -> pa.RecordBatch:
    """Columns of LISTED_SCHEMA.

    Raises:
        DamagedLineError: a line is not whole, or of another form.
    """
    check_lines(lines)
    try:
        listed = DECODER.decode_lines(b"".join(lines))
        digests = [bytes.fromhex(line.sha256) or None for line in listed]
    except (ValueError, msgspec.MsgspecError):
        raise DamagedLineError from None
    sizes = [(*line.bucket, *line.original_size, line.resized[0], *line.crop[:2]) for line in listed]
    numbers = np.array(sizes, np.int32).T
    columns = [
        [line.key for line in listed],
        [line.listed_ns for line in listed],
        [line.file for line in listed],
        *map(np.ascontiguousarray, numbers),
        [line.offset for line in listed],
        [line.bytes for line in listed],
        digests,
    ]
    return _build_columns(columns, LISTED_SCHEMA)


def _list_entries(folder: Path) -> Iterator[pa.RecordBatch]:
    """The manifest's lines as columns."""
    entries = read_entries(folder)
    while some := list(islice(entries, ENTRIES_AT_ONCE)):
        rows = [
            (
                entry.key,
                entry.listed_ns,
                entry.file,
                *entry.bucket,
                *entry.original_size,
                entry.resized[0],
                *entry.crop[:2],
                entry.offset,
                entry.bytes,
                bytes.fromhex(entry.sha256) or None,
            )
            for entry in some
        ]
        yield _build_batch(rows, LISTED_SCHEMA)


def _match_entries(listed: pa.Table, keys: pa.ChunkedArray) -> np.ndarray:
    """[N] for each key the row of its entry that was listed last, or -1."""
    rows = pc.call_function("index_in", [listed.column("key")], pc.SetLookupOptions(keys.combine_chunks()))
    rows = rows.fill_null(-1).to_numpy()
    order = np.argsort(listed.column("listed_ns").to_numpy(), kind="stable")
    order = order[rows[order] >= 0]
    place_of_record = np.full(len(keys), -1, np.int64)
    place_of_record[rows[order]] = order  # of several, the last assignment stays
    return place_of_record


def _list_found(headers: Iterator[tuple[Place, Header | Exception]], records: pa.Table,
                notes: dict[str, Any]) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """Unlisted latents as columns. Bad ones, and those whose original size is assumed, are noted."""
    keys = records.column("key")
    widths, heights = (records.column(name).to_numpy() for name in ("width", "height"))
    while some := list(islice(headers, ENTRIES_AT_ONCE)):
        rows = []
        for place, header in some:
            if isinstance(header, Exception):
                if len(notes["bad"]) < MAX_NAMED:
                    notes["bad"].append([keys[place.row].as_py(), f"{place.file}: {header}"])
                continue
            known = (int(widths[place.row]), int(heights[place.row]))
            notes["num_assumed_sizes"] += header.original_size is None and known == (0, 0)
            size = header.original_size or (known if known != (0, 0) else header.bucket)
            placement = place_unlisted(header, size)
            rows.append(
                (place.row, place.file, *header.bucket, *size, placement.resized[0], placement.left, placement.top,
                 place.offset, header.bytes, None)
            )  # fmt: skip
        yield _build_batch(rows, FOUND_SCHEMA)


def _build_batch(rows: list[tuple], schema: pa.Schema) -> pa.RecordBatch:
    return _build_columns(list(zip(*rows, strict=True)) if rows else [[] for _ in schema], schema)


def _build_columns(columns: list[Any], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    return pa.record_batch(arrays, schema)
