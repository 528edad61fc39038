"""Join records with their latents.

The join searches for latents in this order: in the cache's manifest (listed_latents.py), then in files and shards that
no manifest lists (unlisted_latents.py). With `cache.on_missing: encode` it plans latents for images that have none
(missing_latents.py).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.data.formats.latents import UnreadLatentError
from sdxl_trainer.data.formats.manifest import read_refused
from sdxl_trainer.data.images.bucket import BucketRule, Placement, Size
from sdxl_trainer.data.images.image_files import LATENT_SUFFIX
from sdxl_trainer.data.index.listed_latents import open_listed_latents
from sdxl_trainer.data.index.missing_latents import BadImage, EncodingSettings, PlannedLatents, plan_missing_latents
from sdxl_trainer.data.index.moved_keys import find_moved_entries
from sdxl_trainer.data.index.schema import (
    FOUND_SCHEMA,
    LATENT_COLUMNS,
    RECORD_COLUMNS,
    SAMPLE_SCHEMA,
    BadSample,
    FoundLatents,
    build_found_batch,
    fits_columns,
)
from sdxl_trainer.data.index.unlisted_latents import (
    LatentHeader,
    LatentLocation,
    find_unlisted_latents,
    infer_placement,
    read_latent_headers,
)
from sdxl_trainer.data.metadata.merge import spill_batches

LATENTS_AT_ONCE = 16_384
MAX_BAD = 100_000  # bad samples that the summary lists


@dataclass(frozen=True)
class LatentSelection:
    """The latents that a run trains on."""

    captioned_only: bool = False  # skip records without a caption
    prefixes: tuple[str, ...] = ("",)  # of the keys of each resolution's latents
    rules: tuple[tuple[str, BucketRule], ...] = ()  # (prefix, rule) of each resolution; none if unknown
    encoding: EncodingSettings | None = None  # for images without latents; None skips these images


ALL_LATENTS = LatentSelection()


@dataclass(frozen=True)
class JoinSummary:
    """Counts and findings of a join. The index stores them, each field as JSON under its name."""

    num_wanted: int  # samples that should have latents: the selected records at each resolution
    num_unlisted: int  # samples whose latents no manifest lists
    num_uncached: int  # samples whose latents are encoded during training
    num_assumed_sizes: int  # samples whose original size is unknown and taken to be their bucket's
    other_sizes: str  # a message about records whose size is not their image's; "" if there are none
    identities: dict[str, dict[str, int]]  # prefix → name of a cache identity → number of samples made under it
    num_bad: int  # samples whose latents or image cannot be used
    num_unread: int  # of them, those that the storage did not give, so that another join may find them whole
    bad: list[BadSample]  # the first MAX_BAD of the bad ones
    watched: list[str]  # folders that were searched for unlisted latents

    def to_metadata(self) -> dict[str, bytes]:
        """Return the summary as metadata of an Arrow schema."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: orjson.dumps(value) for name, value in {**values, "bad": list(map(list, self.bad))}.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes]) -> "JoinSummary":
        """Return the summary that `to_metadata` stored."""
        values = {field.name: orjson.loads(metadata[field.name.encode()]) for field in fields(cls)}
        return cls(**{**values, "bad": [BadSample(*each) for each in values["bad"]]})


@dataclass(frozen=True)
class JoinedLatents:
    """The latents of each record at each resolution."""

    latents: pa.Table  # the columns of LATENT_FIELDS
    row_of_record: dict[str, np.ndarray]  # prefix → [N] int64 row of `latents`, -1 for none
    summary: JoinSummary


@contextmanager
def join_latents(cache_folder: Path, records: pa.Table, selection: LatentSelection) -> Iterator[JoinedLatents]:
    """Find the latents of all records. The tables lie in files that are deleted when the block ends."""
    work, keys = cache_folder / "index", records.column("key")
    wanted = {prefix: _select_records(records, selection.captioned_only, prefix) for prefix in selection.prefixes}
    with ExitStack() as stack:
        listed = stack.enter_context(open_listed_latents(cache_folder, work))
        row_of_record = {
            prefix: np.where(rows, _find_newest_entries(listed, add_prefix(prefix, keys)), -1)
            for prefix, rows in wanted.items()
        }
        for prefix, rows in wanted.items():
            missing = np.flatnonzero(rows & (row_of_record[prefix] < 0))
            row_of_record[prefix][missing] = _find_moved_latents(cache_folder, listed, records, prefix, missing)
        identities = {prefix: _count_identities(listed, rows) for prefix, rows in row_of_record.items()}

        missing = {prefix: rows & (row_of_record[prefix] < 0) for prefix, rows in wanted.items()}
        search = _Search(records, missing, dict(selection.rules))
        found = stack.enter_context(spill_batches(work, FOUND_SCHEMA, search.iterate_unlisted(cache_folder)))
        _assign_rows(row_of_record, found, len(listed))

        planned = stack.enter_context(spill_batches(work, FOUND_SCHEMA, search.iterate_planned(selection.encoding)))
        _assign_rows(row_of_record, planned, len(listed) + len(found))

        latents = pa.concat_tables([table.select(LATENT_COLUMNS) for table in (listed, found, planned)])
        summary = JoinSummary(
            num_wanted=sum(int(rows.sum()) for rows in wanted.values()),
            num_unlisted=len(found),
            num_uncached=len(planned),
            num_assumed_sizes=search.num_assumed_sizes,
            other_sizes=_describe_other_sizes(records, latents, row_of_record),
            identities=identities,
            num_bad=search.num_bad,
            num_unread=search.num_unread,
            bad=search.bad,
            watched=sorted(search.watched),
        )
        yield JoinedLatents(latents, row_of_record, summary)


def iterate_sample_rows(
    joined: JoinedLatents, records: pa.Table, release_pages: Callable[[], None]
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of the sample index: each resolution's samples in the order of their records.

    Args:
        release_pages: called after each batch, to drop the mapped pages of the record index from this process' memory.
    """
    columns = [joined.latents.column(name).combine_chunks() for name in LATENT_COLUMNS]
    for prefix, row_of_record in joined.row_of_record.items():
        start = 0
        for batch in records.select(RECORD_COLUMNS).to_batches():
            rows = row_of_record[start : start + len(batch)]
            start += len(batch)
            has_latents = np.flatnonzero(rows >= 0)
            joined_batch = batch if len(has_latents) == len(batch) else batch.take(pa.array(has_latents))
            keys, *left = joined_batch.columns
            right = [column.take(pa.array(rows[has_latents])) for column in columns]
            yield pa.record_batch([add_prefix(prefix, keys), *left, *right], SAMPLE_SCHEMA)
            release_pages()


def add_prefix(prefix: str, keys: Any) -> Any:
    """Return the keys of samples at a resolution, given the keys of their records."""
    return pc.call_function("binary_join_element_wise", [pa.scalar(prefix), keys, pa.scalar("")]) if prefix else keys


def _select_records(records: pa.Table, captioned_only: bool, prefix: str) -> np.ndarray:
    """Return a mask of the records that a resolution's samples are made of, [N] bool.

    A record that names latents in place of an image has them at one resolution, the one without a prefix.
    """
    selected = np.ones(len(records), bool)
    if captioned_only:
        selected &= records.column("captioned").to_numpy()
    return selected & _find_images(records) if prefix else selected


def _find_images(records: pa.Table) -> np.ndarray:
    """Return a mask of the records that name an image, and not latents in place of one, [N] bool."""
    is_latents = pc.call_function("ends_with", [records.column("image_path")], pc.MatchSubstringOptions(LATENT_SUFFIX))
    return records.column("offset").is_null().to_numpy() & ~is_latents.to_numpy()


def _find_newest_entries(listed: pa.Table, keys: pa.ChunkedArray) -> np.ndarray:
    """Return for each key the row of the manifest's newest entry, or -1, [N] int64.

    `read_latest` of data/formats/manifest.py chooses by the same rule: the last line of a key in a part, and of several
    parts' lines the one with the highest number.
    """
    key_of_entry = pc.call_function("index_in", [listed.column("key")], pc.SetLookupOptions(keys.combine_chunks()))
    key_of_entry = key_of_entry.fill_null(-1).to_numpy()
    part, number = (listed.column(name).to_numpy() for name in ("part", "listed_ns"))
    rows = np.flatnonzero(key_of_entry >= 0)
    rows = rows[np.argsort(key_of_entry[rows], kind="stable")]  # all lines of a key, in the order of the parts
    key, part = key_of_entry[rows], part[rows]
    rows = rows[np.append((key[1:] != key[:-1]) | (part[1:] != part[:-1]), np.ones(min(len(rows), 1), bool))]
    oldest_first = rows[np.argsort(number[rows], kind="stable")]
    entry_of_key = np.full(len(keys), -1, np.int64)
    # Of several entries of a key, numpy keeps the last assignment: the newest entry.
    entry_of_key[key_of_entry[oldest_first]] = oldest_first
    return entry_of_key


def _find_moved_latents(
    cache_folder: Path, listed: pa.Table, records: pa.Table, prefix: str, missing: np.ndarray
) -> np.ndarray:
    """Return for each record without an entry of its key the row of the entry that its image has, or -1, [missing]."""
    rows = np.full(len(missing), -1, np.int64)
    columns = [records.column(name).take(pa.array(missing)) for name in ("key", "image_path")]
    if not _has_other_keys(listed, add_prefix(prefix, records.column("key")), columns[0]):
        return rows
    keys = [prefix + key for key in columns[0].to_pylist()]
    paths = dict(zip(keys, columns[1].to_pylist(), strict=True))
    moved = find_moved_entries(cache_folder, records, paths)
    at = [number for number, key in enumerate(keys) if key in moved]
    rows[at] = _find_newest_entries(listed, pa.chunked_array([[moved[keys[number]].key for number in at]], pa.string()))
    return rows


def _has_other_keys(listed: pa.Table, keys: pa.ChunkedArray, missing: pa.ChunkedArray) -> bool:
    """Return whether the manifest lists keys of no record that end like the keys of records without an entry."""
    if not len(listed) or not len(missing):
        return False
    known = pc.call_function("is_in", [listed.column("key")], pc.SetLookupOptions(keys.combine_chunks()))
    others = listed.column("key").filter(pc.call_function("invert", [known]))
    options = pc.ReplaceSubstringOptions(pattern="^.*/", replacement="")
    stems = [pc.call_function("replace_substring_regex", [column], options) for column in (others, missing)]
    found = pc.call_function("is_in", [stems[0]], pc.SetLookupOptions(stems[1].combine_chunks()))
    return bool(pc.call_function("any", [found]).as_py())


def _count_identities(listed: pa.Table, row_of_record: np.ndarray) -> dict[str, int]:
    """Count the entries that records use by the cache identity they were made under."""
    names = listed.column("identity").take(pa.array(row_of_record[row_of_record >= 0]))
    return {each["values"]: each["counts"] for each in pc.call_function("value_counts", [names]).to_pylist()}


def _assign_rows(row_of_record: dict[str, np.ndarray], found: pa.Table, start: int) -> None:
    """Store which records have their latents in `found`, whose first row is row `start` of all latents."""
    records = found.column("row").to_numpy()
    for prefix, rows in row_of_record.items():
        own = pc.call_function("equal", [found.column("prefix"), pa.scalar(prefix)]).to_numpy()
        rows[records[own]] = start + np.flatnonzero(own)


def _describe_other_sizes(records: pa.Table, latents: pa.Table, row_of_record: dict[str, np.ndarray]) -> str:
    """Describe the records whose size contradicts their latents, or return "".

    A record may hold the bucket's size instead, as kohya's `train_resolution` does. That is not a contradiction.
    """
    recorded, original, bucket = (
        np.stack([table.column(f"{name}{side}").to_numpy() for side in ("width", "height")])
        for name, table in (("", records), ("original_", latents), ("bucket_", latents))
    )
    parts = []
    for row_of_latents in row_of_record.values():
        rows = np.flatnonzero((row_of_latents >= 0) & (recorded[0] > 0))
        at = row_of_latents[rows]
        differs = (recorded[:, rows] != original[:, at]).any(0) & (recorded[:, rows] != bucket[:, at]).any(0)
        parts.append(np.stack([rows[differs], at[differs]]))
    rows, at = np.concatenate(parts, axis=1)
    if len(rows) == 0:
        return ""
    number = len(np.unique(rows))  # a record counts once, at however many resolutions
    key, *sizes = records.column("key")[int(rows[0])], *recorded[:, rows[0]], *original[:, at[0]]
    text = "{} whose size is not that of the image; the first is {} ({}x{} instead of {}x{})"
    return text.format(format_count(number, "record"), key, *sizes)


class _Search:
    """Search for the latents of records that the manifest does not list.

    Attributes:
        num_bad: samples whose latents or images were found but cannot be used.
        num_unread: bad samples that the storage did not give.
        bad: the first MAX_BAD bad samples.
        num_assumed_sizes: samples whose original size is unknown.
        watched: folders that were searched for latents.
    """

    def __init__(self, records: pa.Table, missing: dict[str, np.ndarray], rules: Mapping[str, BucketRule]):
        self._records = records
        self._missing = missing  # prefix → [N] bool, true for records whose latents are still to be found
        self._rules = rules
        self._keys = records.column("key")
        self._widths, self._heights = (records.column(name).to_numpy() for name in ("width", "height"))
        self.num_bad = self.num_unread = 0
        self.bad: list[BadSample] = []
        self.num_assumed_sizes = 0
        self.watched: set[str] = set()

    def iterate_unlisted(self, cache_folder: Path) -> Iterator[pa.RecordBatch]:
        """Yield latents that no manifest lists, as columns of FOUND_SCHEMA. No latents are planned for bad files."""
        refused = read_refused(cache_folder)
        locations = chain.from_iterable(
            find_unlisted_latents(self._records, np.flatnonzero(rows), cache_folder, self.watched, prefix, refused)
            for prefix, rows in self._missing.items()
        )
        headers = read_latent_headers(locations, cache_folder / "index")
        while chunk := list(islice(headers, LATENTS_AT_ONCE)):
            yield build_found_batch([found for pair in chunk if (found := self._examine(*pair)) is not None])

    def iterate_planned(self, encoding: EncodingSettings | None) -> Iterator[pa.RecordBatch]:
        """Yield the latents that training will encode of the images that have none, as columns of FOUND_SCHEMA."""
        if encoding is None:
            return
        images = _find_images(self._records)
        plans = chain.from_iterable(
            plan_missing_latents(self._records, np.flatnonzero(rows & images), prefix, encoding)
            for prefix, rows in self._missing.items()
        )
        while chunk := list(islice(plans, LATENTS_AT_ONCE)):
            for image in (plan for plan in chunk if isinstance(plan, BadImage)):
                self.num_unread += image.is_unread
                self._add_bad(image.key, image.reason)
            planned = [plan for plan in chunk if isinstance(plan, PlannedLatents)]
            yield build_found_batch(
                [
                    _build_found(plan.row, plan.prefix, plan.file, plan.size, plan.placement, encoding.flip)
                    for plan in planned
                ]
            )

    def _examine(self, location: LatentLocation, header: LatentHeader | Exception) -> FoundLatents | None:
        """Build the row of latents that were found, or return None if they are bad."""
        self._missing[location.prefix][location.row] = False
        key = location.prefix + self._keys[location.row].as_py()
        if isinstance(header, Exception):
            self.num_unread += isinstance(header, UnreadLatentError)
            self._add_bad(key, f"{location.file}: {header}")
            return None
        recorded = Size(int(self._widths[location.row]), int(self._heights[location.row]))
        self.num_assumed_sizes += header.original_size is None and recorded == (0, 0)
        size = header.original_size or (recorded if recorded != (0, 0) else header.bucket)
        placement = infer_placement(header, size, self._rules.get(location.prefix))
        if not fits_columns(size, placement):
            self._add_bad(key, f"{location.file}: the original size {size} px is out of range")
            return None
        found = _build_found(location.row, location.prefix, location.file, size, placement, header.flipped)
        return found._replace(offset=location.offset, bytes=header.bytes)

    def _add_bad(self, key: str, reason: str) -> None:
        self.num_bad += 1
        if len(self.bad) < MAX_BAD:
            self.bad.append(BadSample(key, reason))


def _build_found(
    row: int, prefix: str, file: str, original_size: Size, placement: Placement, flipped: bool | None
) -> FoundLatents:
    """Build the row of latents in an npz file of their own, which need not exist yet."""
    return FoundLatents(
        row=row,
        prefix=prefix,
        file=file,
        bucket_width=placement.bucket.width,
        bucket_height=placement.bucket.height,
        original_width=original_size[0],
        original_height=original_size[1],
        resized_width=placement.resized.width,
        crop_left=placement.left,
        crop_top=placement.top,
        flipped=flipped,
    )
