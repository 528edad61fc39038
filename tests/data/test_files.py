"""Files: only regular ones of a sane size are read; those that are written appear whole and survive a power cut."""

import ast
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from disk_calls import DiskCalls

from sdxl_trainer.data.files import (
    TEMPORARY_NAME,
    create_folder,
    hash_file,
    open_atomic,
    open_atomic_folder,
    open_regular,
    open_text_stream,
    read_regular,
    remove_leftovers,
    write_atomic,
)

ROOT = Path(__file__).parents[2]


def make_special_files(folder) -> dict[str, str]:
    """Create files that must not be read. Return the reason of each refusal by path."""
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    socket.socket(socket.AF_UNIX).bind(str(folder / "socket"))
    os.symlink("loop", folder / "loop")
    os.symlink("absent", folder / "dangling")
    os.symlink("/dev/zero", folder / "device")
    with open(folder / "sparse", "wb") as file:
        file.truncate(1 << 42)
    names = {
        **{"pipe": "is a pipe", "socket": "is a socket", "device": "is a device", ".": "Is a directory"},
        **{"loop": "Too many levels", "dangling": "No such file", "sparse": "has 4,398,046,511,104 bytes, more than 9"},
        **{"a\0b": "no file can have this name", "\ud800": "no file can have this name", "x" * 256: "too long"},
    }
    return {f"{folder}/{name}": reason for name, reason in names.items()}


def test_only_regular_files_of_a_sane_size_are_opened(tmp_path):
    for path, reason in make_special_files(tmp_path / "special").items():
        with pytest.raises(OSError) as caught:
            read_regular(path, 9)
        assert reason in str(caught.value.strerror), path
        if "sparse" not in path:
            with pytest.raises(OSError, match=reason.split(",")[0]):
                hash_file(path)
    (tmp_path / "x").write_bytes(b"123456789")
    assert read_regular(tmp_path / "x", 9) == (b"123456789", (tmp_path / "x").stat().st_mtime_ns)
    # A file of /proc has no size, and some never end.
    assert read_regular("/proc/self/maps", 9).content == b""
    assert not os.listdir("/proc/self/fd") == [] and stat.S_ISREG(
        os.fstat(descriptor := open_regular(tmp_path / "x")).st_mode
    )
    os.close(descriptor)


def test_a_text_with_a_hole_is_refused(tmp_path):
    (tmp_path / "x").write_text("{}")
    with open_text_stream(tmp_path / "x") as stream:
        assert stream.read() == b"{}"
    os.truncate(tmp_path / "x", 1 << 40)
    with pytest.raises(OSError, match="is damaged or sparse: holds no data from byte 4096 on"):
        open_text_stream(tmp_path / "x")
    (tmp_path / "empty").touch()
    assert open_text_stream(tmp_path / "empty").read() == b""


@pytest.mark.parametrize("letter", ["x", "ä", "貓"])
def test_a_name_as_long_as_any_can_be_is_written(tmp_path, letter):
    path = tmp_path / (letter * (255 // len(letter.encode())))
    write_atomic(path, b"1")
    assert path.read_bytes() == b"1" and os.listdir(tmp_path) == [path.name]
    with pytest.raises(OSError) as caught:
        write_atomic(path.with_name(path.name + "xxx"), b"1")
    assert caught.value.errno == errno.ENAMETOOLONG and os.listdir(tmp_path) == [path.name]


def test_a_file_is_on_disk_before_its_name_and_its_name_before_the_end(tmp_path, monkeypatch):
    calls = DiskCalls(monkeypatch)
    create_folder(tmp_path / "a" / "b")
    write_atomic(tmp_path / "a" / "b" / "file", b"content")
    (tmp_path / "other").touch()
    (tmp_path / "other").unlink()
    assert calls.faults == [] and (calls.num_renames, calls.num_deletions) == (1, 1)
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")} <= calls._durable
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    calls = DiskCalls(monkeypatch)
    for content in ("old", "new"):
        with open_atomic_folder(folder) as target:
            (target / "unet").mkdir()
            (target / "unet" / "config.json").write_text(content)
        assert calls.faults == [], content
    with pytest.raises(ValueError, match="stop"), open_atomic_folder(folder) as target:
        (target / "half").touch()
        raise ValueError("stop")
    assert (folder / "unet" / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_files_of_killed_processes_are_deleted_and_those_in_use_stay(tmp_path):
    code = (
        "import os, pathlib, signal, sys; from sdxl_trainer.data.files import open_atomic, open_atomic_folder;"
        "folder = pathlib.Path(sys.argv[1]);"
        "writers = [open_atomic(folder / 'file'), open_atomic_folder(folder / 'folder')];"
        "[writer.__enter__() for writer in writers];"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".user.tmp").touch()  # not one of ours
    with open_atomic(tmp_path / "mine") as mine:
        remove_leftovers(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([Path(mine.name).name, ".user.tmp"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".user.tmp", "mine"]
    remove_leftovers(tmp_path / "absent")


def test_renames_go_through_one_module():
    """`data/files.py` flushes the folder after each rename."""
    found = []
    for folder in ("configs", "launch", "data", "cache", "train"):
        for path in (ROOT / folder).rglob("*.py"):
            calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
            names = [call.func for call in calls if isinstance(call.func, ast.Attribute)]
            renames = [name for name in names if ast.unparse(name) in ("os.replace", "os.rename", "os.renames")]
            renames += [name for name in names if name.attr == "rename"]
            found += [f"{path.relative_to(ROOT)}:{name.lineno}" for name in renames]
    assert {place.partition(":")[0] for place in found} == {"data/files.py"}, found
    assert TEMPORARY_NAME.fullmatch(".a.npz.0123abcd.tmp") and not TEMPORARY_NAME.fullmatch("a.npz.0123abcd.tmp")
