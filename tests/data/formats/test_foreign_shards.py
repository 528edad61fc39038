"""Shards of other programs: webdataset and the readers here find the same samples in odd tars."""

import gzip
import io
import re
import subprocess
import tarfile
from pathlib import Path

import orjson
import pytest
import webdataset
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from webdataset.autodecode import decoders

from sdxl_trainer.data.formats.shard_samples import (
    CAPTION_SUFFIXES,
    NUMBER_SUFFIXES,
    RECORD_SUFFIXES,
    SAMPLE_SUFFIXES,
    ShardSample,
    list_shard_samples,
)
from sdxl_trainer.data.formats.shards import BadShardError, decode_key, iterate_members

FOLDERS = ["", "", "", "./", "a/", "a.b/", "__m__/", "a/__m__/", "ü 空/", "x" * 120 + "/"]
BASES = ["k", "k", "K", "k1", "__k__", "__k", "", "a b", "日本", "n" * 150, "100%25", "a%2Eb", "k\nl"]
ENDS = [".npz", ".NPZ", ".json", ".jsn", ".txt", ".text", ".cls", ".te.npz", ".v2.npz", ".jpg", ".", ""]
CONTENTS = {"json": b'{"n": 1}', "jsn": b'{"n": 2, "m": 3}', "cls": b" 7\n", "txt": b"", "text": "é".encode()}
KINDS = [tarfile.REGTYPE] * 8 + [tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
names = st.builds("{}{}{}".format, st.sampled_from(FOLDERS), st.sampled_from(BASES), st.sampled_from(ENDS))
members_of_tars = st.tuples(names.filter(len), st.sampled_from(KINDS))
# An old regular file whose name ends with a slash is a folder to tarfile, which then takes its content for a header.
possible_members = members_of_tars.filter(lambda member: not (member[1] == tarfile.AREGTYPE and member[0][-1] == "/"))
tar_members = st.lists(possible_members, min_size=1, max_size=9)


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> dict[str, bytes]:
    """Write members of any type; a file's content follows from its suffix, and a latent's from its place."""
    with tarfile.open(path, "w", format=form, pax_headers={"comment": "global"}) as tar:
        for place, (name, kind) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "k.npz"
            content = CONTENTS.get(name.rpartition(".")[2].lower(), b"latents %d" % place)
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)


def read_by_webdataset(path: Path) -> dict[str, dict[str, bytes]] | None:
    """Return the members of each sample that webdataset reads and that has a part that is used here.

    None: two samples, or two members of one, have the same name. webdataset refuses the second case only.
    """
    found: dict[str, dict[str, bytes]] = {}
    try:
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    except ValueError as error:
        repeated = re.search(r"(?s)(.*): duplicate file name in tar file (.*) dict_keys", error.args[0])
        assert repeated, error
        # Members that nothing here uses may have one name.
        assume(repeated[2] in SAMPLE_SUFFIXES and not is_nameless(repeated[1]))
        return None
    for sample in samples:
        if is_nameless(sample["__key__"]):
            continue
        parts = {suffix: content for suffix, content in sample.items() if not suffix.startswith("__")}
        known = found.setdefault(decode_key(sample["__key__"]), {})
        if known.keys() & parts.keys() & SAMPLE_SUFFIXES:
            return None
        known |= parts
    return {key: parts for key, parts in found.items() if parts.keys() & SAMPLE_SUFFIXES}


def is_nameless(name: str) -> bool:
    """Whether a name such as `folder/.npz` has a key without a name of its own, which is not used here."""
    return name.rpartition("/")[2][:1] in ("", ".")


def list_samples(path: Path) -> list[ShardSample]:
    with open(path, "rb") as stream:
        return list_shard_samples(str(path), stream)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(members=[(name, tarfile.REGTYPE) for name in ("a.json", "b.json", "a.npz", "b.npz")], form=tarfile.PAX_FORMAT)
@example(members=[(name, tarfile.REGTYPE) for name in ("a.npz", "b.npz", "a.NPZ")], form=tarfile.GNU_FORMAT)
@example(members=[("a.npz", tarfile.REGTYPE), ("a.npz", tarfile.SYMTYPE)], form=tarfile.GNU_FORMAT)
@given(members=tar_members, form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_the_samples_are_webdatasets(tmp_path, members, form):
    path = tmp_path / "x.tar"
    write_tar(path, members, form)
    expected = read_by_webdataset(path)
    if expected is None:
        with pytest.raises(BadShardError, match="has two members"):
            list_samples(path)
        return
    images = [key for key, parts in expected.items() if "npz" in parts]
    if not images and any(name.lower().endswith((".jpg", ".te.npz", ".v2.npz", ".")) for name, _ in members):
        return  # a shard of images, or of files that are no latents, is refused as such
    samples = list_samples(path)
    assert sorted(sample.key for sample in samples) == sorted(expected)
    content = path.read_bytes()
    for sample in samples:
        parts = expected[sample.key]
        place = None if sample.offset is None else content[sample.offset : sample.offset + sample.size]
        assert place == parts.get("npz")
        record = {suffix: decoders[suffix](parts[suffix]) for suffix in NUMBER_SUFFIXES if suffix in parts}
        for suffix in reversed(RECORD_SUFFIXES):
            record |= decoders[suffix](parts[suffix]) if suffix in parts else {}
        caption = next((decoders[suffix](parts[suffix]) for suffix in CAPTION_SUFFIXES if suffix in parts), None)
        assert sample.record == record | ({} if caption is None else {"caption": caption})


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_members_with_holes_are_refused(tmp_path, form):
    """webdataset fills the holes, but a read by position would return other bytes."""
    with open(tmp_path / "a.npz", "wb") as file:
        file.truncate(1 << 20)
        file.write(b"1")
    command = ["tar", "--sparse", f"--format={form}", "-cf", "x.tar", "a.npz"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "x.tar").stat().st_size < 1 << 20
    with pytest.raises(BadShardError, match="'a.npz' is stored with holes; write the tar without --sparse"):
        list_samples(tmp_path / "x.tar")


def test_a_compressed_shard_is_refused_with_its_cure(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.npz", tarfile.REGTYPE)])
    packed = gzip.compress((tmp_path / "x.tar").read_bytes())
    (tmp_path / "x.tar").write_bytes(packed)
    assert [sample["__key__"] for sample in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)] == ["a"]
    with pytest.raises(BadShardError, match=r"is compressed; .* decompress it \(gzip -d\)"):
        list_samples(tmp_path / "x.tar")
    write_tar(tmp_path / "BZh.tar", [("BZh.npz", tarfile.REGTYPE)])  # a plain tar whose first name looks compressed
    assert [sample.key for sample in list_samples(tmp_path / "BZh.tar")] == ["BZh"]


def test_links_and_devices_are_skipped(tmp_path):
    members = [(name, kind) for name in ("a.npz", "b/c.json") for kind in KINDS if kind != tarfile.REGTYPE]
    write_tar(tmp_path / "x.tar", [*members, ("d.npz", tarfile.REGTYPE)])
    found = [(key, suffix) for key, suffix, *_ in iterate_members(tmp_path / "x.tar")]
    assert found == [("a", "npz"), ("b/c", "json"), ("d", "npz")]  # the first two are regular files of the old type


def test_numbers_that_are_none_stay_text(tmp_path):
    texts = {"cls": b"12", "id": b"img-7", "index": b"9" * 30}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for suffix, content in {**texts, "txt": b"a cat"}.items():
            info = tarfile.TarInfo(f"k.{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    [sample] = list_samples(tmp_path / "x.tar")
    assert sample.record == {"cls": 12, "id": "img-7", "index": "9" * 30, "caption": "a cat"}
    assert orjson.dumps(sample.record)  # as catalogues and indexes store it
