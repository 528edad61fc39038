"""Process group, device, and collectives. The only module that asks for a rank.

Every collective returns at once in a single process, so callers never ask whether they are distributed.
"""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sdxl_trainer.launch import patches
from sdxl_trainer.launch.status import RankZeroError

# Without a launcher that keeps the store, rank 0 opens it only after its checks, which may read a whole data set.
CHECKS_TIMEOUT = timedelta(days=1)
CHECKED_KEY = "rank 0 has checked settings and data"  # its value: empty, or the exit status of a failed rank 0
FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.01, 1.0
ANNOUNCE_SECONDS = 20.0  # limit for a failed rank 0 to reach the other ranks
HEARD_KEY = "ranks that know that rank 0 has failed"

_joined = False  # whether this process has ever joined the process group
_store: dist.Store | None = None  # the store that the process group was made with


@dataclass(frozen=True)
class Ranks:
    """Place of this process in the job: global rank, rank on its node, number of processes, and device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0, which reports to people and writes shared files."""
        return self.rank == 0


def read_environment() -> tuple[int, int, int]:
    """Return (rank, local rank, world size) from the launcher's environment; (0, 0, 1) without a launcher.

    torchrun and the deepspeed launcher both set RANK, LOCAL_RANK and WORLD_SIZE.
    """
    return (int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def init_ranks(timeout_minutes: float = 60.0) -> Ranks:
    """Join the process group (NCCL with GPUs, gloo without) and choose this rank's device.

    A single process forms a group of its own, because DeepSpeed needs one.

    Args:
        timeout_minutes: how long a rank waits in a collective for the others. Waiting for rank 0 to call this function
            has no limit.

    Raises:
        RankZeroError: rank 0 failed before it called this function.
    """
    global _joined, _store  # noqa: PLW0603 (a process joins one group at a time)
    timeout = timedelta(minutes=timeout_minutes)
    rank, local_rank, world_size = read_environment()
    alone = world_size == 1 and "MASTER_PORT" not in os.environ
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size))  # DeepSpeed reads them
    use_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        patches.set_default_timeout(timeout)
        _store = _open_own_store(timeout) if alone else _open_store(rank, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if use_gpu else "gloo",
            store=_store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if use_gpu else None,
        )
    _joined = True
    return Ranks(rank, local_rank, world_size, device)


def announce_rank_zero_failure(status: int) -> None:
    """Send rank 0's exit status to the ranks that wait for it in `init_ranks`, so that they end too.

    On one machine launchers stop the other ranks, but DeepSpeed's leaves the ranks of other machines waiting. Returns
    at once on other ranks, or after this rank has joined the process group. Gives up after `ANNOUNCE_SECONDS`.
    """
    rank, _, world_size = read_environment()
    if rank or world_size == 1 or _joined:
        return
    try:
        shared, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=ANNOUNCE_SECONDS))))
        store = _add_start_prefix(shared)
        store.set(CHECKED_KEY, str(status))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # the store ends with this process
            deadline = time.monotonic() + ANNOUNCE_SECONDS
            while store.add(HEARD_KEY, 0) < world_size - 1 and time.monotonic() < deadline:
                time.sleep(LAST_POLL_SECONDS / 10)
    except (RuntimeError, ValueError):  # the store cannot be reached, or MASTER_ADDR is not set
        return


def _add_start_prefix(store: dist.Store) -> dist.PrefixStore:
    """Return the part of a store that belongs to this start of the job; see `_open_store`."""
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _open_own_store(timeout: timedelta) -> dist.Store:
    """Open the store of a process without a launcher, at port 0: a port found free may be taken by now."""
    return dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True, timeout=timeout)


def _open_store(rank: int, timeout: timedelta) -> dist.Store:
    """Open the store in which ranks find each other's addresses, and wait there for rank 0.

    torchrun's store outlives a restart and keeps the addresses of dead ranks, which new ranks would try to reach (torch
    2.13, `--max-restarts` with `--standalone`). So each start of the job uses key names of its own.
    """
    patience = timeout if rank == 0 else CHECKS_TIMEOUT
    shared, _, _ = next(iter(dist.rendezvous("env://", timeout=patience)))
    store = _add_start_prefix(shared)
    if rank == 0:
        store.set(CHECKED_KEY, "")
    pause_seconds = FIRST_POLL_SECONDS
    while not store.check([CHECKED_KEY]):  # not `wait`: Python handles no signal in it
        time.sleep(pause_seconds)
        pause_seconds = min(1.5 * pause_seconds, LAST_POLL_SECONDS)
    if failed := store.get(CHECKED_KEY):
        store.add(HEARD_KEY, 1)
        raise RankZeroError(int(failed))
    store.set_timeout(timeout)
    return store


def close_ranks() -> None:
    """Leave the process group, if there is one. The process may join another one afterwards."""
    global _store  # noqa: PLW0603
    if dist.is_initialized():
        patches.destroy_process_groups()
        _store = None


def barrier() -> None:
    """Wait for all ranks."""
    if _is_distributed():
        dist.barrier()


def reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over all ranks, in place, and return them."""
    if _is_distributed():
        dist.all_reduce(values)
    return values


def broadcast_tensor(values: torch.Tensor, source_rank: int) -> torch.Tensor:
    """Copy the source rank's `values` to every rank, in place, and return them."""
    if _is_distributed():
        dist.broadcast(values, source_rank)
    return values


def broadcast_object(value: Any) -> Any:
    """Return rank 0's `value` on every rank. It is pickled, so keep it small."""
    if not _is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's `value`, ordered by rank, on every rank. Values are pickled, so keep them small."""
    if not _is_distributed():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def _is_distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def publish(key: str, value: str) -> None:
    """Store a value that other ranks can read at any time, without a collective. Needs a process group."""
    if _store is not None:
        _store.set(f"published/{key}", value)


def read_published(key: str) -> str | None:
    """Return the value published under `key`, or None if there is none yet. Never waits."""
    name = f"published/{key}"
    return _store.get(name).decode() if _store is not None and _store.check([name]) else None
