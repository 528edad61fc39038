"""128-bit hashes of keys, and searches by them: equal keys, and the entry that belongs to each key.

Two different keys out of 100 million have the same 128 bits with a probability of 10^-23, so that equal hashes count as
equal keys. Searches sort a few million hashes at a time, which bounds their memory.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

SORTED_AT_ONCE = 1 << 22  # hashes
KEYS_AT_ONCE = 8192
MAX_SEARCHED = 0.25  # share of new keys above which all are searched, which is as fast
MAX_TABLE_BITS = 26
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
NO_HASHES = np.empty(0, np.uint64)


class KeyHashes(NamedTuple):
    """Hashes of keys in two columns. The first one sorts and searches, the second one confirms."""

    first: Sequence[np.ndarray]  # chunks, [N] uint64 in all
    second: Sequence[np.ndarray]

    def __len__(self) -> int:
        return sum(map(len, self.first))


class Entries(NamedTuple):
    """The lines of a manifest, by the hashes of their keys."""

    hashes: KeyHashes
    get_parts: Callable[[np.ndarray], np.ndarray]  # rows → number of each entry's part, ascending with the row
    get_numbers: Callable[[np.ndarray], np.ndarray]  # rows → number of each entry's line


def hash_keys(keys: pa.Array) -> np.ndarray:
    """Return the hashes of an array of strings, [2, N] uint64."""
    blocks = [_hash_block(keys.slice(start, KEYS_AT_ONCE)) for start in range(0, len(keys), KEYS_AT_ONCE)]
    return np.concatenate(blocks, axis=1) if blocks else np.empty((2, 0), np.uint64)


def _hash_block(keys: pa.Array) -> np.ndarray:
    _, offsets, letters = keys.buffers()
    places = np.frombuffer(offsets, np.int32, len(keys) + 1, 4 * keys.offset).astype(np.int64)
    lengths = np.diff(places)
    words = max(1, -(-int(lengths.max()) // 8))
    content = np.frombuffer(letters or b"", np.uint8)[places[0] : places[-1]]
    table = np.zeros((len(keys), 8 * words), np.uint8)
    table[np.arange(8 * words) < lengths[:, None]] = content
    columns = table.view(np.uint64)  # [N, words], each key padded with zeros
    hashes = np.empty((2, len(keys)), np.uint64)
    for number, multiplier in enumerate(_MULTIPLIERS):
        state = lengths.astype(np.uint64) * multiplier  # so that padding is no part of a key
        for word in range(words):
            # Longer keys beside it must not change the hash of a key.
            state = np.where(lengths > 8 * word, _mix((state ^ columns[:, word]) * multiplier), state)
        hashes[number] = state
    return hashes


def _mix(values: np.ndarray) -> np.ndarray:
    """Mix the bits of numbers: the finaliser of splitmix64 (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def has_equal_keys(hashes: KeyHashes, is_new: np.ndarray | None = None) -> bool:
    """Return whether two keys are equal.

    Args:
        is_new: [N] bool; the others are known to differ from each other. None: all are new.
    """
    if is_new is not None and np.count_nonzero(is_new) <= MAX_SEARCHED * len(hashes):
        alike = _find_hashes(hashes.first, _take_rows(hashes.first, np.flatnonzero(is_new)))
        hashes = _take_hashes(hashes, alike)
    num_parts = _count_parts(len(hashes))
    for part in range(num_parts):
        _, first, second = _select_part(hashes, part, num_parts)
        values = np.sort(first)  # seven times as fast as argsort
        if np.any(values[1:] == values[:-1]):
            order = np.lexsort((second, first))
            if not np.all(_differ(first[order], second[order])):
                return True
    return False


def find_newest_entries(keys: KeyHashes, entries: Entries) -> np.ndarray:
    """Return for each key the number of its newest entry, or -1, [N] int32.

    `read_latest` of data/formats/manifest.py chooses by the same rule: the last line of a key in a part, and of several
    parts' lines the one with the highest number.
    """
    found = np.full(len(keys), -1, np.int32)
    num_parts = _count_parts(max(len(keys), len(entries.hashes)))
    for part in range(num_parts):
        listed, wanted = (_sort_part(hashes, part, num_parts) for hashes in (entries.hashes, keys))
        if not len(listed.rows) or not len(wanted.rows):
            continue
        newest = _choose_newest(listed, entries)
        share_first = np.any(newest.first[1:] == newest.first[:-1])
        # Sorted searches walk through memory in order, which is several times as fast.
        start = np.searchsorted(newest.first, wanted.first)
        for step in (0, 1) if share_first else (0,):  # at most two keys share the first hash
            places = np.minimum(start + step, len(newest.first) - 1)
            matches = (newest.first[places] == wanted.first) & (newest.second[places] == wanted.second)
            found[wanted.rows[matches]] = newest.rows[places[matches]]
    return found


def update_newest_entries(found: np.ndarray, keys: KeyHashes, entries: Entries, is_new: np.ndarray) -> None:
    """Fill in the newest entries of the keys that have none yet, and of those that new entries list.

    Args:
        found: [keys] int32 number of the newest entry of each key that is not new, or -1; changed in place.
        is_new: [entries] bool.
    """
    searched = found < 0
    searched[_find_hashes(keys.first, _take_rows(entries.hashes.first, np.flatnonzero(is_new)))] = True
    rows = np.flatnonzero(searched)
    if len(rows) > MAX_SEARCHED * len(found):
        found[:] = find_newest_entries(keys, entries)
        return
    own = _take_hashes(keys, rows)
    at = _find_hashes(entries.hashes.first, *own.first)
    hashes = _take_hashes(entries.hashes, at)
    newest = find_newest_entries(
        own, Entries(hashes, lambda part: entries.get_parts(at[part]), lambda part: entries.get_numbers(at[part]))
    )
    is_found = newest >= 0
    found[rows[is_found]] = at[newest[is_found]]


def _find_hashes(chunks: Sequence[np.ndarray], wanted: np.ndarray) -> np.ndarray:
    """Return the rows whose hash is among a few wanted ones, ascending, [M] int64."""
    rows, start = [np.empty(0, np.int64)], 0
    wanted = np.sort(wanted)
    # A table of the first bits excludes most hashes at once.
    shift = np.uint64(64 - min(MAX_TABLE_BITS, len(wanted).bit_length() + 4))
    may_be_wanted = np.zeros(1 << (64 - int(shift)), bool)
    may_be_wanted[wanted >> shift] = True
    for chunk in chunks if len(wanted) else []:
        at = np.flatnonzero(may_be_wanted[chunk >> shift])
        places = np.minimum(np.searchsorted(wanted, chunk[at]), len(wanted) - 1)
        rows.append(start + at[wanted[places] == chunk[at]])
        start += len(chunk)
    return np.concatenate(rows)


def _take_hashes(hashes: KeyHashes, rows: np.ndarray) -> KeyHashes:
    """Return the hashes of ascending rows."""
    return KeyHashes([_take_rows(hashes.first, rows)], [_take_rows(hashes.second, rows)])


def _take_rows(chunks: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Return the values at ascending rows of chunks that follow each other."""
    values, start = [NO_HASHES], 0
    for chunk in chunks:
        first, last = np.searchsorted(rows, (start, start + len(chunk)))
        values.append(chunk[rows[first:last] - start])
        start += len(chunk)
    return np.concatenate(values)


def _choose_newest(listed: "_SortedKeys", entries: Entries) -> "_SortedKeys":
    """Return the newest entry of each key."""
    differ = _differ(listed.first, listed.second)
    if np.all(differ):
        return listed
    part = entries.get_parts(listed.rows)
    listed = listed.select(np.append(differ | (part[1:] != part[:-1]), True))
    # The sort is stable, so that of two equal numbers the one of the later part counts.
    listed = listed.select(np.lexsort((entries.get_numbers(listed.rows), listed.second, listed.first)))
    return listed.select(np.append(_differ(listed.first, listed.second), True))


class _SortedKeys(NamedTuple):
    """Some keys, sorted by their hashes. Equal keys are in the order of their rows."""

    rows: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def select(self, places: np.ndarray) -> "_SortedKeys":
        """Return the keys at `places`."""
        return _SortedKeys(self.rows[places], self.first[places], self.second[places])


def _sort_part(hashes: KeyHashes, part: int, num_parts: int) -> _SortedKeys:
    """Return the keys whose first hash lies in one of `num_parts` parts of its range."""
    keys = _select_part(hashes, part, num_parts)
    order, first = _argsort(keys.first, num_parts)
    if np.any(first[1:] == first[:-1]):
        return keys.select(np.lexsort((keys.rows, keys.second, keys.first)))
    return _SortedKeys(keys.rows[order], first, keys.second[order])


def _argsort(values: np.ndarray, num_parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return np.argsort(values) of hashes of one part, and the sorted hashes.

    Each hash is sorted with its place in its low bits, which is several times as fast as argsort. The high bits are the
    same in all of the part.
    """
    place_bits = np.uint64(len(values).bit_length())
    low = (np.uint64(1) << place_bits) - np.uint64(1)
    packed = values << np.uint64(num_parts.bit_length() - 1)
    packed &= ~low
    packed |= np.arange(len(values), dtype=np.uint64)
    packed.sort()
    order = (packed & low).astype(np.int64)
    in_order = values[order]
    if np.any(in_order[1:] < in_order[:-1]):  # hashes that differ in the bits of the places only
        order = order[np.argsort(in_order, kind="stable")]
        in_order = values[order]
    return order, in_order


def _select_part(hashes: KeyHashes, part: int, num_parts: int) -> _SortedKeys:
    """Like `_sort_part`, in the order of the rows."""
    rows, firsts, seconds, start = [np.empty(0, np.int32)], [NO_HASHES], [NO_HASHES], 0
    shift = np.uint64(65 - num_parts.bit_length())
    for first, second in zip(hashes.first, hashes.second, strict=True):
        at = np.arange(len(first)) if num_parts == 1 else np.flatnonzero(first >> shift == np.uint64(part))
        rows.append((start + at).astype(np.int32))
        firsts.append(first[at])
        seconds.append(second[at])
        start += len(first)
    return _SortedKeys(np.concatenate(rows), np.concatenate(firsts), np.concatenate(seconds))


def _differ(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return whether each sorted key differs from the one before it, [N - 1] bool."""
    return (first[1:] != first[:-1]) | (second[1:] != second[:-1])


def _count_parts(num_hashes: int) -> int:
    """Return the number of parts, a power of two, that hashes are sorted in."""
    return 1 << max(0, (num_hashes - 1) // SORTED_AT_ONCE).bit_length()
