"""Records: the same content from every format of metadata, and errors that name the file, line and key."""

import json
import os
import re
import tempfile
from pathlib import Path

import pytest
from programs import FIXTURES

from sdxl_trainer.data.index.index import open_record_index
from sdxl_trainer.data.metadata.blocks import build_block
from sdxl_trainer.data.metadata.merge import merge_sources
from sdxl_trainer.data.metadata.records import (
    ImageFinder,
    build_record_rows,
    check_sources,
    parse_record,
    read_image_folders,
)

SEED_METADATA = FIXTURES / "seed_cache" / "metadata.json"


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read_records(metadata: list[Path], image_dirs: list[Path], separator: str = ",") -> dict[str, dict]:
    """Return all records by key."""
    work = Path(tempfile.mkdtemp())
    blocks = (
        merge_sources([[file] for file in metadata], work)
        if metadata
        else map(build_block, read_image_folders(image_dirs))
    )
    finder = ImageFinder(image_dirs)
    rows = [row for block in blocks for row in build_record_rows(block, finder, separator).to_pylist()]
    assert list(work.iterdir()) == []  # no temporary file is left
    return {row["key"]: parse_record(row) for row in rows}


def read_captions(*args) -> dict:
    return {key: record["caption"] for key, record in read_records(*args).items()}


def test_metadata_of_the_first_sdxl_trainer(tmp_path):
    metadata = write(tmp_path / "metadata.json", SEED_METADATA.read_text())
    write(tmp_path / "img000000.jpg", "")
    records = read_records([metadata], [])
    assert list(records) == ["img000000", "img000001"]
    assert records["img000000"] == {
        "key": "img000000",
        "image_path": str(tmp_path / "img000000.jpg"),
        "original_size": [348, 256],
        "caption": json.loads(SEED_METADATA.read_text())["img000000"]["caption"],
    }
    # The second image is missing: the record has the path where the image should be.
    assert records["img000001"]["image_path"] == str(tmp_path / "img000001.jpg")


def test_later_files_update_earlier_ones_key_by_key(tmp_path):
    first = write(
        tmp_path / "a" / "1.json", {"x": {"image_path": "x.png", "caption": "old", "artist": "b"}, "y": {"tags": "t"}}
    )
    second = write(
        tmp_path / "2.json", {"z": {"caption": "new"}, "x": {"caption": "new", "score": 1.5, "key": "other"}}
    )
    write(tmp_path / "a" / "x.png", "")
    records = read_records([first, second], [])
    assert list(records) == ["x", "y", "z"]
    assert records["x"] == {
        "key": "x",
        "image_path": str(tmp_path / "a" / "x.png"),
        "caption": "new",
        "artist": "b",
        "score": 1.5,
    }
    assert read_captions([second, first], [])["x"] == "old"


@pytest.mark.parametrize(
    ("fields", "caption"),
    [
        ({"caption": "a, b"}, "a, b"),
        ({"tags": "c"}, "c"),
        ({"tags": ["c", "d e"]}, "c, d e"),
        ({"caption": "a", "tags": "c", "image_path": "x.png"}, "a"),
        ({"caption": "a", "tags": "c"}, "a,c"),  # keyed by its path, as kohya's are
        ({"caption": "", "tags": "c"}, "c"),
        ({"caption": None}, None),
        ({}, None),
        ({"caption": 7}, "7"),
    ],
)
def test_a_caption_is_made_of_caption_and_tags(tmp_path, fields, caption):
    assert read_captions([write(tmp_path / "m.json", {"x": fields})], []) == {"x": caption}


def test_images_are_found_by_path_then_name_then_stem(tmp_path):
    # `here` is the folder of the metadata, `there` lies below the image folder.
    here, there = tmp_path / "here", tmp_path / "there" / "deep"
    for path in (
        here / "direct.png",
        there / "direct.png",
        there / "name.png",
        there / "name.jpg",
        there / "stem.webp",
        there / "a.b.png",
    ):
        write(path, "")
    metadata = write(
        here / "m.json",
        {
            "direct": {"image_path": "direct.png"},
            "absolute": {"image_path": str(there / "name.jpg")},
            "name": {"image_path": "/gone/name.png"},
            "stem": {"image_path": "old/stem.jpg"},
            "a.b": {"caption": "its key is its stem"},
            "lost": {"image_path": "lost.png"},
        },
    )
    found = {key: record["image_path"] for key, record in read_records([metadata], [tmp_path / "there"]).items()}
    assert found == {
        "direct": str(here / "direct.png"),
        "absolute": str(there / "name.jpg"),
        "name": str(there / "name.png"),
        "stem": str(there / "stem.webp"),
        "a.b": str(there / "a.b.png"),
        "lost": str(here / "lost.png"),
    }


def test_an_ambiguous_image_is_refused(tmp_path):
    """Choosing any of several images could train an image with the caption of another one."""
    for path in ("a/x.png", "b/x.png", "a/y.png", "b/y.webp", "b/z.png"):
        write(tmp_path / path, "")
    folders = [tmp_path / "a", tmp_path / "b", tmp_path]
    metadata = write(tmp_path / "m.json", {"x": {"image_path": "/gone/x.png"}, "z": {"image_path": "/gone/z.png"}})
    with pytest.raises(ValueError) as caught:
        read_records([metadata], folders)
    message = str(caught.value)
    assert message.startswith("1 image name found more than once under data.image_dirs: 'x.png' (")
    assert f"({tmp_path}/a/x.png and {tmp_path}/b/x.png)" in message and "z.png" not in message
    metadata = write(tmp_path / "m.json", {"y": {"image_path": "/gone/y.webp"}, "x": {"image_path": "b/x.png"}})
    found = read_records([metadata], folders)  # a file name has priority over a stem, and an existing path over both
    assert found["y"]["image_path"] == f"{tmp_path}/b/y.webp" and found["x"]["image_path"] == f"{tmp_path}/b/x.png"
    metadata = write(tmp_path / "m.json", {"y": {"image_path": "/gone/y.jpg"}})
    with pytest.raises(ValueError, match="'y.jpg' "):
        read_records([metadata], folders)


def test_a_folder_of_images_and_caption_files(tmp_path):
    for name, caption in (
        ("b.JPG", None),
        ("a.png", ".txt"),
        ("sub/c.webp", ".caption"),
        ("sub/d.tiff", ".txt"),
        ("x.y.gif", ".txt"),
    ):
        image = write(tmp_path / name, "")
        if caption:
            write(image.with_suffix(caption), f"  of {image.stem}\n")
    write(tmp_path / "a.caption", "not this one")
    (tmp_path / "sub" / "d.txt").write_bytes("\ufeffvon Möwe\r\n".encode())  # as Windows' editor writes it
    write(tmp_path / "notes.txt", "no image")
    assert read_captions([], [tmp_path]) == {"a": "of a", "b": None, "c": "of c", "d": "von Möwe", "x.y": "of x.y"}
    record = read_records([], [tmp_path])["c"]
    assert record == {"key": "c", "image_path": str(tmp_path / "sub" / "c.webp"), "caption": "of c"}


def test_captions_of_other_names_are_found(tmp_path):
    captions = {"a.TXT": "a", "b.png.txt": "b", "c.Caption": "c", "d.txt": "d", "d.TXT": "no", "d.png.txt": "no"}
    for name, text in captions.items():
        write(tmp_path / f"{name[0]}.png", "")
        write(tmp_path / name, text)
    assert read_captions([], [tmp_path]) == {key: key for key in "abcd"}
    index = open_record_index(tmp_path / "cache", [], [tmp_path])
    write(tmp_path / "b.png.txt", "new")
    again = open_record_index(tmp_path / "cache", [], [tmp_path])
    assert again.fingerprint != index.fingerprint and again.record(1)["caption"] == "new"


def test_all_captions_that_cannot_be_read_are_named_at_once(tmp_path):
    for name in "abcde":
        write(tmp_path / f"{name}.png", "")
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    os.symlink("gone", tmp_path / "c.txt")
    os.truncate(write(tmp_path / "d.txt", ""), 1 << 40)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        open_record_index(tmp_path / "cache", [], [tmp_path])
    lines = [line.strip() for line in str(caught.value).splitlines()]
    reasons = ["is a pipe", "is not UTF-8", "No such file", "more than 1,048,576"]
    assert len(lines) == 4
    for line, name, reason in zip(lines, "abcd", reasons, strict=True):
        assert line.startswith(f"{tmp_path}/{name}.txt: ") and reason in line


def test_images_that_share_a_stem_are_told_apart_by_their_folders(tmp_path):
    names = ["10_dog/1.png", "5_cat/1.jpg", "5_cat/2.png", "x/512px/1.png", "y/5_cat/1.png", "3.a.png"]
    for name in names:
        write(tmp_path / "set" / name, "")
    index = open_record_index(tmp_path / "cache", [], [tmp_path / "set"])
    keys = dict(zip(index.table.column("image_path").to_pylist(), index.table.column("key").to_pylist(), strict=True))
    assert [keys[str(tmp_path / "set" / name)] for name in names] == [
        "10_dog/1",
        "set/5_cat/1",
        "2",
        "x/512px/1",  # a folder like that of a resolution would be read as one
        "y/5_cat/1",
        "3.a",
    ]
    assert index.record(0)["key"] in keys.values()
    # Masks are found by the stem of their image, so that it must tell images apart.
    (tmp_path / "masks").mkdir()
    with pytest.raises(ValueError, match="3 images with the file stem of another image"):
        open_record_index(tmp_path / "cache", [], [tmp_path / "set"], masks=str(tmp_path / "masks"))


def test_paths_in_metadata_may_be_relative_to_an_image_folder(tmp_path):
    for name in ("10_dog/1.png", "5_cat/1.png"):
        write(tmp_path / "set" / name, "")
    metadata = tmp_path / "lists" / "metadata.json"
    write(metadata, {"dog": {"image_path": "10_dog/1.png", "tags": "a"}, "cat": {"image_path": "5_cat/1.png"}})
    index = open_record_index(tmp_path / "cache", [str(metadata)], [tmp_path / "lists", tmp_path / "set"])
    wanted = [str(tmp_path / "set" / name) for name in ("10_dog/1.png", "5_cat/1.png")]
    assert index.table.column("image_path").to_pylist() == wanted


def test_images_that_only_their_suffix_tells_apart_are_listed(tmp_path):
    for name in ("a/x.png", "a/x.jpg", "b/x.png", "b/y.png"):
        write(tmp_path / name, "")
    with pytest.raises(ValueError, match="^1 image with the file stem of another image") as caught:
        open_record_index(tmp_path / "cache", [], [tmp_path / "a", tmp_path / "b"])
    assert f"({tmp_path / 'a/x.jpg'} and {tmp_path / 'a/x.png'})" in str(caught.value)
    with pytest.raises(ValueError, match="2 images with the file stem"):  # of two roots
        open_record_index(tmp_path / "cache", [], [tmp_path / "b", tmp_path / "b"])
    assert list((tmp_path / "cache" / "index").glob("*.arrow")) == []


def test_kohyas_folders_give_captions(tmp_path):
    for name in ("10_sks dog/a.png", "10_sks dog/in/b.png", "3_/c.png", "d.png", "10_sks dog/e.png"):
        write(tmp_path / "set" / name, "")
    write(tmp_path / "set" / "10_sks dog" / "e.txt", "own")
    index = open_record_index(tmp_path / "cache", [], [tmp_path / "set"], kohya_folders=True)
    captions = {record["key"]: record["caption"] for record in map(index.record, range(len(index)))}
    assert captions == {"a": "sks dog", "b": "sks dog", "c": None, "d": None, "e": "own"}
    assert open_record_index(tmp_path / "cache", [], [tmp_path / "set"]).record(0)["caption"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "x": {"caption": "a"},\n "y" {}\n}', ":3:6: malformed JSON"),
        ('{"x": {"caption": "a"', ":1:22: malformed JSON"),
        ("", ":1:1: malformed JSON"),
        ('[{"caption": "a"}]', "must be a JSON object keyed by file stem, not a list"),
        ('{"x": "a caption"}', "the record 'x' must be a JSON object, not a str"),
        ('{"x": {"caption": {"en": "a"}}}', """the record 'x' has `caption` = {"en":"a"}, which must be a text"""),
        ('{"": {"caption": "a"}}', "a record has an empty key"),
    ],
)
def test_the_error_of_malformed_metadata_names_the_place(tmp_path, text, message):
    metadata = write(tmp_path / "m.json", text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_records([metadata], [])
    assert str(caught.value).startswith(str(metadata))


def test_the_faults_of_all_files_are_told_at_once(tmp_path):
    files = [
        write(tmp_path / f"{number}.json", '{"x" {}}' if number % 2 else {f"y{number}": {}}) for number in range(5)
    ]
    for metadata in ([[file] for file in files], [files]):
        with pytest.raises(ValueError) as caught:
            list(merge_sources(metadata, tmp_path / "work"))
        lines = str(caught.value).splitlines()
        assert [line.strip().split(":")[0] for line in lines] == [str(files[1]), str(files[3])]
        assert lines[1].startswith("  "), "a break that escape_controls leaves"


def test_a_caption_file_that_is_not_utf8_is_named(tmp_path):
    write(tmp_path / "x.png", "")
    (tmp_path / "x.txt").write_bytes("Möwe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.txt: is not UTF-8, but probably latin1; convert it: iconv"):
        read_records([], [tmp_path])
    assert read_captions([write(tmp_path / "m.json", {"x": {"caption": "a"}})], [tmp_path]) == {"x": "a"}


def test_every_missing_source_is_a_problem(tmp_path):
    file = write(tmp_path / "m.json", "{}")
    assert [problem.key for problem in check_sources([], [])] == ["data"]
    assert list(check_sources([file], [tmp_path])) == []
    problems = check_sources([file, tmp_path, tmp_path / "no.json"], [file, tmp_path, tmp_path / "no"])
    assert [(problem.key, problem.rule) for problem in problems] == [
        ("data.metadata.1", "is a folder, not a metadata file"),
        ("data.metadata.2", "is not a file"),
        ("data.image_dirs.0", "is a file, not a folder"),
        ("data.image_dirs.2", "is not a folder"),
    ]
