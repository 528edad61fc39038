"""Records joined with their latents: those that the cache's manifest lists, and those that no manifest does."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from sdxl_trainer.data.manifest import CRC_MARK, list_parts, read_entries
from sdxl_trainer.data.merge import stage
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
LATENT_SCHEMA = pa.schema([("key", pa.string()), ("caption", pa.string()), ("record", pa.binary()), *PLACE_FIELDS])
LISTED_SCHEMA = pa.schema([("key", pa.string()), ("listed_ns", pa.int64()), *PLACE_FIELDS])
LIST_FIELDS = {"bucket": 2, "original_size": 2, "resized": 2, "crop": 4}
LINE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("listed_ns", pa.int64()),
        ("file", pa.string()),
        *((name, pa.list_(pa.int32())) for name in LIST_FIELDS),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
    ]
)
PART_BYTES = 8 << 20
ONE_BLOCK = pj.ReadOptions(use_threads=False, block_size=4 * PART_BYTES)
CRC_TAIL = len(CRC_MARK) + len('"00000000"}\n')
FOUND_SCHEMA = pa.schema([("row", pa.int64()), *PLACE_FIELDS])


class DamagedLineError(ValueError):
    """A line of the manifest is not whole."""


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
    for batch in records.select(["key", "caption", "record"]).to_batches():
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
    """The manifest's lines, parsed by Arrow: five times as fast as one by one. Their CRC-32 is checked as ever.

    Raises:
        DamagedLineError: a line is damaged, and `read_entries` has to tell which.
    """
    options = pj.ParseOptions(explicit_schema=LINE_SCHEMA, unexpected_field_behavior="ignore")
    for part in list_parts(folder):
        with open(part, "rb") as stream:
            while lines := stream.readlines(PART_BYTES):
                if not lines[-1].endswith(b"\n"):  # torn, or being written just now
                    lines.pop()
                if not all(map(is_whole_line, lines)):
                    raise DamagedLineError
                try:
                    table = pj.read_json(pa.BufferReader(b"".join(lines)), ONE_BLOCK, options) if lines else None
                except pa.ArrowInvalid:
                    raise DamagedLineError from None
                if table is not None:
                    yield _build_listed(table.combine_chunks())


def is_whole_line(line: bytes) -> bool:
    """Whether a line's last field is the CRC-32 of the rest. A line without one may be whole too."""
    tail = line[-CRC_TAIL:]
    return tail.startswith(CRC_MARK) and b"%08x" % zlib.crc32(line[:-CRC_TAIL] + b"}") == tail[-11:-3]


def _build_listed(table: pa.Table) -> pa.RecordBatch:
    """Columns of LISTED_SCHEMA from those of LINE_SCHEMA.

    Raises:
        DamagedLineError: a field that every line has is missing.
    """
    lists = {}
    for name, length in LIST_FIELDS.items():
        column = table.column(name).chunk(0)
        if column.null_count or np.any(np.diff(column.offsets.to_numpy()) != length):
            raise DamagedLineError
        lists[name] = column.flatten().to_numpy().reshape(-1, length)
    digests = table.column("sha256").chunk(0)
    if any(table.column(name).null_count for name in ("key", "file", "bytes", "sha256")):
        raise DamagedLineError
    numbers = [*lists["bucket"].T, *lists["original_size"].T, lists["resized"][:, 0], *lists["crop"].T[:2]]
    return pa.record_batch(
        [
            table.column("key").chunk(0),
            table.column("listed_ns").chunk(0).fill_null(0),
            table.column("file").chunk(0),
            *(pa.array(np.ascontiguousarray(column), pa.int32()) for column in numbers),
            table.column("offset").chunk(0),
            table.column("bytes").chunk(0),
            pa.array([bytes.fromhex(digest) or None for digest in digests.to_pylist()], pa.binary()),
        ],
        LISTED_SCHEMA,
    )


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
    columns = zip(*rows, strict=True) if rows else [[] for _ in schema]
    return pa.record_batch([pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)], schema)
