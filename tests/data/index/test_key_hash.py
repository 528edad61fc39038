"""Hashes of keys find equal keys and the newest entry of each key, whatever keys stand beside them."""

import random

import numpy as np
import pyarrow as pa
import pytest

from sdxl_trainer.data.index import key_hash as module
from sdxl_trainer.data.index.key_hash import Entries, KeyHashes, find_newest_entries, has_equal_keys, hash_keys

KEYS = ["a", "ab", "ab\0", "abcdefgh", "abcdefghi", "10_dog/abcdefgh", "ä" * 30, "x" * 200]


def test_the_hash_of_a_key_depends_on_no_other_key():
    together = hash_keys(pa.array(KEYS))
    for place, key in enumerate(KEYS):
        assert hash_keys(pa.array([key]))[:, 0].tolist() == together[:, place].tolist()
        assert hash_keys(pa.array(["", key, "y" * 90]).slice(1, 1))[:, 0].tolist() == together[:, place].tolist()
    assert all(len(np.unique(column)) == len(KEYS) for column in together)
    # Index files hold the hashes: another function needs another VERSION.
    assert hash_keys(pa.array(["img_00000001"]))[:, 0].tolist() == [RECORDED_FIRST, RECORDED_SECOND]


RECORDED_FIRST, RECORDED_SECOND = 5106353509652940990, 15084112574541232030


def choose(keys: list, entries: list) -> list[int]:
    """Return the newest entry of each key by the rule in words: last line of each part, then the highest number."""
    best: dict = {}
    for row, (key, part, _) in enumerate(entries):
        best.setdefault(key, {})[part] = row
    rows = [best.get(key, {}).values() for key in keys]
    return [max(found, key=lambda row: entries[row][2:0:-1]) if found else -1 for found in rows]


def split(keys: list) -> KeyHashes:
    cut = len(keys) // 2
    chunks = [keys[:cut], keys[cut:]]
    return KeyHashes(*([np.array([key[n] for key in chunk], np.uint64) for chunk in chunks] for n in (0, 1)))


@pytest.mark.parametrize("sorted_at_once", [1, 2, 5, 100])
def test_the_newest_entry_is_found_although_hashes_collide(monkeypatch, sorted_at_once):
    monkeypatch.setattr(module, "SORTED_AT_ONCE", sorted_at_once)
    rng = random.Random(sorted_at_once)
    for _ in range(150):
        firsts = [rng.randrange(2**64) for _ in range(rng.choice([2, 4, 12]))]
        universe = [(first, second) for first in firsts for second in (1, 2)]  # each first hash belongs to two keys
        keys = rng.sample(universe, len(universe) // 2)
        entries = [(rng.choice(universe), rng.randrange(3), rng.randrange(4)) for _ in range(rng.randrange(30))]
        entries.sort(key=lambda entry: entry[1])
        parts, numbers = (np.array([entry[n] for entry in entries], np.int64) for n in (1, 2))
        listed = [entry[0] for entry in entries]
        searched = Entries(split(listed), parts.__getitem__, numbers.__getitem__)
        assert find_newest_entries(split(keys), searched).tolist() == choose(keys, entries)
        assert has_equal_keys(split(listed)) == (len(set(listed)) < len(listed))
        assert not has_equal_keys(split(keys))


@pytest.mark.parametrize("num_parts", [1, 4])
def test_hashes_are_sorted_although_they_differ_in_their_last_bits_only(num_parts):
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2**62 // num_parts, 50, np.uint64) & ~np.uint64(0xFFFF)
    values = rng.permutation(np.concatenate([first, *(first[:40] + np.uint64(step) for step in (1, 3, 63, 64))]))
    order, in_order = module._argsort(values, num_parts)
    assert np.array_equal(values[order], np.sort(values)) and np.array_equal(in_order, np.sort(values))
