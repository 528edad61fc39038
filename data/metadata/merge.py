"""The merge of several sources: later ones update earlier ones key by key; a key that one source has twice is an error.

While sources are merged they wait in a file, and only numbers of each record are kept in memory.
"""

import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa

from sdxl_trainer.data.metadata.blocks import RecordBlock, build_block, read_blocks
from sdxl_trainer.data.metadata.sources import (
    KEYED_PATH,
    LATENT_SPAN,
    ROWS_AT_ONCE,
    SOURCE_NUMBER,
    KeyedRecords,
    read_metadata_file,
)

WAITING_SCHEMA = pa.schema([("key", pa.string()), ("fields", pa.binary())])
MAX_SHOWN = 20  # items that an error lists


class DuplicateKeyError(ValueError):
    """Images of one source have the same stem."""


def merge_sources(sources: Sequence[Sequence[Path]], folder: Path) -> Iterator[RecordBlock]:
    """Yield the records of all sources, each key once, in the order and with the source of its first appearance.

    Args:
        sources: the files of each source. All files that one entry of the settings names are one source.
        folder: for the temporary file of several sources.

    Raises:
        ValueError: malformed metadata, or (with several sources) a key that one of them has twice.
    """
    if len(sources) == 1:
        yield from chain.from_iterable(map(read_blocks, sources[0]))
        return
    starts = [0]

    def list_batches() -> Iterator[pa.RecordBatch]:
        for source in sources:
            starts.append(starts[-1])
            for records in chain.from_iterable(map(read_metadata_file, source)):
                starts[-1] += len(records)
                keys = [key for key, _ in records]
                fields = [orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY, default=str) for _, fields in records]
                yield pa.record_batch([pa.array(keys, pa.string()), pa.array(fields, pa.binary())], WAITING_SCHEMA)

    with spill_batches(folder, WAITING_SCHEMA, list_batches()) as table:
        yield from map(build_block, _merge(table, starts))


def raise_duplicate_keys(keys: pa.ChunkedArray, describe_image: Callable[[int], str]) -> None:
    """Raise if a key occurs twice.

    Args:
        describe_image: returns the image of a row, for the message.

    Raises:
        DuplicateKeyError: the message lists the keys, each with its first image and the later one.
    """
    numbers, num_keys = number_keys(keys)
    if num_keys == len(keys):
        return
    order = np.argsort(numbers, kind="stable")
    again = np.flatnonzero(np.diff(numbers[order], prepend=-1) == 0)
    firsts = np.searchsorted(numbers[order], numbers[order[again]])
    pairs = sorted(zip(order[again].tolist(), order[firsts].tolist(), strict=True))
    shown = [f"'{keys[row]}' ({describe_image(first)} and {describe_image(row)})" for row, first in pairs[:MAX_SHOWN]]
    more = ", ..." if len(pairs) > MAX_SHOWN else ""
    raise DuplicateKeyError(f"{len(pairs)} images have the stem of another one: {', '.join(shown)}{more}")


def number_keys(keys: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """Number keys in the order of their first appearance. Return ([N] number of each key, number of different keys)."""
    encoded = keys.dictionary_encode()
    parts = [np.empty(0, np.int32), *(chunk.indices.to_numpy() for chunk in encoded.chunks)]
    return np.concatenate(parts), max((len(chunk.dictionary) for chunk in encoded.chunks), default=0)


@contextmanager
def spill_batches(folder: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yield record batches as a table that lies in a temporary file under `folder` and not in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".stage.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        yield pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    finally:
        path.unlink(missing_ok=True)


def _merge(table: pa.Table, starts: list[int]) -> Iterator[KeyedRecords]:
    """Yield the merged records of a table of WAITING_SCHEMA.

    Args:
        starts: the row of the table at which each source begins, and the number of rows.
    """
    keys, contents = table.column("key"), table.column("fields")
    numbers, num_keys = number_keys(keys)
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        if end > start and np.bincount(numbers[start:end]).max() > 1:
            source_keys = keys.slice(start, end - start)
            raise_duplicate_keys(source_keys, lambda row, start=start: _describe_image(contents[start + row]))
    order = np.argsort(numbers, kind="stable")
    ends = np.searchsorted(numbers[order], np.arange(num_keys), side="right")
    for first in range(0, num_keys, ROWS_AT_ONCE):
        merged: KeyedRecords = []
        begin = int(ends[first - 1]) if first else 0
        for end in ends[first : first + ROWS_AT_ONCE].tolist():
            fields: dict = {}
            for row in order[begin:end].tolist():
                fields.update(orjson.loads(contents[row].as_py()))
            first_row = int(order[begin])
            fields[SOURCE_NUMBER] = bisect_right(starts, first_row) - 1
            merged.append((keys[first_row].as_py(), fields))
            begin = end
        yield merged


def _describe_image(content: pa.Scalar) -> str:
    """Return the image that a waiting record names."""
    fields = orjson.loads(content.as_py())
    return str(fields.get("image_path") or fields.get(KEYED_PATH) or fields.get(LATENT_SPAN) or "no path")
