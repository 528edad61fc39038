"""Ranks wait for a late rank 0 without a limit, and for a rank that hangs only until the time-out."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_port import find_rank_port

from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.launch import distributed

# Rank 0 joins later than the time-out. Then rank 1 waits in collectives that rank 0 does not call: in the first group,
# and in a group that is made as DeepSpeed makes its own.
LATE_AND_STUCK = """
import sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.launch.distributed import gather_objects, init_ranks, read_environment, share_problems
from sdxl_trainer.launch.program import end_program

rank = read_environment().rank
print("here", flush=True) if rank else sys.stdin.readline()
ranks = init_ranks(timeout_minutes=4 / 60, collective_margin=timedelta(0))
own = dist.new_group(ranks=range(2))
print(gather_objects(rank), dist.distributed_c10d._get_default_store().timeout.total_seconds(), flush=True)
try:
    with share_problems():
        if rank == 0:
            raise UserInputError([Problem("cache.dir", Path("/x"), "is full")])
except UserInputError as error:
    print(error.problems, flush=True)
if rank == 0:
    sys.stdin.read()  # until rank 1 has ended
for group in (None, own) if rank else ():
    try:
        dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError:
        print("gave up", flush=True)
end_program(0)
"""


# The store that torchrun's agent serves for its ranks.
AGENT = """
import os, sys
import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)
sys.stdin.read()
"""


# Rank 0 fails in its checks; rank 1 waits for it already, or calls `init_ranks` later.
MISTAKEN = """
import sys, time
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.launch.distributed import init_ranks, read_environment
from sdxl_trainer.launch.program import end_program, run_program

def work():
    if read_environment().rank == 0:
        raise UserInputError([Problem("run.name", 1, "is wrong", "mend it")])
    time.sleep(float(sys.argv[1]))
    init_ranks()

end_program(run_program(work))
"""


def start_ranks(code: str, launcher_keeps_store: bool, *words: str, ranks: int = 2) -> list[subprocess.Popen]:
    """Start the first `ranks` of two ranks that run `code`, and the launcher's store if it keeps one."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_rank_port()), "WORLD_SIZE": "2"}
    if launcher_keeps_store:
        place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, *words],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, program in enumerate([code] * ranks + [AGENT] * launcher_keeps_store)
    ]


@pytest.mark.parametrize("launcher_keeps_store", [False, True])
def test_a_late_rank_0_is_waited_for_and_a_stuck_rank_is_not(launcher_keeps_store: bool) -> None:
    processes = start_ranks(LATE_AND_STUCK, launcher_keeps_store)
    try:
        assert processes[1].stdout.readline() == "here\n"
        time.sleep(5)  # longer than the time-out
        processes[0].stdin.write("\n")
        processes[0].stdin.flush()
        shared = ["[0, 1] 4.0", str([Problem("cache.dir", Path("/x"), "is full")])]
        assert processes[1].communicate(timeout=100)[0].splitlines() == [*shared, "gave up", "gave up"]
        assert processes[0].communicate(timeout=100)[0].splitlines() == shared
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes[:2]] == [0, 0]


@pytest.mark.parametrize(("launcher_keeps_store", "late_seconds"), [(False, 2), (True, 0)])
def test_nobody_waits_for_a_rank_0_that_has_failed(launcher_keeps_store: bool, late_seconds: float) -> None:
    processes = start_ranks(MISTAKEN, launcher_keeps_store, str(late_seconds))
    try:
        assert [process.wait(timeout=60) for process in processes[:2]] == [2, 2]
    finally:
        for process in processes:
            process.kill()


# Rank 0 of two; rank 1 never starts.
ALONE_OF_TWO = """
import sys
from sdxl_trainer.launch import distributed, waiting
from sdxl_trainer.launch.logger import init_logger
from sdxl_trainer.launch.program import end_program, run_program

waiting.REPORT_SECONDS = 0.2
init_logger(0)
end_program(run_program(lambda: distributed.init_ranks(float(sys.argv[1]) / 60)))
"""


@pytest.mark.parametrize("launcher_keeps_store", [False, pytest.param(True, marks=pytest.mark.long)])
def test_rank_0_names_the_ranks_it_waits_for_and_gives_up(launcher_keeps_store: bool) -> None:
    process, *others = start_ranks(ALONE_OF_TWO, launcher_keeps_store, "1", ranks=1)
    try:
        printed = process.communicate(timeout=60)[1]
    finally:
        for other in others:
            other.kill()
    assert process.returncode == 1 and "waiting for 1 of 2 ranks: 1" in printed
    assert "ranks 1 of 2 did not connect to rank 0 at 127.0.0.1:" in printed
    assert "WORLD_SIZE=2 is set: if it is left over and you want one process, unset RANK WORLD_SIZE" in printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_rank_0_heeds_signals_while_it_waits(number: signal.Signals) -> None:
    [process] = start_ranks(ALONE_OF_TWO, False, "600", ranks=1)
    try:
        assert "waiting for 1 of 2 ranks" in process.stderr.readline()
        process.send_signal(number)
        assert process.wait(timeout=20) == 128 + number
    finally:
        process.kill()


def test_a_left_over_world_size_without_an_address_is_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test of this process may have joined a group.
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserInputError, match="unset RANK WORLD_SIZE"):
        distributed.init_ranks()


def test_more_ranks_than_devices_are_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": 6, "LOCAL_RANK": 2, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    with pytest.raises(UserInputError) as refused:
        distributed.init_ranks()
    text = str(refused.value)
    assert "NPROC = 4" in text and "2 GPUs (CUDA_VISIBLE_DEVICES=0,3)" in text and "NPROC=2" in text
