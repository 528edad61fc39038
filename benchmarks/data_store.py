"""Eight ranks that train on shards of a store with latency: whether reads hide behind the step; figures of data.py.

Each rank reads micro batches as training on a GPU does, by its own worker processes and a thread that receives from
them, and sleeps for the time of a step at the speed of an H100 (22 images a second). The ranks are threads here, so
that a small machine can run eight of them. The store is an HTTP server, a process of its own, that answers each request
after 20 ms. In training all ranks wait for the slowest one, so of each step the longest wait of a rank counts. CPU time
is that of ranks and workers, without the server's.
"""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

LATENCY_SECONDS = 0.02
RANKS, IMAGES_PER_SECOND, MICRO_BATCH, GLOBAL_BATCH = 8, 22.0, 4, 64
NUM_WORKERS = 2  # of each rank, the default of data.num_workers
WARM_STEPS = 8
MAX_WAIT_SHARE = 0.01


@dataclass(frozen=True)
class RankTimes:
    """Seconds of a rank: its wait before each step, all, and of the CPU."""

    waits: list[float]
    seconds: float
    cpu_seconds: float = 0.0


def measure_store(shards: list[Path], work: Path, seconds: float) -> dict[str, float]:
    """Return the share of the time that ranks wait for data, and the cores that they take, from a store and a disk."""
    figures: dict[str, float] = {}
    with serve_shards(shards[0].parent) as address:
        urls = [f"{address}/{shard.name}" for shard in shards]
        for name, sources in (("store", urls), ("disk", [str(shard) for shard in shards])):
            found = run_ranks(sources, work / name, seconds)
            waits = [max(step) for step in zip(*(rank.waits for rank in found), strict=False)]
            step, rates = (
                MICRO_BATCH / IMAGES_PER_SECOND,
                [MICRO_BATCH * len(rank.waits) / rank.seconds for rank in found],
            )
            cpu = sum(rank.cpu_seconds / rank.seconds for rank in found) / sum(rates)
            figures |= {
                f"{name}_wait_share_of_slowest_rank": sum(waits) / (sum(waits) + step * len(waits)),
                f"{name}_wait_share_mean": sum(sum(rank.waits) / rank.seconds for rank in found) / RANKS,
                f"{name}_images_per_second": sum(rates),
                f"{name}_cpu_ms_per_image": 1e3 * cpu,
                f"{name}_cores_of_8_gpus": cpu * RANKS * IMAGES_PER_SECOND,
            }
    return figures


def run_ranks(sources: list[str], work: Path, seconds: float) -> list[RankTimes]:
    """Run all ranks at the same time, each a thread with worker processes of its own, and return the times of each."""
    from data import (
        build_dataset,
        build_plan,
        iterate_batches,
        iterate_specs,
        load_tokenizers,
        open_record_index,
        open_sample_index,
    )
    from sdxl_trainer.data.order.plan import Position

    work.mkdir(parents=True, exist_ok=True)
    index = open_sample_index(work, open_record_index(work, sources, []))
    dataset, plan = build_dataset(index, work, load_tokenizers()), build_plan(index, GLOBAL_BATCH, 0)
    specs = [iterate_specs(plan, Position(0, 0), rank, RANKS, MICRO_BATCH) for rank in range(RANKS)]
    loaders: list[Any] = [iterate_batches(dataset, own, NUM_WORKERS) for own in specs]
    ranks = [Receiver(loader) for loader in loaders]
    start = threading.Barrier(RANKS + 1)

    def run(batches: Receiver) -> RankTimes:
        try:
            for _ in range(WARM_STEPS):
                batches.receive()
        except BaseException:
            start.abort()  # so that the others do not wait for this rank
            raise
        start.wait()
        began, waits = time.perf_counter(), []
        while time.perf_counter() - began < seconds:
            asked = time.perf_counter()
            batches.receive()
            waits.append(time.perf_counter() - asked)
            time.sleep(MICRO_BATCH / IMAGES_PER_SECOND)
        return RankTimes(waits, time.perf_counter() - began)

    with ThreadPoolExecutor(RANKS) as pool:
        running = [pool.submit(run, batches) for batches in ranks]
        start.wait()
        workers = [worker.pid for loader in loaders for worker in loader._workers]
        cpu = sum(map(read_cpu_seconds, [os.getpid(), *workers]))
        times = [future.result() for future in running]
        cpu = sum(map(read_cpu_seconds, [os.getpid(), *workers])) - cpu
    for batches, loader in zip(ranks, loaders, strict=True):
        batches.close()
        loader._shutdown_workers()
    return [replace(each, cpu_seconds=cpu / RANKS) for each in times]


class Receiver:
    """A thread that receives a micro batch ahead, as DataLoader's own thread does when it pins memory for a GPU."""

    def __init__(self, batches: Iterator[Any]):
        self._batches, self._thread = batches, ThreadPoolExecutor(1)
        self._next = self._thread.submit(next, batches)

    def receive(self) -> None:
        """Wait for the next micro batch, which must be readable."""
        batch = self._next.result()
        self._next = self._thread.submit(next, self._batches)
        assert not batch.bad, batch.bad

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def read_cpu_seconds(process: int) -> float:
    """Return the CPU seconds that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serve_shards(folder: Path) -> Iterator[str]:
    """Serve the files of a folder over HTTP, each request after LATENCY_SECONDS, until the block ends."""
    command = [sys.executable, __file__, str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.terminate()
        server.wait()


async def serve(folder: Path) -> None:
    """Serve a folder; print the port."""
    from aiohttp import web

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(LATENCY_SECONDS)
        return web.FileResponse(folder / request.match_info["name"])

    application = web.Application()
    application.router.add_get("/{name}", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
