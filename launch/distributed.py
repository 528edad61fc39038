"""Process group, device, and collectives. The only module that asks for a rank.

Every collective returns at once in a single process, so callers never ask whether they are distributed.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from packaging.version import Version

from sdxl_trainer.configs.problems import FailedError, Problem, UserInputError, raise_if_any
from sdxl_trainer.launch import patches
from sdxl_trainer.launch.activity import ACTIVITY, Watchdog
from sdxl_trainer.launch.interfaces import check_network
from sdxl_trainer.launch.kernels import set_tf32
from sdxl_trainer.launch.status import RankZeroError
from sdxl_trainer.launch.waiting import LAST_POLL_SECONDS, LOOKS_PER_LIMIT, RankWaits, give_patience, poll

# Without a launcher that keeps the store, rank 0 opens it only after its checks, which may read a whole data set.
CHECKS_TIMEOUT = timedelta(days=1)
CHECKED_KEY = "rank 0 has checked settings and data"  # its value: empty, or the exit status of a failed rank 0
ANNOUNCE_SECONDS = 20.0  # that a failed rank 0 waits until the other ranks have read its exit status
HEARD_KEY = "ranks that know that rank 0 has failed"  # a count
# A collective ends this much later than `engine.timeout_minutes`. NCCL then ends the process without an exception,
# unless a variable forbids that, so the watchdog of training must have saved by then.
COLLECTIVE_MARGIN = timedelta(minutes=10)

_joined = False  # whether this process has ever joined the process group


class StuckRanksError(FailedError):
    """Other ranks have stopped making progress or cannot be reached. This rank has saved nothing yet."""


@dataclass(frozen=True)
class Ranks:
    """Place of this process in the job: global rank, rank on its node, number of processes, and device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True for global rank 0, which reports to people and writes shared files."""
        return self.rank == 0


class RankEnvironment(NamedTuple):
    """Place of this process in the job, before it joins the process group."""

    rank: int
    local_rank: int
    world_size: int


class _Meeting(NamedTuple):
    """The means by which the ranks of a process group meet without a collective."""

    store: dist.Store
    waits: RankWaits
    timeout: timedelta
    raise_if_stopped: Callable[[], None]


_meeting: _Meeting | None = None


def read_environment() -> RankEnvironment:
    """Read RANK, LOCAL_RANK and WORLD_SIZE, which torchrun and the deepspeed launcher set.

    Without a launcher this is rank 0 of 1.
    """
    return RankEnvironment(
        rank=int(os.environ.get("RANK", 0)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
    )


def count_ranks_here() -> int:
    """Count the ranks of this node, as torchrun or DeepSpeed's launcher has set it; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def init_ranks(
    timeout_minutes: float = 60.0,
    raise_if_stopped: Callable[[], None] = lambda: None,
    collective_margin: timedelta = COLLECTIVE_MARGIN,
) -> Ranks:
    """Join the process group (NCCL with GPUs, gloo without), choose this rank's device, and forbid TF32.

    A single process forms a group of its own, because DeepSpeed needs one. PyTorch's default would round the inputs of
    fp32 convolutions on GPUs; programs allow it where their settings do (launch/kernels.py).

    Args:
        timeout_minutes: limit for a rank that waits for others which make no progress, and for rank 0 that waits here
            for the others. Waiting here for rank 0 has no limit.
        raise_if_stopped: called while waiting, here and in `wait_for_ranks`; raises Interrupted to stop.
        collective_margin: added to the limit for a rank that waits in a collective.

    Raises:
        RankZeroError: rank 0 failed before it called this function.
        FailedError: other ranks did not call it in time.
        UserInputError: this node has more ranks than GPUs, the address of rank 0 is missing, or NCCL or gloo would
            use a network interface that does not exist or leads nowhere.
    """
    global _joined, _meeting  # noqa: PLW0603 (a process joins one group at a time)
    timeout = timedelta(minutes=timeout_minutes)
    rank, local_rank, world_size = read_environment()
    alone = world_size == 1 and "MASTER_PORT" not in os.environ
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size))  # DeepSpeed reads them
    use_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    set_tf32(False)
    if use_gpu:
        _require_device(local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        raise_if_any(check_network(use_gpu, world_size))
        patches.set_default_timeout(timeout + collective_margin)
        patience = timeout if rank == 0 else CHECKS_TIMEOUT
        store = _open_own_store(timeout) if alone else _open_shared_store(rank, patience, raise_if_stopped)
        meeting = _Meeting(store, RankWaits(store, rank, world_size), timeout, raise_if_stopped)
        if not alone:
            _rendezvous(meeting, rank, world_size)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if use_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout + collective_margin,
            device_id=device if use_gpu and binds_device(world_size) else None,
        )
        _meeting = meeting
        if world_size > 1:
            ACTIVITY.publish_by(_publish_activity)
    _joined = True
    return Ranks(rank, local_rank, world_size, device)


def binds_device(world_size: int, torch_version: str = torch.__version__) -> bool:
    """Return whether a rank's GPU is named when the process group is made, by the rule of DeepSpeed 0.19.8.

    A single rank has nobody to reach, and NCCL fails on some machines when it divides a group of one
    (github.com/deepspeedai/DeepSpeed/issues/8248). PyTorch after 2.6.0 and before 2.7.1 hangs
    (github.com/pytorch/pytorch/issues/153960).
    """
    release = Version(Version(torch_version).public)  # without the version of CUDA
    return world_size > 1 and not Version("2.6.0") < release < Version("2.7.1")


def announce_rank_zero_failure(status: int) -> None:
    """Send rank 0's exit status to the ranks that wait for it in `init_ranks`, so that they end too.

    On one machine launchers stop the other ranks, but DeepSpeed's leaves the ranks of other machines waiting. Returns
    at once on other ranks, or after this rank has joined the process group. Waits for at most `ANNOUNCE_SECONDS`.
    """
    rank, _, world_size = read_environment()
    if rank != 0 or world_size == 1 or _joined:
        return
    try:
        store = _open_shared_store(rank, timedelta(seconds=ANNOUNCE_SECONDS), lambda: None)
        store.set(CHECKED_KEY, str(status))
        if not _launcher_keeps_store():  # the store ends with this process
            deadline = time.monotonic() + ANNOUNCE_SECONDS
            while store.add(HEARD_KEY, 0) < world_size - 1 and time.monotonic() < deadline:
                time.sleep(LAST_POLL_SECONDS / 10)
    except (RuntimeError, ValueError, OSError):  # the store cannot be reached, or MASTER_ADDR is not set
        return


def _require_device(local_rank: int) -> None:
    """Raise UserInputError if this rank has no GPU of its own."""
    count = torch.cuda.device_count()
    if local_rank < count:
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = f"{count} GPUs" if hidden is None else f"{count} GPUs (CUDA_VISIBLE_DEVICES={hidden})"
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    cure = f"start {count} ranks on this node: NPROC={count}, or --nproc_per_node={count} with torchrun"
    raise UserInputError([Problem("NPROC", ranks, f"gives more ranks than this node has devices: {visible}", cure)])


def _launcher_keeps_store() -> bool:
    """Return whether torchrun's agent, and not rank 0, serves the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _open_own_store(timeout: timedelta) -> dist.Store:
    """Open the store of a process without a launcher, at port 0: a port found free may be taken by now."""
    return dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True, timeout=timeout)


def _open_shared_store(rank: int, timeout: timedelta, raise_if_stopped: Callable[[], None]) -> dist.Store:
    """Open the store at MASTER_ADDR:MASTER_PORT. Rank 0 serves it, unless the launcher does.

    torchrun's store outlives a restart and keeps the addresses of dead ranks, which new ranks would try to reach (torch
    2.13, `--max-restarts` with `--standalone`). So each start of the job uses key names of its own.

    Raises:
        UserInputError: the environment names no address.
        TimeoutError: no process serves the store in time.
    """
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        rule = "is set, but MASTER_ADDR and MASTER_PORT do not name the address of rank 0"
        cure = "start several ranks with a launch script or torchrun; for a single process: unset RANK WORLD_SIZE"
        raise UserInputError([Problem("WORLD_SIZE", os.environ.get("WORLD_SIZE"), rule, cure)]) from None
    serves = rank == 0 and not _launcher_keeps_store()
    if not serves:
        _wait_for_server(host, port, timeout, raise_if_stopped)
    # `wait_for_workers` would wait in C++, where Python handles no signal.
    store = dist.TCPStore(host, port, is_master=serves, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _wait_for_server(host: str, port: int, timeout: timedelta, raise_if_stopped: Callable[[], None]) -> None:
    """Wait until a connection to host:port succeeds.

    Raises:
        TimeoutError: no connection succeeds within `timeout`.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    for _ in poll(raise_if_stopped):
        try:
            socket.create_connection((host, port), timeout=LAST_POLL_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no process answers at {host}:{port}: {error}") from None


def _rendezvous(meeting: _Meeting, rank: int, world_size: int) -> None:
    """Wait on rank 0 for all other ranks, which wait for rank 0 to finish its checks.

    Raises:
        RankZeroError: rank 0 failed before it called this function.
        FailedError: some ranks did not call it in time (raised on rank 0).
    """
    store, waits, timeout, raise_if_stopped = meeting
    if rank == 0:
        store.set(CHECKED_KEY, "")
        waits.arrive()
        absent = waits.until_all_arrive("start", timeout.total_seconds(), raise_if_stopped)
        if absent:
            raise FailedError(_explain_absent_ranks(absent, world_size, timeout))
        return
    for _ in poll(raise_if_stopped):  # not `store.wait`, in which Python handles no signal
        if store.check([CHECKED_KEY]):
            break
    if failed := store.get(CHECKED_KEY):
        store.add(HEARD_KEY, 1)
        raise RankZeroError(int(failed))
    waits.arrive()
    store.set_timeout(timeout)


def _explain_absent_ranks(shown: str, world_size: int, timeout: timedelta) -> str:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    text = (
        f"ranks {shown} of {world_size} did not connect to rank 0 at {address} within engine.timeout_minutes = "
        f"{timeout.total_seconds() / 60:g}. Check that they have started, and that their nodes reach that address"
    )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return text
    return f"{text}. WORLD_SIZE={world_size} is set: if it is left over and you want one process, unset RANK WORLD_SIZE"


def close_ranks() -> None:
    """Leave the process group, if there is one. The process may join another one afterwards."""
    global _meeting  # noqa: PLW0603
    if dist.is_initialized():
        ACTIVITY.publish_by(None)
        patches.destroy_process_groups()
        _meeting = None


def _publish_activity(text: str) -> None:
    """Publish this rank's progress. A store that has gone is no error here: the next wait or collective reports it."""
    if _meeting is not None:
        with suppress(dist.DistError):
            _meeting.waits.publish_activity(text)


def wait_for_ranks(purpose: str) -> None:
    """Wait until all ranks have called this function, as long as those that have not make progress.

    A collective would end after a fixed time, although another rank may rightly work longer on its own. Progress is
    what `ACTIVITY` notes. All ranks call it together.

    Args:
        purpose: what the ranks wait for, for the log.

    Raises:
        StuckRanksError: a missing rank made no progress for `engine.timeout_minutes`, or rank 0 has ended.
        InterruptedAlone: this rank was asked to stop, and the others have not stopped some seconds later.
    """
    if not _is_distributed():
        return
    assert _meeting is not None, "init_ranks has opened the store"
    _, waits, timeout, raise_if_stopped = _meeting
    limit_seconds = timeout.total_seconds()
    # The store does not answer if the process that keeps it is stopped, or its node is frozen.
    is_silent = Watchdog(limit_seconds * (1 + 2 / LOOKS_PER_LIMIT))
    with ACTIVITY.during(f"waiting for other ranks, {purpose}"), is_silent:
        try:
            waits.arrive()
            stuck = waits.until_all_arrive(purpose, limit_seconds, give_patience(raise_if_stopped))
            if not stuck:
                waits.leave()
        except dist.DistError as error:
            raise StuckRanksError(f"{purpose}: the store of the ranks cannot be reached any more: {error}") from error
    if stuck:
        text = f"rank {stuck} made no progress for engine.timeout_minutes = {limit_seconds / 60:g}"
        raise StuckRanksError(f"{purpose}: {text}. Look at its log and its node; raise the setting if it only was slow")


def reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over all ranks, in place, and return them."""
    if _is_distributed():
        dist.all_reduce(values)
    return values


def start_reduction(values: torch.Tensor) -> Callable[[], None]:
    """Start to sum `values` over all ranks, in place, and return a function that waits for the end."""
    work = dist.all_reduce(values, async_op=True) if _is_distributed() else None

    def wait() -> None:
        if work is not None:
            work.wait()

    return wait


def broadcast_tensor(values: torch.Tensor, source_rank: int) -> torch.Tensor:
    """Copy the source rank's `values` to every rank, in place, and return them."""
    if _is_distributed():
        dist.broadcast(values, source_rank)
    return values


def broadcast_object(value: Any) -> Any:
    """Return rank 0's `value` on every rank. It is pickled, so keep it small.

    Ranks may work alone before they call it, as before `wait_for_ranks`.
    """
    if not _is_distributed():
        return value
    wait_for_ranks(f"after {ACTIVITY.phase}")
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def share_problems() -> Iterator[None]:
    """Raise the UserInputError of rank 0 in this block on every rank, so that none waits for a rank that has ended.

    All ranks enter the block together; only rank 0 looks for problems in it.
    """
    problems: list[Problem] = []
    try:
        yield
    except UserInputError as error:
        problems = error.problems
    raise_if_any(broadcast_object(problems))


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's `value`, ordered by rank, on every rank. Values are pickled, so keep them small.

    Ranks may work alone before they call it, as before `wait_for_ranks`.
    """
    if not _is_distributed():
        return [value]
    wait_for_ranks(f"after {ACTIVITY.phase}")
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def _is_distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def publish(key: str, value: str) -> None:
    """Store a value that other ranks can read at any time, without a collective. Needs a process group.

    A store that has gone with the launcher is no error here, nor in `read_published`: the next wait reports it.
    """
    if _meeting is not None:
        with suppress(dist.DistError):
            _meeting.store.set(f"published/{key}", value)


def read_published(key: str) -> str | None:
    """Return the value published under `key`, or None if there is none yet. Never waits."""
    name, store = f"published/{key}", _meeting and _meeting.store
    with suppress(dist.DistError):
        return store.get(name).decode() if store is not None and store.check([name]) else None
    return None
