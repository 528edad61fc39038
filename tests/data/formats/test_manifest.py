"""The manifest: entries are read back, also after a crash, and reading changes no file."""

import errno
import os
import threading
import time
import zlib
from dataclasses import replace

import orjson
import pytest
from loguru import logger

from sdxl_trainer.data.formats import manifest
from sdxl_trainer.data.formats.manifest import (
    FIRST_NUMBER,
    Identity,
    ManifestEntry,
    ManifestWriter,
    _dump_line,
    drop_damaged_lines,
    list_manifest_parts,
    read_entries,
    read_identity,
    read_latest,
    verify_identity,
    write_identity,
)

ENTRY = ManifestEntry(
    key="a",
    file="a.npz",
    bytes=33342,
    sha256="0" * 64,
    bucket=(288, 224),
    original_size=(348, 256),
    resized=(305, 224),
    crop=(8, 0, 296, 224),
    identity="0123456789abcdef",
    source_path="/images/ä.jpg",
    source_bytes=9,
    source_mtime_ns=17,
    source_sha256="1" * 64,
)
IDENTITY = Identity(
    vae_sha256="ab",
    vae_precision="fp32",
    dtype="float32",
    posterior="sample",
    flip=False,
    resolution_px=1024,
    min_bucket_px=256,
    max_bucket_px=2048,
    bucket_step_px=64,
    no_upscale=False,
)


@pytest.fixture
def warnings():
    lines = []
    number = logger.add(lambda message: lines.append(message.record["message"]), level="WARNING")
    yield lines
    logger.remove(number)


def append(folder, rank, *keys, **changes):
    writer = ManifestWriter(folder, rank)
    for key in keys:
        writer.append(replace(ENTRY, key=key, **changes))
    writer.close()
    return folder / "manifest" / f"part-{rank:05d}.jsonl"


def list_keys(folder):
    return [entry.key for entry in read_entries(folder)]


def compute_crc(line: bytes) -> str:
    """Compute a line's CRC-32 as docs/CACHE.md describes it."""
    return f"{zlib.crc32(line[: line.rindex(b',')] + b'}'):08x}"


def test_only_the_lines_of_wanted_keys_are_read(tmp_path):
    keys = ("a", "b", 'quo"ted', "back\\slash", "ä", "c", "a")
    part = append(tmp_path, 0, *keys)
    for wanted in ({"a"}, {'quo"ted', "ä"}, {"back\\slash", "c"}, set(keys), set()):
        assert [entry.key for entry in read_entries(tmp_path, keys=wanted) if entry.key in wanted] == [
            key for key in keys if key in wanted
        ]
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(lines[0] + lines[1].replace(b"33342", b"33343") + lines[5])
    damaged = []
    # Lines of other keys are not checked.
    assert set(read_latest(tmp_path, damaged, {"a", "c"})) == {"a", "c"} and damaged == []
    assert set(read_latest(tmp_path, damaged, {"a", "b"})) == {"a"} and len(damaged) == 1


def test_entries_of_all_ranks_and_jobs_are_read_back(tmp_path):
    append(tmp_path, 0, "a", "b")
    append(tmp_path, 1, "c")
    append(tmp_path, 0, "d")
    entries = list(read_entries(tmp_path))
    assert [replace(entry, listed_ns=0) for entry in entries] == [replace(ENTRY, key=key) for key in "abdc"]
    numbers = {entry.key: entry.listed_ns - FIRST_NUMBER for entry in entries}
    assert numbers == {"a": 0, "b": 1, "c": 2, "d": 3}  # on from the highest number of all parts


def test_a_line_is_plain_json(tmp_path):
    content = append(tmp_path, 7, "a").read_bytes()
    line = orjson.loads(content)
    assert line.pop("listed_ns") == FIRST_NUMBER
    assert line == {
        "key": "a",
        "file": "a.npz",
        "bytes": 33342,
        "sha256": "0" * 64,
        "bucket": [288, 224],
        "original_size": [348, 256],
        "resized": [305, 224],
        "crop": [8, 0, 296, 224],
        "identity": "0123456789abcdef",
        "adopted": False,
        "source": {"path": "/images/ä.jpg", "size": 9, "mtime_ns": 17, "sha256": "1" * 64},
        "crc32": compute_crc(content),
    }
    inside = append(tmp_path, 8, "b", file="shards/x.tar", offset=1536, record_bytes=2, record_sha256="2" * 64)
    line = orjson.loads(inside.read_bytes())
    assert (line["offset"], line["record_bytes"], line["record_sha256"]) == (1536, 2, "2" * 64)


def test_the_latest_line_of_a_key_counts(tmp_path):
    append(tmp_path, 0, "a", "b")
    second = append(tmp_path, 1, "a", bytes=1)
    append(tmp_path, 0, "c")
    os.utime(second, ns=(1, 1))  # times of files do not matter
    assert [entry.bytes for entry in read_entries(tmp_path)] == [33342, 33342, 33342, 1]
    assert {key: entry.bytes for key, entry in read_latest(tmp_path).items()} == {"a": 1, "b": 33342, "c": 33342}


def set_numbers(part, *numbers):
    """Give the lines of a part the numbers that earlier releases would have written: the time in nanoseconds."""
    lines = []
    for line, number in zip(part.read_bytes().splitlines(), numbers, strict=True):
        fields = {**orjson.loads(line), "listed_ns": number}
        fields.pop("crc32")
        lines.append(_dump_line(orjson.dumps(fields)))
    part.write_bytes(b"".join(lines))


def test_the_clock_does_not_decide_which_line_is_newest(tmp_path):
    """Earlier releases listed times: a line that follows one of a clock that was ahead is the newer one."""
    day, now = 86_400 * 10**9, 1_700_000_000 * 10**9
    set_numbers(append(tmp_path, 0, "a", "b"), now + day, now)
    part = append(tmp_path, 1, "a", "b", "a", bytes=1)
    set_numbers(part, now + 2 * day, now + 1, now + 2)
    # Between parts of earlier releases only their times can decide.
    assert {key: entry.bytes for key, entry in read_latest(tmp_path).items()} == {"a": 33342, "b": 1}
    append(tmp_path, 1, "a", bytes=2)
    append(tmp_path, 0, "b", bytes=3)
    assert {key: entry.bytes for key, entry in read_latest(tmp_path).items()} == {"a": 2, "b": 3}
    with open(part.with_name("part-00000.jsonl"), "ab") as file:
        file.write(bytes(100_000) + b"\n")  # a damaged end longer than the part of the file that is searched
    append(tmp_path, 1, "a", bytes=4)
    assert read_latest(tmp_path, [])["a"].bytes == 4 and read_latest(tmp_path)["a"].listed_ns == FIRST_NUMBER + 2


def test_lines_are_flushed_to_disk_while_a_job_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "SECONDS_BETWEEN_SYNCS", 0.01)
    flushed = threading.Event()
    writer = ManifestWriter(tmp_path, 0)
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (fsync(descriptor), flushed.set()))
    writer.append(ENTRY)
    assert flushed.wait(10)

    def fail(descriptor):
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "fsync", fail)
    writer.append(ENTRY)
    deadline = time.monotonic() + 10
    while writer._error is None and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(OSError, match="the disk is broken"):
        writer.append(ENTRY)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="the disk is broken"):
        writer.close()


def test_every_flipped_byte_of_a_line_is_noticed(tmp_path):
    part = append(tmp_path, 0, "a", "b", "c")
    whole = part.read_bytes()
    first = whole.index(b"\n") + 1
    for place in range(first, whole.index(b"\n", first) + 1):
        for value in (whole[place] ^ 1, whole[place] ^ 0x20, ord("\n"), 0):
            if value == whole[place]:
                continue
            part.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            damaged = []
            entries = list(read_entries(tmp_path, damaged))
            assert damaged, (place, value)
            assert {entry.key for entry in entries} <= {"a", "c"}


def test_a_line_without_a_crc_is_accepted(tmp_path, warnings):
    part = append(tmp_path, 0, "a")
    line = orjson.loads(part.read_bytes())
    line.pop("crc32")
    line["file"] = "moved.npz"
    part.write_bytes(orjson.dumps(line) + b"\n")
    assert read_latest(tmp_path)["a"].file == "moved.npz" and warnings == []


def test_damaged_lines_are_dropped_on_request(tmp_path):
    part, other = append(tmp_path, 0, "a", "b"), append(tmp_path, 1, "c")
    os.utime(other, ns=(5, 5))
    whole = part.read_bytes()
    part.write_bytes(b"{}\n" + whole + b'{"key": "x')
    damaged = []
    assert set(read_latest(tmp_path, damaged)) == {"a", "b", "c"}
    assert damaged == [f"{part}:1", f"{part}:4"]
    drop_damaged_lines(tmp_path)
    assert part.read_bytes() == whole and other.stat().st_mtime_ns == 5


@pytest.mark.parametrize("torn", [b'{"key": "x', b"{", b"\x00\x00"])
def test_a_line_torn_by_a_crash_is_skipped_and_removed(tmp_path, warnings, torn):
    part = append(tmp_path, 0, "a")
    with open(part, "ab") as file:
        file.write(torn)
    assert list_keys(tmp_path) == ["a"] and warnings == []
    append(tmp_path, 0, "b")
    assert list_keys(tmp_path) == ["a", "b"]
    assert [orjson.loads(line)["key"] for line in part.read_bytes().splitlines()] == ["a", "b"]


@pytest.mark.parametrize(
    "damaged", [b"\x00\x00\n", b"{}\n", b"[1]\n", b'{"key": "x", "source": {}}\n', b"\xff\n", b"\n"]
)
def test_a_damaged_line_is_skipped_and_named(tmp_path, warnings, damaged):
    part = append(tmp_path, 0, "a")
    with open(part, "ab") as file:
        file.write(damaged)
    append(tmp_path, 0, "b")
    assert list_keys(tmp_path) == ["a", "b"]
    assert len(warnings) == 1 and warnings[0].startswith(f"damaged line skipped: {part}:2: ")


def test_a_job_with_nothing_to_do_leaves_the_parts_unchanged(tmp_path):
    part = append(tmp_path, 0, "a")
    os.utime(part, ns=(5, 5))
    append(tmp_path, 0)
    append(tmp_path, 1)  # another rank with nothing to do
    assert list_manifest_parts(tmp_path) == [part] and part.stat().st_mtime_ns == 5
    assert list_manifest_parts(tmp_path / "absent") == [] and list_keys(tmp_path / "absent") == []


def test_identity_is_read_back(tmp_path):
    assert read_identity(tmp_path) is None
    write_identity(tmp_path, IDENTITY)
    assert read_identity(tmp_path) == {
        "name": IDENTITY.name,
        "vae_sha256": "ab",
        "vae_precision": "fp32",
        "dtype": "float32",
        "posterior": "sample",
        "flip": False,
        "resolution_px": 1024,
        "min_bucket_px": 256,
        "max_bucket_px": 2048,
        "bucket_step_px": 64,
        "no_upscale": False,
        "crop": "center",
        "format_version": 1,
    }
    assert os.listdir(tmp_path) == ["cache.json"]


def test_the_name_of_an_identity_depends_on_every_field():
    fields = {field: getattr(IDENTITY, field) for field in IDENTITY.__dataclass_fields__}
    changed = [
        Identity(**{**fields, field: not value if isinstance(value, bool) else value * 2 or ((64, 64),)})
        for field, value in fields.items()
    ]
    names = {identity.name for identity in (IDENTITY, *changed)}
    assert len(names) == len(fields) + 1 and all(len(name) == 16 for name in names)
    assert Identity(**fields).name == IDENTITY.name


def test_every_flipped_byte_of_the_identity_is_noticed(tmp_path):
    write_identity(tmp_path, IDENTITY)
    file = tmp_path / "cache.json"
    whole = file.read_bytes()
    assert verify_identity(tmp_path) is None
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert verify_identity(tmp_path), place
    for content in (b"", b"[]", b"null", whole[:-1]):
        file.write_bytes(content)
        assert verify_identity(tmp_path)
