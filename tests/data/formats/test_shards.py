"""Tar shards: webdataset and tar read them, a crash loses no listed sample, and damage is named."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import webdataset

from sdxl_trainer.data.formats.shard_samples import ShardSample, load_catalogue, save_catalogue
from sdxl_trainer.data.formats.shards import (
    BLOCK,
    BadShardError,
    ShardWriter,
    compute_sample_span,
    decode_key,
    encode_key,
    get_partial_path,
    iterate_members,
    list_partial_shards,
    locate_shard,
    read_sample,
    recover_shard,
    verify_shard_end,
)

KEYS = [
    "plain",
    "with.dots.in.it",
    "a/b/c",
    "100% cotton",
    "%2E",
    "..",
    "../up",
    "/absolute",
    "ü" * 30,
    "画像" * 60,
    " space ",
    *("x" * length for length in (91, 94, 95, 96, 97, 200, 505, 506, 507, 508, 600)),
]


def make_content(number: int) -> tuple[bytes, bytes]:
    """Return (record, npz) with sizes around that of a tar block."""
    buffer = io.BytesIO()
    np.savez(buffer, latents=np.full((4, 2, number % 7 + 1), number, np.float32))
    return json.dumps({"number": number, "text": "ä" * (number * 40)}).encode(), buffer.getvalue()


@pytest.fixture
def shard(tmp_path):
    """Write a finished shard of all keys. Return (path, key → (record, npz, place))."""
    writer = ShardWriter(tmp_path / "shards" / "x.tar")
    items = {}
    for number, key in enumerate(KEYS):
        record, npz = make_content(number)
        items[key] = (record, npz, writer.append(key, record, npz))
        writer.flush(writer.bytes_written)
    assert os.listdir(tmp_path / "shards") == [".x.tar.partial"]
    writer.close()
    assert os.listdir(tmp_path / "shards") == ["x.tar"]
    return writer.path, items


def test_tarfile_reads_a_shard(shard):
    path, items = shard
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert len(members) == 2 * len(KEYS)
        for member in members:
            assert not member.name.startswith("/") and ".." not in member.name.split("/")
            stem, _, suffix = member.name.partition(".")
            record, npz, place = items[decode_key(stem)]
            assert tar.extractfile(member).read() == (npz if suffix == "npz" else record)
            if suffix == "npz":
                assert (member.offset_data, member.size) == (place.offset, place.size)


def test_webdataset_reads_a_shard(shard):
    path, items = shard
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [decode_key(sample["__key__"]) for sample in samples] == KEYS
    for key, sample in zip(KEYS, samples, strict=True):
        assert {name for name in sample if not name.startswith("__")} == {"json", "npz"}
        assert (sample["json"], sample["npz"]) == items[key][:2]
    decoded = next(iter(webdataset.WebDataset(str(path), shardshuffle=False).decode()))
    assert decoded["json"]["number"] == 0 and decoded["npz"]["latents"].shape == (4, 2, 1)


def test_encoded_keys_are_unique_and_can_be_decoded():
    assert [decode_key(encode_key(key)) for key in KEYS] == KEYS
    assert len({encode_key(key) for key in KEYS}) == len(KEYS)
    assert encode_key("0001_red_circle") == "0001_red_circle"  # an ordinary stem is unchanged


def test_a_sample_is_read_by_its_offset(shard):
    path, items = shard
    for key, (record, npz, place) in items.items():
        assert read_sample(path, key, len(record), place.offset, place.size) == (record, npz)


def test_spans_of_samples_fill_the_tar(shard):
    path, items = shard
    end = 0
    for key, (record, _, place) in items.items():
        span = compute_sample_span(key, len(record), place.offset, place.size)
        assert span.offset == end, key
        end = span.end
    assert verify_shard_end(path, end) is None
    assert path.stat().st_size == end + 2 * BLOCK


def test_members_are_listed_from_headers(shard):
    path, items = shard
    expected = []
    for key, (record, npz, place) in items.items():
        start = place.offset - compute_sample_span(key, len(record), place.offset, 0).offset
        assert start > 0
        expected += [(key, "json", len(record)), (key, "npz", len(npz))]
    assert [(key, suffix, size) for key, suffix, _, size in iterate_members(path)] == expected
    assert [offset for _, suffix, offset, _ in iterate_members(path) if suffix == "npz"] == [
        place.offset for _, _, place in items.values()
    ]


def test_folders_in_a_tar_of_another_program(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a/b.c/", "a/b.c/d.e.npz"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            tar.addfile(info)
    assert [(key, suffix) for key, suffix, _, _ in iterate_members(tmp_path / "x.tar")] == [("a/b.c/d", "e.npz")]


@pytest.mark.parametrize("name", ["/etc/x.npz", "../x.npz", "a/../../x.npz", "a/.."])
def test_members_that_point_outside_are_refused(tmp_path, name):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("good.npz"))
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(BadShardError, match="points outside the archive"):
        list(iterate_members(tmp_path / "x.tar"))


def test_every_truncation_of_a_tar_is_noticed(tmp_path):
    writer = ShardWriter(tmp_path / "x.tar")
    for number in range(3):
        writer.append(str(number), b"{}", b"n" * 700)
    writer.close()
    content = writer.path.read_bytes()
    end = len(content) - 2 * BLOCK
    for kept in [*range(0, end + 1, 100), *range(0, end + 1, BLOCK), end, end + 1, end + BLOCK - 1]:
        writer.path.write_bytes(content[:kept])
        with pytest.raises(BadShardError):
            list(iterate_members(writer.path))
    for kept in (end + BLOCK, end + BLOCK + 1, len(content) - 1):  # readers stop at the first block of zeros
        writer.path.write_bytes(content[:kept])
        assert len(list(iterate_members(writer.path))) == 6
        assert "bytes, but its samples and the end of the tar take" in verify_shard_end(writer.path, end)
    writer.path.write_bytes(content[:BLOCK] + b"\1" + content[BLOCK + 1 :])
    assert len(list(iterate_members(writer.path))) == 6  # only the manifest has a checksum of a record's content
    writer.path.write_bytes(content[: 2 * BLOCK] + b"\1" + content[2 * BLOCK + 1 :])
    with pytest.raises(BadShardError, match="is damaged at byte 1024"):
        list(iterate_members(writer.path))


def test_every_flipped_byte_of_a_sample_or_of_the_end_is_noticed(tmp_path):
    key, record, npz = "x" * 120, b'{"a": 1}', b"n" * 520
    writer = ShardWriter(tmp_path / "x.tar")
    places = [writer.append(name, record, npz) for name in ("before", key, "after")]
    end = writer.bytes_written
    writer.close()
    span = compute_sample_span(key, len(record), places[1].offset, len(npz))
    first, last = span.offset, span.end
    whole = writer.path.read_bytes()
    file = os.open(writer.path, os.O_WRONLY)
    before = None
    for place in [*range(first, last), *range(end, len(whole))]:
        if before is not None:
            os.pwrite(file, whole[before : before + 1], before)
        os.pwrite(file, bytes([whole[place] ^ 0x20]), place)
        before = place
        try:
            read = read_sample(writer.path, key, len(record), places[1].offset, len(npz))
        except BadShardError as error:
            assert "tar header" in str(error) and first <= place < last
        else:
            # The record's and the npz's own bytes have checksums in the manifest.
            assert (read != (record, npz)) == (place < last), place
            assert (verify_shard_end(writer.path, end) is not None) == (place >= end), place
    os.close(file)


def test_a_wrong_offset_or_key_is_refused(shard):
    path, items = shard
    record, npz, place = items["plain"]
    for offset in (place.offset - BLOCK, place.offset + BLOCK, 0, 1 << 40):
        with pytest.raises(BadShardError):
            read_sample(path, "plain", len(record), offset, len(npz))
    with pytest.raises(BadShardError):
        read_sample(path, "plane", len(record), place.offset, len(npz))


def test_an_unfinished_shard_is_recovered_wherever_it_was_cut(tmp_path):
    """The samples that the manifest lists are on disk. Any part of the later ones may be there, too."""
    path = tmp_path / "x.tar"
    partial = get_partial_path(path)
    writer = ShardWriter(path)
    items = {key: (*make_content(number), number) for number, key in enumerate(("a", "b" * 120, "c"))}
    places = {key: writer.append(key, record, npz) for key, (record, npz, _) in items.items()}
    writer.flush(writer.bytes_written)
    content = partial.read_bytes()
    os.close(writer._descriptor)
    ends = [places[key].offset + places[key].size for key in items]
    for listed, end in enumerate(ends, 1):
        for kept in [end, *range(end + 1, len(content), 97), *range(end + -end % BLOCK, len(content), BLOCK)]:
            path.unlink(missing_ok=True)
            partial.write_bytes(content[:kept])
            assert list_partial_shards(tmp_path) == [path] and locate_shard(path) == partial
            recover_shard(path, end)
            assert os.listdir(tmp_path) == ["x.tar"] and locate_shard(path) == path
            assert verify_shard_end(path, end + -end % BLOCK) is None
            samples = list(webdataset.WebDataset(str(path), shardshuffle=False)) if kept == end else []
            assert [sample["__key__"] for sample in samples] == list(items)[: len(samples)]
            assert len(list(iterate_members(path))) == 2 * listed
            for key in list(items)[:listed]:
                record, npz, _ = items[key]
                assert read_sample(path, key, len(record), places[key].offset, len(npz)) == (record, npz)
    partial.write_bytes(content)
    path.unlink()
    recover_shard(path, 0)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_no_trace(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path / "x.tar")
    writer.append("a", b"{}", b"1" * 3000)
    whole, write, room = writer.bytes_written, os.pwrite, [1500]

    def write_until_full(descriptor: int, content: memoryview, place: int) -> int:
        size = min(len(content), room[0])
        room[0] -= size
        if size == 0:
            raise OSError(28, "No space left on device")
        return write(descriptor, content[:size], place)

    monkeypatch.setattr(os, "pwrite", write_until_full)
    with pytest.raises(OSError, match="No space left"):
        writer.append("b", b"{}", b"2" * 3000)
    assert writer.bytes_written == whole
    room[0] = 1 << 20
    place = writer.append("c", b"{}", b"3" * 100)  # shorter than the remains of the failed write
    end = writer.bytes_written
    writer.close()
    assert [(key, suffix) for key, suffix, _, _ in iterate_members(writer.path)] == [
        ("a", "json"),
        ("a", "npz"),
        ("c", "json"),
        ("c", "npz"),
    ]
    assert read_sample(writer.path, "c", 2, place.offset, 100)[1] == b"3" * 100
    assert verify_shard_end(writer.path, end) is None
    room[0] = 0
    full = ShardWriter(tmp_path / "y.tar")
    with pytest.raises(OSError, match="No space left"):
        full.close()
    assert not full.path.exists() and list_partial_shards(tmp_path) == [full.path]


@pytest.mark.parametrize("place", [3, 80, -1, None])
def test_a_damaged_catalogue_is_named_and_deleted(tmp_path, place):
    file = tmp_path / "0123-4567.catalogue"
    samples = [ShardSample(key="a", record={"caption": "a red square"}, offset=1536, size=4664)]
    save_catalogue(file, "s3://bucket/a.tar", samples)
    content = bytearray(file.read_bytes())
    assert load_catalogue(file) == ("s3://bucket/a.tar", samples)
    if place is None:
        content.clear()
    else:
        content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        BadShardError, match="0123-4567.catalogue: was damaged and is deleted; run the same command again"
    ):
        load_catalogue(file)
    assert not file.exists()
