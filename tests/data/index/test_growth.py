"""Large and growing indexes: parts, spans and checks that bound memory and time, and a compact manifest."""

import json
import os
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pytest
from campaigns import hundred_million
from samples.index_samples import get_keys, list_entries, write_metadata

from sdxl_trainer.data.formats import manifest_columns
from sdxl_trainer.data.formats.manifest import (
    ManifestEntry,
    ManifestWriter,
    drop_damaged_lines,
    list_manifest_parts,
    read_latest,
)
from sdxl_trainer.data.formats.manifest_compaction import compact_parts
from sdxl_trainer.data.index import index_file, join, key_hash, latent_files, record_parts, sample_rows
from sdxl_trainer.data.index.index import open_record_index, open_sample_index
from sdxl_trainer.data.index.join import LatentSelection
from sdxl_trainer.data.index.latent_files import LatentFiles
from sdxl_trainer.data.index.listed_latents import build_listed_latents
from sdxl_trainer.data.index.schema import PARTS
from sdxl_trainer.data.metadata.merge import DuplicateKeyError
from sdxl_trainer.data.metadata.records import parse_record
from sdxl_trainer.data.order.plan import Plan, Position


def list_parts(folder: Path, kind: str) -> set[str]:
    return {path.name for path in (folder / "index" / PARTS).glob(f"{kind}-*")}


def test_growth_reuses_the_parts_of_all_files_that_have_not_changed(tmp_path, monkeypatch):
    """Records and latents that are added cost their own parts only, and equal an index that is built at once."""
    monkeypatch.setattr(record_parts, "LARGE_BYTES", 1)
    files = [tmp_path / f"{number}.jsonl" for number in range(4)]
    for number, file in enumerate(files):
        keys = [f"k{number}{'x' * row}" for row in range(12)]
        file.write_text("".join(json.dumps({"key": key, "caption": f"of {key}"}) + "\n" for key in keys))
    files[3].rename(tmp_path / "later")
    list_entries(tmp_path, "k0", "k1x", "k2xxxxxxxxxx")
    before = open_sample_index(tmp_path, open_record_index(tmp_path, [*files[:3]], []))
    known = {kind: list_parts(tmp_path, kind) for kind in ("records", "listed")}
    (tmp_path / "later").rename(files[3])
    list_entries(tmp_path, "k3xxx", "k0", bucket=(96, 64))  # a new key, and another line of a known one
    index = open_sample_index(tmp_path, open_record_index(tmp_path, files, []))
    for kind, names in known.items():
        assert names < list_parts(tmp_path, kind) and len(list_parts(tmp_path, kind)) == len(names) + 1
    assert get_keys(before) == ["k0", "k1x", "k2xxxxxxxxxx"]
    assert get_keys(index) == ["k0", "k1x", "k2xxxxxxxxxx", "k3xxx"]
    assert index.column("bucket_width").tolist() == [96, 64, 64, 96]
    assert [index.record(row)["caption"] for row in range(4)] == [f"of {key}" for key in get_keys(index)]
    # A file that changes or goes takes its own part with it.
    files[1].write_text(json.dumps({"key": "k1x", "caption": "new"}) + "\n")
    index = open_sample_index(tmp_path, open_record_index(tmp_path, [files[0], files[1], files[3]], []))
    assert get_keys(index) == ["k0", "k1x", "k3xxx"] and index.record(1)["caption"] == "new"


def test_a_manifest_that_grows_every_day_has_few_files(tmp_path):
    """Each line is read a few times in all, and no file of latents holds a line twice."""
    folder, seen, num_read = tmp_path / "index" / PARTS, set(), 0
    for day in range(60):
        list_entries(tmp_path, *(f"k{day:02d}{number}" for number in range(day % 3 + 1)))
        paths = build_listed_latents(tmp_path, folder).paths
        new = LatentFiles(set(paths) - seen)
        assert len(new.files) == 1 and len(paths) <= 7
        num_read, seen = num_read + len(new), seen | set(paths)
    latents = LatentFiles(paths)
    keys = latents.take("key", np.arange(len(latents))).to_pylist()
    assert keys == list(read_latest(tmp_path)) and len(keys) == 120 and num_read <= 7 * 120


def test_records_without_a_caption_are_skipped_although_the_manifest_lists_them(tmp_path):
    records = open_record_index(tmp_path, [write_metadata(tmp_path / "m.json", {"a": {"caption": "x"}, "b": {}})], [])
    list_entries(tmp_path, "a", "b")
    assert get_keys(open_sample_index(tmp_path, records)) == ["a", "b"]
    assert get_keys(open_sample_index(tmp_path, records, LatentSelection(captioned_only=True))) == ["a"]


def test_groups_of_rows_are_bounded_by_their_bytes(tmp_path, monkeypatch):
    """Arrow's texts hold at most 2 GiB a group."""
    monkeypatch.setattr(index_file, "GROUP_BYTES", 3000)
    batches = [pa.record_batch([[f"{number:01000d}"]], ["text"]) for number in range(10)]
    groups = list(index_file.regroup(batches))
    assert [len(group) for group in groups] == [3, 3, 3, 1]
    assert pa.Table.from_batches(groups) == pa.Table.from_batches(batches).combine_chunks()


def test_a_manifest_of_columns_joins_as_its_lines_do(tmp_path, monkeypatch):
    records = open_record_index(tmp_path, [write_metadata(tmp_path / "m.json", {key: {} for key in "abc"})], [])
    list_entries(tmp_path, "a", "b", "gone")
    list_entries(tmp_path, "b", rank=1, bucket=(96, 64))
    lines, rows = read_latest(tmp_path), [open_sample_index(tmp_path, records).row(row) for row in (0, 1)]
    monkeypatch.setattr(manifest_columns, "SMALL_ROWS", 0)  # no merge
    assert not compact_parts(tmp_path) and not list(tmp_path.glob("manifest/*.jsonl"))
    assert read_latest(tmp_path) == lines
    assert [open_sample_index(tmp_path, records).row(row) for row in (0, 1)] == rows
    list_entries(tmp_path, "a", bucket=(96, 64))  # numbered after the columns
    assert open_sample_index(tmp_path, records).row(0)["bucket_width"] == 96
    [part] = tmp_path.glob("manifest/part-00000-*.parquet")
    content = bytearray(part.read_bytes())
    content[content.index(b"gone")] ^= 1
    part.write_bytes(content)
    damaged: list[str] = []
    assert set(read_latest(tmp_path, damaged)) == {"a", "b"} and len(damaged) == 1
    drop_damaged_lines(tmp_path)
    assert not part.exists() and set(read_latest(tmp_path)) == {"a", "b"}


def test_a_manifest_that_is_compacted_every_day_has_few_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_columns, "SMALL_ROWS", 20)
    content = {f"k{number}": {} for number in range(40)}
    records = open_record_index(tmp_path, [write_metadata(tmp_path / "m.json", content)], [])
    rng = np.random.default_rng(0)
    for day in range(8):
        for rank in range(3):
            keys = [f"k{number}" for number in rng.choice(40, 4, replace=False)]
            list_entries(tmp_path, *keys, rank=rank, bucket=(64 + 8 * day, 64 + 8 * rank))
        lines = read_latest(tmp_path)
        assert not compact_parts(tmp_path)
        assert read_latest(tmp_path) == lines
        parts = list_manifest_parts(tmp_path)
        assert len(parts) <= 1 + 12 * (day + 1) // 20 and {part.suffix for part in parts} == {".parquet"}
    index = open_sample_index(tmp_path, records)
    buckets = zip(index.column("bucket_width").tolist(), index.column("bucket_height").tolist(), strict=True)
    assert dict(zip(get_keys(index), buckets, strict=True)) == {key: entry.bucket for key, entry in lines.items()}
    # A part whose lines are damaged stays, and says so.
    list_entries(tmp_path, "k1")
    [part] = tmp_path.glob("manifest/*.jsonl")
    part.write_bytes(part.read_bytes().replace(b"k1", b"k2"))
    assert compact_parts(tmp_path) == [part] and part.is_file()


def test_columns_whose_numbers_do_not_rise_are_not_merged(tmp_path):
    """Of lines without numbers the last one in a part counts, which the order of numbers cannot keep."""
    list_entries(tmp_path, "a", "b")
    list_entries(tmp_path, "a", "c", rank=1, bucket=(96, 64))
    [part] = tmp_path.glob("manifest/part-00001.jsonl")
    lines = [{**orjson.loads(line), "listed_ns": 7} for line in part.read_bytes().splitlines()]
    part.write_bytes(b"".join(orjson.dumps({k: v for k, v in line.items() if k != "crc32"}) + b"\n" for line in lines))
    before = read_latest(tmp_path)
    assert not compact_parts(tmp_path) and len(list_manifest_parts(tmp_path)) == 2
    assert read_latest(tmp_path) == before and before["a"].bucket == (64, 96)


def test_a_start_over_many_tables_with_a_manifest_of_columns(tmp_path, monkeypatch):
    """A short form of tests/campaigns/hundred_million.py."""
    monkeypatch.setattr(hundred_million, "MILLION", 1000)
    made = hundred_million.make(tmp_path, 2500)
    first = hundred_million.first(tmp_path, 2500)
    assert made["manifest_bytes_an_item"] <= 110 and first["index_bytes_a_record"] <= 300
    index, plan = hundred_million.open_plan(tmp_path)
    batch = plan.batch(Position(0, 3))
    rows = [index.row(row) for row in batch.rows.tolist()]
    assert {row["bucket_width"] << 16 | row["bucket_height"] for row in rows} == {batch.bucket}
    assert all(row["file"].startswith("shards/") and row["offset"] % 263_680 == 1024 for row in rows)
    assert all(parse_record(row)["caption"].count(", ") == 13 for row in rows)
    expected = (index.column("bucket_width").astype(np.int64) << 16) | index.column("bucket_height")
    other = Plan(expected, plan.global_batch_size, 0)  # of sorted buckets, not of the rows in the file
    assert other.batch(Position(2, 1)).rows.tolist() == plan.batch(Position(2, 1)).rows.tolist()


def read_head(path: Path) -> list:
    head = index_file.IndexFile(path)
    return [head.read_description(), *(batch.to_pydict() for batch in head.read_batches())]


def test_a_large_index_is_read_whole_only_if_a_part_was_written_to(tmp_path, builds, monkeypatch):
    metadata = write_metadata(tmp_path / "m.json", {f"k{n}": {"caption": f"words {n}"} for n in range(300)})
    records = open_record_index(tmp_path, [metadata], [])
    [part] = [file.path for file in records.list_parts()]
    del records, builds[:]

    def damage(keep_time: bool) -> None:
        content, status = bytearray(part.read_bytes()), part.stat()
        content[content.index(b"k7")] ^= 1
        part.write_bytes(content)
        if keep_time:
            os.utime(part, ns=(status.st_atime_ns, status.st_mtime_ns))

    monkeypatch.setattr(index_file, "CHECKED_BYTES", part.stat().st_size - 1)
    damage(keep_time=True)  # as a disk does
    open_record_index(tmp_path, [metadata], [])
    assert not builds
    monkeypatch.undo()  # a start that checks this part
    assert open_record_index(tmp_path, [metadata], []).row(7)["key"] == "k7"
    monkeypatch.setattr(index_file, "CHECKED_BYTES", 0)
    damage(keep_time=False)
    assert open_record_index(tmp_path, [metadata], []).row(7)["key"] == "k7"
    # A copy is read whole once.
    os.utime(part, (1, 1))
    assert open_record_index(tmp_path, [metadata], []) and index_file.IndexFile(part).is_unchanged


def test_each_start_checks_other_parts(tmp_path, monkeypatch):
    paths, checked = [tmp_path / f"{number}.arrow" for number in range(4)], set()
    for path in paths:
        index_file.write_index_file(path, pa.schema([]), [])
    verify = index_file.IndexFile.verify
    monkeypatch.setattr(index_file.IndexFile, "verify", lambda file: (checked.add(file.path), verify(file)))
    for sizes in (0, 1, 2, 4):
        checked.clear()
        monkeypatch.setattr(index_file, "CHECKED_BYTES", sizes * paths[0].stat().st_size)
        assert index_file.are_undamaged(paths) and len(checked) == sizes
    monkeypatch.setattr(index_file, "CHECKED_BYTES", paths[0].stat().st_size)
    checked.clear()
    for _ in range(200):
        index_file.are_undamaged(paths)
    assert checked == set(paths)
    paths[2].unlink()
    assert not index_file.are_undamaged(paths)


def test_an_index_that_is_put_together_of_small_spans_has_the_same_rows(tmp_path, monkeypatch):
    """Spans bound the memory of large sets. The rows, their buckets and their hash do not depend on them."""
    content = {f"k{number}": {"caption": "x", "original_size": [100, 150]} for number in range(40)}
    records = open_record_index(tmp_path, [write_metadata(tmp_path / "m.json", content)], [])
    rng, selection = np.random.default_rng(0), LatentSelection(prefixes=("", "64px/"))
    for prefix in selection.prefixes:
        for rank, bucket in enumerate([(64, 96), (96, 64), (32, 32)]):
            keys = [f"{prefix}k{number}" for number in rng.integers(48, size=20)]
            list_entries(tmp_path, *keys, rank=rank, bucket=bucket)
    for entry in ("10_dog/k1", "64px/k2"):  # of other records, and another key of an image without an entry
        list_entries(tmp_path, entry)
    whole = open_sample_index(tmp_path, records, selection)
    expected = read_head(whole.path)
    listed = read_latest(tmp_path)
    counts = {prefix: sum(prefix + key in listed for key in content) for prefix in selection.prefixes}
    assert whole.summary.identities == {prefix: {"": number} for prefix, number in counts.items()}
    assert get_keys(whole) == [
        prefix + key for prefix in selection.prefixes for key in content if prefix + key in listed
    ]
    whole.path.unlink()
    for place, name in ((join, "HASHED_AT_ONCE"), (latent_files, "ROWS_AT_ONCE"), (sample_rows, "ROWS_AT_ONCE")):
        monkeypatch.setattr(place, name, 7)
    assert read_head(open_sample_index(tmp_path, records, selection).path) == expected
    assert not [path for path in (tmp_path / "index").iterdir() if path.name.startswith("tmp")]


def change_set(folder: Path, rng: np.random.Generator, files: set[Path], step: int) -> None:
    """Add, change or remove a metadata file or a part of the manifest, compact the manifest, or list latents."""
    file, kind = folder / f"{rng.integers(6)}.jsonl", rng.integers(10)
    if kind < 3 or not files:
        keys = [f"{file.stem}-{number}" for number in rng.choice(9, 6, replace=False)]
        lines = [{"key": key, "caption": f"{step} {key}"} if rng.random() < 0.9 else {"key": key} for key in keys]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        files.add(file)
        return
    if kind == 3 and len(files) > 1:
        files.remove(gone := sorted(files)[rng.integers(len(files))])
        gone.unlink()
        return
    if kind == 4:
        assert not compact_parts(folder)
        return
    if kind == 5 and len(parts := list_manifest_parts(folder)) > 1:
        parts[rng.integers(len(parts))].unlink()
        return
    keys = [f"{rng.integers(6)}-{number}" for number in rng.choice(9, 5, replace=False)]
    prefix = "64px/" if rng.random() < 0.3 else ""
    list_entries(folder, *(prefix + key for key in keys), rank=int(rng.integers(3)), bucket=(64, 64 + step))


def test_a_grown_set_is_joined_as_a_whole_one_is(tmp_path, monkeypatch):
    """Records and latents come, change and go. What the last index knows leads to the same rows as a whole join."""
    monkeypatch.setattr(record_parts, "LARGE_BYTES", 1)
    monkeypatch.setattr(key_hash, "MAX_SEARCHED", 1.0)
    rng, num_searched, num_keys = np.random.default_rng(0), 0, 0
    searched = record_calls(monkeypatch)
    selections = [LatentSelection(), LatentSelection(captioned_only=True), LatentSelection(prefixes=("", "64px/"))]
    files: set[Path] = set()
    list_entries(tmp_path, *(f"{number // 8}-{number % 8}" for number in range(48)))
    for step in range(40):
        change_set(tmp_path, rng, files, step)
        selection, records = selections[step // 14], open_record_index(tmp_path, sorted(files), [])
        searched.clear()
        joined = join.join_latents(tmp_path, records.records, selection)
        num_searched, num_keys = num_searched + sum(searched), num_keys + len(records) * len(selection.prefixes)
        with monkeypatch.context() as patched:
            patched.setattr(join, "open_earlier_join", lambda *parts: None)
            whole = join.join_latents(tmp_path, records.records, selection)
        assert joined.summary == whole.summary and joined.files == whole.files
        for prefix in selection.prefixes:
            assert joined.row_of_record[prefix].tolist() == whole.row_of_record[prefix].tolist(), step
        open_sample_index(tmp_path, records, selection)
    assert 0 < num_searched < 0.9 * num_keys  # 0 if no join of a grown set happens


def test_a_repeated_key_is_found_although_only_new_files_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(record_parts, "LARGE_BYTES", 1)
    compared, count = [], key_hash._count_parts
    monkeypatch.setattr(key_hash, "_count_parts", lambda number: compared.append(number) or count(number))

    def write(name: str, keys: str) -> None:
        lines = [json.dumps({"key": key, "caption": key}) + "\n" for key in keys]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))

    def open_files(*patterns: str) -> list[str]:
        compared.clear()
        return get_keys(open_record_index(tmp_path, [f"{tmp_path}/{pattern}" for pattern in patterns], []))

    every = "*.jsonl"
    write("a", "0123456789")
    write("b", "abcdefghij")
    assert open_files(every) == list("0123456789abcdefghij") and compared == [20]
    for keys in ("x5", "xx", "xj"):
        write("c", keys)
        with pytest.raises(DuplicateKeyError, match=keys[-1]):
            open_files(every)
    write("c", "xy")
    assert open_files(every) == list("0123456789abcdefghijxy") and compared == [2]
    write("b", "a4")
    with pytest.raises(DuplicateKeyError, match="4"):
        open_files(every)
    # Records of several sources are merged, whether a source is new or names a file that is known.
    for sources in (("a.jsonl", "c.jsonl"), ("a.jsonl", "c.jsonl", "c.jsonl"), ("a.jsonl", "c.jsonl", "d.jsonl")):
        write("d", "y")
        assert open_files(*sources) == list("0123456789xy")


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of keys that joins of grown sets search for."""
    searched, find = [], key_hash.find_newest_entries

    def record(keys, entries):
        searched.append(len(keys))
        return find(keys, entries)

    monkeypatch.setattr(key_hash, "find_newest_entries", record)
    return searched


def test_latents_of_an_earlier_key_are_found_anew_by_each_join(tmp_path, monkeypatch):
    """The key's own record may come later, and takes them back."""
    monkeypatch.setattr(record_parts, "LARGE_BYTES", 1)
    monkeypatch.setattr(key_hash, "MAX_SEARCHED", 1.0)
    writer = ManifestWriter(tmp_path, 0)
    place = {"bucket": (64, 96), "original_size": (100, 150), "resized": (70, 96), "crop": (3, 0, 67, 96)}
    source = {"source_path": "/x/1.png", "source_bytes": 1, "source_mtime_ns": 1, "source_sha256": ""}
    writer.append(ManifestEntry(key="1", file="1.npz", bytes=1, sha256="", **place, identity="", **source))
    writer.close()
    files = [write_metadata(tmp_path / "a.json", {"10_dog/1": {"image_path": "/x/1.png"}})]
    assert get_keys(open_sample_index(tmp_path, open_record_index(tmp_path, files, []))) == ["10_dog/1"]
    files.append(write_metadata(tmp_path / "b.json", {"1": {"image_path": "/x/1.png"}}))
    assert get_keys(open_sample_index(tmp_path, open_record_index(tmp_path, files, []))) == ["1"]
