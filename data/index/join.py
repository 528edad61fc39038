"""Records joined with their latents: those that the cache's manifest lists, and those that no manifest does."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from isal.isal_zlib import crc32

from sdxl_trainer.data.formats.manifest import CRC_MARK, list_manifest_parts, read_entries
from sdxl_trainer.data.images.image_files import LATENT_SUFFIX
from sdxl_trainer.data.index.missing_latents import EncodingSettings, plan_missing_latents
from sdxl_trainer.data.index.unlisted_latents import (
    LatentHeader,
    LatentLocation,
    find_unlisted_latents,
    infer_placement,
    read_latent_headers,
)
from sdxl_trainer.data.metadata.merge import spill_batches
from sdxl_trainer.data.metadata.records import RECORD_SCHEMA

ENTRIES_AT_ONCE = 16_384
MAX_NAMED = 100_000  # bad files that are named
TEXT_FIELDS = pa.struct(
    [
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("variants", pa.int32()),
        ("identity", pa.string()),
        ("captions_sha256", pa.string()),
    ]
)
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
    ("bytes", pa.int64()),  # null: there are none yet, `file` is where they will be
    ("sha256", pa.binary()),  # of the npz; null: no manifest lists it
    ("flipped", pa.bool_()),  # it holds latents of the mirrored image too; null: the manifest does not tell
    ("text", TEXT_FIELDS),  # where the text encoders' outputs are, and of what; null: not cached
]
RECORD_COLUMNS = ["key", "image_path", "record", "source"]
LATENT_SCHEMA = pa.schema([*(RECORD_SCHEMA.field(name) for name in RECORD_COLUMNS), *PLACE_FIELDS])
LISTED_SCHEMA = pa.schema([("key", pa.string()), ("listed_ns", pa.int64()), ("identity", pa.string()), *PLACE_FIELDS])
PART_BYTES = 8 << 20
CRC_TAIL = len(CRC_MARK) + len('"00000000"}\n')
FOUND_SCHEMA = pa.schema([("row", pa.int64()), ("prefix", pa.string()), *PLACE_FIELDS])


class DamagedLineError(ValueError):
    """A line of the manifest is not whole."""


class ManifestLine(msgspec.Struct, gc=False):
    """What of a manifest's line is wanted; `ManifestEntry` of data/formats/manifest.py says what it means."""

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
    text: dict[str, Any] | None = None  # as TEXT_FIELDS


DECODER = msgspec.json.Decoder(ManifestLine)
GET_SIZES = attrgetter("bucket", "original_size", "resized", "crop")
NUM_SIDES, INDEXED_SIDES = (
    10,
    (0, 1, 2, 3, 4, 6, 7),
)  # all of them together; those that have a column: not resized's height


@dataclass(frozen=True)
class LatentSelection:
    """Which latents are looked for."""

    captioned_only: bool = False  # leave out records without a caption
    prefixes: tuple[str, ...] = ("",)  # of each resolution, before the keys of its latents
    encoding: EncodingSettings | None = None  # how those of other images will be made; None: such are left out


ALL_LATENTS = LatentSelection()


@dataclass(frozen=True)
class JoinedLatents:
    """Which latents each record has at each resolution."""

    places: list[pa.Table]  # with the PLACE_FIELDS, one after the other
    place_of_record: dict[str, np.ndarray]  # prefix → [N] row of the places, -1 without latents


@contextmanager
def join_latents(
    folder: Path, records: pa.Table, selection: LatentSelection
) -> Iterator[tuple[JoinedLatents, dict[str, Any]]]:
    """Find the latents of all records; also what is to be noted about it (data/index/index.py, `open_sample_index`).

    Args:
        folder: the cache's.
    """
    work = folder / "index"
    watched: set[str] = set()
    notes: dict[str, Any] = {"num_wanted": 0, "num_assumed_sizes": 0, "bad": [], "identities": {}}
    with _stage_entries(folder, work) as listed:
        matched, missing = {}, {}
        for prefix in selection.prefixes:
            wanted = _list_wanted(records, selection.captioned_only, prefix)
            place_of_record = _match_entries(listed, add_prefix(prefix, records.column("key")))
            matched[prefix] = np.where(wanted, place_of_record, -1)
            missing[prefix] = wanted & (place_of_record < 0)
            notes["num_wanted"] += int(wanted.sum())
            notes["identities"][prefix] = _count_identities(listed, matched[prefix])
        places = chain.from_iterable(
            find_unlisted_latents(records, np.flatnonzero(rows), folder, watched, prefix)
            for prefix, rows in missing.items()
        )
        with spill_batches(
            work, FOUND_SCHEMA, _list_found(read_latent_headers(places, work), records, missing, notes)
        ) as found:
            _match_found(found, len(listed), matched)
            uncached = _list_uncached(records, missing, selection.encoding, notes)
            with spill_batches(work, FOUND_SCHEMA, uncached) as planned:
                _match_found(planned, len(listed) + len(found), matched)
                notes |= {"num_unlisted": len(found), "num_uncached": len(planned), "watched": sorted(watched)}
                tables = [table.select([name for name, _ in PLACE_FIELDS]) for table in (listed, found, planned)]
                notes["other_sizes"] = _describe_other_sizes(records, tables, matched)
                yield JoinedLatents(tables, matched), notes


def _describe_other_sizes(records: pa.Table, places: list[pa.Table], matched: dict[str, np.ndarray]) -> str:
    """Which records' metadata tell another size than their latents, or "". Not those that tell the bucket's, as kohya's
    `train_resolution` does."""
    tables = {"": [records], "original_": places, "bucket_": places}
    told, found, bucket = (
        np.stack([pa.concat_tables(some).column(f"{name}{side}").to_numpy() for side in ("width", "height")])
        for name, some in tables.items()
    )
    parts = []
    for place_of_record in matched.values():
        rows = np.flatnonzero((place_of_record >= 0) & (told[0] > 0))
        at = place_of_record[rows]
        differs = (told[:, rows] != found[:, at]).any(0) & (told[:, rows] != bucket[:, at]).any(0)
        parts.append(np.stack([rows[differs], at[differs]]))
    rows, at = np.concatenate(parts, axis=1)
    if len(rows) == 0:
        return ""
    key, *sizes = records.column("key")[int(rows[0])], *told[:, rows[0]], *found[:, at[0]]
    differing = np.zeros(len(records), bool)
    differing[rows] = True  # a record counts once, at however many resolutions
    return "{} records tell another size than their images have, {} first ({}x{} and not {}x{})".format(
        int(differing.sum()), key, *sizes
    )


def add_prefix(prefix: str, keys: Any) -> Any:
    """Keys of latents at a resolution from the keys of the records."""
    return pc.call_function("binary_join_element_wise", [pa.scalar(prefix), keys, pa.scalar("")]) if prefix else keys


def _list_wanted(records: pa.Table, captioned_only: bool, prefix: str) -> np.ndarray:
    """[N] bool: whether latents of each record are looked for; of one that names latents at one resolution only."""
    wanted = np.ones(len(records), bool)
    if captioned_only:
        wanted &= records.column("captioned").to_numpy()
    return wanted & _are_images(records) if prefix else wanted


def _are_images(records: pa.Table) -> np.ndarray:
    """[N] bool: whether each record names an image, and not latents in place of it."""
    given = pc.call_function("ends_with", [records.column("image_path")], pc.MatchSubstringOptions(LATENT_SUFFIX))
    return records.column("offset").is_null().to_numpy() & ~given.to_numpy()


def iterate_sample_rows(
    joined: JoinedLatents, records: pa.Table, release: Callable[[], None]
) -> Iterator[pa.RecordBatch]:
    """The records that have latents, with them, in their order.

    Args:
        release: gives the mapped pages of the records back, which have been copied.
    """
    table = pa.concat_tables(joined.places)
    columns = [table.column(name).combine_chunks() for name, _ in PLACE_FIELDS]
    for prefix, place_of_record in joined.place_of_record.items():
        start = 0
        for batch in records.select(RECORD_COLUMNS).to_batches():
            places = place_of_record[start : start + len(batch)]
            start += len(batch)
            rows = np.flatnonzero(places >= 0)
            keys, *left = (batch if len(rows) == len(batch) else batch.take(pa.array(rows))).columns
            right = [column.take(pa.array(places[rows])) for column in columns]
            yield pa.record_batch([add_prefix(prefix, keys), *left, *right], LATENT_SCHEMA)
            release()


@contextmanager
def _stage_entries(folder: Path, work: Path) -> Iterator[pa.Table]:
    """The manifest's lines as columns."""
    with ExitStack() as stack:
        try:
            yield stack.enter_context(spill_batches(work, LISTED_SCHEMA, _parse_parts(folder)))
        except DamagedLineError:
            yield stack.enter_context(spill_batches(work, LISTED_SCHEMA, _list_entries(folder)))


def _parse_parts(folder: Path) -> Iterator[pa.RecordBatch]:
    """The manifest's lines, many at once: five times as fast as one by one. Their CRC-32 is checked as ever.

    Raises:
        DamagedLineError: a line is damaged, and `read_entries` has to tell which.
    """
    for part in list_manifest_parts(folder):
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
    sides = chain.from_iterable(chain.from_iterable(map(GET_SIZES, listed)))
    numbers = np.fromiter(sides, np.int32, NUM_SIDES * len(listed)).reshape(-1, NUM_SIDES)
    columns = [
        [line.key for line in listed],
        [line.listed_ns for line in listed],
        [line.identity for line in listed],
        [line.file for line in listed],
        *(np.ascontiguousarray(numbers[:, side]) for side in INDEXED_SIDES),
        [line.offset for line in listed],
        [line.bytes for line in listed],
        digests,
        [line.flipped for line in listed],
        [line.text for line in listed],
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
                entry.identity,
                entry.file,
                *entry.bucket,
                *entry.original_size,
                entry.resized[0],
                *entry.crop[:2],
                entry.offset,
                entry.bytes,
                bytes.fromhex(entry.sha256) or None,
                entry.flipped,
                entry.text and {field.name: getattr(entry.text, field.name) for field in TEXT_FIELDS},
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


def _count_identities(listed: pa.Table, place_of_record: np.ndarray) -> dict[str, int]:
    """How many of the entries that were found were made under each identity."""
    made = listed.column("identity").take(pa.array(place_of_record[place_of_record >= 0]))
    return {each["values"]: each["counts"] for each in pc.call_function("value_counts", [made]).to_pylist()}


def _match_found(found: pa.Table, start: int, matched: dict[str, np.ndarray]) -> None:
    """Note of each record that its place is among `found`, the first of which is row `start` of all places."""
    rows = found.column("row").to_numpy()
    for prefix, place_of_record in matched.items():
        those = pc.call_function("equal", [found.column("prefix"), pa.scalar(prefix)]).to_numpy()
        place_of_record[rows[those]] = start + np.flatnonzero(those)


def _list_found(
    headers: Iterator[tuple[LatentLocation, LatentHeader | Exception]],
    records: pa.Table,
    missing: dict[str, np.ndarray],
    notes: dict[str, Any],
) -> Iterator[pa.RecordBatch]:
    """Unlisted latents as columns. Bad ones, and those whose original size is assumed, are noted. None of these is
    `missing` any more."""
    keys = records.column("key")
    widths, heights = (records.column(name).to_numpy() for name in ("width", "height"))
    while some := list(islice(headers, ENTRIES_AT_ONCE)):
        rows = []
        for place, header in some:
            missing[place.prefix][place.row] = False
            if isinstance(header, Exception):
                if len(notes["bad"]) < MAX_NAMED:
                    notes["bad"].append([place.prefix + keys[place.row].as_py(), f"{place.file}: {header}"])
                continue
            known = (int(widths[place.row]), int(heights[place.row]))
            notes["num_assumed_sizes"] += header.original_size is None and known == (0, 0)
            size = header.original_size or (known if known != (0, 0) else header.bucket)
            placement = infer_placement(header, size)
            rows.append(
                (
                    place.row,
                    place.prefix,
                    place.file,
                    *header.bucket,
                    *size,
                    placement.resized[0],
                    placement.left,
                    placement.top,
                    place.offset,
                    header.bytes,
                    None,
                    header.flipped,
                    None,
                )
            )
        yield _build_batch(rows, FOUND_SCHEMA)


def _list_uncached(
    records: pa.Table, missing: dict[str, np.ndarray], encoding: EncodingSettings | None, notes: dict[str, Any]
) -> Iterator[pa.RecordBatch]:
    """Where the latents of images that have none will be, as columns. Images that cannot be used are noted."""
    if encoding is None:
        return
    images = _are_images(records)
    places = chain.from_iterable(
        plan_missing_latents(records, np.flatnonzero(rows & images), prefix, encoding)
        for prefix, rows in missing.items()
    )
    while some := list(islice(places, ENTRIES_AT_ONCE)):
        rows = []
        for place in some:
            if isinstance(place, tuple):
                notes["bad"] += [list(place)] if len(notes["bad"]) < MAX_NAMED else []
                continue
            placement = place.placement
            rows.append(
                (
                    place.row,
                    place.prefix,
                    place.file,
                    *placement.bucket,
                    *place.size,
                    placement.resized[0],
                    placement.left,
                    placement.top,
                    None,
                    None,
                    None,
                    encoding.flip,
                    None,
                )
            )
        yield _build_batch(rows, FOUND_SCHEMA)


def _build_batch(rows: list[tuple], schema: pa.Schema) -> pa.RecordBatch:
    return _build_columns(list(zip(*rows, strict=True)) if rows else [[] for _ in schema], schema)


def _build_columns(columns: list[Any], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    return pa.record_batch(arrays, schema)
