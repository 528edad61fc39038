"""Merge several sources: later sources update earlier ones key by key. A key that one source has twice is an error.

During the merge, the records wait in a temporary file. Memory holds only a few integers for each record.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import orjson
import pyarrow as pa
from loguru import logger

from sdxl_trainer.configs.problems import MAX_PROBLEMS, format_count
from sdxl_trainer.data.files import open_temporary
from sdxl_trainer.data.metadata.blocks import RecordBlock, build_block, dump_json, read_blocks
from sdxl_trainer.data.metadata.sources import ROWS_AT_ONCE, ShardSpan, SourceRecord, read_metadata_file
from sdxl_trainer.data.metadata.values import VALUE_READERS, is_missing

T = TypeVar("T")

WAITING_SCHEMA = pa.schema([("key", pa.string()), ("record", pa.binary())])
MAX_SHOWN = 20  # items that an error lists


class DuplicateKeyError(ValueError):
    """Two images of one source have the same stem."""


def merge_sources(
    sources: Sequence[Sequence[Path]], folder: Path, image_dirs: Sequence[Path] = ()
) -> Iterator[RecordBlock]:
    """Yield the records of all sources, each key once, in the order and with the source of its first appearance.

    Args:
        sources: the files of each source. All files that one entry of the settings names are one source.
        folder: for the temporary file of several sources.
        image_dirs: folders that relative image paths may be relative to.

    Raises:
        ValueError: malformed metadata (the error names the first fault of each file), or (with several sources) a key
            that one of them has twice, or two shards of different sources.
    """
    faults: list[ValueError] = []
    if len(sources) == 1:
        yield from _read_files(read_blocks, sources[0], faults)
        _raise_if_any(faults)
        return
    starts = [0]

    def list_batches() -> Iterator[pa.RecordBatch]:
        for source in sources:
            starts.append(starts[-1])
            for records in _read_files(read_metadata_file, source, faults):
                starts[-1] += len(records)
                keys, contents = [record.key for record in records], list(map(_dump_record, records))
                yield pa.record_batch([pa.array(keys, pa.string()), pa.array(contents, pa.binary())], WAITING_SCHEMA)
        _raise_if_any(faults)

    with spill_batches(folder, WAITING_SCHEMA, list_batches()) as table:
        yield from map(build_block, _merge(table, starts, _ReplacedImages(image_dirs)))


def _read_files(read: Callable[[Path], Iterator[T]], files: Sequence[Path], faults: list[ValueError]) -> Iterator[T]:
    """Yield what `read` yields of each file up to its first fault, and collect the faults."""
    for file in files:
        try:
            yield from read(file)
        except ValueError as error:
            faults.append(error)


def _raise_if_any(faults: Sequence[ValueError]) -> None:
    """Raise one error that names the faults of all files."""
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise ValueError("\n      ".join(map(str, faults[:MAX_PROBLEMS])))


def verify_unique_keys(keys: pa.ChunkedArray, describe_image: Callable[[int], str]) -> None:
    """Verify that no key occurs twice.

    Args:
        describe_image: returns the image of a row, for the message.

    Raises:
        DuplicateKeyError: the message lists the keys, each with its first image and the later one.
    """
    numbers, num_keys = number_keys(keys)
    if num_keys == len(keys):
        return
    order = np.argsort(numbers, kind="stable")
    repeats = np.flatnonzero(np.diff(numbers[order], prepend=-1) == 0)
    firsts = np.searchsorted(numbers[order], numbers[order[repeats]])
    pairs = sorted(zip(order[repeats].tolist(), order[firsts].tolist(), strict=True))
    shown = [f"'{keys[row]}' ({describe_image(first)} and {describe_image(row)})" for row, first in pairs[:MAX_SHOWN]]
    more = ", ..." if len(pairs) > MAX_SHOWN else ""
    # The key of a sample in a shard is the stem of its members, but no file has it.
    if all(".tar" in describe_image(row) for row, _ in pairs[:MAX_SHOWN]):
        count = format_count(len(pairs), "sample")
        raise DuplicateKeyError(f"{count} with the key of another sample: {', '.join(shown)}{more}")
    count = format_count(len(pairs), "image")
    raise DuplicateKeyError(f"{count} with the file stem of another image: {', '.join(shown)}{more}")


def number_keys(keys: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """Number keys in the order of their first appearance. Return ([N] number of each key, number of different keys)."""
    encoded = keys.dictionary_encode()
    parts = [np.empty(0, np.int32), *(chunk.indices.to_numpy() for chunk in encoded.chunks)]
    return np.concatenate(parts), max((len(chunk.dictionary) for chunk in encoded.chunks), default=0)


@contextmanager
def spill_batches(folder: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Write record batches to a temporary file under `folder`, and yield them as a table mapped from the file."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_temporary(folder / "stage") as file:
        with pa.OSFile(file.name, "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        yield pa.ipc.open_file(pa.memory_map(file.name)).read_all()


def _merge(table: pa.Table, starts: list[int], replaced: "_ReplacedImages") -> Iterator[list[SourceRecord]]:
    """Yield the merged records of a table of WAITING_SCHEMA.

    Args:
        starts: the row of the table at which each source begins, and the number of rows.
    """
    keys, contents = table.column("key"), table.column("record")
    numbers, num_keys = number_keys(keys)
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        if end > start and np.bincount(numbers[start:end]).max() > 1:
            source_keys = keys.slice(start, end - start)
            verify_unique_keys(source_keys, lambda row, start=start: _describe_image(contents[start + row].as_py()))
    order = np.argsort(numbers, kind="stable")
    ends = np.searchsorted(numbers[order], np.arange(num_keys), side="right")
    for first in range(0, num_keys, ROWS_AT_ONCE):
        merged: list[SourceRecord] = []
        begin = int(ends[first - 1]) if first else 0
        for end in ends[first : first + ROWS_AT_ONCE].tolist():
            rows = order[begin:end].tolist()
            key, source = keys[rows[0]].as_py(), bisect_right(starts, rows[0]) - 1
            waiting = [contents[row].as_py() for row in rows]
            if len(waiting) > 1:
                replaced.add(key, waiting)
            merged.append(_merge_records(key, source, waiting))
            begin = end
        yield merged
    replaced.report()


class _ReplacedImages:
    """Keys under which several sources have different images, of which only the last one would be trained."""

    def __init__(self, image_dirs: Sequence[Path]):
        self._folders = ["", *map(str, image_dirs)]
        self._in_shards: list[str] = []
        self._files: list[str] = []
        self._num_in_shards = self._num_files = 0

    def add(self, key: str, contents: Sequence[bytes]) -> None:
        """Note whether the waiting records of a key have latents in several shards, or several image files.

        Two paths are one image that has moved, unless files exist at both.
        """
        shards: dict[str, None] = {}
        paths: dict[tuple[str, str], None] = {}
        for content in contents:
            fields, base_folder, keyed_path, span = orjson.loads(content)
            if span:
                shards[ShardSpan(*span).shard] = None
            elif path := fields.get("image_path") or keyed_path:
                paths[base_folder, str(path)] = None
        if len(shards) > 1:
            self._num_in_shards += 1
            _append_pair(self._in_shards, key, list(shards))
        elif len(paths) > 1:
            files = list(dict.fromkeys(filter(None, (self._find_file(*path) for path in paths))))
            self._num_files += len(files) > 1
            _append_pair(self._files, key, files)

    def _find_file(self, base_folder: str, path: str) -> str | None:
        """Return the absolute path of the image file that a record names, or None if there is none."""
        candidates = [os.path.abspath(os.path.join(folder, path)) for folder in (base_folder, *self._folders)]
        return next(filter(os.path.isfile, candidates), None)

    def report(self) -> None:
        """Warn of replaced image files, and raise an error for latents.

        Raises:
            DuplicateKeyError: several shards have latents under one key.
        """
        if self._files:
            count, shown = format_count(self._num_files, "record"), _join_pairs(self._files, self._num_files)
            logger.warning(
                "{}: a later entry of data.metadata names another image under the same key, and only the later image "
                "is trained: {}. If both are to be trained, give them different keys (file stems)",
                count,
                shown,
            )
        if self._in_shards:
            count, shown = format_count(self._num_in_shards, "key"), _join_pairs(self._in_shards, self._num_in_shards)
            raise DuplicateKeyError(
                f"data.metadata: {count} with latents in the shards of several entries: {shown}. "
                "Give the samples different keys, or remove the entry that another one replaces"
            )


def _append_pair(shown: list[str], key: str, places: Sequence[str]) -> None:
    """Append a key with its first and last place, if it has several, to a list of at most MAX_SHOWN."""
    if len(places) > 1 and len(shown) < MAX_SHOWN:
        shown.append(f"'{key}' ({places[0]} and {places[-1]})")


def _join_pairs(shown: Sequence[str], num: int) -> str:
    """Join the keys that a message lists."""
    return ", ".join(shown) + (", ..." if num > len(shown) else "")


def _merge_records(key: str, source: int, contents: Sequence[bytes]) -> SourceRecord:
    """Merge the waiting records of one key. Later records update earlier ones, except by values that are missing."""
    merged, base_folder, keyed_path, span = orjson.loads(contents[0])
    for content in contents[1:]:
        fields, later_folder, later_path, later_span = orjson.loads(content)
        merged.update(
            {name: value for name, value in fields.items() if name not in VALUE_READERS or not is_missing(value)}
        )
        base_folder, keyed_path, span = later_folder or base_folder, later_path or keyed_path, later_span or span
    return SourceRecord(
        key=key,
        fields=merged,
        base_folder=base_folder,
        keyed_path=keyed_path,
        span=ShardSpan(*span) if span else None,
        source=source,
    )


def _dump_record(record: SourceRecord) -> bytes:
    """Return a record as JSON for the temporary file, without its key and source, which the table holds already."""
    place = [record.base_folder, record.keyed_path, record.span and list(record.span)]
    return dump_json(record.key, [record.fields, *place])


def _describe_image(content: bytes) -> str:
    """Return the image that a record of the temporary file names."""
    fields, _, keyed_path, span = orjson.loads(content)
    return str(fields.get("image_path") or keyed_path or span or "no path")
