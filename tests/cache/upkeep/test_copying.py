"""Copies of a cache: byte for byte, subsets, other keys and forms, merged, resumed, on a disk and on a store."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from cache_samples import hash_items, list_files, run_job, write_settings

from sdxl_trainer.cache.upkeep import copying
from sdxl_trainer.cache.upkeep.copy_targets import FolderTarget
from sdxl_trainer.cache.upkeep.copy_units import CopyUnit, build_unit
from sdxl_trainer.cache.upkeep.verify import verify_entries
from sdxl_trainer.data.formats.manifest import read_latest
from sdxl_trainer.data.formats.shards import iterate_members
from sdxl_trainer.data.images.demo_set import draw_demo_set
from sdxl_trainer.data.index.index import open_record_index, open_sample_index
from sdxl_trainer.data.stores.store_lock import StoreLock
from sdxl_trainer.data.stores.uploads import list_objects, put_bytes


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with settings and caches of twelve images, `npz` and `shards`; images and metadata are gone."""
    folder = tmp_path_factory.mktemp("filled")
    metadata = draw_demo_set(folder / "data", num_images=12)
    records = json.loads(metadata.read_text())
    for number, record in enumerate(records.values()):
        record |= {"aesthetic_score": number, "tags": ["cat", "x"] if number % 2 else ["dog"]}
    metadata.write_text(json.dumps(records))
    settings = write_settings(folder, tiny_folder / "model", metadata)
    for form in ("npz", "shards"):
        assert run_job(settings, f"cache.dir={folder / form}", f"cache.format={form}") == 0
    (folder / "data").rename(folder / "gone")
    return folder


def copy(filled: Path, form: str, *words: object) -> int:
    return run_job(filled / "settings.yaml", f"cache.dir={filled / form}", *words)


def read_all(folder: Path) -> dict[str, str]:
    """Return the hash of each item, after checking every byte of a cache."""
    entries = read_latest(folder)
    result = verify_entries(folder, entries)
    assert (result.bad, result.bad_shards) == ({}, {})
    assert not list(folder.rglob(".*.partial")) and not (folder / ".copy").exists()
    return hash_items(folder)


def read_records(folder: Path) -> dict[str, dict]:
    """Return the records in a cache's shards by key."""
    found = {}
    for path in sorted((folder / "shards").glob("*.tar")):
        content = path.read_bytes()
        for member in iterate_members(path):
            if member.suffix == "json":
                found[member.key] = json.loads(content[member.offset : member.offset + member.size])
    return found


@pytest.mark.parametrize("form", ["npz", "shards"])
def test_a_cache_without_originals_is_copied_whole(filled: Path, tmp_path: Path, form: str) -> None:
    before = list_files(filled / form)
    assert copy(filled, form, "--copy-to", tmp_path / "copy") == 0
    assert read_all(tmp_path / "copy") == hash_items(filled / form)
    assert (tmp_path / "copy" / "cache.json").read_bytes() == (filled / form / "cache.json").read_bytes()
    of_source = {name: time for name, time in list_files(filled / form).items() if not name.startswith("logs")}
    assert of_source == {name: time for name, time in before.items() if not name.startswith("logs")}
    # A second time nothing is left to do, and nothing is written.
    files = list_files(tmp_path / "copy")
    assert copy(filled, form, "--copy-to", tmp_path / "copy") == 0
    assert list_files(tmp_path / "copy") == files
    assert run_job(filled / "settings.yaml", f"cache.dir={tmp_path / 'copy'}", "--verify") == 0


def test_forms_are_converted_both_ways(filled: Path, tmp_path: Path) -> None:
    """From shards to files with kohya's names and back: the bytes of each item, its record and its text stay."""
    assert copy(filled, "shards", "--copy-to", tmp_path / "files", "--as", "kohya") == 0
    source = read_latest(filled / "shards")
    for key, entry in source.items():
        width, height = entry.original_size
        with np.load(tmp_path / "files" / f"{key}_{width:04d}x{height:04d}_sdxl.npz") as arrays:
            assert arrays["latents"].shape[1:] == (entry.bucket[1] // 8, entry.bucket[0] // 8)
    assert read_all(tmp_path / "files") == hash_items(filled / "shards")
    metadata = tmp_path / "files" / "metadata-00000.jsonl"
    lines = [json.loads(line) for line in metadata.read_text().splitlines()]
    assert {line["aesthetic_score"] for line in lines} == set(range(12))
    words = (f"cache.dir={tmp_path / 'files'}", f"data.metadata=[{metadata}]")
    assert run_job(filled / "settings.yaml", *words, "--copy-to", tmp_path / "shards", "--as", "shards") == 0
    assert read_all(tmp_path / "shards") == hash_items(filled / "shards")
    again, original = read_records(tmp_path / "shards"), read_records(filled / "shards")
    assert again.keys() == original.keys()
    assert all(again[key]["caption"] == record["caption"] for key, record in original.items())
    # Training finds all samples in the files by the metadata beside them.
    records = open_record_index(tmp_path / "files", [metadata], [], ", ")
    assert len(open_sample_index(tmp_path / "files", records)) == 12


def test_a_query_copies_a_subset(filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    query = "aesthetic_score >= 4 and not tags contains cat"
    assert copy(filled, "shards", "--copy-to", tmp_path / "few", "--where", query) == 0
    found = read_records(tmp_path / "few")
    assert sorted(record["aesthetic_score"] for record in found.values()) == [4, 6, 8, 10]
    assert read_all(tmp_path / "few").keys() == found.keys()
    for words, text in (
        (("--where", "esthetic_score > 1"), "asks for esthetic_score, which no record has\n      cure: did you mean"),
        (("--where", "aesthetic_score > 99"), "leaves nothing to copy\n      cure: the cache holds 12 items"),
        (("--where", "aesthetic_score >"), "ends where a value must stand"),
        (("--part", "5/4"), "names no part"),
        (("--rekey", "(", "x"), "is no replacement"),
        (("--rekey", ".*", ""), "leaves no key"),
        (("--rekey", r"^\d+_.*", "a"), "gives one key to several items: a"),
    ):
        assert copy(filled, "shards", "--copy-to", tmp_path / "none", *words) == 2
        assert text in capsys.readouterr().err
        assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        copy(filled, "shards", "--where", "a > 1")
    assert "--where needs --copy-to" in capsys.readouterr().err


def test_parts_are_split_and_merged_with_other_keys(
    filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Two parts make the whole again, and the other form under other keys joins them in one cache."""
    for part in ("1/2", "2/2"):
        assert copy(filled, "shards", "--copy-to", tmp_path / part[0], "--part", part) == 0
        words = (f"cache.dir={tmp_path / part[0]}", "--copy-to", tmp_path / "merged")
        assert run_job(filled / "settings.yaml", *words) == 0
    sizes = [len(read_latest(tmp_path / name)) for name in ("1", "2")]
    assert sum(sizes) == 12 and min(sizes) > 1
    assert read_all(tmp_path / "merged") == hash_items(filled / "shards")
    assert copy(filled, "npz", "--copy-to", tmp_path / "merged", "--rekey", "^", "b_", "--as", "shards") == 0
    hashes = hash_items(filled / "npz")
    assert read_all(tmp_path / "merged") == {**hash_items(filled / "shards")} | {f"b_{k}": v for k, v in hashes.items()}
    assert {f"b_{key}" for key in hashes} < read_records(tmp_path / "merged").keys()
    # One key cannot have two latents: here those of `1` under the keys of others.
    words = ("--rekey", "^(.*)$", r"b_\1")
    changed = tmp_path / "changed"
    shutil.copytree(filled / "npz", changed)
    damage(changed, swap=True)
    assert run_job(filled / "settings.yaml", f"cache.dir={changed}", "--copy-to", tmp_path / "merged", *words) == 2
    assert "has other latents under 2 keys: " in capsys.readouterr().err


def damage(folder: Path, swap: bool = False) -> list[str]:
    """Swap the manifest's lines of two items, or damage the latents of one; return the keys."""
    part = folder / "manifest" / "part-00000.jsonl"
    entries = read_latest(folder)
    one = sorted(entries)[0]
    if not swap:
        path = folder / entries[one].file
        content = bytearray(path.read_bytes())
        content[(entries[one].offset or 0) + entries[one].bytes // 2] ^= 1
        path.write_bytes(content)
        return [one]
    other = next(key for key in sorted(entries) if key != one and entries[key].bucket == entries[one].bucket)
    lines = {key: {**json.loads(line)} for line in part.read_text().splitlines() for key in [json.loads(line)["key"]]}
    swapped = {one: lines[other], other: lines[one]}
    first, second = ({**lines[key], **{name: swapped[key][name] for name in ("file", "sha256")}} for key in swapped)
    lines |= {one: first, other: second}
    for line in lines.values():
        line.pop("crc32")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    return [one, other]


@pytest.mark.parametrize("form", ["npz", "shards"])
def test_bad_items_are_named_and_not_copied(
    filled: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(filled / form, tmp_path / "bad")
    keys = damage(tmp_path / "bad")
    words = (f"cache.dir={tmp_path / 'bad'}", "--copy-to", tmp_path / "copy")
    assert run_job(filled / "settings.yaml", *words) == 1
    printed = capsys.readouterr().err
    assert "SHA-256 differs from the manifest" in printed and keys[0] in printed
    assert "1 item bad and not copied" in " ".join(printed.split())
    assert read_all(tmp_path / "copy").keys() == hash_items(filled / form).keys() - set(keys)


def test_targets_that_cannot_be_used_are_named(
    filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(filled / "shards", tmp_path / "own")
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    identity = json.loads((filled / "shards" / "cache.json").read_text()) | {"dtype": "float16", "name": "0" * 16}
    (tmp_path / "other" / "cache.json").write_text(json.dumps(identity))
    for target, text in (
        (tmp_path / "own", "lies in the cache that is copied"),
        (tmp_path / "own" / "shards" / "x", "lies in the cache that is copied"),
        (tmp_path / "file" / "x", "is a file"),
        (tmp_path / "other", "its cache.json differs in dtype, name"),
    ):
        assert run_job(filled / "settings.yaml", f"cache.dir={tmp_path / 'own'}", "--copy-to", target) == 2
        assert text in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["cache.json"]
    monkeypatch.setattr("sdxl_trainer.cache.upkeep.copy_targets.FolderTarget.free_bytes", lambda self: 1000)
    assert copy(filled, "npz", "--copy-to", tmp_path / "full") == 2
    assert "has 1,000 bytes free" in capsys.readouterr().err


def test_a_full_disk_stops_the_copy_which_then_continues(
    filled: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sdxl_trainer.cache.upkeep.copy_targets.FolderTarget.free_bytes", lambda self: None)
    (small_disk / "filler").write_bytes(bytes(950_000))
    assert copy(filled, "shards", "--copy-to", small_disk / "copy", "cache.shard_mb=1") == 1
    printed = " ".join(capsys.readouterr().err.split())
    assert "No space left on device. Solve this and run the same command again" in printed
    (small_disk / "filler").unlink()
    assert copy(filled, "shards", "--copy-to", small_disk / "copy", "cache.shard_mb=1") == 0
    assert read_all(small_disk / "copy") == hash_items(filled / "shards")


def test_a_disk_that_gives_other_bytes_than_were_written_is_named(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    publish = FolderTarget.publish

    def damage_and_publish(self, names, verify):  # pyright: ignore[reportMissingParameterType]
        path = self.root / names[0]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        publish(self, names, verify)

    monkeypatch.setattr(FolderTarget, "publish", damage_and_publish)
    assert copy(filled, "shards", "--copy-to", tmp_path / "copy") == 1
    assert "is not what was written: shards/" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "copy" / "manifest").exists()


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CopyUnit]]:
    """Stop a copy when its third unit is built and not yet listed; the list holds the units of all copies."""
    units: list[CopyUnit] = []

    def build_and_stop(*arguments):  # pyright: ignore[reportMissingParameterType]
        units.append(arguments[2])
        built = build_unit(*arguments)
        if len(units) == 3:
            raise KeyboardInterrupt
        return built

    monkeypatch.setattr(copying, "build_unit", build_and_stop)
    yield units


@pytest.mark.parametrize("form", ["npz", "shards"])
def test_a_copy_that_was_stopped_continues(
    filled: Path, tmp_path: Path, stopping: list[CopyUnit], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr("sdxl_trainer.cache.upkeep.copy_units.FILES_PER_UNIT", 2)
    target = tmp_path / "copy"
    with pytest.raises(KeyboardInterrupt):
        copy(filled, "npz", "--copy-to", target, "--as", form)
    assert not (target / "cache.json").exists() and not (target / "manifest").exists()
    first = [item.entry.key for unit in stopping[:2] for item in unit.items]
    assert copy(filled, "npz", "--copy-to", target, "--as", form) == 0
    later = [item.entry.key for unit in stopping[3:] for item in unit.items]
    assert first and not set(first) & set(later) and len(first) + len(later) == 12
    assert read_all(target) == hash_items(filled / "npz")


def test_a_stopped_copy_of_another_request_leaves_nothing(
    filled: Path, tmp_path: Path, stopping: list[CopyUnit]
) -> None:
    target = tmp_path / "copy"
    with pytest.raises(KeyboardInterrupt):
        copy(filled, "shards", "--copy-to", target)
    assert copy(filled, "shards", "--copy-to", target, "--part", "1/3") == 0
    kept = read_all(target)
    assert 0 < len(kept) < 12
    assert {f"shards/{path.name}" for path in (target / "shards").iterdir()} == {
        entry.file for entry in read_latest(target).values()
    }


def test_no_copy_goes_to_a_store_that_another_job_writes(
    filled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    url, held = "memory://locked/copy", StoreLock("memory://locked/copy")
    assert copy(filled, "shards", "--copy-to", url) == 2
    assert f"--copy-to = '{url}' is being written by another job (host" in " ".join(capsys.readouterr().err.split())
    held.release()
    finish = copying.finish_copy

    def finish_late(*arguments):  # pyright: ignore[reportMissingParameterType]
        put_bytes(b"{}", f"{url}/lock/00000009.json")  # another job has taken the lock over
        finish(*arguments)

    monkeypatch.setattr(copying, "finish_copy", finish_late)
    assert copy(filled, "shards", "--copy-to", url) == 1
    assert "another job has taken over the lock" in " ".join(capsys.readouterr().err.split())
    names = [item.url.removeprefix(f"{url}/") for item in list_objects(url)]
    assert "cache.json" not in names and not [name for name in names if name.startswith("manifest/")]
    fsspec.filesystem("memory").rm_file(f"{url}/lock/00000009.json")
    monkeypatch.setattr(copying, "finish_copy", finish)
    assert copy(filled, "shards", "--copy-to", url) == 0
    assert "cache.json" in [item.url.removeprefix(f"{url}/") for item in list_objects(url)]


def test_a_copy_on_a_store_is_the_same(filled: Path, tmp_path: Path, stopping: list[CopyUnit]) -> None:
    """To a real S3 server, stopped and continued; a second cache is merged there; all of it comes back."""
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    from servers.object_store import serve_store

    with serve_store():
        s3fs.S3FileSystem.clear_instance_cache()
        store = s3fs.S3FileSystem()
        store.mkdir("copies")
        url = "s3://copies/set/one"
        with pytest.raises(KeyboardInterrupt):
            copy(filled, "shards", "--copy-to", url)
        store.invalidate_cache()
        assert not store.exists("copies/set/one/cache.json") and len(store.find("copies/set/one")) == 2
        assert copy(filled, "shards", "--copy-to", url) == 0
        assert copy(filled, "npz", "--copy-to", f"{url}/", "--rekey", "$", "_b", "--as", "kohya") == 0
        assert copy(filled, "npz", "--copy-to", url, "--rekey", "$", "_b", "--as", "kohya") == 0  # nothing to do
        store.invalidate_cache()
        store.get("copies/set/one", str(tmp_path / "back"), recursive=True)
    assert not list((filled / "shards" / "logs").glob("copy-*"))
    hashes = hash_items(filled / "shards")
    assert read_all(tmp_path / "back") == hashes | {f"{key}_b": value for key, value in hashes.items()}
    # Each unit once, apart from the one in which the copy was stopped.
    shards = [unit.shard for unit in stopping if unit.shard]
    assert len(shards) == len(set(shards)) + 1
    s3fs.S3FileSystem.clear_instance_cache()
