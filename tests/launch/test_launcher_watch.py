"""Ranks do not outlive their launcher: it is watched up to the launch script, and only if there is one."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from programs import ROOT

from sdxl_trainer.launch.launcher_watch import (
    LAUNCHER_VARIABLES,
    SCRIPT_VARIABLE,
    list_launchers,
    read_process_space,
)

# A rank: prints itself and its parent, then the processes that it watches, and ends by SIGTERM or after a minute.
RANK = """
import os, sys, time
from sdxl_trainer.launch import launcher_watch

parent = os.getppid()
print(os.getpid(), parent, flush=True)
while "late" in sys.argv and os.getppid() == parent:  # looks when its launcher has ended already
    time.sleep(0.01)
if "old-kernel" in sys.argv:
    os.pidfd_open, launcher_watch.POLL_SECONDS = lambda process: os.open("", 0), 0.05
print(*launcher_watch.list_launchers(), flush=True)
launcher_watch.stop_with_launcher()
time.sleep(60)
print("was not stopped")
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
SCRIPT = ["bash", "-c", f'source "{ROOT}/launch/child.sh"; "$@"; exit 0', "script"]
# Adopts the orphans below it, as systemd does for the processes of a user.
ADOPTER = "import ctypes, os, sys; ctypes.CDLL(None).prctl(36, 1); os.execv(sys.argv[1], sys.argv[1:])"


@contextmanager
def start(*words: str, above: list[str], **environment: str) -> Iterator[tuple[subprocess.Popen, int, int]]:
    """Start a rank below a launcher, and that below the command `above`; yield the topmost, the rank and its parent."""
    known = {name: value for name, value in os.environ.items() if name not in (*LAUNCHER_VARIABLES, SCRIPT_VARIABLE)}
    command = [*above, sys.executable, "-c", LAUNCHER, "-c", RANK, *words]
    with subprocess.Popen(command, env={**known, **environment}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            rank, parent = read_numbers(process)
            yield process, rank, parent
            assert process.stdout.read() == ""  # the rank has ended too: it held the pipe
        finally:
            process.kill()


def read_numbers(process: subprocess.Popen) -> list[int]:
    """Read the next line of a rank."""
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]


@pytest.mark.parametrize("words", [(), ("old-kernel",)])
@pytest.mark.parametrize("killed", ["script", "launcher"])
def test_a_rank_stops_when_its_script_or_its_launcher_is_killed(killed: str, words: tuple[str, ...]) -> None:
    with start(*words, above=SCRIPT) as (script, _, launcher):
        assert read_numbers(script) == [launcher, script.pid]
        os.kill(script.pid if killed == "script" else launcher, signal.SIGKILL)


@pytest.mark.parametrize("words", [(), ("old-kernel",)])
def test_a_rank_stops_at_once_if_its_script_was_killed_before_it_looked(words: tuple[str, ...]) -> None:
    with start("late", *words, above=SCRIPT, TORCHELASTIC_RUN_ID="x") as (script, _, launcher):
        script.kill()
        script.wait()
        os.kill(launcher, signal.SIGKILL)
        assert read_numbers(script) == [script.pid]


def test_a_rank_stops_with_a_torchrun_that_was_started_by_hand() -> None:
    with start(above=[], TORCHELASTIC_RUN_ID="x") as (launcher, _, parent):
        assert read_numbers(launcher) == [parent] == [launcher.pid]
        launcher.kill()


def test_a_rank_stops_at_once_if_a_torchrun_by_hand_was_killed_before_it_looked(tmp_path: Path) -> None:
    shutil.copy(shutil.which("bash") or "", tmp_path / "systemd")
    program = ["-c", '"$@" & exec >&-; wait; kill -STOP $$', "systemd"]
    above = [sys.executable, "-c", ADOPTER, str(tmp_path / "systemd"), *program]
    with start("late", above=above, TORCHELASTIC_RUN_ID="x") as (adopter, _, launcher):
        assert launcher != adopter.pid
        os.kill(launcher, signal.SIGKILL)
        assert read_numbers(adopter) == [0]


def test_a_process_without_a_launcher_outlives_its_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup, or as process 1 of a container."""
    with start(above=[]) as (shell, process, _):
        assert read_numbers(shell) == []
        shell.kill()
        shell.wait()
        assert os.path.exists(f"/proc/{process}")
        os.kill(process, signal.SIGKILL)
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for space in ("pid:[1] another-machine", read_process_space() + "x", ""):  # the number means nothing there
        monkeypatch.setenv(SCRIPT_VARIABLE, f"999999999 {space}".strip())
        assert list_launchers() == []
    monkeypatch.setenv("CROSS_SIZE", "1")  # DeepSpeed's launcher, on a node where no script runs
    assert list_launchers() == [os.getppid()]
