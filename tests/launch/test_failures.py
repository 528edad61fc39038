"""Errors of storage, memory and workers end a program with one line that names the place and the cure."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdxl_trainer.data.checks.folders import check_writable
from sdxl_trainer.launch.failures import CURES, explain_failure
from sdxl_trainer.launch.program import run_program

SHARED = "unable to allocate shared memory(shm) for file </torch_1_2_3>: Resource temporarily unavailable (11)"


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/runs/x"),
            ("/runs/x: No space left on device", "free some"),
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/a.txt"),
            ("/data/a.txt: Permission denied", "right"),
        ),
        (FileExistsError(errno.EEXIST, "File exists", "/run/models"), ("/run/models: File exists", "rename it")),
        (OSError(errno.EROFS, "Read-only file system", "/cache"), ("/cache: Read-only", "mount the disk")),
        (OSError(errno.EMFILE, "Too many open files"), ("Too many open files", "ulimit -n")),
        (MemoryError(), ("too little memory", "data.num_workers")),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
            ("memory",),
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), ("the GPU", "train.micro_batch_size")),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), ("pid 7", "dmesg")),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), ("pid(s) 7", "dmesg")),
        (
            RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\nTrace\n{SHARED}"),
            ("/dev/shm", "--shm-size"),
        ),
        (
            RuntimeError("unable to write to file </torch_9_8>: No space left on device (28)"),
            ("/dev/shm", "--ipc=host"),
        ),
    ],
)
def test_a_failure_from_outside_is_one_line_with_the_cure(error: Exception, parts: tuple[str, ...]) -> None:
    line = explain_failure(error)
    assert line is not None and "\n" not in line and line.endswith("run the same command again")
    assert [part for part in parts if part not in line] == []


def test_faults_of_the_program_keep_their_traceback() -> None:
    faults = [RuntimeError("shape mismatch"), FileNotFoundError(errno.ENOENT, "No such file", "x"), OSError("odd")]
    assert [explain_failure(error) for error in faults] == [None] * 3
    assert all(os.strerror(number) for number in CURES)

    def work() -> None:
        raise faults[0]

    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_program(work)


@pytest.mark.parametrize("is_ascii", [False, True])
def test_a_program_prints_the_line_in_any_locale_and_ends_with_1(tmp_path: Path, is_ascii: bool) -> None:
    code = (
        "import sys; from sdxl_trainer.launch.program import run_program\n"
        "def work(): print('\\u56f3'); open(sys.argv[1] + '/\\u56fe\\n.txt', 'w')\n"
        "sys.exit(run_program(work))"
    )
    (tmp_path / "file").touch()
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"} if is_ascii else {}
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", **locale}
    done = subprocess.run(command, capture_output=True, encoding="latin-1", env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stdout == "\\u56f3\n"
    if is_ascii:
        assert done.stderr.startswith("the locale's file names are ascii, those of data are UTF-8: export PYTHONUTF8=1")
        assert "'ascii' codec can't encode" in done.stderr and done.stderr.count("PYTHONUTF8=1") == 2
    else:
        assert done.stderr.startswith(
            f"\n{tmp_path}/file/\\u56fe\\n.txt: Not a directory; a part of the path is a file"
        )


def test_folders_that_cannot_be_written_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(folder: Path) -> str:
        return "; ".join(problem.rule for problem in check_writable("run.dir", folder))

    (tmp_path / "file").touch()
    assert find(tmp_path) == find(tmp_path / "new" / "deeper") == ""
    assert find(tmp_path / "file" / "run") == f"cannot be a folder: {tmp_path / 'file'} is a file"
    assert not any("remove" in cure for cure in CURES.values()), "the file may be the user's image"
    assert [problem.cure for problem in check_writable("run.dir", tmp_path / "file")] == ["choose another folder"]
    disk = os.statvfs(tmp_path)
    fields = {name: getattr(disk, name) for name in dir(disk) if name.startswith("f_")}
    states = {
        "no free space": {"f_bavail": 0},
        "inodes": {"f_files": 9, "f_ffree": 0},
        "read-only": {"f_flag": os.ST_RDONLY},
    }
    for rule, state in states.items():
        monkeypatch.setattr(os, "statvfs", lambda _, state=state: type("Disk", (), {**fields, **state}))
        assert rule in find(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert find(tmp_path / "new") == f"cannot be written: this user may not write to {tmp_path}"
