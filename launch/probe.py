"""Communication probe: ranks join a process group and sum numbers.

launch/machine.py starts it on this machine. launch/doctor.sh starts it with `--report` through the launcher of several
nodes.
"""

import argparse
import json
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.cuda.nccl

from sdxl_trainer.configs.language.arguments import TranslatedParser
from sdxl_trainer.configs.problems import FailedError
from sdxl_trainer.launch.distributed import Ranks, close_ranks, gather_objects, init_ranks, reduce_sum
from sdxl_trainer.launch.machine import Finding, describe_sums
from sdxl_trainer.launch.program import end_program, run_program

NUM_SUMS = {64: 5, 400: 3}  # by size in megabytes: a small bucket of gradients, and a large one
TIMEOUT_MINUTES = 3.0
ACROSS_NODES_CURE = (
    "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the interface that the nodes share; NCCL_DEBUG=INFO shows more "
    "(docs/CLUSTER.md)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Sum over all ranks; rank 0 prints the figures. Return the exit status (0 done, 1 failed, 2 wrong input)."""
    parser = TranslatedParser(description="Measure communication between ranks.")
    parser.add_argument("--report", action="store_true", help="print findings of the doctor instead of JSON")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's
    options = parser.parse_args(arguments)
    return run_program(lambda: probe(options.report))


def probe(report: bool) -> None:
    """Join the ranks, compare their nodes, and measure sums.

    Raises:
        FailedError: the ranks do not connect, or a sum is wrong.
    """
    ranks = init_ranks(TIMEOUT_MINUTES, collective_margin=timedelta(0))  # nothing is saved here
    backend = "NCCL" if ranks.device.type == "cuda" else "gloo"
    try:
        nodes = compare_nodes(gather_objects((socket.gethostname(), describe_versions(ranks))))
        speeds = {megabytes: measure_sums(ranks, megabytes, count) for megabytes, count in NUM_SUMS.items()}
    except RuntimeError as error:  # of NCCL or gloo
        detail = f"{ranks.world_size} by {backend} failed: {error!s:.300}"
        raise FailedError(str(Finding("ranks", detail, ACROSS_NODES_CURE))) from None
    close_ranks()
    if not ranks.is_main:
        return
    if not report:
        figures = {"ranks": ranks.world_size, "device": ranks.device.type, "gb_per_second": speeds}
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    sums = Finding("ranks", f"{ranks.world_size} by {backend}, {describe_sums(speeds)}")
    sys.stdout.writelines(f"{finding}\n" for finding in (nodes, sums))
    if not nodes.is_ok:
        raise FailedError("the nodes differ")


def describe_versions(ranks: Ranks) -> str:
    """Return the versions that must be the same on all nodes."""
    nccl = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if ranks.device.type == "cuda" else ""
    return f"Python {sys.version_info.major}.{sys.version_info.minor}, torch {torch.__version__}{nccl}"


def compare_nodes(ranks: Sequence[tuple[str, str]]) -> Finding:
    """Compare the versions of the ranks' nodes.

    Args:
        ranks: host name and versions of each rank.
    """
    hosts = {host: versions for host, versions in reversed(ranks)}
    detail = f"{len(hosts)} ({', '.join(sorted(hosts)[:8])}{', ...' if len(hosts) > 8 else ''}), "
    if len(set(hosts.values())) == 1:
        return Finding("nodes", detail + ranks[0][1])
    detail += "; ".join(f"{host}: {versions}" for host, versions in sorted(hosts.items())[:8])
    return Finding("nodes", detail, "install the same versions on all nodes (constraints.txt)")


def measure_sums(ranks: Ranks, megabytes: int, count: int) -> float:
    """Return the gigabytes of float32 that all ranks sum in a second.

    Raises:
        FailedError: a sum is wrong.
    """
    values = torch.full((megabytes * 1_000_000 // 4,), float(ranks.rank + 1), device=ranks.device)
    total, expected = float(reduce_sum(values)[-1]), ranks.world_size * (ranks.world_size + 1) / 2
    if total != expected:
        raise FailedError(f"the sum over {ranks.world_size} ranks is {total:g}, not {expected:g}")
    start = time.monotonic()
    for _ in range(count):
        reduce_sum(values)
    values[0].item()  # waits for the device
    return count * values.nbytes / (time.monotonic() - start) / 1e9


if __name__ == "__main__":
    end_program(main())
