"""Several sources as one: later ones update earlier ones key by key, and a key that one source has twice is an error.

Sources wait in a file, not in memory; only numbers are kept of each record while they are put in order.
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

from sdxl_trainer.data.metadata.blocks import Block, build_block, read_blocks
from sdxl_trainer.data.metadata.sources import NAME, NPZ, ROWS_AT_ONCE, SOURCE, KeyedRecords, read_metadata_file

STAGE_SCHEMA = pa.schema([("key", pa.string()), ("fields", pa.binary())])
MAX_SHOWN = 20  # items that an error lists


class DuplicateKeyError(ValueError):
    """Images of one source that have the same stem."""


def merge_sources(sources: Sequence[Sequence[Path]], folder: Path) -> Iterator[Block]:
    """The records of all sources, each key once, in the order of their first appearance, of which their source tells.

    Args:
        sources: the files of each. What one setting names, be it many files, is one source.
        folder: where sources wait for each other, if there are several.

    Raises:
        ValueError: malformed metadata, or (several sources) a key that one of them has twice.
    """
    if len(sources) == 1:
        yield from chain.from_iterable(map(read_blocks, sources[0]))
        return
    starts = [0]

    def list_batches() -> Iterator[pa.RecordBatch]:
        for source in sources:
            starts.append(starts[-1])
            for items in chain.from_iterable(map(read_metadata_file, source)):
                starts[-1] += len(items)
                keys = [key for key, _ in items]
                fields = [orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY, default=str) for _, fields in items]
                yield pa.record_batch([pa.array(keys, pa.string()), pa.array(fields, pa.binary())], STAGE_SCHEMA)

    with spill_batches(folder, STAGE_SCHEMA, list_batches()) as table:
        yield from map(build_block, _merge(table, starts))


def raise_duplicate_keys(keys: pa.ChunkedArray, describe: Callable[[int], str]) -> None:
    """Stop if a key occurs twice; `describe` tells the image of a row.

    Raises:
        DuplicateKeyError: it lists them, each with the one it is a twin of.
    """
    numbers, num_keys = factorize_keys(keys)
    if num_keys == len(keys):
        return
    order = np.argsort(numbers, kind="stable")
    again = np.flatnonzero(np.diff(numbers[order], prepend=-1) == 0)
    firsts = np.searchsorted(numbers[order], numbers[order[again]])
    pairs = sorted(zip(order[again].tolist(), order[firsts].tolist(), strict=True))
    shown = [f"'{keys[row]}' ({describe(first)} and {describe(row)})" for row, first in pairs[:MAX_SHOWN]]
    more = ", ..." if len(pairs) > MAX_SHOWN else ""
    raise DuplicateKeyError(f"{len(pairs)} images have the stem of another one: {', '.join(shown)}{more}")


def factorize_keys(keys: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """([N] the number of each key, in the order of their first appearance; how many different ones there are)."""
    encoded = keys.dictionary_encode()
    parts = [np.empty(0, np.int32), *(chunk.indices.to_numpy() for chunk in encoded.chunks)]
    return np.concatenate(parts), max((len(chunk.dictionary) for chunk in encoded.chunks), default=0)


@contextmanager
def spill_batches(folder: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Record batches as a table that lies in a file and not in memory, while the block lasts."""
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
    """Args: starts: where each source's rows begin, and the end."""
    keys, contents = table.column("key"), table.column("fields")
    numbers, num_keys = factorize_keys(keys)
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        if end > start and np.bincount(numbers[start:end]).max() > 1:
            raise_duplicate_keys(
                keys.slice(start, end - start), lambda row, start=start: _describe(contents[start + row])
            )
    order = np.argsort(numbers, kind="stable")
    ends = np.searchsorted(numbers[order], np.arange(num_keys), side="right")
    for first in range(0, num_keys, ROWS_AT_ONCE):
        items: KeyedRecords = []
        begin = int(ends[first - 1]) if first else 0
        for end in ends[first : first + ROWS_AT_ONCE].tolist():
            fields: dict = {}
            for row in order[begin:end].tolist():
                fields.update(orjson.loads(contents[row].as_py()))
            first_row = int(order[begin])
            fields[SOURCE] = bisect_right(starts, first_row) - 1
            items.append((keys[first_row].as_py(), fields))
            begin = end
        yield items


def _describe(content: pa.Scalar) -> str:
    """What a waiting record says its image is."""
    fields = orjson.loads(content.as_py())
    return str(fields.get("image_path") or fields.get(NAME) or fields.get(NPZ) or "no path")
