"""Shards and metadata on an S3 server on loopback give the same batches as local files, and faults are named."""

import io
import json
import os
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import orjson
import pytest
import yaml
from programs import ROOT
from tiny_tokenizers import load_tiny_tokenizers

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

import s3fs  # noqa: E402
import torch  # noqa: E402

from sdxl_trainer.configs.problems import Problem  # noqa: E402
from sdxl_trainer.configs.schema import Config  # noqa: E402
from sdxl_trainer.data.checks.left_out import TooManyBadError, leave_out_bad_latents  # noqa: E402
from sdxl_trainer.data.checks.records import open_checked_records  # noqa: E402
from sdxl_trainer.data.checks.training_set import open_training_set  # noqa: E402
from sdxl_trainer.data.formats.latents import LatentSample, pack_latents  # noqa: E402
from sdxl_trainer.data.formats.shards import ShardWriter  # noqa: E402
from sdxl_trainer.data.index.index import Index, open_record_index, open_sample_index  # noqa: E402
from sdxl_trainer.data.loading.dataset import LatentDataset, SampleSettings  # noqa: E402
from sdxl_trainer.data.loading.loader import build_plan, iterate_batches, iterate_specs  # noqa: E402
from sdxl_trainer.data.loading.micro_batch import MicroBatch  # noqa: E402
from sdxl_trainer.data.metadata.records import parse_record  # noqa: E402
from sdxl_trainer.data.order.plan import Position  # noqa: E402
from sdxl_trainer.data.stores import remote  # noqa: E402
from sdxl_trainer.data.stores.remote_sources import name_shard_version  # noqa: E402
from sdxl_trainer.data.stores.shard_copies import ShardCopies  # noqa: E402
from sdxl_trainer.data.text.captions import CaptionSettings  # noqa: E402

BUCKETS = [(64, 96), (96, 64)]
START = Position(0, 0)
NUM_SHARDS, PER_SHARD = 3, 8


@pytest.fixture(scope="module")
def server():
    """Run an S3 server, set the variables that s3fs reads its address and credentials from, and yield the address."""
    settings = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    settings["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*running.get_host_and_port())
    before = dict(os.environ)
    os.environ.update(settings)
    forkserver._forkserver._stop()  # a fork server that runs already would start workers without these variables
    yield settings["AWS_ENDPOINT_URL"]
    running.stop()
    os.environ.clear()
    os.environ.update(before)
    forkserver._forkserver._stop()


@pytest.fixture(scope="module")
def store(server) -> s3fs.S3FileSystem:
    store = s3fs.S3FileSystem()
    store.mkdir("bucket")
    return store


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, store) -> Path:
    """Three shards of two buckets each, the same on disk and as `s3://bucket/set/s-<n>.tar`."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(NUM_SHARDS):
        writer = ShardWriter(folder / f"s-{number}.tar")
        for item in range(PER_SHARD):
            bucket = BUCKETS[item % 2]
            shape = (4, bucket[1] // 8, bucket[0] // 8)
            latents = np.random.default_rng(number * PER_SHARD + item).standard_normal(shape).astype(np.float32)
            crop = (item, 0, item + bucket[0], bucket[1])
            npz = pack_latents(
                LatentSample(
                    latents=latents, original_size=(200 + item, 300), crop_ltrb=crop, flipped=latents[..., ::-1]
                )
            )
            writer.append(f"k{number}.{item}", orjson.dumps({"caption": f"a {number} b {item}", "n": item}), npz)
        writer.close()
        store.put_file(str(writer.path), f"bucket/set/s-{number}.tar")
    return folder


def open_index(cache: Path, *metadata: Path | str) -> Index:
    return open_sample_index(cache, open_record_index(cache, list(metadata), []))


def build_dataset(cache: Path, index: Index, copies: ShardCopies | None = None) -> LatentDataset:
    tokenizers = load_tiny_tokenizers()
    settings = SampleSettings(seed=0, max_tokens=75, caption=CaptionSettings())
    return LatentDataset(index, cache, tokenizers, settings, copies=copies)


def read_epoch(dataset: LatentDataset, num_workers: int = 0, size: int = 2) -> list[MicroBatch]:
    plan = build_plan(dataset.index, size, seed=1)
    batches = iterate_batches(dataset, iterate_specs(plan, Position(0, 0), 0, 1, size), num_workers)
    return [next(batches) for _ in range(plan.num_batches(0))]


def assert_same(expected: list[MicroBatch], found: list[MicroBatch]) -> None:
    assert len(expected) == len(found) > 0
    for left, right in zip(expected, found, strict=True):
        for name, value in vars(left).items():
            other = getattr(right, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def record_reads(monkeypatch: pytest.MonkeyPatch) -> list[remote.RemoteSpan]:
    """Return a list that records the spans that are read from the store from now on."""
    reads: list[remote.RemoteSpan] = []
    read_once = remote._read_once

    def record(spans: list[remote.RemoteSpan]) -> list:
        reads.extend(spans)
        return read_once(spans)

    monkeypatch.setattr(remote, "_read_once", record)
    return reads


def make_copies(cache: Path, folder: Path, limit_bytes: int = 1 << 30) -> ShardCopies:
    return ShardCopies(folder, limit_bytes, partial(name_shard_version, cache / "index"))


def test_shards_on_a_store_give_the_batches_of_local_ones(tmp_path, shards, store):
    local = read_epoch(build_dataset(tmp_path / "a", open_index(tmp_path / "a", shards / "s-{0..2}.tar")))
    index = open_index(tmp_path / "b", "s3://bucket/set/s-{0..2}.tar")
    assert index.arrow_column("file").to_pylist()[0] == "s3://bucket/set/s-0.tar"
    dataset = build_dataset(tmp_path / "b", index)
    assert_same(local, read_epoch(dataset))
    assert sorted(row for batch in local for row in batch.rows.tolist()) == list(range(NUM_SHARDS * PER_SHARD))
    assert_same(local, read_epoch(dataset, num_workers=1))  # a worker process opens the store itself
    everything = open_index(tmp_path / "b", "s3://bucket/set/*.tar")
    assert everything.arrow_column("key").to_pylist() == index.arrow_column("key").to_pylist()


def test_the_index_reads_headers_but_no_latents_and_only_once(tmp_path, store, monkeypatch):
    latents = np.ones((4, 128, 128), np.float32)
    writer = ShardWriter(tmp_path / "big.tar")
    for item in range(6):
        npz = pack_latents(LatentSample(latents=latents, original_size=(1024, 1024), crop_ltrb=(0, 0, 1024, 1024)))
        writer.append(f"k{item}", orjson.dumps({"caption": "c" * 1500}), npz)
    writer.close()
    store.put_file(str(writer.path), "bucket/one/big.tar")
    reads = record_reads(monkeypatch)
    index = open_index(tmp_path / "cache", "s3://bucket/one/big.tar")
    assert len(index) == 6 and index.row(5)["original_width"] == 1024
    assert len(reads) <= 2 * 6 + 2
    assert sum(span.size for span in reads) < 0.1 * writer.path.stat().st_size
    reads.clear()
    (tmp_path / "m.jsonl").write_text('{"key": "k0", "caption": "another"}\n')
    again = open_index(tmp_path / "cache", "s3://bucket/one/big.tar", tmp_path / "m.jsonl")
    assert again.record(0)["caption"] == "another" and reads == []
    # An object that has been replaced is read again.
    store.pipe_file("bucket/one/big.tar", (tmp_path / "big.tar").read_bytes().replace(b"cc", b"dd"))
    store.invalidate_cache()
    changed = open_index(tmp_path / "cache", "s3://bucket/one/big.tar")
    assert changed.record(5)["caption"].startswith("dd") and reads


def test_metadata_on_a_store(tmp_path, store):
    records = [{"image_path": f"{key}.png", "caption": key, "width": 9, "height": 8} for key in "ab"]
    contents = {
        "m.json": json.dumps({"a": records[0], "b": records[1]}),
        "m.jsonl": "\n".join(map(json.dumps, records)),
        "m.csv": "image_path,caption,width,height\na.png,a,9,8\nb.png,b,9,8\n",
    }
    for name, content in contents.items():
        store.pipe_file(f"bucket/meta/{name}", content.encode())
        index = open_record_index(tmp_path, [f"s3://bucket/meta/{name}"], [])
        rows = [(parse_record(row), row["width"]) for row in map(index.row, range(2))]
        assert [(record["key"], record["caption"], width) for record, width in rows] == [
            ("a", "a", 9),
            ("b", "b", 9),
        ], name
    store.pipe_file("bucket/meta/bad.jsonl", b'{"image_path": "a.png"}\n{"x": }\n')
    with pytest.raises(ValueError, match=r"^s3://bucket/meta/bad.jsonl:2:7: malformed JSON"):
        open_record_index(tmp_path, ["s3://bucket/meta/bad.jsonl"], [])


def list_problems(tmp_path: Path, *metadata: str) -> list[Problem]:
    data = {"metadata": list(metadata), "max_bad_fraction": 1.0}
    config = Config.model_validate({"data": data, "cache": {"dir": str(tmp_path / "cache")}})
    return open_checked_records(config)[1]


def test_missing_objects_and_packages_are_named_before_the_start(tmp_path, shards, store):
    [problem] = list_problems(tmp_path, "s3://bucket/set/s-{0..3}.tar")
    assert problem.key == "data.metadata.0"
    assert "names 1 missing file, the first is s3://bucket/set/s-3.tar" in problem.rule
    [problem] = list_problems(tmp_path, "s3://no-such-bucket/s-0.tar")
    assert "is not on the store: The specified bucket does not exist" in problem.rule
    [problem] = list_problems(tmp_path, "s3://bucket/nothing/*.tar")
    assert "s3://bucket/nothing/*.tar" in str(problem) and "is not on the store" in problem.rule
    [problem] = list_problems(tmp_path, "gs://bucket/s-0.tar")
    assert "gs:// needs a package that is not installed: Please install gcsfs" in problem.rule
    [problem] = list_problems(tmp_path, "tape://x/y.tar")
    assert problem.rule == "cannot be read: Protocol not known: tape"
    config = Config.model_validate({"data": {"metadata": ["s3://bucket/set/s-0.tar"]}})
    [problem] = open_checked_records(config)[1]
    assert problem.key == "cache.dir"
    store.pipe_file("bucket/bad/cut.tar", (shards / "s-0.tar").read_bytes()[:9000])
    [problem] = list_problems(tmp_path, "s3://bucket/bad/cut.tar")
    assert str(problem).count("s3://bucket/bad/cut.tar") == 1 and problem.cure == "upload the object again"
    assert problem.rule == "is cut short: it ends before its own headers say"
    for name in ("c-0.tar", "c-1.tar"):
        store.pipe_file(f"bucket/twice/{name}", (shards / "s-0.tar").read_bytes())
    [problem] = list_problems(tmp_path, "s3://bucket/twice/c-{0..1}.tar")
    assert "samples with the key of another sample: " in problem.rule and "file stem" not in problem.rule
    assert "s3://bucket/twice/c-0.tar and s3://bucket/twice/c-1.tar" in problem.rule
    assert problem.cure.startswith("give each sample a key of its own") and "upload it" in problem.cure


def test_the_cure_of_bad_latents_on_a_store_is_an_upload(tmp_path, shards, store):
    content = bytearray((shards / "s-0.tar").read_bytes())
    place = content.index(b"PK\x03\x04")
    content[place : place + 4] = b"xxxx"
    store.pipe_file("bucket/bad/torn.tar", bytes(content))
    data = {"metadata": ["s3://bucket/bad/torn.tar"], "max_bad_fraction": 0}
    config = Config.model_validate(
        {"data": data, "cache": {"dir": str(tmp_path / "cache")}, "run": {"dir": str(tmp_path), "name": "run"}}
    )
    index, problems = open_training_set(config)
    assert index is not None and problems == []
    with pytest.raises(TooManyBadError, match="1 of 8 latents are bad") as caught:
        leave_out_bad_latents(config, index, resuming=False)
    error = caught.value
    assert error.rule.endswith("the first: s3://bucket/bad/torn.tar: not a readable npz file: cut short, or not a zip")
    assert error.cure == (
        "write s3://bucket/bad/torn.tar again and upload it: nothing here can repair it; or raise data.max_bad_fraction"
    )
    assert error.log.is_file() and str(error).endswith(f"{error.log} lists all")


def test_the_quick_start_s_example_trains_on_shards_of_a_store(tmp_path, shards, store):
    """The YAML as it stands in the document passes all checks of the data, on a machine without an image."""
    page = (ROOT / "docs" / "QUICKSTART.md").read_text()
    [example] = [body for body in re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "s3://" in body]
    settings = yaml.safe_load(example)
    settings["cache"]["dir"] = str(tmp_path / "cache")
    records, problems = open_checked_records(Config.model_validate(settings))
    assert problems == [] and records is not None and len(records) == NUM_SHARDS * PER_SHARD
    assert len(open_sample_index(tmp_path / "cache", records)) == NUM_SHARDS * PER_SHARD


def test_an_unreachable_store_ends_the_job_and_makes_no_sample_bad(tmp_path, shards, store, monkeypatch):
    index = open_index(tmp_path, "s3://bucket/set/s-0.tar")
    dataset = build_dataset(tmp_path, index)
    whole = read_epoch(dataset)
    once, calls = remote._read_once, []

    def fail_twice(spans):
        calls.append(len(spans))
        return [ConnectionResetError("gone") for _ in spans] if len(calls) < 3 else once(spans)

    monkeypatch.setattr(remote, "_read_once", fail_twice)
    assert_same(whole, read_epoch(dataset))
    assert len(calls) == len(whole) + 2
    monkeypatch.setattr(remote, "_read_once", lambda spans: [TimeoutError("no answer") for _ in spans])
    with pytest.raises(remote.StoreError, match="s3://bucket/set/s-0.tar at byte .*: TimeoutError: no answer"):
        read_epoch(dataset)
    monkeypatch.setattr(remote, "_read_once", lambda spans: [PermissionError("denied") for _ in spans])
    with pytest.raises(remote.StoreError, match="PermissionError: denied"):
        read_epoch(dataset)


def test_shards_that_change_while_training_make_bad_samples(tmp_path, shards, store):
    content = (shards / "s-0.tar").read_bytes()
    store.pipe_file("bucket/gone/a.tar", content)
    store.put_file(str(shards / "s-1.tar"), "bucket/gone/b.tar")
    index = open_index(tmp_path, "s3://bucket/gone/{a,b}.tar")
    dataset = build_dataset(tmp_path, index)
    keys = index.arrow_column("key").to_pylist()
    last = index.row(PER_SHARD - 1)
    store.pipe_file("bucket/gone/a.tar", content[: last["offset"] + 100])
    batches = read_epoch(dataset)
    [(key, reason)] = [item for batch in batches for item in batch.bad]
    assert key == last["key"] and "s3://bucket/gone/a.tar at byte" in reason and "is truncated: has 100 of" in reason
    store.pipe_file("bucket/gone/a.tar", content[:2000])
    bad = [item for batch in read_epoch(dataset) for item in batch.bad]
    assert sorted(key for key, _ in bad) == keys[:PER_SHARD] and all("is truncated: " in reason for _, reason in bad)
    store.rm("bucket/gone/a.tar")
    batches = read_epoch(dataset)
    bad = [item for batch in batches for item in batch.bad]
    assert sorted(key for key, _ in bad) == keys[:PER_SHARD]
    assert all("key does not exist" in reason for _, reason in bad)
    assert sum(batch.weights.sum().item() for batch in batches) == len(index) - len(bad)


def test_full_verification_reads_from_the_store(tmp_path, shards, store):
    content = bytearray((shards / "s-2.tar").read_bytes())
    row = open_index(tmp_path, shards / "s-2.tar").row(3)
    content[row["offset"] + 500] ^= 1
    store.pipe_file("bucket/flipped/x.tar", bytes(content))
    data = {"metadata": ["s3://bucket/flipped/x.tar"], "verify_latents": "full", "max_bad_fraction": 0.5}
    settings = {"run": {"name": "r", "dir": str(tmp_path)}, "data": data, "cache": {"dir": str(tmp_path / "cache")}}
    config = Config.model_validate(settings)
    index, problems = open_training_set(config)
    assert problems == [] and index is not None
    leave_out_bad_latents(config, index, resuming=False)
    [line] = (tmp_path / "r" / "logs" / "bad_samples.jsonl").read_bytes().splitlines()
    assert orjson.loads(line)["key"] == "k2.3" and "CRC-32" in orjson.loads(line)["reason"]


def test_copies_are_read_instead_of_the_store(tmp_path, shards, store, monkeypatch):
    index = open_index(tmp_path, "s3://bucket/set/s-{0..2}.tar")
    plain = read_epoch(build_dataset(tmp_path, index))
    dataset = build_dataset(tmp_path, index, make_copies(tmp_path, tmp_path / "copies"))
    assert_same(plain, read_epoch(dataset))
    files = sorted((tmp_path / "copies").iterdir())
    assert len(files) == NUM_SHARDS
    reads = record_reads(monkeypatch)
    assert_same(plain, read_epoch(dataset))
    assert reads == []
    content = bytearray(files[0].read_bytes())
    content[-700] ^= 1  # a damaged sample is read from the store again
    files[0].write_bytes(content)
    assert_same(plain, read_epoch(dataset))
    assert len(reads) == 1
    assert_same(plain, read_epoch(dataset))
    assert len(reads) == 1
    make_copies(tmp_path, tmp_path / "copies", limit_bytes=1).keep("s3://bucket/set/s-0.tar", 0, b"x")
    assert len(list((tmp_path / "copies").iterdir())) == 1  # too little room: the other copies are deleted


def read_streamed(dataset: LatentDataset, num_epochs: int, rank: int = 0, ranks: int = 1, at: Position = START) -> dict:
    """Return the (key, epoch) pairs of a rank's samples in each batch, by position in the stream."""
    plan = build_plan(dataset.index, 4, seed=1, shuffle_shards=1)
    specs = iterate_specs(plan, at, rank, ranks, 4 // ranks)
    keys, found, position = dataset.index.arrow_column("key").to_pylist(), {}, plan.skip_empty_epochs(at)
    while position[0] < num_epochs:
        spec = next(specs)
        batch = dataset[spec]
        assert batch.bad == [] and batch.weights.min() == 1
        found[position] = [(keys[row], int(e)) for row, e in zip(batch.rows.tolist(), spec.epochs, strict=True)]
        position = plan.next_position(position)
    return found


def test_streamed_shards_give_every_sample_once_an_epoch(tmp_path, shards, store, monkeypatch):
    index = open_index(tmp_path, "s3://bucket/set/s-{0..2}.tar")
    dataset = build_dataset(tmp_path, index, make_copies(tmp_path, tmp_path / "copies"))
    whole = read_streamed(dataset, 2)
    taken = sorted(item for batch in whole.values() for item in batch)
    assert taken == sorted((key, epoch) for key in index.arrow_column("key").to_pylist() for epoch in (0, 1))
    for future in dataset.store._running.values():
        future.result()
    assert len(list((tmp_path / "copies").glob("*.tar"))) == NUM_SHARDS
    reads = record_reads(monkeypatch)
    for rank in (0, 1):  # the batches of two ranks, joined, are the batches of one rank
        share = read_streamed(dataset, 2, rank, 2)
        assert {at: batch[2 * rank :][:2] for at, batch in whole.items()} == share
    middle = list(whole)[5]
    assert list(read_streamed(dataset, 2, at=middle).values()) == list(whole.values())[5:]
    assert reads == []


def test_a_server_without_ranges_is_read_by_whole_shards(tmp_path, shards, store, monkeypatch):
    def send_all(spans):
        return [remote._verify_answer(store.cat_file(span.url), span) for span in spans]

    monkeypatch.setattr(remote, "_read_once", send_all)
    index = open_index(tmp_path, "s3://bucket/set/s-{0..2}.tar")
    with pytest.raises(remote.NoRangesError, match="sends only whole files; set data.remote_shards.shuffle_shards"):
        read_epoch(build_dataset(tmp_path, index))
    streamed = read_streamed(build_dataset(tmp_path, index, make_copies(tmp_path, tmp_path / "copies")), 1)
    assert len({key for batch in streamed.values() for key, _ in batch}) == NUM_SHARDS * PER_SHARD


def test_too_little_room_for_copies_is_an_error_at_the_start(tmp_path, shards, store):
    stream = {"shuffle_shards": 2, "copies_gb": 1e-4}
    data = {"metadata": ["s3://bucket/set/s-{0..2}.tar"], "remote_shards": stream}
    settings = {"run": {"name": "r", "dir": str(tmp_path)}, "data": data, "cache": {"dir": str(tmp_path / "cache")}}
    [problem] = open_training_set(Config.model_validate(settings))[1]
    assert problem.key == "data.remote_shards.copies_gb" and "GB of two windows of" in problem.rule


def test_a_remote_file_reads_at_any_position(store):
    content = bytes(range(256)) * 20
    store.pipe_file("bucket/window", content)
    [item] = remote.describe_objects(["s3://bucket/window"])
    file, plain = remote.RemoteFile(item, 50, 100), io.BytesIO(content)
    rng = np.random.default_rng(0)
    for _ in range(30):
        place, count = int(rng.integers(0, len(content) + 50)), int(rng.integers(0, 400))
        assert file.seek(place) == plain.seek(place) and file.read(count) == plain.read(count)


def test_a_replaced_file_of_a_web_server_has_another_version(tmp_path):
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server, file, versions = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)), "a.tar", []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for content, seconds in ((b"a" * 100, 10**9), (b"b" * 100, 2 * 10**9)):
        (tmp_path / file).write_bytes(content)
        os.utime(tmp_path / file, (seconds, seconds))
        versions += remote.describe_objects([f"http://127.0.0.1:{server.server_port}/{file}"])
    server.shutdown()
    server.server_close()
    assert versions[0].size == versions[1].size and versions[0].version != versions[1].version
