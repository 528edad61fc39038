"""Metrics and lists of bad samples outlive a full disk and their own deletion."""

import shutil
from pathlib import Path

from disk_calls import limit_file_size

from sdxl_trainer.launch.append_file import AppendFile


def test_a_full_disk_drops_whole_records_and_counts_them(tmp_path: Path) -> None:
    messages: list[str] = []
    file = AppendFile(tmp_path / "logs" / "lines", messages.append)
    assert not file.path.exists()
    file.append(b"first\n")
    with limit_file_size(10):
        file.append(b"too long\n")
        file.append(b"too long\ntoo long\n", count=2)
        assert file.path.read_bytes() == b"first\n", "a part of a record is left"
        assert len(messages) == 1 and "cannot be written: File too large" in messages[0]
    file.append(b"second\n")
    assert file.path.read_bytes() == b"first\nsecond\n"
    assert len(messages) == 2 and messages[1].endswith("is written again; 3 records could not be written")
    with limit_file_size(10):
        file.append(b"third\n")
        file.close()
    assert messages[-1].endswith("is closed; 1 record could not be written") and len(messages) == 4


def test_a_deleted_file_is_written_anew_with_all_that_it_held(tmp_path: Path) -> None:
    messages: list[str] = []
    file = AppendFile(tmp_path / "run" / "logs" / "lines", messages.append)
    file.append(b"first\n")
    shutil.rmtree(tmp_path / "run")
    with limit_file_size(3):
        file.append(b"lost\n")
        assert not file.path.exists()
    file.append(b"second\n")
    assert file.path.read_bytes() == b"first\nsecond\n"
    assert "was deleted while it was in use, and is written anew" in messages[1]
    (tmp_path / "edited").write_bytes(b"mine\n")
    (tmp_path / "edited").rename(file.path)
    file.append(b"third\n")
    file.close()
    assert file.path.read_bytes() == b"mine\nthird\n", "a file that replaced it is appended to"
    file.append(b"fourth\n")
    file.path.unlink()
    file.close()
    assert file.path.read_bytes() == b"mine\nthird\nfourth\n", "also if no record comes after the deletion"
