"""Ranks wait for a late rank 0 without a limit, and for a rank that hangs only until the time-out."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from forked_ranks import call_each, start_forked
from rank_port import find_rank_port

from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.launch import distributed

# Rank 0 joins later than the time-out. Then rank 1 waits in collectives that rank 0 does not call: in the first group,
# and in a group that is made as DeepSpeed makes its own.
LATE_AND_STUCK = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.launch.distributed import gather_objects, init_ranks, read_environment, share_problems
from sdxl_trainer.launch.program import end_program

rank, folder = read_environment().rank, Path(sys.argv[1])
said = open(folder / f"said-{rank}", "w", buffering=1)

def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.01)

print("here", file=said) if rank else wait_for("go")
ranks = init_ranks(timeout_minutes=4 / 60, collective_margin=timedelta(0))
own = dist.new_group(ranks=range(2))
print(gather_objects(rank), dist.distributed_c10d._get_default_store().timeout.total_seconds(), file=said)
try:
    with share_problems():
        if rank == 0:
            raise UserInputError([Problem("cache.dir", Path("/x"), "is full")])
except UserInputError as error:
    print(error.problems, file=said)
if rank == 0:
    wait_for("end")
for group in (None, own) if rank else ():
    try:
        dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError:
        print("gave up", file=said)
end_program(0)
"""


# The store that torchrun's agent serves for its ranks.
AGENT = """
import os, time
import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)
time.sleep(600)
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


@contextmanager
def start_ranks(
    folder: Path, code: str, launcher_keeps_store: bool, *words: object, ranks: int = 2
) -> Iterator[list[BaseProcess]]:
    """Start the first `ranks` of two ranks that run `code`, and the launcher's store if it keeps one.

    What they print is in `printed-RANK` of the folder. They are killed in the end.
    """
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_rank_port()), "WORLD_SIZE": "2"}
    if launcher_keeps_store:
        place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    processes = []
    for rank, program in enumerate([code] * ranks + [AGENT] * launcher_keeps_store):
        (folder / f"program-{rank}.py").write_text(program)
        (folder / f"printed-{rank}").touch()
        environment = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes += start_forked(folder / f"program-{rank}.py", words, environment, folder / f"printed-{rank}")
    try:
        yield processes
    finally:
        call_each(processes, "kill")


def wait_for_text(file: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() or text not in file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("launcher_keeps_store", [False, True])
def test_a_late_rank_0_is_waited_for_and_a_stuck_rank_is_not(tmp_path: Path, launcher_keeps_store: bool) -> None:
    with start_ranks(tmp_path, LATE_AND_STUCK, launcher_keeps_store, tmp_path) as processes:
        wait_for_text(tmp_path / "said-1", "here\n")
        time.sleep(5)  # longer than the time-out
        (tmp_path / "go").touch()
        processes[1].join(100)
        (tmp_path / "end").touch()
        processes[0].join(100)
        assert [process.exitcode for process in processes[:2]] == [0, 0]
    shared = ["[0, 1] 4.0", str([Problem("cache.dir", Path("/x"), "is full")])]
    said = [(tmp_path / f"said-{rank}").read_text().splitlines() for rank in range(2)]
    assert said == [shared, ["here", *shared, "gave up", "gave up"]]


@pytest.mark.parametrize(("launcher_keeps_store", "late_seconds"), [(False, 2), (True, 0)])
def test_nobody_waits_for_a_rank_0_that_has_failed(
    tmp_path: Path, launcher_keeps_store: bool, late_seconds: float
) -> None:
    with start_ranks(tmp_path, MISTAKEN, launcher_keeps_store, late_seconds) as processes:
        for process in processes[:2]:
            process.join(60)
        assert [process.exitcode for process in processes[:2]] == [2, 2]


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
def test_rank_0_names_the_ranks_it_waits_for_and_gives_up(tmp_path: Path, launcher_keeps_store: bool) -> None:
    with start_ranks(tmp_path, ALONE_OF_TWO, launcher_keeps_store, 1, ranks=1) as processes:
        processes[0].join(60)
        assert processes[0].exitcode == 1
    printed = (tmp_path / "printed-0").read_text()
    assert "waiting for 1 of 2 ranks: 1" in printed
    assert "ranks 1 of 2 did not connect to rank 0 at 127.0.0.1:" in printed
    assert "WORLD_SIZE=2 is set: if it is left over and you want one process, unset RANK WORLD_SIZE" in printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_rank_0_heeds_signals_while_it_waits(tmp_path: Path, number: signal.Signals) -> None:
    with start_ranks(tmp_path, ALONE_OF_TWO, False, 600, ranks=1) as [process]:
        wait_for_text(tmp_path / "printed-0", "waiting for 1 of 2 ranks")
        os.kill(process.pid or 0, number)
        process.join(20)
        assert process.exitcode == 128 + number


def test_a_left_over_world_size_without_an_address_is_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test of this process may have joined a group.
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserInputError, match="unset RANK WORLD_SIZE"):
        distributed.init_ranks()


@pytest.mark.parametrize(
    ("world_size", "release", "binds"),
    [
        (1, "2.13.0+cu130", False),
        (2, "2.13.0+cu130", True),
        (2, "2.6.0+cu124", True),
        (2, "2.7.0+cu126", False),
        (2, "2.7.1+cu126", True),
    ],
)
def test_a_device_is_bound_by_deepspeeds_rule(world_size: int, release: str, binds: bool) -> None:
    assert distributed.binds_device(world_size, release) == binds


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
