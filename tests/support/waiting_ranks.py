"""Ranks that wait for one of them, run by tests/launch/test_waiting.py: `waiting_ranks.py CASE`.

slow: rank 1 works longer than the time-out, piece by piece; then rank 2 stops in the middle of its work.
frozen: rank 0, which keeps the store, is stopped.
signal: rank 1 gets SIGTERM while it waits for rank 0, which does not stop.
"""

import os
import signal
import subprocess
import sys
import time

from sdxl_trainer.launch import waiting
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import gather_objects, init_ranks, publish, read_published, wait_for_ranks
from sdxl_trainer.launch.logger import init_logger
from sdxl_trainer.launch.program import end_program, run_program
from sdxl_trainer.launch.signals import StopRequest

TIMEOUT_SECONDS = 1.5
waiting.LAST_POLL_SECONDS = 0.05
waiting.REPORT_SECONDS = 0.5
waiting.STOP_PATIENCE_SECONDS = 0.5


def work_slowly(seconds: float) -> None:
    started = time.monotonic()
    while time.monotonic() < started + seconds:
        time.sleep(0.05)
        ACTIVITY.note()


def work() -> None:
    case = sys.argv[1]
    stop = StopRequest() if case == "signal" and os.environ["RANK"] == "1" else None
    ranks = init_ranks(TIMEOUT_SECONDS / 60, stop.raise_if_received if stop else lambda: None)
    init_logger(ranks.rank)
    ACTIVITY.enter("encoding images")
    if case == "slow":
        if ranks.rank == 1:
            work_slowly(3 * TIMEOUT_SECONDS)
        print(gather_objects(ranks.rank), flush=True)  # rank 2 is killed
        if ranks.rank == 2:
            time.sleep(600)
    elif case == "frozen":
        gather_objects("met")
        if ranks.rank == 0:
            subprocess.Popen(["sh", "-c", f"sleep 4; kill -KILL {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
    elif ranks.rank == 0:
        while not (pid := read_published("pid")):
            work_slowly(0.2)
        work_slowly(0.5)
        os.kill(int(pid), signal.SIGTERM)
        time.sleep(600)
    else:
        publish("pid", str(os.getpid()))
    wait_for_ranks("the planted work")


status = run_program(work)
sys.stdout.write(f"status {status} of rank {os.environ['RANK']}\n")
sys.stdout.flush()
time.sleep(2)  # the launcher sends SIGTERM to the others once one has ended
end_program(status)
