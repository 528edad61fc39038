"""The samples that are held out of training, chosen by a hash of their keys alone."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_trainer.data.order.keyed_random import derive_seed

_ODD = np.uint64(0x9E3779B97F4A7C15)


def hash_keys(keys: pa.ChunkedArray, seed: int) -> np.ndarray:
    """[N] uint64, evenly spread; a key's own hash, whatever other keys there are. A million take about a second.

    A polynomial of the key's bytes, finished as splitmix64 does, computed for a chunk of keys at once.
    """
    hashes = [_hash_chunk(chunk, np.uint64(derive_seed(seed))) for chunk in keys.chunks]
    return np.concatenate([np.empty(0, np.uint64), *hashes])


def select_by_hash(hashes: np.ndarray, share: float) -> np.ndarray:
    """Rows whose hash lies in the first `share` of all values, in order of their hashes: a shorter list is always the
    beginning of a longer one."""
    rows = np.flatnonzero(hashes < np.uint64(int(share * 2.0**64)))
    return rows[np.argsort(hashes[rows], kind="stable")]


def find_matching_rows(keys: pa.ChunkedArray, others: pa.ChunkedArray) -> np.ndarray:
    """Rows of `keys` that are among `others`."""
    found = pc.call_function("is_in", [keys], pc.SetLookupOptions(others.combine_chunks()))
    return np.flatnonzero(found.to_numpy())


def exclude_rows(rows: np.ndarray, num_rows: int, repeats: np.ndarray | None) -> np.ndarray | None:
    """How often each row is used when some are not used at all; [num_rows], or None for once each."""
    if len(rows) == 0:
        return repeats
    used = np.ones(num_rows) if repeats is None else repeats.astype(np.float64)
    used[rows] = 0
    return used


def _hash_chunk(chunk: pa.Array, start: np.uint64) -> np.ndarray:
    _, offsets, letters = chunk.buffers()
    if len(chunk) == 0 or letters is None:
        return np.full(len(chunk), start)
    places = np.frombuffer(offsets, np.int32, len(chunk) + 1, 4 * chunk.offset).astype(np.int64)
    first, lengths = places[0], np.diff(places)
    values = np.frombuffer(letters, np.uint8)[first : places[-1]].astype(np.uint64) + np.uint64(1)
    powers = np.cumprod(np.full(int(lengths.max(initial=0)) + 1, _ODD))
    values *= powers[np.arange(len(values)) - np.repeat(places[:-1] - first, lengths)]
    until = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values)])  # all of it modulo 2^64
    return _finish(until[places[1:] - first] - until[places[:-1] - first] + start)


def _finish(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
