"""The held-out split: by each key's own hash, so other samples do not change it."""

import numpy as np
import pyarrow as pa

from sdxl_trainer.data.order.split import exclude_rows, find_matching_rows, hash_keys, select_by_hash


def chunk(*chunks: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(keys, pa.string()) for keys in chunks], pa.string())


KEYS = [f"img_{number:05d}" for number in range(20_000)] + ["", "a", "ä", "猫", "a" * 500]


def test_a_keys_hash_ignores_other_keys_and_is_evenly_spread() -> None:
    hashes = hash_keys(chunk(KEYS), 0)
    assert len(np.unique(hashes)) == len(KEYS)
    counts, _ = np.histogram(hashes.astype(np.float64), 20, (0, 2.0**64))
    assert abs(counts - len(KEYS) / 20).max() < 5 * (len(KEYS) / 20) ** 0.5
    # The hash is the same among other keys, in other chunks, and in a slice.
    some = [KEYS[number] for number in (5, 20_003, 17, 20_000)]
    cut = pa.chunked_array([pa.array(["x", *some[:2]]).slice(1), pa.array(some[2:])])
    assert hash_keys(cut, 0).tolist() == hashes[[5, 20_003, 17, 20_000]].tolist()
    assert not np.any(hash_keys(chunk(KEYS), 1) == hashes)


def test_a_share_is_stable_when_samples_are_added_or_removed() -> None:
    hashes = hash_keys(chunk(KEYS), 7)
    held = {KEYS[row] for row in select_by_hash(hashes, 0.1)}
    assert abs(len(held) - 0.1 * len(KEYS)) < 5 * (0.09 * len(KEYS)) ** 0.5
    fewer = KEYS[::3]
    assert {fewer[row] for row in select_by_hash(hash_keys(chunk(fewer), 7), 0.1)} == held & set(fewer)
    longer, shorter = select_by_hash(hashes, 0.1), select_by_hash(hashes, 0.05)
    assert longer[: len(shorter)].tolist() == shorter.tolist()
    assert len(select_by_hash(hashes, 0)) == 0
    # Of small sets at least 4, but not more than a tenth.
    assert [len(select_by_hash(hashes[:number], 1e-9)) for number in (9, 10, 39, 40, 900)] == [0, 1, 3, 4, 4]
    assert select_by_hash(hashes, 1e-9).tolist() == np.argsort(hashes)[:4].tolist()


def test_held_out_samples_are_not_used() -> None:
    rows = find_matching_rows(chunk(["a", "b"], ["c", "d"]), chunk(["d", "x", "b"]))
    assert rows.tolist() == [1, 3]
    assert exclude_rows(rows, 4, None).tolist() == [1, 0, 1, 0]
    assert exclude_rows(rows, 4, np.array([2, 2, 0.5, 1])).tolist() == [2, 0, 0.5, 0]
    assert exclude_rows(np.empty(0, int), 4, None) is None
