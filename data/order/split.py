"""The split of samples into a training and a held-out part, by a hash of their keys alone."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_trainer.data.order.keyed_random import derive_seed

_ODD = np.uint64(0x9E3779B97F4A7C15)


def hash_keys(keys: pa.ChunkedArray, seed: int) -> np.ndarray:
    """Hash keys into evenly spread numbers, [N] uint64. A million keys take about a second.

    A key's hash does not depend on the other keys. It is a polynomial of the key's bytes, finished by splitmix64, and
    is computed for a chunk of keys at once.
    """
    hashes = [_hash_chunk(chunk, np.uint64(derive_seed(seed))) for chunk in keys.chunks]
    return np.concatenate([np.empty(0, np.uint64), *hashes])


# Rows that a split of a small set has at least, unless they are more than this part of the set.
FEWEST_ROWS, MOST_OF_SMALL_SET = 4, 0.1


def select_by_hash(hashes: np.ndarray, share: float) -> np.ndarray:
    """Return the rows whose hash lies in the first `share` of all values, in the order of their hashes.

    A smaller share gives the beginning of a larger share's list. If a small set has fewer such rows than FEWEST_ROWS,
    the list continues up to that number, but not above a tenth of the set.
    """
    fewest = min(FEWEST_ROWS, int(MOST_OF_SMALL_SET * len(hashes))) if share else 0
    num_rows = max(fewest, int((hashes < np.uint64(int(share * 2.0**64))).sum()))
    if not num_rows:
        return np.empty(0, np.int64)
    rows = np.argpartition(hashes, num_rows - 1)[:num_rows]
    return rows[np.lexsort((rows, hashes[rows]))]


def find_matching_rows(keys: pa.ChunkedArray, others: pa.ChunkedArray) -> np.ndarray:
    """Return the rows of the keys that also occur in `others`."""
    found = pc.call_function("is_in", [keys], pc.SetLookupOptions(others.combine_chunks()))
    return np.flatnonzero(found.to_numpy())


def exclude_rows(rows: np.ndarray, num_rows: int, repeats: np.ndarray | None) -> np.ndarray | None:
    """Return each row's repeats, with 0 for `rows`, [num_rows]; None uses each row once.

    Args:
        repeats: how often each row would be used without the exclusion.
    """
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
    # All arithmetic is modulo 2^64.
    powers = np.cumprod(np.full(int(lengths.max(initial=0)) + 1, _ODD))
    values *= powers[np.arange(len(values)) - np.repeat(places[:-1] - first, lengths)]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values)])
    return _finish(sums[places[1:] - first] - sums[places[:-1] - first] + start)


def _finish(values: np.ndarray) -> np.ndarray:
    """Mix the bits of numbers: the finaliser of splitmix64 (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
