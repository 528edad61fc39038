"""Join records with their latents.

The join searches for latents in this order: in the cache's manifest (listed_latents.py), then in files and shards that
no manifest lists (unlisted_latents.py). With `cache.on_missing: encode` it plans latents for images that have none
(missing_latents.py).
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.data.formats.latents import UnreadLatentError
from sdxl_trainer.data.formats.refused_files import read_refused
from sdxl_trainer.data.images.bucket import BucketRule, Placement, Size
from sdxl_trainer.data.images.image_files import LATENT_SUFFIX
from sdxl_trainer.data.index.earlier_join import EarlierJoin, Part, list_parts, open_earlier_join
from sdxl_trainer.data.index.key_hash import (
    Entries,
    KeyHashes,
    find_newest_entries,
    hash_keys,
    update_newest_entries,
)
from sdxl_trainer.data.index.latent_files import LatentFiles, pack_size, widen_sizes, write_latent_file
from sdxl_trainer.data.index.listed_latents import build_listed_latents
from sdxl_trainer.data.index.missing_latents import BadImage, EncodingSettings, PlannedLatents, plan_missing_latents
from sdxl_trainer.data.index.moved_keys import find_moved_entries
from sdxl_trainer.data.index.record_parts import RecordParts
from sdxl_trainer.data.index.rows import add_prefix
from sdxl_trainer.data.index.schema import (
    FOUND_SCHEMA,
    KEY_HASHES,
    PARTS,
    BadSample,
    FoundLatents,
    JoinSummary,
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
HASHED_AT_ONCE = 1 << 20  # keys
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
class JoinedLatents:
    """The latents of each record at each resolution."""

    files: list[Path]  # of latents, whose rows are numbered through all of them
    latents: LatentFiles
    row_of_record: dict[str, np.ndarray]  # prefix → [N] int32 row of `latents`, -1 for none
    summary: JoinSummary
    matched: dict[str, list[Part]]  # the parts that were matched by their keys, for `open_earlier_join`


def join_latents(cache_folder: Path, records: RecordParts, selection: LatentSelection) -> JoinedLatents:
    """Find the latents of all records."""
    folder = cache_folder / "index" / PARTS
    wanted = {prefix: _select_records(records, selection.captioned_only, prefix) for prefix in selection.prefixes}
    paths, parts = build_listed_latents(cache_folder, folder)
    listed = LatentFiles(paths)
    entries = _list_entries(listed, parts)
    record_parts, latent_parts = list_parts(records.files, records.counts), list_parts(listed.files, listed.lengths)
    earlier = open_earlier_join(cache_folder / "index", record_parts, latent_parts)
    row_of_record, num_moved = {}, 0
    for prefix, rows in wanted.items():
        row_of_record[prefix] = _find_listed(_hash_with_prefix(records, prefix), entries, earlier, prefix)
        row_of_record[prefix][~rows] = -1
    for prefix, rows in wanted.items():
        missing = _select_moved(listed, row_of_record, records, np.flatnonzero(rows & (row_of_record[prefix] < 0)))
        if len(missing):
            moved = _find_moved_latents(cache_folder, entries, records, prefix, missing)
            num_moved += np.count_nonzero(moved >= 0)
            row_of_record[prefix][missing] = moved
    identities = listed.count_identities(row_of_record)
    missing = {prefix: rows & (row_of_record[prefix] < 0) for prefix, rows in wanted.items()}
    search = _Search(records, missing, dict(selection.rules))
    with ExitStack() as stack:
        work, first = cache_folder / "index", len(listed)
        found = stack.enter_context(spill_batches(work, FOUND_SCHEMA, search.iterate_unlisted(cache_folder)))
        _assign_rows(row_of_record, found, first)
        planned = stack.enter_context(spill_batches(work, FOUND_SCHEMA, search.iterate_planned(selection.encoding)))
        _assign_rows(row_of_record, planned, first + len(found))
        if len(found) or len(planned):
            both = [*found.to_batches(), *planned.to_batches()]
            paths.append(folder / f"found-{secrets.token_hex(8)}.arrow")
            write_latent_file(paths[-1], lambda: iter(both), is_listed=False)
        num_unlisted, num_uncached = len(found), len(planned)
    latents = LatentFiles(paths)
    summary = JoinSummary(
        num_wanted=sum(int(rows.sum()) for rows in wanted.values()),
        num_unlisted=num_unlisted,
        num_uncached=num_uncached,
        num_assumed_sizes=search.num_assumed_sizes,
        other_sizes=_describe_other_sizes(records, latents, row_of_record),
        identities=identities,
        num_bad=search.num_bad,
        num_unread=search.num_unread,
        bad=search.bad,
        watched=sorted(search.watched),
    )
    # Keys do not lead to moved latents, so that a later join has to find them again.
    matched = {} if num_moved else {"record_parts": record_parts, "latent_parts": latent_parts}
    return JoinedLatents(paths, latents, row_of_record, summary, matched)


def _find_listed(keys: KeyHashes, entries: Entries, earlier: EarlierJoin | None, prefix: str) -> np.ndarray:
    """Return for each key the row of its newest entry, or -1, [N] int32."""
    if earlier is None:
        return find_newest_entries(keys, entries)
    found = earlier.list_known(prefix)
    update_newest_entries(found, keys, entries, earlier.is_new)
    return found


def _list_entries(listed: LatentFiles, parts: Sequence[int]) -> Entries:
    """Return the manifest's lines as entries to search in."""
    ends, part_of_file = np.cumsum(listed.lengths), np.array(parts, np.int64)
    return Entries(
        hashes=KeyHashes(*([batch.column(name).to_numpy() for batch in listed.batches] for name in KEY_HASHES)),
        get_parts=lambda rows: part_of_file[np.searchsorted(ends, rows, side="right")],
        get_numbers=lambda rows: listed.take("listed_ns", rows).to_numpy(),
    )


def _hash_with_prefix(records: RecordParts, prefix: str) -> KeyHashes:
    """Return the hashes of the keys that records have at a resolution."""
    if not prefix:
        return records.hashes
    chunks = [hash_keys(add_prefix(prefix, chunk)) for chunk in records.table.column("key").chunks]
    return KeyHashes([first for first, _ in chunks], [second for _, second in chunks])


def _select_records(records: RecordParts, captioned_only: bool, prefix: str) -> np.ndarray:
    """Return a mask of the records that a resolution's samples are made of, [N] bool.

    A record that names latents in place of an image has them at one resolution, the one without a prefix.
    """
    selected = np.ones(len(records), bool)
    if captioned_only:
        selected &= records.table.column("captioned").to_numpy()
    return selected & _find_images(records) if prefix else selected


def _find_images(records: RecordParts) -> np.ndarray:
    """Return a mask of the records that name an image, and not latents in place of one, [N] bool."""
    paths = records.table.column("image_path")
    is_latents = pc.call_function("ends_with", [paths], pc.MatchSubstringOptions(LATENT_SUFFIX))
    return records.table.column("offset").is_null().to_numpy() & ~is_latents.to_numpy()


def _find_moved_latents(
    cache_folder: Path, entries: Entries, records: RecordParts, prefix: str, missing: np.ndarray
) -> np.ndarray:
    """Return for each record without an entry of its key the row of the entry that its image has, or -1, [missing]."""
    rows = np.full(len(missing), -1, np.int32)
    keys = [prefix + key for key in records.take("key", missing).to_pylist()]
    paths = dict(zip(keys, records.take("image_path", missing).to_pylist(), strict=True))
    moved = find_moved_entries(cache_folder, records.table, paths)
    at = [number for number, key in enumerate(keys) if key in moved]
    first, second = hash_keys(pa.array([moved[keys[number]].key for number in at], pa.string()))
    rows[at] = find_newest_entries(KeyHashes([first], [second]), entries)
    return rows


def _select_moved(
    listed: LatentFiles, row_of_record: dict[str, np.ndarray], records: RecordParts, missing: np.ndarray
) -> np.ndarray:
    """Return those of the `missing` records whose keys end like the key of a line that no record uses."""
    if not len(missing):
        return missing
    is_used = np.zeros(len(listed), bool)
    for rows in row_of_record.values():
        for start in range(0, len(rows), HASHED_AT_ONCE):
            part = rows[start : start + HASHED_AT_ONCE]
            is_used[part[part >= 0]] = True
    if is_used.all():
        return missing[:0]
    others, start = [], 0
    for batch in listed.batches:
        is_other = pa.array(~is_used[start : start + len(batch)])
        others.append(_hash_stems(batch.column("key").filter(is_other)))
        start += len(batch)
    others = np.unique(np.concatenate(others))
    parts = (missing[start : start + HASHED_AT_ONCE] for start in range(0, len(missing), HASHED_AT_ONCE))
    return np.concatenate([part[np.isin(_hash_stems(records.take("key", part)), others)] for part in parts])


def _hash_stems(keys: pa.Array) -> np.ndarray:
    """Return a hash of the last part of each key, [N] uint64."""
    options = pc.ReplaceSubstringOptions(pattern="^.*/", replacement="")
    return hash_keys(pc.call_function("replace_substring_regex", [keys], options))[0]


def _assign_rows(row_of_record: dict[str, np.ndarray], found: pa.Table, start: int) -> None:
    """Store which records have their latents in `found`, whose first row is row `start` of all latents."""
    records = found.column("row").to_numpy()
    for prefix, rows in row_of_record.items():
        own = pc.call_function("equal", [found.column("prefix"), pa.scalar(prefix)]).to_numpy()
        rows[records[own]] = start + np.flatnonzero(own)


def _describe_other_sizes(records: RecordParts, latents: LatentFiles, row_of_record: dict[str, np.ndarray]) -> str:
    """Describe the records whose size contradicts their latents, or return "".

    A record may hold the bucket's size instead, as kohya's `train_resolution` does. That is not a contradiction.
    """
    original, bucket = latents.pack_sizes("original"), latents.pack_sizes("bucket")
    number, first, start = 0, None, 0
    for batch in records.table.select(["width", "height"]).to_batches():
        recorded = pack_size(*(column.to_numpy() for column in batch.columns))
        contradicts = np.zeros(len(batch), bool)  # a record counts once, at however many resolutions
        for row_of_latents in row_of_record.values():
            at = row_of_latents[start : start + len(batch)]
            rows = np.flatnonzero((at >= 0) & (recorded > 0))
            for sizes in (original, bucket):
                rows = rows[recorded[rows] != widen_sizes(sizes[at[rows]])]
            contradicts[rows] = True
            if first is None and len(rows):
                first = (start + int(rows[0]), int(at[rows[0]]))
        number += int(contradicts.sum())
        start += len(batch)
    if first is None:
        return ""
    record, listed = records.row(first[0]), latents.row(first[1])
    sizes = record["width"], record["height"], listed["original_width"], listed["original_height"]
    text = "{} whose size is not that of the image; the first is {} ({}x{} instead of {}x{})"
    return text.format(format_count(number, "record"), record["key"], *sizes)


class _Search:
    """Search for the latents of records that the manifest does not list.

    Attributes:
        num_bad: samples whose latents or images were found but cannot be used.
        num_unread: bad samples that the storage did not give.
        bad: the first MAX_BAD bad samples.
        num_assumed_sizes: samples whose original size is unknown.
        watched: folders that were searched for latents.
    """

    def __init__(self, records: RecordParts, missing: dict[str, np.ndarray], rules: Mapping[str, BucketRule]):
        self._index, self._records = records, records.table
        self._missing = missing  # prefix → [N] bool, true for records whose latents are still to be found
        self._rules = rules
        self._keys, self._widths, self._heights = map(records.table.column, ("key", "width", "height"))
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
        images = _find_images(self._index)
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
                    self._build_found(plan.row, plan.prefix, plan.file, plan.size, plan.placement, encoding.flip)
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
        recorded = Size(self._widths[location.row].as_py(), self._heights[location.row].as_py())
        self.num_assumed_sizes += header.original_size is None and recorded == (0, 0)
        size = header.original_size or (recorded if recorded != (0, 0) else header.bucket)
        placement = infer_placement(header, size, self._rules.get(location.prefix))
        if not fits_columns(size, placement):
            self._add_bad(key, f"{location.file}: the original size {size} px is out of range")
            return None
        found = self._build_found(location.row, location.prefix, location.file, size, placement, header.flipped)
        return found._replace(offset=location.offset, bytes=header.bytes)

    def _add_bad(self, key: str, reason: str) -> None:
        self.num_bad += 1
        if len(self.bad) < MAX_BAD:
            self.bad.append(BadSample(key, reason))

    def _build_found(
        self, row: int, prefix: str, file: str, original_size: Size, placement: Placement, flipped: bool | None
    ) -> FoundLatents:
        """Build the row of latents in an npz file of their own, which need not exist yet."""
        return FoundLatents(
            row=row,
            prefix=prefix,
            key=prefix + self._keys[row].as_py(),
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
