"""A cache on an S3 server: the same latents as on disk, nothing encoded twice, faults and mistakes named."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cache_samples import run_job, write_settings

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import orjson  # noqa: E402
import s3fs  # noqa: E402
import torch  # noqa: E402
from servers.object_store import FaultyStore, Request, choose_randomly, serve_store  # noqa: E402
from tiny_tokenizers import load_tiny_tokenizers  # noqa: E402

from sdxl_trainer.cache.encode import spool  # noqa: E402
from sdxl_trainer.cache.upkeep.verify import compute_shard_ends  # noqa: E402
from sdxl_trainer.configs.load import load_config  # noqa: E402
from sdxl_trainer.data.checks.training_set import open_training_set  # noqa: E402
from sdxl_trainer.data.formats.manifest import ManifestEntry, read_latest  # noqa: E402
from sdxl_trainer.data.images.demo_set import draw_demo_set  # noqa: E402
from sdxl_trainer.data.loading.loader import build_dataset, build_plan, iterate_batches, iterate_specs  # noqa: E402
from sdxl_trainer.data.loading.micro_batch import MicroBatch  # noqa: E402
from sdxl_trainer.data.order.plan import Position  # noqa: E402
from sdxl_trainer.data.stores import remote, store_lock  # noqa: E402
from sdxl_trainer.data.stores.cache_mirror import name_mirror, pull_cache  # noqa: E402
from sdxl_trainer.data.stores.uploads import list_objects, put_bytes, read_bytes  # noqa: E402

BUCKET = "caches"
SHARDS = ("cache.format=shards", "cache.shard_mb=1", "cache.spool_gb=0.01", "cache.text=true")


@pytest.fixture(scope="module")
def running() -> Iterator[FaultyStore]:
    with serve_store() as proxy:
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(BUCKET)
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def proxy(running: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    running.requests.clear()
    yield running
    running.choose_fault = lambda request: None
    running.ignores_ranges = False


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("store")
    return write_settings(folder, tiny_folder / "model", draw_demo_set(folder / "data", num_images=12))


@pytest.fixture(scope="module")
def local(settings: Path) -> dict[str, tuple[str, str]]:
    """Hash of each item of the same cache on disk."""
    folder = settings.parent / "local"
    assert run_job(settings, f"cache.dir={folder}", *SHARDS) == 0
    return hash_entries(read_latest(folder))


def list_words(settings: Path, name: str) -> tuple[str, ...]:
    """Words for a cache of its own, whose mirror lies in a folder of its own."""
    return (f"cache.dir=s3://{BUCKET}/{name}", f"run.dir={settings.parent / name}", *SHARDS)


def get_mirror(settings: Path, name: str) -> Path:
    return name_mirror(settings.parent / name, f"s3://{BUCKET}/{name}")


def read_report(settings: Path, name: str) -> dict:
    return orjson.loads((get_mirror(settings, name) / "cache_report.json").read_bytes())


def read_store(name: str, folder: Path, has_records: bool = True) -> dict[str, ManifestEntry]:
    """Return the entries on the store, as another machine finds them. Each shard is whole and listed.

    Args:
        has_records: each shard has a record of its size and checksums, which a copy has not.
    """
    url = f"s3://{BUCKET}/{name}"
    objects = {item.url[len(url) + 1 :]: item.size for item in list_objects(url)}
    (folder / "manifest").mkdir(parents=True)
    for part in (part for part in objects if part.startswith("manifest/")):
        (folder / part).write_bytes(read_bytes(f"{url}/{part}"))
    entries = read_latest(folder)
    shards = {file for file in objects if file.startswith("shards/")}
    assert shards == {entry.file for entry in entries.values()}
    assert {shard: objects[shard] - 1024 for shard in shards} == compute_shard_ends(shards, entries.values())
    assert not [name for name in objects if name.startswith(("pending/", "lock/"))]
    assert {name for name in objects if name.startswith("manifest/object-")} == {
        f"manifest/object-{shard.removeprefix('shards/')}.json" for shard in shards if has_records
    }
    assert {"cache.json", "text.json", "manifest/empty_te_outputs.npz"} <= objects.keys()
    return entries


def hash_entries(entries: dict[str, ManifestEntry]) -> dict[str, tuple[str, str]]:
    """Return the hashes of each item's latents and text."""
    return {key: (entry.sha256, entry.text.sha256 if entry.text else "") for key, entry in entries.items()}


def test_a_cache_on_a_store_holds_the_latents_of_one_on_disk(settings, local, proxy, tmp_path):
    words = list_words(settings, "same")
    assert run_job(settings, *words) == 0
    found = read_store("same", tmp_path / "a")
    assert hash_entries(found) == local
    spooled = [path for path in (get_mirror(settings, "same") / "spool").rglob("*") if path.is_file()]
    assert [path for path in spooled if path.suffix != ".lock"] == []
    assert run_job(settings, *words) == 0
    assert read_report(settings, "same")["encoded"] == 0
    # Another machine finds everything there.
    assert run_job(settings, *words, f"run.dir={tmp_path / 'other'}") == 0
    mirror = name_mirror(tmp_path / "other", f"s3://{BUCKET}/same")
    assert orjson.loads((mirror / "cache_report.json").read_bytes())["encoded"] == 0
    assert read_store("same", tmp_path / "b") == found


def read_epoch(settings: Path, *words: str) -> list[MicroBatch]:
    """Read the micro batches of an epoch as training does."""
    config, problems = load_config(settings, [*words, "data.num_workers=0"])
    index, found = open_training_set(config)
    assert problems == found == [] and index is not None
    dataset = build_dataset(config, index, load_tiny_tokenizers(), None)
    plan = build_plan(index, 2, 0, shuffle_shards=config.data.remote_shards.shuffle_shards)
    batches = iterate_batches(dataset, iterate_specs(plan, Position(0, 0), 0, 1, 2), 0)
    return [next(batches) for _ in range(plan.num_batches(0))]


def test_training_reads_it_as_it_reads_one_on_disk(settings, local, proxy, tmp_path):
    words = list_words(settings, "read")
    assert run_job(settings, *words) == 0
    expected = read_epoch(settings, f"cache.dir={settings.parent / 'local'}", *SHARDS)
    found = read_epoch(settings, *words)
    assert len(found) == len(expected) > 2
    for left, right in zip(expected, found, strict=True):
        assert left.bad == right.bad == [] and left.weights.min() == 1
        assert torch.equal(left.latents, right.latents) and torch.equal(left.rows, right.rows)
        assert left.text is not None and right.text is not None
        assert all(torch.equal(left.text[name], right.text[name]) for name in left.text)
    ranges = [request for request in proxy.requests if "Range" in request.headers and "/shards/" in request.path]
    assert ranges and all(request.method == "GET" for request in ranges)
    # Whole shards, one after the other, from copies.
    streamed = read_epoch(settings, *words, "data.remote_shards.shuffle_shards=2", "cache.text=false")
    assert sorted(row for batch in streamed for row in batch.rows.tolist()) == list(range(len(local)))
    assert all(batch.bad == [] for batch in streamed)
    proxy.choose_fault = lambda request: "internal" if "/shards/" in request.path else None
    proxy.requests.clear()
    again = read_epoch(settings, *words, "data.remote_shards.shuffle_shards=2", "cache.text=false")
    assert [batch.rows.tolist() for batch in again] == [batch.rows.tolist() for batch in streamed]


def test_faults_are_named_and_repaired(settings, local, proxy, tmp_path, capsys):
    words, url = list_words(settings, "bad"), f"s3://{BUCKET}/bad"
    assert run_job(settings, *words) == 0
    assert run_job(settings, *words, "--verify") == run_job(settings, *words, "--verify", "--every-byte") == 0
    shards = [item.url for item in list_objects(f"{url}/shards")]
    content, entries = bytearray(read_bytes(shards[0])), read_latest(get_mirror(settings, "bad")).values()
    entry = next(entry for entry in entries if shards[0].endswith(entry.file))
    content[(entry.offset or 0) + entry.bytes // 2] ^= 1
    put_bytes(bytes(content), shards[0])
    s3fs.S3FileSystem().rm_file(shards[1])
    capsys.readouterr()
    assert run_job(settings, *words, "--verify") == 1
    logged = (get_mirror(settings, "bad") / "logs" / "cache.log").read_text()
    assert "the store's checksum is not that of the upload" in logged and "is not on the store" in logged
    # Without the checksum of the upload, only reading shows that a byte is another one.
    name = shards[0].rpartition("/")[2]
    s3fs.S3FileSystem().rm_file(f"{url}/manifest/object-{name}.json")
    assert run_job(settings, *words, "--verify", "--every-byte") == 1
    assert "SHA-256 differs from the manifest" in (get_mirror(settings, "bad") / "logs" / "cache.log").read_text()
    assert run_job(settings, *words, "--repair", "--every-byte") == 0
    assert 0 < read_report(settings, "bad")["encoded"] < len(local)
    assert hash_entries(read_store("bad", tmp_path / "a")) == local
    assert run_job(settings, *words, "--verify", "--every-byte") == 0


def test_small_shards_are_joined_and_files_of_others_adopted(settings, local, proxy, tmp_path, capsys):
    words = list_words(settings, "adopted")
    beside = ("cache.dir=null", "cache.format=npz", "cache.text=true")
    assert run_job(settings, *beside, f"run.dir={tmp_path / 'beside'}") == 0
    files = sorted(settings.parent.rglob("data/**/*.npz"))
    assert run_job(settings, *words, "--adopt") == 0
    for file in files:
        file.unlink()
    assert hash_entries(read_store("adopted", tmp_path / "a")) == local
    assert run_job(settings, *words) == 0 and read_report(settings, "adopted")["encoded"] == 0
    before = list_objects(f"s3://{BUCKET}/adopted/shards")
    entries = read_store("adopted", tmp_path / "b")
    # Half of the items again, as a repair would: each bucket now has several small shards.
    for shard in before[::2]:
        s3fs.S3FileSystem().rm_file(shard.url)
    assert run_job(settings, *words) == 0
    assert run_job(settings, *words, "--pack") == 0
    packed = read_store("adopted", tmp_path / "c")
    assert hash_entries(packed) == hash_entries(entries)
    buckets = [entry.file.partition("-")[0] for entry in {entry.file: entry for entry in packed.values()}.values()]
    assert len(buckets) == len(set(buckets))
    capsys.readouterr()
    assert run_job(settings, *words, "--unpack") == 2
    assert "a cache on a store holds shards only" in capsys.readouterr().err


def test_text_of_others_is_adopted_for_latents_on_the_store(settings, local, proxy, tmp_path):
    words = list_words(settings, "text")
    assert run_job(settings, *words, "cache.text=false") == 0
    beside = ("cache.dir=null", "cache.format=npz", "cache.text=true", f"run.dir={tmp_path / 'beside'}")
    assert run_job(settings, *beside) == 0
    assert run_job(settings, *words, "--adopt") == 0
    for file in settings.parent.rglob("data/**/*.npz"):
        file.unlink()
    assert run_job(settings, *words) == 0 and read_report(settings, "text")["encoded"] == 0
    assert hash_entries(read_store("text", tmp_path / "a")) == local


def test_a_cache_is_copied_from_a_store(settings, local, proxy, tmp_path, capsys):
    words, url = list_words(settings, "source"), f"s3://{BUCKET}/source"
    assert run_job(settings, *words) == 0
    assert run_job(settings, *words, "--copy-to", tmp_path / "npz", "--as", "npz") == 0
    assert hash_entries(read_latest(tmp_path / "npz")) == local
    assert run_job(settings, f"cache.dir={tmp_path / 'npz'}", "cache.text=true", "--verify") == 0
    query = (*words, "data.metadata=[]", "--where", "bucket_width > 128 and caption exists")
    assert run_job(settings, *query, "--copy-to", f"s3://{BUCKET}/few") == 0
    found = read_store("few", tmp_path / "few", has_records=False)
    assert 0 < len(found) < len(local) and all(local[key] == value for key, value in hash_entries(found).items())
    shard = list_objects(f"{url}/shards")[0]
    s3fs.S3FileSystem().rm_file(shard.url)
    assert run_job(settings, *words, "--copy-to", tmp_path / "rest") == 1
    capsys.readouterr()
    for more, text in (
        (("--copy-to", f"{url}/x"), "lies in the cache that is copied"),
        (("--compact",), "cannot be compacted: on a store, each shard has lines of its own"),
    ):
        assert run_job(settings, *words, *more) == 2
        assert text in " ".join(capsys.readouterr().err.split())


def test_a_job_succeeds_in_spite_of_faults_of_a_moment(settings, local, proxy, tmp_path):
    proxy.choose_fault = choose_randomly(0.08, seed=1)
    assert run_job(settings, *list_words(settings, "faults")) == 0
    proxy.choose_fault = lambda request: None
    assert hash_entries(read_store("faults", tmp_path / "a")) == local


def test_a_fault_that_lasts_is_named_and_nothing_is_encoded_twice(
    settings, local, proxy, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(remote, "LONGEST_WAIT_SECONDS", 0.01)
    words, num_shards = list_words(settings, "lasting"), []

    def fail_later(request: Request) -> str | None:
        is_shard = request.method == "PUT" and "/shards/" in request.path
        num_shards.append(is_shard)
        return "slow" if is_shard and sum(num_shards) > 2 else None

    proxy.choose_fault = fail_later
    assert run_job(settings, *words) == 1
    error = capsys.readouterr().err
    assert "reduce your request rate" in error and "run the same command again" in error and "Traceback" not in error
    proxy.choose_fault = lambda request: None
    assert run_job(settings, *words) == 0
    assert read_report(settings, "lasting")["encoded"] == 0  # what was encoded was still in the spool
    assert hash_entries(read_store("lasting", tmp_path / "a")) == local


def test_a_shard_that_was_uploaded_and_not_listed_is_listed(settings, local, proxy, tmp_path, monkeypatch):
    words, url = list_words(settings, "unlisted"), f"s3://{BUCKET}/unlisted"
    list_shard = spool.CacheStore._list_shard
    monkeypatch.setattr(spool.CacheStore, "_list_shard", lambda *_: (_ for _ in ()).throw(remote.StoreError("cut off")))
    assert run_job(settings, *words) == 1
    monkeypatch.setattr(spool.CacheStore, "_list_shard", list_shard)
    assert len(list_objects(f"{url}/shards")) == len(list_objects(f"{url}/pending")) == 1
    put_bytes(b"of a job that was killed while it replaced it", f"{url}/shards/64x64-00000-1.tar")
    put_bytes(b"{}", f"{url}/manifest/object-64x64-00000-1.tar.json")
    assert run_job(settings, *words, f"run.dir={tmp_path / 'other'}") == 0  # on another machine: without the spool
    report = orjson.loads((name_mirror(tmp_path / "other", url) / "cache_report.json").read_bytes())
    assert report["encoded"] < len(local)
    assert hash_entries(read_store("unlisted", tmp_path / "a")) == local


def test_a_pull_during_the_first_upload_leaves_the_state_of_the_cache(settings, local, proxy, tmp_path, monkeypatch):
    words, url, publish = list_words(settings, "pulled"), f"s3://{BUCKET}/pulled", spool.CacheStore.publish_shard

    def pull_and_publish(self: spool.CacheStore, file: Path, lines: bytes) -> None:
        pull_cache(url, get_mirror(settings, "pulled"))  # as a dry run, the doctor and a training do
        publish(self, file, lines)

    monkeypatch.setattr(spool.CacheStore, "publish_shard", pull_and_publish)
    assert run_job(settings, *words) == 0
    assert hash_entries(read_store("pulled", tmp_path / "a")) == local
    s3fs.S3FileSystem().rm_file(f"{url}/cache.json")
    assert run_job(settings, *words, "--repair") == 0
    assert hash_entries(read_store("pulled", tmp_path / "b")) == local


def test_objects_of_the_user_in_the_folder_of_a_cache_stay(settings, proxy, tmp_path):
    words, store = list_words(settings, "user"), s3fs.S3FileSystem()
    names = ("", "README.md", "0001.tar", "train-0001.tar", "sub/64x64-00000-00001.tar", "64x64-00000-00001.tar")
    keys = {f"user/{folder}/{name}" for folder in ("shards", "pending") for name in names}
    for key in keys:
        store.call_s3("put_object", Bucket=BUCKET, Key=key, Body=b"the user's")
    for command in ((), ("--repair",), ("--pack",)):
        assert run_job(settings, *words, *command) == 0
    found = {item["Key"] for item in store.call_s3("list_objects_v2", Bucket=BUCKET, Prefix="user/")["Contents"]}
    assert keys <= found and "user/cache.json" in found
    store.call_s3("delete_object", Bucket=BUCKET, Key="user/shards/64x64-00000-00001.tar")
    assert run_job(settings, *words, "--verify") == 0


def write_lock(url: str, **fields: object) -> None:
    put_bytes(orjson.dumps({**store_lock.describe_process(), "host": "node7", **fields}), f"{url}/lock/00000004.json")


def test_mistakes_are_named_before_anything_is_encoded(settings, proxy, tmp_path, capsys, monkeypatch):
    url = f"s3://{BUCKET}/mistakes"
    words = list_words(settings, "mistakes")

    def fail(*more: str) -> str:
        capsys.readouterr()
        assert run_job(settings, *words, *more) == 2
        assert not [item for item in list_objects(url) if "/shards/" in item.url]
        return " ".join(capsys.readouterr().err.split())

    assert "there is no bucket s3://no-such-bucket cure: create the bucket" in fail("cache.dir=s3://no-such-bucket/a")
    assert "gs:// needs a package that is not installed" in fail("cache.dir=gs://bucket/a")
    assert "cache.format" in fail("cache.format=npz")
    assert "cannot add to a cache on a store" in fail("cache.on_missing=encode")
    assert "cache.spool_gb = 0.001" in fail("cache.spool_gb=0.001")
    proxy.choose_fault = lambda request: "denied" if request.method == "PUT" else None
    assert "Access Denied cure: check the credentials and their right" in fail()
    proxy.choose_fault = lambda request: None
    proxy.ignores_ranges = True
    assert "does not read ranges of bytes" in fail()
    proxy.ignores_ranges = False
    write_lock(url, machine="another", heartbeat=time.time() - 700)  # its clock is behind, or ours is ahead
    error = fail()
    assert re.search(r"is being written by another job \(host node7, process .*, heartbeat \d s ago\)", error)
    assert "without a heartbeat for 10 minutes is taken over" in error
    write_lock(url, machine="another", heartbeat=time.time() + 86400)
    monkeypatch.setattr(store_lock, "STALE_SECONDS", 1)
    time.sleep(2.1)
    assert run_job(settings, *words) == 0
    read_store("mistakes", tmp_path / "a")


def test_the_lock_of_an_ended_job_of_this_machine_is_taken_over_at_once(proxy):
    url = f"s3://{BUCKET}/lock"
    write_lock(url, process=2**22, heartbeat=time.time())
    lock = store_lock.StoreLock(url)
    with pytest.raises(store_lock.HeldError, match=rf"process {os.getpid()}, started .*, heartbeat \d+ s ago"):
        store_lock.StoreLock(url)
    lock.ticket.verify()
    put_bytes(b"{}", f"{url}/lock/00000009.json")  # another job has taken it over
    with pytest.raises(RuntimeError, match="another job has taken over the lock of this cache: this one ends"):
        lock.ticket.verify()
    lock.release()
