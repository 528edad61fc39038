"""Storage of items: when an entry is returned, the item is on disk as the entry describes it."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cache_samples import make_entry, make_sample

from sdxl_trainer.cache.encode.storage import (
    EncodedItem,
    NpzStorage,
    ShardStorage,
    list_shards,
    read_item,
    recover_shards,
)
from sdxl_trainer.cache.upkeep.verify import verify_entries, verify_shards
from sdxl_trainer.data.formats.latents import pack_latents, parse_latents, read_latents
from sdxl_trainer.data.formats.manifest import ManifestWriter
from sdxl_trainer.data.formats.shards import iterate_members

BUCKETS = [(96, 64), (64, 96), (128, 128)]


def make_items(count: int) -> list[EncodedItem]:
    return [
        EncodedItem(
            make_entry(f"k{number}", bucket=BUCKETS[number % 3]),
            make_sample(number, BUCKETS[number % 3]),
            record=b'{"number": %d}' % number,
        )
        for number in range(count)
    ]


def test_npz_files_match_their_entries(tmp_path):
    storage = NpzStorage(tmp_path, "float16")
    item = EncodedItem(make_entry("a", file="sub/folder/a.npz", offset=3, record_bytes=2), make_sample())
    entry = storage.write(item)
    storage.close()
    content = (tmp_path / "sub/folder/a.npz").read_bytes()
    assert content == pack_latents(item.sample, "float16") and os.listdir(tmp_path / "sub/folder") == ["a.npz"]
    assert (entry.bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (entry.offset, entry.record_bytes, entry.record_sha256) == (None, None, None)
    assert read_latents(tmp_path / entry.file, (96, 64)).latents.dtype == np.float16


def test_shards_hold_one_bucket_each_and_keep_their_limit(tmp_path):
    items = make_items(60)
    limit = 20_000
    storage = ShardStorage(tmp_path, "float32", rank=3, shard_bytes=limit)
    with ThreadPoolExecutor(8) as pool:
        entries = {entry.key: entry for entry in pool.map(storage.write, items)}
    storage.close()
    assert not list((tmp_path / "shards").glob(".*"))
    shards = list_shards(tmp_path)
    assert len(shards) > 6 and {file.split("-")[1] for file in shards} == {"00003"}
    for file in shards:
        keys = [key for key, suffix, _, _ in iterate_members(tmp_path / file) if suffix == "npz"]
        assert {entries[key].file for key in keys} == {file}
        width, height = entries[keys[0]].bucket
        assert {entries[key].bucket for key in keys} == {(width, height)}
        assert file.startswith(f"shards/{width}x{height}-")
        assert (tmp_path / file).stat().st_size <= limit + 3000
    result = verify_entries(tmp_path, entries)
    assert (result.num_items, result.bad, result.bad_shards) == (60, {}, {})
    for item in items:
        record, content = read_item(tmp_path, entries[item.entry.key])
        assert record == item.record
        assert np.array_equal(parse_latents(content, item.entry.bucket).latents, item.sample.latents)


def test_a_later_job_never_changes_earlier_shards(tmp_path):
    for _ in range(2):
        storage = ShardStorage(tmp_path, "float32", 0, 1 << 30)
        storage.write(make_items(1)[0])
        storage.close()
    unfinished = ShardStorage(tmp_path, "float32", 0, 1 << 30)
    unfinished.write(make_items(1)[0])
    beside = ShardStorage(tmp_path, "float32", 0, 1 << 30)
    beside.write(make_items(1)[0])
    beside.close()
    unfinished.close()
    assert list_shards(tmp_path) == [f"shards/96x64-00000-{number:05d}.tar" for number in range(4)]


def test_shards_of_a_killed_job_keep_listed_items_and_lose_all_others(tmp_path):
    storage = ShardStorage(tmp_path, "float32", 0, 1 << 30)
    entries = [storage.write(item) for item in make_items(9)]
    listed = [entry for entry in entries if entry.bucket == BUCKETS[0]][:2] + [entries[1]]  # no item of BUCKETS[2]
    by_key = {entry.key: entry for entry in listed}
    assert verify_entries(tmp_path, by_key).bad == {}  # also before the shards are finished
    assert {path.name[:6] for path in recover_shards(tmp_path, listed)} == {"96x64-", "64x96-", "128x12"}
    assert list_shards(tmp_path) == ["shards/64x96-00000-00000.tar", "shards/96x64-00000-00000.tar"]
    assert not list((tmp_path / "shards").glob(".*"))
    result = verify_entries(tmp_path, by_key)
    assert (result.bad, result.bad_shards) == ({}, {})
    assert recover_shards(tmp_path, listed) == []
    assert verify_shards(tmp_path, listed[:2]) == {}, "no line of the manifest names the shard, which may be the user's"
    manifest = ManifestWriter(tmp_path, 0)
    manifest.append(entries[1])
    manifest.close()
    assert "bytes, but its samples" in verify_shards(tmp_path, listed[:2])["shards/64x96-00000-00000.tar"]


def test_a_shard_that_cannot_be_finished_does_not_block_the_others(tmp_path, monkeypatch):
    storage = ShardStorage(tmp_path, "float32", 0, 1 << 30)
    entries = [storage.write(item) for item in make_items(3)]
    replace, calls = os.replace, []

    def fail_once(*paths) -> None:
        calls.append(paths)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(OSError, match="No space left"):
        storage.close()
    assert len(list_shards(tmp_path)) == 2
    recover_shards(tmp_path, entries)
    result = verify_entries(tmp_path, {entry.key: entry for entry in entries})
    assert (result.bad, result.bad_shards) == ({}, {})
