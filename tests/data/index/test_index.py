"""The index: built once, rebuilt when its sources change, and shared by processes instead of copied."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pytest
from samples.index_samples import get_keys, list_entries, write_metadata

from sdxl_trainer.data.formats.latent_header import LatentHeader
from sdxl_trainer.data.formats.manifest import read_latest
from sdxl_trainer.data.images.bucket import BucketRule, CropBox, Size
from sdxl_trainer.data.index import index as module
from sdxl_trainer.data.index import index_file
from sdxl_trainer.data.index.index import open_record_index, open_sample_index
from sdxl_trainer.data.index.join import LatentSelection
from sdxl_trainer.data.index.missing_latents import EncodingSettings
from sdxl_trainer.data.index.schema import PARTS
from sdxl_trainer.data.index.unlisted_latents import infer_placement
from sdxl_trainer.data.loading.loader import build_plan
from sdxl_trainer.data.metadata.records import parse_record


def list_heads(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "index").iterdir() if path.name != PARTS)


def test_rows_and_columns_come_from_the_mapped_file(tmp_path):
    content = {f"k{number}": {"caption": f"c{number}", "score": number} for number in range(5)}
    content["k3"] = {"tags": ["ä", "b"]}
    content["k4"] = {}
    before = pa.total_allocated_bytes()
    index = open_record_index(tmp_path, [write_metadata(tmp_path / "m.json", content)], [])
    assert pa.total_allocated_bytes() < before + 512  # no column is in memory but those of one value
    assert str(index.list_parts()[0].path) in Path("/proc/self/maps").read_text()
    assert len(index) == 5 and get_keys(index) == list(content)
    row = index.row(3)
    assert (row["key"], parse_record(row)["caption"], index.record(4)["caption"]) == ("k3", "ä, b", None)
    assert (~index.column("captioned")).sum() == 1
    assert orjson.loads(index.row(2)["record"])["score"] == 2  # the whole record is kept


def test_rows_are_read_from_several_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(index_file, "ROWS_PER_GROUP", 3)
    content = {f"k{number}": {"caption": str(number)} for number in range(10)}
    index = open_record_index(tmp_path, [write_metadata(tmp_path / "m.json", content)], [])
    assert [index.record(number)["caption"] for number in range(len(index))] == [str(number) for number in range(10)]


def test_the_index_is_rebuilt_only_when_its_metadata_changes(tmp_path, builds):
    first = write_metadata(tmp_path / "1.json", {"a": {"caption": "x"}})
    second = write_metadata(tmp_path / "2.json", {"b": {"caption": "y"}})
    paths = [open_record_index(tmp_path, [first, second], []).path for _ in range(3)]
    assert len(set(paths)) == 1 and builds == [paths[0].name]
    write_metadata(first, {"a": {"caption": "xx"}})
    assert open_record_index(tmp_path, [first, second], []).record(0)["caption"] == "xx"
    assert get_keys(open_record_index(tmp_path, [second, first], [])) == ["b", "a"]
    assert len(builds) == 3
    assert list_heads(tmp_path) == sorted(builds)  # no temporary file is left


def test_the_index_is_rebuilt_when_images_or_captions_change(tmp_path, builds):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.jpg"):
        (tmp_path / name).touch()
    # An index or latents among the images are not a change.
    fingerprints = [open_record_index(tmp_path, [], [tmp_path]).fingerprint]
    (tmp_path / "a.npz").touch()
    fingerprints.append(open_record_index(tmp_path, [], [tmp_path]).fingerprint)
    assert fingerprints[0] == fingerprints[1] and len(builds) == 1
    caption = tmp_path / "sub" / "b.txt"
    caption.write_text("one")
    assert open_record_index(tmp_path, [], [tmp_path]).record(1)["caption"] == "one"
    caption.write_text("other")
    assert open_record_index(tmp_path, [], [tmp_path]).record(1)["caption"] == "other"
    (tmp_path / "sub" / "c.webp").touch()
    assert get_keys(open_record_index(tmp_path, [], [tmp_path])) == ["a", "b", "c"]
    (tmp_path / "a.png").unlink()
    assert get_keys(open_record_index(tmp_path, [], [tmp_path])) == ["b", "c"]
    assert len(builds) == 5


def test_pickling_carries_the_path_and_not_the_rows(tmp_path):
    content = {f"key-{number}": {"caption": "x" * 100} for number in range(1000)}
    index = open_record_index(tmp_path, [write_metadata(tmp_path / "m.json", content)], [])
    data = pickle.dumps(index)
    assert len(data) < 500
    assert pickle.loads(data).row(999) == index.row(999)


def test_the_join_holds_records_with_latents_in_the_order_of_the_records(tmp_path, builds):
    content = {key: {"caption": f"of {key}", "score": 1} for key in ("d", "a", "c", "b")}
    records = open_record_index(tmp_path, [write_metadata(tmp_path / "m.json", content)], [])
    list_entries(tmp_path, "a", "b", "gone")
    list_entries(tmp_path, "d", rank=1, bucket=(96, 64))
    index = open_sample_index(tmp_path, records)
    assert get_keys(index) == ["d", "a", "b"]
    row = index.row(1)
    assert orjson.loads(row.pop("record"))["score"] == 1
    assert row == {
        "key": "a",
        "image_path": str(Path("a").absolute()),
        "source": 0,
        "file": "a.npz",
        "bucket_width": 64,
        "bucket_height": 96,
        "original_width": 101,
        "original_height": 150,
        "resized_width": 70,
        "crop_left": 3,
        "crop_top": 0,
        "offset": None,
        "bytes": 1,
        "sha256": None,
        "flipped": None,
        "text": None,
    }
    assert index.column("bucket_width").tolist() == [96, 64, 64] and index.column("bucket_width").dtype == np.int32
    assert build_plan(index, 1, 0).buckets == [64 << 16 | 96, 96 << 16 | 64]
    # A cache job that adds nothing changes nothing, even on more ranks; a new item does.
    list_entries(tmp_path)
    list_entries(tmp_path, rank=2)
    assert open_sample_index(tmp_path, records).path == index.path and len(builds) == 2
    list_entries(tmp_path, "c", rank=2)
    assert get_keys(open_sample_index(tmp_path, records)) == ["d", "a", "c", "b"]
    assert len(builds) == 3


def test_the_newest_entry_of_a_key_is_joined(tmp_path):
    records = open_record_index(tmp_path, [write_metadata(tmp_path / "m.json", {"a": {"caption": "x"}})], [])
    list_entries(tmp_path, "a")
    list_entries(tmp_path, "a", bucket=(96, 64))
    assert open_sample_index(tmp_path, records).row(0)["bucket_width"] == 96


def test_job_and_training_take_the_same_line_for_the_newest(tmp_path):
    """Both follow the order of lines in a part and the numbers between parts; neither asks a clock."""
    records = open_record_index(tmp_path, [write_metadata(tmp_path / "m.json", {key: {} for key in "abcd"})], [])
    rng = np.random.default_rng(0)
    for rank in range(3):
        list_entries(tmp_path, *map(str, rng.choice(list("abcd"), 20)), rank=rank, bucket=(64 + 8 * rank, 96))
        part = tmp_path / "manifest" / f"part-{rank:05d}.jsonl"
        lines = [{**orjson.loads(line), "bytes": number} for number, line in enumerate(part.read_bytes().splitlines())]
        lines = [{**line, "listed_ns": int(rng.integers(5)), "file": f"{rank}-{line['bytes']}"} for line in lines]
        lines = [{name: value for name, value in line.items() if name != "crc32"} for line in lines]
        part.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
        index = open_sample_index(tmp_path, records)
        files = dict(zip(get_keys(index), index.arrow_column("file").to_pylist(), strict=True))
        assert files == {key: entry.file for key, entry in sorted(read_latest(tmp_path).items())}
    list_entries(tmp_path, "a", rank=0)
    assert open_sample_index(tmp_path, records).row(0)["file"] == "a.npz" == read_latest(tmp_path)["a"].file


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "flipped", "end"])
def test_a_damaged_index_is_built_again(tmp_path, builds, damage):
    metadata = write_metadata(tmp_path / "m.json", {f"k{n}": {"caption": f"words {n}"} for n in range(300)})
    list_entries(tmp_path, "k0", "k7")
    for kind in ("records", "listed", "latents"):
        records = open_record_index(tmp_path, [metadata], [])
        samples = open_sample_index(tmp_path, records)
        before = [samples.row(row) for row in (0, 1)]
        [path] = [path for path in [samples.path, *(tmp_path / "index" / PARTS).iterdir()] if kind in path.name]
        content = bytearray(path.read_bytes())
        place = content.index({"records": b"k7", "listed": b"k7", "latents": b"bucket_counts"}[kind])
        del records, samples, builds[:]
        if damage in ("cut", "empty"):
            del content[place if damage == "cut" else 0 :]
        elif damage == "flipped":
            content[place] ^= 1
        else:
            start = place if damage == "zeros" else -9
            content[start : start + 9 if damage == "zeros" else None] = bytes(9)
        path.write_bytes(content)
        records = open_record_index(tmp_path, [metadata], [])
        samples = open_sample_index(tmp_path, records)
        assert [samples.row(row) for row in (0, 1)] == before
        assert builds == [(records if kind == "records" else samples).path.name]


def test_an_index_is_kept_although_all_others_are_of_a_later_time(tmp_path):
    (tmp_path / "index").mkdir()
    for number in range(module.KEPT_FILES + 1):
        (tmp_path / "index" / f"records-{number}.arrow").touch()
        os.utime(tmp_path / "index" / f"records-{number}.arrow", (2**32, 2**32))
    (tmp_path / "index" / ".records-x.arrow.0123abcd.tmp").touch()  # of a killed job
    records = open_record_index(tmp_path, [write_metadata(tmp_path / "m.json", {"a": {"caption": "x"}})], [])
    assert get_keys(records) == ["a"] and records.path.is_file()
    assert len(list_heads(tmp_path)) == module.KEPT_FILES


RULE = BucketRule(resolution_px=1024, min_px=256, max_px=2048, step_px=64, no_upscale=True)


@pytest.mark.parametrize(
    ("crop", "rule", "resized", "place"),
    [
        (None, RULE, (800, 600), (16, 12)),  # no_upscale: the image keeps its size
        ((16, 12, 784, 588), RULE, (800, 600), (16, 12)),
        ((16, 12, 784, 588), None, (800, 600), (16, 12)),  # the file's crop is as large as the bucket
        ((0, 0, 768, 576), RULE, (768, 576), (0, 0)),  # made without no_upscale
        ((0, 0, 768, 576), None, (768, 576), (0, 0)),
        ((5, 7, 773, 583), RULE, (778, 590), (5, 7)),  # of another rule
        ((0, 12, 768, 564.5), RULE, (800, 600), (16, 12)),  # kohya's letterbox
        ((0, 0, 0, 0), RULE, (768, 576), (0, 0)),  # stretched by the first sdxl-trainer
        ((-16, 12, 752, 588), None, (768, 576), (0, 0)),
    ],
)
def test_the_crop_of_unlisted_latents_follows_the_file_or_the_rule(crop, rule, resized, place):
    header = LatentHeader(
        bucket=Size(768, 576), original_size=None, crop_ltrb=crop and CropBox(*crop), bytes=1, flipped=False
    )
    placement = infer_placement(header, Size(800, 600), rule)
    assert (placement.resized, (placement.left, placement.top), placement.bucket) == (resized, place, (768, 576))


def test_old_files_are_deleted_except_those_in_use(tmp_path):
    metadata, indexes = tmp_path / "m.json", []
    for number in range(6):
        write_metadata(metadata, {f"k{number}": {"caption": "x" * number}})
        index = open_record_index(tmp_path, [metadata], [])
        os.utime(index.path, (number, number))
        if number in (0, 2):
            indexes.append(index)  # in use
    kept = set(list_heads(tmp_path))
    assert {index.path.name for index in indexes} <= kept and index.path.name in kept
    assert len(kept) == len(indexes) + module.KEPT_FILES
    assert [get_keys(index) for index in indexes] == [["k0"], ["k2"]]


def test_processes_that_start_at_once_build_one_index(tmp_path):
    """No process waits for another or reads half a file, and no temporary file is left."""
    write_metadata(tmp_path / "m.json", {f"k{row}": {"caption": "x" * 50} for row in range(20_000)})
    list_entries(tmp_path, *(f"k{row}" for row in range(0, 20_000, 2)))
    code = (
        "import sys, pathlib; from sdxl_trainer.data.index.index import open_sample_index, open_record_index;"
        "folder = pathlib.Path(sys.argv[1]); print('ready', flush=True); sys.stdin.readline();"
        "index = open_sample_index(folder, open_record_index(folder, [folder / 'm.json'], []));"
        "print(index.path, len(index), index.hash_rows(), index.row(9_999)['key'])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    [output] = {process.communicate("go\n")[0] for process in processes}
    assert output.split()[1] == "10000" and output.split()[3] == "k19998"
    assert [name.split("-")[0] for name in list_heads(tmp_path)] == ["latents", "records"]


def test_an_index_that_another_process_deletes_is_no_error(tmp_path):
    """A dangling link behaves like a file that is deleted after its folder was listed."""
    (tmp_path / "index").mkdir()
    for number in range(module.KEPT_FILES + 1):
        (tmp_path / "index" / f"records-{number}.arrow").symlink_to(tmp_path / "deleted")
    records = open_record_index(tmp_path, [write_metadata(tmp_path / "m.json", {"a": {"caption": "x"}})], [])
    assert get_keys(records) == ["a"]


@pytest.mark.parametrize("size", [(2**40, 5), (1, 2**31 - 1)])
def test_latents_with_a_size_out_of_range_are_a_bad_sample(tmp_path, size):
    """Such a size overflows the columns, by itself or scaled to the bucket."""
    np.savez(tmp_path / "a.npz", latents=np.ones((4, 8, 8), np.float32), original_size=np.array(size))
    np.savez(tmp_path / "b.npz", latents=np.ones((4, 8, 8), np.float32), original_size=np.array([64, 64]))
    records = open_record_index(tmp_path, [write_metadata(tmp_path / "m.json", {"a": {}, "b": {}})], [])
    index = open_sample_index(tmp_path, records)
    [bad] = index.summary.bad
    assert get_keys(index) == ["b"] and bad.key == "a"
    assert bad.reason == f"{tmp_path}/a.npz: the original size {size[0]}x{size[1]} px is out of range"


def test_an_image_with_a_recorded_size_out_of_range_is_a_bad_sample(tmp_path):
    (tmp_path / "a.png").touch()
    content = {"a": {"image_path": "a.png", "original_size": [1, 2**31 - 1]}}
    records = open_record_index(tmp_path, [write_metadata(tmp_path / "m.json", content)], [])
    rule = BucketRule(resolution_px=128, min_px=64, max_px=256, step_px=32, max_aspect_ratio=1e10)
    selection = LatentSelection(encoding=EncodingSettings(rules=(("", rule),), beside=False, flip=False))
    index = open_sample_index(tmp_path, records, selection)
    [bad] = index.summary.bad
    assert (
        len(index) == 0 and bad.key == "a" and "the size 1x2147483647 px in its metadata is out of range" in bad.reason
    )


def test_the_hash_of_rows_covers_keys_and_buckets_only(tmp_path):
    hashes = []
    for name, caption, bucket in (("a", "x", (64, 96)), ("b", "other", (64, 96)), ("c", "x", (96, 64))):
        folder = tmp_path / name
        folder.mkdir()
        records = open_record_index(
            folder, [write_metadata(folder / "m.json", {"k1": {"caption": caption}, "k2": {}})], []
        )
        list_entries(folder, "k2", "k1", bucket=bucket)
        hashes.append(open_sample_index(folder, records).hash_rows())
    assert hashes[0] == hashes[1] != hashes[2]
