"""The spool of a cache on a store: its size stays bounded, and what it holds after a kill is uploaded and listed."""

import errno
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import fsspec
import orjson
import pytest
from cache_samples import make_entry, make_sample

from sdxl_trainer.cache.encode import spool
from sdxl_trainer.cache.encode.background_writer import BackgroundWriter
from sdxl_trainer.cache.encode.spool import CacheStore, ShardUploads, SpoolStorage, recover_spool
from sdxl_trainer.cache.encode.storage import EncodedItem, read_remote_item
from sdxl_trainer.cache.encode.store_setup import tidy_store
from sdxl_trainer.cache.upkeep.store_upkeep import replace_stored_shards
from sdxl_trainer.data.formats.manifest import FIRST_NUMBER, ManifestEntry, find_last_number, read_entries, read_latest
from sdxl_trainer.data.formats.shards import ShardWriter
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.stores.cache_mirror import pull_cache
from sdxl_trainer.data.stores.store_lock import HeldError, StoreLock, describe_process
from sdxl_trainer.data.stores.uploads import list_objects, put_bytes

URL = "memory://spool-tests/cache"
BUCKETS = [(64, 96), (96, 64), (64, 64)]
LIMIT_BYTES = 60_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CacheStore]:
    fsspec.filesystem("memory").store.clear()
    lock = StoreLock(URL)
    yield CacheStore(URL, tmp_path / "spool", lock.ticket)
    lock.release()


def build(number: int) -> EncodedItem:
    bucket = BUCKETS[number % len(BUCKETS)]
    entry = replace(make_entry(f"k{number}"), bucket=Size(*bucket))
    return EncodedItem(entry, make_sample(number, bucket), record=b'{"a": 1}')


def read_store(mirror: Path) -> dict[str, ManifestEntry]:
    pull_cache(URL, mirror)
    return read_latest(mirror)


def measure(folder: Path) -> int:
    """Return the bytes of the shards in a spool; some may be deleted meanwhile."""
    sizes = []
    for file in folder.rglob("*.tar*"):
        try:
            sizes.append(file.stat().st_size)
        except FileNotFoundError:
            continue
    return sum(sizes)


def test_the_spool_stays_within_its_limit_while_uploads_are_slow(tmp_path, store, monkeypatch):
    go_on, publish, sizes = threading.Event(), CacheStore.publish_shard, []

    def publish_late(self: CacheStore, file: Path, lines: bytes) -> None:
        assert go_on.wait(60)
        sizes.append(measure(self.spool))
        publish(self, file, lines)

    monkeypatch.setattr(CacheStore, "publish_shard", publish_late)
    uploads = ShardUploads(store, 0, FIRST_NUMBER)
    storage = SpoolStorage(uploads, "float32", 0, 1 << 30, LIMIT_BYTES)

    def write(number: int) -> None:
        uploads.append(storage.write(build(number)))
        sizes.append(measure(store.spool))

    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(write, number) for number in range(40)]
        threading.Timer(1.0, go_on.set).start()
        for future in done:
            future.result(60)
    storage.close()
    uploads.close()
    assert LIMIT_BYTES // 2 < max(sizes) <= LIMIT_BYTES + 3 * 10_000  # two items may be written at once
    entries = read_store(tmp_path / "mirror")
    assert set(entries) == {f"k{number}" for number in range(40)}
    assert all(read_remote_item(URL, entry).record == b'{"a": 1}' for entry in entries.values())
    assert measure(store.spool) == 0 and len({entry.file for entry in entries.values()}) > len(BUCKETS)


def test_what_a_killed_job_left_in_the_spool_is_uploaded_unless_it_is_damaged(tmp_path, store):
    uploads = ShardUploads(store, 0, FIRST_NUMBER)
    storage = SpoolStorage(uploads, "float32", 0, 1 << 30, 1 << 30)
    for number in range(6):
        uploads.append(storage.write(build(number)))
    unlisted = storage.write(build(6))  # killed before the item was listed
    shards = sorted((store.spool / "shards").glob(".*.partial"))
    assert len(shards) == len(BUCKETS) and read_store(tmp_path / "mirror") == {}
    damaged = next(shard for shard in shards if shard.name[1:].startswith("64x64"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    recover_spool(store, tmp_path / "mirror")
    entries = read_store(tmp_path / "mirror")
    assert set(entries) == {f"k{number}" for number in range(6) if BUCKETS[number % 3] != (64, 64)}
    assert unlisted.key not in entries and all(read_remote_item(URL, entry) for entry in entries.values())
    assert [file for file in (store.spool / "shards").iterdir()] == []


def test_items_that_another_job_has_listed_meanwhile_are_not_listed_again(tmp_path, store):
    for name in ("first", "second"):
        own = replace(store, spool=tmp_path / name)
        uploads = ShardUploads(own, 0, FIRST_NUMBER)
        storage = SpoolStorage(uploads, "float32", 0, 1 << 30, 1 << 30)
        for number in (0, 3, 6) if name == "first" else (0, 3):
            uploads.append(storage.write(build(number)))
        if name == "second":
            storage.close()
            uploads.close()
    before = read_store(tmp_path / "mirror")
    recover_spool(replace(store, spool=tmp_path / "first"), tmp_path / "mirror")
    after = read_store(tmp_path / "mirror")
    assert set(before) == {"k0", "k3"} and set(after) == {"k0", "k3", "k6"}
    assert all(after[key] == before[key] for key in before)
    assert sorted(entry.key for entry in read_entries(tmp_path / "mirror")) == ["k0", "k3", "k6"]


@pytest.mark.parametrize("place", ["journal", "shard"])
def test_a_full_disk_ends_the_job_and_the_next_one_uploads_the_spool(tmp_path, store, monkeypatch, place):
    uploads = ShardUploads(store, 0, FIRST_NUMBER)
    storage = SpoolStorage(uploads, "float32", 0, 1 << 30, 1 << 30)
    flush, begin = ShardWriter.flush, uploads.begin

    def flush_until_full(writer: ShardWriter, end: int) -> None:
        flush(writer, end)
        if place == "shard" and writer.num_samples == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    class FullJournal(io.FileIO):
        def write(self, content: bytes) -> int:  # type: ignore[override]
            if Path(str(self.name)).read_bytes().count(b"\n") < 3:
                return super().write(content)
            super().write(content[:9])
            raise OSError(errno.ENOSPC, "No space left on device")

    def begin_full(path: Path) -> None:
        begin(path)
        if place == "journal":
            uploads._shards[f"shards/{path.name}"].journal = FullJournal(path.with_suffix(".jsonl"), "ab")

    monkeypatch.setattr(ShardWriter, "flush", flush_until_full)
    monkeypatch.setattr(uploads, "begin", begin_full)
    writer, errors = BackgroundWriter(storage, uploads, num_threads=1), []

    def work() -> None:
        try:
            for number in range(0, 18, 3):  # of one bucket
                writer.submit(build(number))
        except OSError:
            pass
        try:
            writer.close()
        except OSError as error:
            errors.append(error.strerror)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and errors == ["No space left on device"]
    monkeypatch.setattr(ShardWriter, "flush", flush)
    recover_spool(store, tmp_path / "mirror")
    assert set(read_store(tmp_path / "mirror")) == {"k0", "k3"}


def test_only_recorded_shards_that_are_no_metadata_are_deleted(tmp_path, store):
    own, unknown, source, gone = (f"64x64-00000-{number:012d}.tar" for number in range(4))
    for shard in (own, unknown, source):
        put_bytes(b"x", f"{URL}/shards/{shard}")
    for shard in (own, source, gone):
        put_bytes(b"{}", f"{URL}/manifest/object-{shard}.json")
    put_bytes(b"x", f"{URL}/shards/train-0001.tar")
    store = replace(store, sources=("s3://other/{000..012}.tar", f"{URL}/shards/*2.tar"))
    expected = {f"shards/{name}" for name in (unknown, source, "train-0001.tar")} | {f"manifest/object-{source}.json"}

    def list_names() -> set[str]:
        return {item.url.removeprefix(f"{URL}/") for item in list_objects(URL) if "/lock/" not in item.url}

    tidy_store(store, tmp_path / "mirror")
    assert list_names() == expected
    uploads = ShardUploads(store, 0, FIRST_NUMBER)
    storage = SpoolStorage(uploads, "float32", 0, 1 << 30, 1 << 30)
    assert replace_stored_shards(store, tmp_path / "mirror", storage, uploads, small_bytes=1 << 20) == []
    uploads.close()
    assert list_names() == expected


def test_latents_of_a_killed_job_do_not_replace_newer_ones(tmp_path, store):
    mirror = tmp_path / "mirror"
    read_store(mirror)
    for name, keys in (("listed", (9,)), ("killed", (3, 9, 6, 0)), ("newer", (0, 6))):
        own = replace(store, spool=tmp_path / name)
        uploads = ShardUploads(own, 0, find_last_number(mirror))
        storage = SpoolStorage(uploads, "float32", 0, 1 << 30, 1 << 30)
        for number in keys:
            item = build(number)
            uploads.append(storage.write(replace(item, entry=replace(item.entry, identity=name))))
        if name != "killed":
            storage.close()
            uploads.close()
        read_store(mirror)
    recover_spool(replace(store, spool=tmp_path / "killed"), mirror)
    found = {key: entry.identity for key, entry in read_store(mirror).items()}
    assert found == {"k0": "newer", "k3": "killed", "k6": "newer", "k9": "killed"}


def test_the_age_of_a_lock_is_measured_by_the_clock_of_the_store(store):
    url, files = "memory://spool-tests/clocks", fsspec.filesystem("memory").store
    holder = {**describe_process(), "machine": "another"}
    put_bytes(orjson.dumps({**holder, "heartbeat": time.time() - 700}), f"{url}/lock/00000001.json")
    with pytest.raises(HeldError, match="heartbeat 0 s ago"):
        StoreLock(url)
    put_bytes(orjson.dumps({**holder, "heartbeat": time.time() + 86400}), f"{url}/lock/00000001.json")
    files["/spool-tests/clocks/lock/00000001.json"].created -= timedelta(minutes=11)
    lock = StoreLock(url)
    assert [item.url for item in list_objects(f"{url}/lock")] == [lock.ticket.name]
    lock.release()


def test_another_job_that_takes_the_lock_ends_the_uploads(tmp_path, store):
    uploads = ShardUploads(store, 0, FIRST_NUMBER)
    storage = SpoolStorage(uploads, "float32", 0, 1 << 30, 1 << 30)
    uploads.append(storage.write(build(0)))
    fsspec.filesystem("memory").pipe_file(f"{URL}/lock/00000007.json", b"{}")
    storage.close()
    with pytest.raises(RuntimeError, match="another job has taken over the lock"):
        uploads.close()
    assert read_store(tmp_path / "mirror") == {}
    assert spool.name_shard(spool.name_part("64x96-00000-000000000001.tar")) == "64x96-00000-000000000001.tar"
