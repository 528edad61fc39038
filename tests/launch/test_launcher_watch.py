"""Ranks do not outlive their launcher: it is watched up to the launch script, and only if there is one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sdxl_trainer.launch.launcher_watch import LAUNCHER_VARIABLES, SCRIPT_VARIABLE, list_launchers

# A rank: prints its parent and the processes that it watches, and ends by SIGTERM or after a minute.
RANK = """
import os, sys, time
from sdxl_trainer.launch import launcher_watch

if "old-kernel" in sys.argv:
    os.pidfd_open, launcher_watch.POLL_SECONDS = lambda process: os.open("", 0), 0.05
launchers = launcher_watch.list_launchers()
launcher_watch.stop_with_launcher()
print(os.getpid(), os.getppid(), *launchers, flush=True)
time.sleep(60)
print("was not stopped")
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
SCRIPT = 'export SDXL_TRAINER_SCRIPT="$$"; "$@"; exit 0'


@contextmanager
def start(script: bool, *words: str, **environment: str) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """Start a rank below a launcher, and that below a script if asked for; yield the topmost, and the rank's words."""
    known = {name: value for name, value in os.environ.items() if name not in (*LAUNCHER_VARIABLES, SCRIPT_VARIABLE)}
    command = [sys.executable, "-c", LAUNCHER, "-c", RANK, *words]
    command = ["bash", "-c", SCRIPT, "script", *command] if script else command
    with subprocess.Popen(command, env={**known, **environment}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, [int(word) for word in process.stdout.readline().split()]
            assert process.stdout.read() == ""  # the rank has ended too: it held the pipe
        finally:
            process.kill()


@pytest.mark.parametrize("killed", ["script", "launcher"])
def test_a_rank_stops_when_its_script_or_its_launcher_is_killed(killed: str) -> None:
    with start(True) as (script, (_, launcher, *watched)):
        assert watched == [launcher, script.pid]
        os.kill(script.pid if killed == "script" else launcher, signal.SIGKILL)


@pytest.mark.parametrize("words", [(), ("old-kernel",)])
def test_a_rank_stops_with_a_torchrun_that_was_started_by_hand(words: tuple[str, ...]) -> None:
    with start(False, *words, TORCHELASTIC_RUN_ID="x") as (launcher, (_, parent, *watched)):
        assert watched == [parent] == [launcher.pid]
        launcher.kill()


def test_a_process_without_a_launcher_outlives_its_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup, or as process 1 of a container."""
    with start(False) as (shell, (process, _, *watched)):
        assert watched == []
        shell.kill()
        shell.wait()
        assert os.path.exists(f"/proc/{process}")
        os.kill(process, signal.SIGKILL)
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(SCRIPT_VARIABLE, "999999999")  # inherited from a script that is none of its parents
    assert list_launchers() == []
    monkeypatch.setenv("CROSS_SIZE", "1")  # DeepSpeed's launcher, on a node where no script runs
    assert list_launchers() == [os.getppid()]
