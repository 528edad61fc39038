"""The lock of a run folder or cache: held by one job, named, free again when the job has ended, also by a kill."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_trainer.configs.problems import FailedError, UserInputError
from sdxl_trainer.launch import folder_lock
from sdxl_trainer.launch.folder_lock import lock_folder, renew_locks

HOLDER = """
import sys
from pathlib import Path
from sdxl_trainer.launch.folder_lock import lock_folder
with lock_folder(Path(sys.argv[1]), "run.name", "x"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def lock(folder: Path):
    return lock_folder(folder, "run.name", "set another run.name")


def test_a_second_job_is_refused_and_told_who_holds_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "locked\n"
        with pytest.raises(UserInputError) as error, lock(folder):
            pass
        named = rf"run.name = '{folder}'\n.*\(host {socket.gethostname()}, process {holder.pid}, started 20\d\d-"
        assert re.search(named, str(error.value)) and "set another run.name" in str(error.value)
        holder.send_signal(signal.SIGKILL)
    with lock(folder):
        assert f"process {os.getpid()}" in (folder / ".lock").read_text()
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_a_start_that_writes_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock(tmp_path / "a"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_its_holder_has_just_deleted_is_no_lock(tmp_path: Path, monkeypatch) -> None:
    """The holder ends between the other job's opening of the file and its lock."""
    flock, calls = folder_lock.fcntl.flock, []

    def delete_first(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(folder_lock.fcntl, "flock", delete_first)
    with lock(tmp_path), pytest.raises(UserInputError, match="is being written by another job"), lock(tmp_path):
        pass
    assert len(calls) == 3


def test_a_lock_outlives_the_deletion_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with lock(folder):
        shutil.rmtree(folder)
        renew_locks()
        with pytest.raises(UserInputError, match=f"process {os.getpid()}"), lock(folder):
            pass
        shutil.rmtree(folder)
        command = [sys.executable, "-c", HOLDER, str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout and other.stdout.readline() == "locked\n"
            with pytest.raises(FailedError, match=rf"another job writes it now \(.*process {other.pid}"):
                renew_locks()
            other.send_signal(signal.SIGKILL)


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserInputError, match="cannot be written: Not a directory"), lock(tmp_path / "file" / "run"):
        pass
