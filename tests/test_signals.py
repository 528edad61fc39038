"""What stop signals do to a process: the first one is noted, its echo too, and a later one ends it at once."""

import signal
import subprocess
import sys

import pytest

CODE = """
import os, sys, time
from sdxl_trainer.launch import signals

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_wish_to_stop_ends_the_process_at_once(number: int) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(int(number))], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + number, f"{int(number)} [1]\n"), done.stderr
