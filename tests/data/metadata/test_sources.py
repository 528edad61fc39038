"""Every format of data gives the same records and latents, and errors name the place of a mistake."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger
from PIL import Image
from programs import FIXTURES, ROOT

from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.latent_files import find_bad_latents
from sdxl_trainer.data.checks.left_out import get_left_out_file, leave_out_bad_latents, load_left_out_rows
from sdxl_trainer.data.checks.training_set import count_missing, open_training_set
from sdxl_trainer.data.formats.latents import LatentSample, find_latent_file, read_latents, write_latents
from sdxl_trainer.data.formats.shards import ShardWriter
from sdxl_trainer.data.images.bucket import BucketRule
from sdxl_trainer.data.index import join
from sdxl_trainer.data.index.index import Index, open_record_index, open_sample_index
from sdxl_trainer.data.index.join import LatentSelection
from sdxl_trainer.data.index.missing_latents import EncodingSettings
from sdxl_trainer.data.metadata import json_stream
from sdxl_trainer.data.metadata.records import parse_record
from sdxl_trainer.data.metadata.sources import SourceRecord, list_source_files, read_metadata_file

PAGE = ROOT / "docs" / "DATA.md"
RECORD = {"image_path": "images/cat.png", "caption": "cat, on a mat", "original_size": [1500, 1000]}


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_all(file: Path) -> list[SourceRecord]:
    return [record for records in read_metadata_file(file) for record in records]


def list_rows(index: Index) -> list[dict]:
    return [index.row(number) for number in range(len(index))]


def make_latents(path: Path, seed: int = 0, size=(300, 200), bucket=(96, 64)) -> bytes:
    latents = np.random.default_rng(seed).standard_normal((4, bucket[1] // 8, bucket[0] // 8)).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_latents(path, LatentSample(latents=latents, original_size=size, crop_ltrb=(0, 0, *bucket)))


@pytest.mark.parametrize("name", re.findall(r"^```\w+ ((?!tag_)\S+)$", PAGE.read_text(), re.M))
def test_the_examples_of_the_data_page_are_read(tmp_path, name):
    text = re.search(rf"^```\w+ {re.escape(name)}\n(.*?)^```", PAGE.read_text(), re.M | re.S)[1]
    write(tmp_path / "images" / "cat.png", "")
    if name.endswith((".parquet", ".sqlite3")):
        subprocess.run([sys.executable, "-c", text], cwd=tmp_path, check=True)
    else:
        write(tmp_path / name, text)
    metadata = [] if name.endswith(".txt") else [tmp_path / name]
    row = open_record_index(tmp_path / "cache", metadata, [] if metadata else [tmp_path / "images"]).row(0)
    assert (row["key"], row["image_path"]) == ("cat", str(tmp_path / "images" / "cat.png"))
    assert parse_record(row)["caption"] == ("a cat,cat, on a mat" if name == "meta_cap.json" else "cat, on a mat")
    assert (row["width"], row["height"]) == ((1500, 1000) if metadata else (0, 0))


def test_all_formats_give_the_same_records(tmp_path):
    fields = {**RECORD, "artist": "Ä, b"}
    table = pa.table({**{name: [value] for name, value in fields.items()}, "empty": pa.array([None], pa.string())})
    pq.write_table(table, tmp_path / "m.parquet")
    files = [
        tmp_path / "m.parquet",
        write(tmp_path / "m.json", orjson.dumps({"cat": fields})),
        write(tmp_path / "m.jsonl", b"\xef\xbb\xbf\n" + orjson.dumps(fields) + b"\n\n"),
        write(tmp_path / "lines.json", orjson.dumps(fields) + b"\n" + orjson.dumps({"image_path": "x.png"}) + b"\n"),
        write(tmp_path / "m", orjson.dumps({"cat": fields})),
        write(
            tmp_path / "m.csv",
            'image_path,caption,original_size,artist,none\nimages/cat.png,"cat, on a mat","[1500, 1000]","Ä, b",\n',
        ),
        write(
            tmp_path / "m.tsv",
            "artist\timage_path\tcaption\twidth\theight\nÄ, b\timages/cat.png\tcat, on a mat\t1500\t1000\n",
        ),
    ]
    rows = [open_record_index(tmp_path / "cache", [file], []).row(0) for file in files]
    for file, row in zip(files, rows, strict=True):
        record = parse_record(row)
        row.pop("record")
        assert (record["artist"], record["caption"]) == ("Ä, b", "cat, on a mat"), file
        assert "empty" not in record and "none" not in record, file
        assert row == rows[0], file
    assert rows[0]["captioned"] and (rows[0]["width"], rows[0]["height"]) == (1500, 1000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", '{"image_path": "a.png"}\n{"image_path": }\n', "m.jsonl:2:16: malformed JSON"),
        ("m.jsonl", '{"image_path": "a.png"}\n[1]\n', "m.jsonl:2: the record must be a JSON object, not a list"),
        ("m.jsonl", '{"image_path": "a.png"}\n{"caption": "a"}\n', "m.jsonl:2: the record has no `image_path`"),
        ("m.csv", "image_path,caption\na.png,b\nc.png,d,e\n", "m.csv:3: the row has 3 values for 2 columns"),
        ("m.csv", 'image_path,caption\na.png,"b" c\n', "m.csv:2: malformed CSV"),
        ("m.csv", '"image_path"x,caption\na.png,b\n', "m.csv:1: malformed CSV"),
        ("m.csv", "image_path,image_path\na,b\n", "m.csv:1: two columns have the name 'image_path'"),
        ("m.csv", b"image_path\nM\xf6.png\n", "m.csv: is not UTF-8"),
        ("m.parquet", "PAR1 no", "m.parquet: not a readable Parquet file"),
        ("m.tar", "x" * 2000, "m.tar: not a readable tar"),
        ("m.bin", "\x00\x01", "m.bin: has no known metadata format"),
        ("m.json", b'{"a": {},\n "b": {"c": "\xff"}}', "m.json:2:14: is not UTF-8"),
        ("m.json", '{"a": {}, "a": {}}', "m.json: 1 duplicate key: 'a'"),
    ],
)
def test_errors_name_the_place_of_a_mistake(tmp_path, name, content, message):
    with pytest.raises(ValueError) as caught:
        read_all(write(tmp_path / name, content))
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


def test_fields_of_the_metadata_never_become_fields_of_the_reader(tmp_path):
    fields = {**RECORD, "//npz": 5, "//name": {}, "//base": [], "//source": "x"}
    files = [
        write(tmp_path / "m.jsonl", orjson.dumps(fields) + b"\n" + orjson.dumps({"image_path": "x.png"})),
        write(tmp_path / "m.json", orjson.dumps({"cat": fields})),
    ]
    for file in files:
        row = open_record_index(tmp_path / "cache", [file], []).row(0)
        assert (row["key"], row["offset"], row["source"]) == ("cat", None, 0)
    merged = open_record_index(tmp_path / "cache", files, [])
    assert merged.row(0)["offset"] is None and merged.record(0)["//npz"] == 5


VALUES = st.recursive(
    st.none() | st.integers(-9, 9) | st.text(max_size=6) | st.sampled_from(['"', "\\", '\\"', "{", "},", "]", "\n"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    content=st.dictionaries(st.text(max_size=4), st.dictionaries(st.text(max_size=3), VALUES, max_size=3)),
    indent=st.sampled_from([None, 1]),
    block_bytes=st.integers(8, 90),
    dropped=st.integers(0, 400),
)
def test_chunks_of_a_file_hold_the_records_of_the_whole(tmp_path_factory, content, indent, block_bytes, dropped):
    """A damaged file is refused in chunks if it is refused as a whole."""
    file = tmp_path_factory.getbasetemp() / "blocks.json"
    text = json.dumps(content, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    before, json_stream.BLOCK_BYTES = json_stream.BLOCK_BYTES, block_bytes
    try:
        file.write_bytes(text)
        pairs = [pair for chunk in json_stream.iterate_chunks(file) for pair in chunk.parse().items()]
        assert pairs == list(content.items())
        damaged = text[: dropped % len(text)] + text[dropped % len(text) + 1 :]
        file.write_bytes(damaged)
        try:
            whole = json.loads(damaged.decode())
        except (json.JSONDecodeError, UnicodeDecodeError):
            whole = None
        if not isinstance(whole, dict):
            with pytest.raises(ValueError):
                [chunk.parse() for chunk in json_stream.iterate_chunks(file)]
    finally:
        json_stream.BLOCK_BYTES = before


def test_an_error_far_into_a_file_names_line_and_column(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "BLOCK_BYTES", 64)
    lines = [f' "k{number}": {{"caption": "ä {number}"}}' for number in range(50)]
    lines[40] = ' "k40": {"caption" "ä"}'
    for separator, place in ((",\n", ":42:20:"), (",", f":2:{sum(map(len, lines[:40])) + 40 + 20}:")):
        file = write(tmp_path / "m.json", "{\n" + separator.join(lines) + "}")
        with pytest.raises(ValueError, match=f"{re.escape(str(file))}{place} malformed JSON"):
            read_all(file)


def test_patterns_are_expanded_to_files(tmp_path):
    for number in range(9, 12):
        write(tmp_path / f"s{number:03d}.tar", "")
    assert [path.name for path in list_source_files([tmp_path / "s{009..011}.tar"])] == [
        "s009.tar",
        "s010.tar",
        "s011.tar",
    ]
    assert [path.name for path in list_source_files([tmp_path / "{b,a}-{1..2}"])] == ["b-1", "b-2", "a-1", "a-2"]
    assert [path.name for path in list_source_files([tmp_path / "s{11..9}"])] == ["s11", "s10", "s9"]
    assert [path.name for path in list_source_files([tmp_path / "s{9..011}"])] == ["s009", "s010", "s011"]
    assert [path.name for path in list_source_files([tmp_path / "s01*.tar"])] == ["s010.tar", "s011.tar"]
    assert list_source_files([tmp_path / "none*.tar"]) == [tmp_path / "none*.tar"]  # check_sources reports it


@pytest.mark.parametrize("program", ["kohya_cache", "seed_cache"])
@pytest.mark.parametrize("form", ["metadata", "folder", "cache_dir"])
def test_caches_of_other_programs_are_read(tmp_path, program, form):
    """The three forms: with metadata, without metadata, and with latents in another folder than the images."""
    data = tmp_path / "data"
    shutil.copytree(FIXTURES / program, data)
    for image in data.glob("*.jpg"):
        image.unlink()
    cache = data
    if form == "cache_dir":
        cache = tmp_path / "cache"
        cache.mkdir()
        for file in data.glob("*.npz"):
            file.rename(cache / file.name)
    metadata = [] if form == "folder" else [data / "metadata.json"]
    index = open_sample_index(cache, open_record_index(cache, metadata, [] if metadata else [data]))
    assert index.arrow_column("key").to_pylist() == ["img000000", "img000001"] and index.summary.num_unlisted == 2
    for row, size in zip(list_rows(index), ((348, 256), (359, 264)), strict=True):
        path = find_latent_file(data / f"{row['key']}.jpg", cache)
        assert path == cache / row["file"]
        sample = read_latents(path, (row["bucket_width"], row["bucket_height"]))
        assert (row["original_width"], row["original_height"]) == sample.original_size == size
        assert row["bytes"] == path.stat().st_size and row["sha256"] is None and row["offset"] is None
        # kohya's scripts resize to cover and crop the centre, but do not store that. The first sdxl-trainer stretches.
        scale = max(row["bucket_width"] / size[0], row["bucket_height"] / size[1])
        left = (int(size[0] * scale + 0.5) - row["bucket_width"]) // 2 if program == "kohya_cache" else 0
        assert row["crop_left"] == left
    if form == "metadata":
        expected = json.loads((data / "metadata.json").read_text())
        assert index.record(0)["caption"] == next(iter(expected.values()))["caption"]


def test_latents_that_are_added_later_are_found(tmp_path):
    metadata = write(tmp_path / "m.json", orjson.dumps({key: {"caption": key} for key in "abc"}))
    cache = tmp_path / "cache"
    make_latents(cache / "a.npz")
    write(cache / "c.npz", "no npz")
    make_latents(cache / "a_te_outputs.npz")
    records = open_record_index(cache, [metadata], [])
    index = open_sample_index(cache, records)
    assert index.arrow_column("key").to_pylist() == ["a"]
    assert [key for key, reason in index.summary.bad if "not a zip" in reason] == ["c"]
    assert open_sample_index(cache, records).path == index.path
    make_latents(cache / "b_0300x0200_sdxl.npz", 1)
    assert open_sample_index(cache, records).arrow_column("key").to_pylist() == ["a", "b"]


@pytest.mark.parametrize("on_missing", ["skip", "encode"])
def test_what_the_storage_did_not_give_is_read_again_at_the_next_start(tmp_path, on_missing):
    suffix = {"skip": ".npz", "encode": ".png"}[on_missing]
    real, link = tmp_path / f"elsewhere{suffix}", tmp_path / "cache" / f"a{suffix}"
    os.mkfifo(real)
    link.parent.mkdir()
    link.symlink_to(real)
    write(tmp_path / "m.json", orjson.dumps({"a": {"image_path": str(link.with_suffix(".png")), "caption": "a"}}))
    records = open_record_index(tmp_path / "cache", [tmp_path / "m.json"], [])
    rule = BucketRule(resolution_px=128, min_px=64, max_px=256, step_px=32)
    encoding = EncodingSettings((("", rule),), beside=False, flip=False)
    selection = LatentSelection(encoding=encoding if on_missing == "encode" else None)
    index = open_sample_index(tmp_path / "cache", records, selection)
    assert len(index) == 0 and "is a pipe" in index.summary.bad[0].reason
    real.unlink()
    if on_missing == "skip":
        make_latents(real)
    else:
        Image.new("RGB", (100, 100)).save(real)
    index = open_sample_index(tmp_path / "cache", records, selection)
    assert len(index) == 1 and index.summary.num_bad == 0
    assert open_sample_index(tmp_path / "cache", records, selection).path == index.path


def test_shards_are_a_source_without_further_metadata(tmp_path):
    contents = {}
    for number in range(2):
        writer = ShardWriter(tmp_path / f"s-{number}.tar")
        for key in (f"a{number}", f"b.{number}"):
            contents[key] = make_latents(tmp_path / "x.npz", len(contents), bucket=(64 + 32 * number, 64))
            writer.append(key, orjson.dumps({"caption": f"of {key}", "score": number}), contents[key])
        writer.close()
    records = open_record_index(tmp_path / "cache", [tmp_path / "s-{0..1}.tar"], [])
    index = open_sample_index(tmp_path / "cache", records)
    assert index.arrow_column("key").to_pylist() == list(contents)
    for row in list_rows(index):
        content = Path(row["file"]).read_bytes()[row["offset"] :][: row["bytes"]]
        assert content == contents[row["key"]] and parse_record(row)["caption"] == f"of {row['key']}"
        assert row["bucket_width"] == 64 + 32 * orjson.loads(row["record"])["score"]
    assert find_bad_latents(index, tmp_path / "cache", "full") == []


def test_sizes_that_disagree_with_the_image_are_counted_and_not_used(tmp_path):
    sizes = {"right": [300, 200], "wrong": [200, 300], "bucket": [96, 64], "none": None, "odd": [301, 200]}
    records = {key: {"caption": key, "original_size": size} for key, size in sizes.items()}
    write(tmp_path / "m.json", orjson.dumps(records))
    for key in sizes:
        make_latents(tmp_path / "cache" / f"{key}.npz")
    index, problems = open_training_set(build_config(tmp_path))
    assert index is not None and problems == []
    assert set(index.column("original_width")) == {300} and set(index.column("original_height")) == {200}
    assert index.summary.other_sizes == (
        "2 records whose size is not that of the image; the first is wrong (200x300 instead of 300x200)"
    )
    write(tmp_path / "m.json", orjson.dumps({"right": records["right"]}))
    again, _ = open_training_set(build_config(tmp_path))
    assert again is not None and again.summary.other_sizes == ""


def test_a_sample_of_a_shard_without_latents_is_counted_as_missing(tmp_path):
    npz = make_latents(tmp_path / "x.npz")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in {
            "a.json": b'{"caption": "a"}',
            "a.npz": npz,
            "b.json": b"{}",
            "c.npz": npz,
            "README.md": b"",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    index, problems = open_training_set(build_config(tmp_path, metadata=[tmp_path / "s.tar"], on_missing="error"))
    assert index is not None and index.arrow_column("key").to_pylist() == ["a", "c"]
    assert [problem.rule for problem in problems] == ["1 of 3 samples have no latents"]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", errors="surrogateescape") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_members_of_no_sample_are_counted_and_named(tmp_path):
    npz, lines = make_latents(tmp_path / "x.npz"), []
    members = {"A.NPZ": npz, "A.Txt": "von Möwe".encode(), "b.JSON": b'{"caption": "b"}', "b.npz": npz, "b.jpg": b""}
    strays = {"c.v2.npz": npz, "c.v2.json": b"{}", "._A.json": b"\0", "d.jpg": b"", "\udcff.npz": npz, "e.te.npz": npz}
    path = write_tar(tmp_path / "s.tar", members | strays)
    sink = logger.add(lambda message: lines.append(str(message)))
    index = open_record_index(tmp_path / "cache", [path], [])
    logger.remove(sink)
    assert {row["key"]: parse_record(row)["caption"] for row in list_rows(index)} == {"A": "von Möwe", "b": "b"}
    assert index.column("bytes").tolist() == [len(npz)] * 2
    [line] = [line for line in lines if "outside any sample" in line]
    assert "not used" in line and f"{path}: 6 members: " in line
    assert all(name in line for name in ("c.v2.npz, c.v2.json, ._A.json", r"\udcff.npz", "d.jpg", "e.te.npz"))


def test_all_bad_texts_of_a_shard_are_named_at_once(tmp_path):
    members = {"a.txt": b"good", "b.txt": b"M\xf6we", "c.json": b'{"caption": "\xff"}', "d.json": b"[]"}
    path = write_tar(tmp_path / "s.tar", members)
    with pytest.raises(ValueError, match="is not UTF-8") as caught:
        open_record_index(tmp_path / "cache", [path], [])
    lines = str(caught.value).splitlines()
    assert [line.split("member ")[1].split(" ")[0].split(":")[0] for line in lines] == ["b.txt", "c.json", "d.json"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.npz": b"", "../b.npz": b""}, "'../b.npz' points outside the archive"),
        ({"a.json": b"[1]", "a.npz": b""}, "member a.json must be a JSON object, not a list"),
        ({"a.json": b'{"caption": "a",\n "tags": }', "a.npz": b""}, "member a.json:2:10: malformed"),
        ({"a.npz": None}, "is cut short: it ends before its own headers say"),
    ],
)
def test_an_unsafe_or_damaged_shard_is_a_problem_of_its_entry(tmp_path, members, message):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = 5000 if content is None else len(content)
            tar.addfile(info, io.BytesIO(content or bytes(5000)))
    if None in members.values():
        os.truncate(tmp_path / "s.tar", 2000)
    index, [problem] = open_training_set(build_config(tmp_path, metadata=[tmp_path / "s.tar"]))
    assert index is None and problem.key == "data.metadata"
    assert problem.value == str(tmp_path / "s.tar") and message in problem.rule
    assert str(tmp_path) not in problem.rule  # named once


def test_bad_latents_in_a_shard_are_each_named(tmp_path):
    good = make_latents(tmp_path / "x.npz", bucket=(64, 64))
    kinds = {
        "values that are not finite": {"latents": np.full((4, 8, 8), np.nan, np.float32)},
        "float32[8, 8]": {"latents": np.ones((8, 8), np.float32)},
        "int32[4, 8, 8]": {"latents": np.ones((4, 8, 8), np.int32)},
        "object[1]": {"latents": np.array([{}], object)},
        "a decompression bomb?": {"latents": np.zeros((4, 8192, 8192), np.float32)},
        "holds moments, but no `latents`": {"moments": np.ones((4, 8, 8), np.float32)},
        "float32[0, 8, 8]": {"latents_8x8": np.ones((0, 8, 8), np.float32)},
    }
    writer = ShardWriter(tmp_path / "s.tar")
    writer.append("good", b'{"caption": "c"}', good)
    for number, (reason, arrays) in enumerate(kinds.items()):
        content = io.BytesIO()
        (np.savez_compressed if "bomb" in reason else np.savez)(content, **arrays)
        writer.append(f"k{number}", b'{"caption": "c"}', content.getvalue())
    writer.close()
    config = build_config(tmp_path, metadata=[tmp_path / "s.tar"], max_bad_fraction=1, verify_latents="full")
    index, problems = open_training_set(config)
    assert problems == [] and index is not None
    leave_out_bad_latents(config, index, resuming=False)
    log = (tmp_path / "run" / "logs" / "bad_samples.jsonl").read_bytes().splitlines()
    named = {line["key"]: line["reason"] for line in map(orjson.loads, log)}
    assert sorted(named) == [f"k{number}" for number in range(len(kinds))]
    for number, reason in enumerate(kinds):
        assert reason in named[f"k{number}"] and f"{tmp_path}/s.tar" in named[f"k{number}"]


def build_config(folder: Path, **data) -> Config:
    data = {"metadata": [folder / "m.json"], "max_bad_fraction": 0.5, **data}
    on_missing = data.pop("on_missing", "skip")
    run = {"name": "run", "dir": folder}
    return Config.model_validate(
        {"run": run, "data": data, "cache": {"dir": folder / "cache", "on_missing": on_missing}}
    )


@pytest.mark.parametrize(("level", "found"), [("none", ""), ("stat", "b"), ("header", "bc"), ("full", "bcd")])
def test_each_level_of_verification_finds_its_faults(tmp_path, level, found):
    write(tmp_path / "m.json", orjson.dumps({key: {"caption": key} for key in "abcdefgh"}))
    for number, key in enumerate("abcdefgh"):
        make_latents(tmp_path / "cache" / f"{key}.npz", number)
    config = build_config(tmp_path, verify_latents=level)
    index, _ = open_training_set(build_config(tmp_path, verify_latents="none"))
    times = (tmp_path / "cache").stat()
    (tmp_path / "cache" / "b.npz").write_bytes((tmp_path / "cache" / "b.npz").read_bytes()[:-1])
    size = (tmp_path / "cache" / "c.npz").stat().st_size
    (tmp_path / "cache" / "c.npz").write_bytes(make_latents(tmp_path / "c" / "c.npz", bucket=(64, 96)))
    assert (tmp_path / "cache" / "c.npz").stat().st_size == size
    content = bytearray((tmp_path / "cache" / "d.npz").read_bytes())
    content[1000] ^= 1
    (tmp_path / "cache" / "d.npz").write_bytes(content)
    assert (tmp_path / "cache").stat().st_mtime_ns == times.st_mtime_ns
    again, problems = open_training_set(config)
    assert again is not None and again.path == index.path and problems == []
    leave_out_bad_latents(config, again, resuming=False)
    rows = load_left_out_rows(config.run.folder, again)
    assert "".join("abcdefgh"[row] for row in rows) == found
    log = tmp_path / "run" / "logs" / "bad_samples.jsonl"
    named = [orjson.loads(line)["key"] for line in log.read_bytes().splitlines()] if log.exists() else []
    assert "".join(named) == found
    # A resumed run leaves out the same latents as at its first start.
    (tmp_path / "cache" / "e.npz").unlink()
    leave_out_bad_latents(config, again, resuming=True)
    assert np.array_equal(load_left_out_rows(config.run.folder, again), rows)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "header", "range"])
def test_a_damaged_list_of_left_out_rows_is_written_anew(tmp_path, damage):
    write(tmp_path / "m.json", orjson.dumps({key: {"caption": key} for key in "abcd"}))
    for number, key in enumerate("abcd"):
        make_latents(tmp_path / "cache" / f"{key}.npz", number)
    config = build_config(tmp_path, verify_latents="stat")
    index, _ = open_training_set(config)
    assert index is not None
    (tmp_path / "cache" / "b.npz").write_bytes(b"")
    leave_out_bad_latents(config, index, resuming=False)
    file = get_left_out_file(config.run.folder, index)
    whole = file.read_bytes()
    assert np.load(file).tolist() == [1] == load_left_out_rows(config.run.folder, index).tolist()
    file.write_bytes(whole[:-4])  # as earlier releases wrote it
    assert load_left_out_rows(config.run.folder, index).tolist() == [1]
    flipped, wrong = bytearray(whole), bytearray(whole[:-4])
    flipped[-12] ^= 2
    wrong[-1] = 1
    contents = {"cut": whole[:-6], "flipped": flipped, "empty": b"", "header": b"x" * len(whole), "range": wrong}
    file.write_bytes(contents[damage])
    assert load_left_out_rows(config.run.folder, index).tolist() == []
    leave_out_bad_latents(config, index, resuming=True)
    assert file.read_bytes() == whole


def test_too_many_bad_latents_stop_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(join, "MAX_BAD", 1)  # the index lists fewer bad samples than it counts
    write(tmp_path / "m.json", orjson.dumps({key: {"caption": key} for key in "abcde"}))
    make_latents(tmp_path / "cache" / "a.npz")
    for key in "bcd":
        write(tmp_path / "cache" / f"{key}.npz", "")
    config = build_config(tmp_path, max_bad_fraction=0.6)
    index, problems = open_training_set(config)
    assert index is not None and problems == []
    assert len(index.summary.bad) == 1 and index.summary.num_bad == 3 and count_missing(index) == 1
    with pytest.raises(RuntimeError, match="3 of 4 latents are bad, more than data.max_bad_fraction"):
        leave_out_bad_latents(config, index, resuming=False)
    assert "b.npz" in (tmp_path / "run" / "logs" / "bad_samples.jsonl").read_text()


def test_missing_captions_and_latents_follow_the_settings(tmp_path):
    write(
        tmp_path / "m.json", orjson.dumps({"a": {"caption": "a"}, "b": {}, "c": {"nl_caption": "c"}, "d": {"tags": []}})
    )
    for key in "abc":
        make_latents(tmp_path / "cache" / f"{key}.npz")
    for choice, keys in (("empty", ["a", "b", "c"]), ("skip", ["a", "c"])):
        index, problems = open_training_set(build_config(tmp_path, on_missing_caption=choice))
        assert index.arrow_column("key").to_pylist() == keys and problems == []
    _, problems = open_training_set(build_config(tmp_path, on_missing_caption="error"))
    assert [problem.rule for problem in problems] == ["2 records have no caption: b, d"]
    _, problems = open_training_set(build_config(tmp_path, on_missing="error"))
    assert [(problem.key, problem.rule) for problem in problems] == [
        ("cache.on_missing", "1 of 4 samples have no latents")
    ]


def test_latents_in_the_shards_of_several_entries_under_one_key_are_an_error(tmp_path):
    """The later shard would replace the earlier one's sample, although both are to be trained."""
    npz = make_latents(tmp_path / "x.npz")
    first = write_tar(tmp_path / "a.tar", {"000.npz": npz, "000.txt": b"cat", "001.npz": npz})
    second = write_tar(tmp_path / "b.tar", {"000.npz": npz, "001.npz": npz, "002.npz": npz})
    with pytest.raises(ValueError) as caught:
        open_record_index(tmp_path / "cache", [first, second], [])
    assert str(caught.value) == (
        "data.metadata: 2 keys with latents in the shards of several entries: "
        f"'000' ({first} and {second}), '001' ({first} and {second}). "
        "Give the samples different keys, or remove the entry that another one replaces"
    )
    captions = tmp_path / "captions.json"
    captions.write_bytes(orjson.dumps({"000": {"caption": "dog"}}))
    index = open_record_index(tmp_path / "cache", [first, first, captions], [])
    assert [(index.record(row)["caption"], index.row(row)["image_path"]) for row in range(2)] == [
        ("dog", str(first)),
        (None, str(first)),
    ]


def test_an_image_that_a_later_entry_replaces_is_named(tmp_path):
    """A path to the same file, or to where a file has moved, is an update as any other."""
    for name in ("photos/1.png", "drawings/1.png", "moved/2.png", "photos/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    files, lines = [], []
    for number, folder in enumerate(("photos", "drawings")):
        paths = {"1": f"{folder}/1.png", "2": ["photos/2.png", "moved/2.png"][number], "3": "photos/3.png"}
        files.append(tmp_path / f"{folder}.json")
        files[-1].write_bytes(orjson.dumps({key: {"image_path": path} for key, path in paths.items()}))
    sink = logger.add(lambda message: lines.append(message.record["message"]))
    index = open_record_index(tmp_path / "cache", files, [])
    logger.remove(sink)
    assert index.row(0)["image_path"] == str(tmp_path / "drawings/1.png")
    assert len(lines) == 1 and lines[0].startswith("1 record: a later entry of data.metadata names another image")
    assert f"'1' ({tmp_path}/photos/1.png and {tmp_path}/drawings/1.png)." in lines[0]
