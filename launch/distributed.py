"""The only module that asks for a rank: process group, device, and the collectives the rest of the project needs.

Every collective does nothing in a single process, so callers never ask whether they are distributed.
"""

import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sdxl_trainer.launch.status import RankZeroError

# How long a rank looks for rank 0's store where no launcher keeps one: rank 0 opens it after the checks.
CHECKS_TIMEOUT = timedelta(days=1)
CHECKED = "rank 0 has checked settings and data"
FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.01, 1.0
EXCUSE_SECONDS = 20.0  # how long a rank 0 that failed looks for others to tell
HEARD = "ranks that know that rank 0 has failed"

_joined = False  # this process was in the process group, be it over by now


@dataclass(frozen=True)
class Ranks:
    """Who this process is: global rank, rank on its node, number of processes, and its device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0, the one that talks to people and writes shared files."""
        return self.rank == 0


def read_environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) from the launcher's environment; (0, 0, 1) without one.

    torchrun and the deepspeed launcher both set RANK, LOCAL_RANK and WORLD_SIZE.
    """
    return (int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def init_ranks(timeout_minutes: float = 60.0) -> Ranks:
    """Join the process group (NCCL with GPUs, gloo without) and pick this rank's device.

    A single process forms a group of its own, because DeepSpeed wants one.

    Args:
        timeout_minutes: how long a rank waits in a collective for others that live and do not come. For rank 0 to come
            here the others wait as long as it takes.

    Raises:
        RankZeroError: rank 0 failed before it came here.
    """
    global _joined  # noqa: PLW0603 (a process joins once)
    timeout = timedelta(minutes=timeout_minutes)
    rank, local_rank, world_size = read_environment()
    alone = world_size == 1 and "MASTER_PORT" not in os.environ
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size))  # DeepSpeed reads them
    use_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # DeepSpeed makes groups of its own, and leaves their time-out to torch, which has 10 minutes for NCCL.
        dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if use_gpu else "gloo",
            store=_open_own_store(timeout) if alone else _open_store(rank, timeout),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if use_gpu else None,
        )
    _joined = True
    return Ranks(rank, local_rank, world_size, device)


def excuse_rank_zero(status: int) -> None:
    """Tell the ranks that wait in `init_ranks` that rank 0 will not come, and with which exit status it ends.

    Launchers see to that on one machine, but DeepSpeed's leaves the ranks of other machines waiting. Does nothing on
    other ranks, or once this one has joined them. Who cannot be reached in some seconds is not told.
    """
    rank, _, world_size = read_environment()
    if rank or world_size == 1 or _joined:
        return
    try:
        shared, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=EXCUSE_SECONDS))))
        store = _name_start(shared)
        store.set(CHECKED, str(status))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # the store ends with this process
            deadline = time.monotonic() + EXCUSE_SECONDS
            while store.add(HEARD, 0) < world_size - 1 and time.monotonic() < deadline:
                time.sleep(LAST_POLL_SECONDS / 10)
    except (RuntimeError, ValueError):  # of the store: others are not there, or nobody said where to meet
        return


def _name_start(store: dist.Store) -> dist.PrefixStore:
    """The part of a store that belongs to this start of the job."""
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _open_own_store(timeout: timedelta) -> dist.Store:
    """The store of a process that no launcher has started. It takes its port itself: one found free may be gone."""
    return dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True, timeout=timeout)


def _open_store(rank: int, timeout: timedelta) -> dist.Store:
    """Where the ranks find each other's addresses, once rank 0 has come.

    torchrun's own outlives a restart with what the dead ranks wrote into it, and the new ones would try to reach those:
    `--max-restarts` never worked with `--standalone` (torch 2.13). So each start looks under names of its own.
    """
    patience = timeout if rank == 0 else CHECKS_TIMEOUT
    shared, _, _ = next(iter(dist.rendezvous("env://", timeout=patience)))
    store = _name_start(shared)
    if rank == 0:
        store.set(CHECKED, "")
    pause_seconds = FIRST_POLL_SECONDS
    while not store.check([CHECKED]):  # not `wait`, in which no signal would be heard
        time.sleep(pause_seconds)
        pause_seconds = min(1.5 * pause_seconds, LAST_POLL_SECONDS)
    if failed := store.get(CHECKED):
        store.add(HEARD, 1)
        raise RankZeroError(int(failed))
    store.set_timeout(timeout)
    return store


def close_ranks() -> None:
    """Leave the process group, if there is one. Another may be joined afterwards."""
    if dist.is_initialized():
        # Where DeepSpeed is in use it has groups of its own, and must know that they are gone.
        comm = sys.modules.get("deepspeed.comm")
        (comm if comm is not None and comm.is_initialized() else dist).destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if _is_distributed():
        dist.barrier()


def reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values` over all ranks, on every rank. Works in place."""
    if _is_distributed():
        dist.all_reduce(values)
    return values


def broadcast_tensor(values: torch.Tensor, source_rank: int) -> torch.Tensor:
    """One rank's `values` on every rank. Works in place."""
    if _is_distributed():
        dist.broadcast(values, source_rank)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` on every rank (pickled; for small things)."""
    if not _is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in order of rank, on every rank (pickled; for small things)."""
    if not _is_distributed():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def _is_distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def publish(key: str, value: str) -> None:
    """Put a value where other ranks can read it at any time, without meeting them. Nothing without a process group."""
    if dist.is_initialized():
        dist.distributed_c10d._get_default_store().set(key, value)


def read_published(key: str) -> str | None:
    """What some rank published under `key`, or None if nothing yet. Never waits."""
    if not dist.is_initialized():
        return None
    store = dist.distributed_c10d._get_default_store()
    return store.get(key).decode() if store.check([key]) else None
