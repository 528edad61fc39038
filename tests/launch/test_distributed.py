"""Ranks wait for a late rank 0 without a limit, and for a rank that hangs only until the time-out."""

import os
import subprocess
import sys
import time

import pytest
from rank_port import find_rank_port

# Rank 0 comes later than the time-out. Then rank 1 waits in collectives to which it does not come: of the first group,
# and of one that is made as DeepSpeed makes its own.
LATE_AND_STUCK = """
import sys
import torch
import torch.distributed as dist
from sdxl_trainer.launch.distributed import gather_objects, init_ranks, read_environment
from sdxl_trainer.launch.program import end_program

rank, _, _ = read_environment()
print("here", flush=True) if rank else sys.stdin.readline()
ranks = init_ranks(timeout_minutes=4 / 60)
own = dist.new_group(ranks=range(2))
print(gather_objects(rank), dist.distributed_c10d._get_default_store().timeout.total_seconds(), flush=True)
if rank == 0:
    sys.stdin.read()  # until rank 1 has ended
for group in (None, own) if rank else ():
    try:
        dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError:
        print("gave up", flush=True)
end_program(0)
"""


# What torchrun's agent does for its ranks.
AGENT = """
import os, sys
import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)
sys.stdin.read()
"""


# Rank 0 finds something wrong before it meets the others; rank 1 has come already, or comes later.
MISTAKEN = """
import sys, time
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.launch.distributed import init_ranks, read_environment
from sdxl_trainer.launch.program import end_program, run_program

def work():
    if read_environment()[0] == 0:
        raise UserInputError([Problem("run.name", 1, "is wrong", "mend it")])
    time.sleep(float(sys.argv[1]))
    init_ranks()

end_program(run_program(work))
"""


def start_ranks(code: str, launcher_keeps_store: bool, *words: str) -> list[subprocess.Popen]:
    """Two ranks that run `code`, and where it is the launcher's, what keeps their store."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_rank_port()), "WORLD_SIZE": "2"}
    if launcher_keeps_store:
        place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, *words],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, program in enumerate([code, code] + [AGENT] * launcher_keeps_store)
    ]


@pytest.mark.parametrize("launcher_keeps_store", [False, True])
def test_a_late_rank_0_is_waited_for_and_a_stuck_rank_is_not(launcher_keeps_store: bool) -> None:
    processes = start_ranks(LATE_AND_STUCK, launcher_keeps_store)
    try:
        assert processes[1].stdout.readline() == "here\n"
        time.sleep(5)  # longer than the time-out
        processes[0].stdin.write("\n")
        processes[0].stdin.flush()
        assert processes[1].communicate(timeout=100)[0].splitlines() == ["[0, 1] 4.0", "gave up", "gave up"]
        assert processes[0].communicate(timeout=100)[0].splitlines() == ["[0, 1] 4.0"]
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
