"""Stop signals: a process records the first one, ignores its echo, and ends at once on a later one."""

import signal
import subprocess
import sys
import time

import pytest
from console_screen import run_in_terminal

from sdxl_trainer.launch.signals import STOP_SIGNALS, list_stop_signals

CODE = """
import os, sys, time
from sdxl_trainer.launch import signals

signals.signal.signal(signals.signal.SIGHUP, signals.signal.SIG_DFL)  # should pytest run under nohup
signals.REPEAT_SECONDS = 0.3
saves = []
request, number = signals.StopRequest(on_save=lambda: saves.append(1)), int(sys.argv[1])
os.kill(os.getpid(), signals.signal.SIGUSR1)
request.raise_if_received()
os.kill(os.getpid(), number)
os.kill(os.getpid(), number)  # as from the terminal, and from torchrun too
print(request.signal_number, saves, flush=True)
time.sleep(0.5)
os.kill(os.getpid(), signals.signal.SIGTERM)
print("still there", flush=True)
"""

HANGUP = """
import sys, time
from sdxl_trainer.launch.signals import StopRequest

request, end = StopRequest(), time.monotonic() + float(sys.argv[1])
print("ready", flush=True)
while request.signal_number is None and time.monotonic() < end:
    time.sleep(0.01)
if request.signal_number:
    sys.stderr.write("said to a terminal that is gone")
sys.exit(128 + (request.signal_number or 0))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_wish_to_stop_ends_the_process_at_once(number: int) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(int(number))], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + number, f"{int(number)} [1]\n"), done.stderr


BLOCKED = """
import ctypes, signal
from sdxl_trainer.launch import signals

signals.REPEAT_SECONDS = 0.2
request = signals.StopRequest("the step", lambda text: print(text, flush=True))
# The main thread stays in C code, as in a collective: other threads receive the signal, and no Python handler runs.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print("ready", flush=True)
ctypes.CDLL(None).poll(None, 0, 60_000)
"""


def test_a_main_thread_that_is_blocked_neither_delays_the_message_nor_the_end() -> None:
    with subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        said = "SIGINT: the step is being finished and saved; a second Ctrl-C ends the job at once\n"
        assert process.stdout.readline() == said
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130 and process.stdout.read() == ""


def test_a_closed_terminal_asks_to_stop_and_what_is_said_then_is_no_error() -> None:
    assert run_in_terminal("-c", HANGUP, 60, then=("ready\r\n", 0), nohup=False)[0] == 128 + signal.SIGHUP


def test_under_nohup_a_closed_terminal_changes_nothing_unless_torchrun_says_so(monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert run_in_terminal("-c", HANGUP, 0.5, then=("ready\r\n", 0))[0] == 128
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert list_stop_signals() == [signal.SIGINT, signal.SIGTERM]
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        assert list_stop_signals() == list(STOP_SIGNALS)
    finally:
        signal.signal(signal.SIGHUP, before)
