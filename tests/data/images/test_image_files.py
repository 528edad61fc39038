"""Folders of images: what is skipped is counted and named, links are followed once, unreadable folders are errors."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from loguru import logger

from sdxl_trainer.data.images.image_files import UnreadableFolderError, list_readable_suffixes, walk_images
from sdxl_trainer.data.images.image_lookup import FileChecker
from sdxl_trainer.data.images.masks import check_masks
from sdxl_trainer.data.images.skipped_files import SkippedFiles
from sdxl_trainer.data.index.index import open_record_index


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def list_images(folder: Path, skipped: SkippedFiles | None = None) -> list[str]:
    return [
        os.path.relpath(f"{each.path}/{name}", folder)
        for each in walk_images([folder], None, skipped)
        for name in each.images
    ]


def test_hidden_and_system_entries_are_no_images(tmp_path):
    hidden = [
        ".ipynb_checkpoints/a-checkpoint.png",
        "__MACOSX/._a.png",
        "@eaDir/a.jpg/SYNOPHOTO.jpg",
        ".thumbnails/a.png",
    ]
    touch(tmp_path, "b.png", "sub/a.png", "sub/._a.png", ".b.png", "lost+found/x.png", *hidden)
    assert list_images(tmp_path) == ["b.png", "sub/a.png"]
    root = tmp_path / ".thumbnails"  # a folder that the user names is taken
    assert list_images(root) == ["a.png"]


def test_links_to_folders_are_followed_once(tmp_path):
    touch(tmp_path, "root/m/a.png", "other/b.png", "other/deep/c.png")
    os.symlink(tmp_path / "other", tmp_path / "root" / "a_link")
    os.symlink(tmp_path / "other" / "deep", tmp_path / "root" / "m" / "again")
    os.symlink("..", tmp_path / "root" / "m" / "up")
    os.symlink(tmp_path / "root", tmp_path / "other" / "round")
    os.symlink("m", tmp_path / "root" / "b_link")
    os.symlink(tmp_path / "other" / "b.png", tmp_path / "root" / "z.png")
    assert list_images(tmp_path / "root") == ["z.png", "m/a.png", "a_link/b.png", "a_link/deep/c.png"]


def run_as_nobody(function) -> str:
    """Run a function in a process without root's rights, and return the error that it raises, as text."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        text = "failed"
        try:
            if os.geteuid() == 0:
                os.setegid(65534)
                os.seteuid(65534)
            text = f"returned {function()}"
        except ValueError as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(write, text.encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


def test_unreadable_folders_are_all_named():
    with TemporaryDirectory() as name:  # pytest's own folders are closed to others
        root = Path(name)
        root.chmod(0o755)
        touch(root, "a.png", "x/b.png", "y/c.png", "masks/m.png")
        closed = [root / "masks", root / "x", root / "y"]
        for folder in closed:
            folder.chmod(0)
        message = run_as_nobody(lambda: list_images(root))
        masks = run_as_nobody(lambda: [str(each) for each in check_masks(f"{root}/masks")])
        for folder in closed:
            folder.chmod(0o755)
    names = ", ".join(f"{folder} (Permission denied)" for folder in closed)
    assert message == f"{UnreadableFolderError.__name__}: 3 folders cannot be listed: {names}"
    assert "data.masks" in masks and "Permission denied" in masks


def test_what_is_not_taken_is_counted_and_named(tmp_path):
    folder, lines = tmp_path / "images", []
    touch(folder, "a.png", "b.JFIF", "c.jp2", "d.tga", "e.heic", "f.jxl", ".h.png", "movie.mp4", "notes.txt")
    touch(folder, "g.svg", "g.txt", "i.psd", "i.caption", "a.psd", "a.txt", "a.json", "j.png", "j.png.json", "k.json")
    bad_name = os.fsencode(folder) + b"/\xe9t\xe9.png"
    open(bad_name, "wb").close()
    sink = logger.add(lambda message: lines.append(str(message)), format="{level} {message}")
    try:
        index = open_record_index(tmp_path / "cache", [], [folder])
        open_record_index(tmp_path / "cache", [], [folder])
    finally:
        logger.remove(sink)
    assert index.arrow_column("key").to_pylist() == ["a", "b", "c", "d", "j"]
    assert len(lines) == 10 and lines[:5] == lines[5:]  # at each start
    listed = [
        json.loads(line) for line in (tmp_path / "cache" / "index" / "skipped_files.jsonl").read_text().splitlines()
    ]
    found: dict[str, list[str]] = {}
    for line in listed:
        found.setdefault(line["kind"], []).append(os.path.relpath(line["path"], folder))
    assert found == {
        "hidden": [".h.png"],
        "not_utf8": [r"\xe9t\xe9.png"],
        "no_plug_in": ["e.heic", "f.jxl"],
        "captioned": ["g.svg", "i.psd"],
        "json": ["a.json", "j.png.json"],
    }
    assert any(
        "skipped 2 files (Pillow needs a plug-in for this format)" in line and "pillow-heif" in line for line in lines
    )
    assert {".heic", ".jxl"}.isdisjoint(list_readable_suffixes())


@pytest.mark.parametrize("count", [3, 40])  # files looked up one by one, and in the listing of their folder
def test_a_link_in_a_loop_does_not_hide_the_other_files(tmp_path, count):
    paths = [str(tmp_path / f"{number}.png") for number in range(count)]
    touch(tmp_path, *(Path(path).name for path in paths[1:]))
    os.symlink("0.png", tmp_path / "0.png")
    assert FileChecker().exist([*paths, "a\0b"]).tolist() == [False] + [True] * (count - 1) + [False]
