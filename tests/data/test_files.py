"""Files: only regular ones of a sane size are read, and names of any length are written."""

import errno
import os
import socket
import stat

import pytest

from sdxl_trainer.data.files import hash_file, open_regular, open_text_stream, read_regular, write_atomic


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
