"""Cost of a checkpoint for training: time lost to a save in the background, compared with a blocking save.

A network of 100 million weights (21 with --quick) trains under the real engine (ZeRO 1, fp32) on one CPU rank with one
thread, so that a second core is free for the writer, as it is beside a GPU. Both saves use the same writer and end with
the sealed checkpoint. The lost time is that of the save call and of the steps until the end of the save, minus that of
as many steps without a save. Also shown: the CPU time of a blocking save, its bytes, and the time of a plain write of
as many bytes to the same disk (write, fsync).
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from harness import Figure, parse_arguments, print_result

WIDTH, BATCH = 2048, 64
ROUNDS = 3
DEVICE_STEP_SECONDS = 0.05


def main() -> int:
    from sdxl_trainer.launch.logger import init_logger

    arguments = parse_arguments(__doc__ or "")
    torch.set_num_threads(1)
    init_logger(0, "WARNING")
    with tempfile.TemporaryDirectory() as temporary:
        return print_result("checkpoint", measure(arguments.work or Path(temporary), 5 if arguments.quick else 24))


def measure(folder: Path, num_layers: int) -> dict[str, Figure]:
    """Return the figures of a network of `num_layers` layers of 4.2 million weights."""
    from sdxl_trainer.launch.distributed import close_ranks, init_ranks
    from sdxl_trainer.train.checkpoint.writer import CheckpointWriter

    init_ranks()
    engine = build_engine(num_layers)
    writer = CheckpointWriter(folder=folder, rank=0, world_size=1, token="t", keep_last=1)
    step_seconds = statistics.median(time_step(engine) for _ in range(8))
    beside_steps = compare_saves(engine, writer, lambda: time_step(engine), step_seconds)
    rest_seconds = statistics.median(rest() for _ in range(8))
    beside_device = compare_saves(engine, writer, rest, rest_seconds)
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*.pt"))
    plain_seconds = write_plainly(folder / "plain", num_bytes)
    close_ranks()
    return {
        "lost_share_of_blocking": Figure(beside_steps.lost / beside_steps.blocking, "<=", 0.15),
        "lost_share_of_blocking_beside_a_device": Figure(beside_device.lost / beside_device.blocking, "<=", 0.15),
        "lost_seconds": Figure(beside_steps.lost, "<="),
        "lost_seconds_beside_a_device": Figure(beside_device.lost, "<="),
        "blocking_seconds": Figure(beside_steps.blocking, "<="),
        "blocking_cpu_seconds": Figure(beside_steps.blocking_cpu, "<="),
        "plain_write_seconds": Figure(plain_seconds, "<="),
        "step_seconds": Figure(step_seconds, "<="),
        "checkpoint_bytes": Figure(num_bytes, "<="),
    }


def build_engine(num_layers: int):
    """Build the real engine around a network that is cheap to run for its size."""
    from sdxl_trainer.configs.engine import EngineConfig
    from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
    from sdxl_trainer.train.engine.engine import Engine

    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(num_layers)]
    net = torch.nn.Sequential(*(module for layer in layers for module in (layer, torch.nn.GELU())))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    return Engine(net, optimizer, EngineConfig(zero_stage=1, precision="fp32"), BatchSizes(BATCH, BATCH, 1), 1.0)


def time_step(engine) -> float:
    """Return the seconds of one optimizer step."""
    started = time.perf_counter()
    engine.backward(engine(torch.ones(BATCH, WIDTH)).square().mean())
    engine.step()
    return time.perf_counter() - started


def rest() -> float:
    """Sleep for a step of the stand-in device, and return its seconds."""
    started = time.perf_counter()
    time.sleep(DEVICE_STEP_SECONDS)
    return time.perf_counter() - started


class SaveSeconds(NamedTuple):
    """Seconds that training loses to a save in the background and to a blocking one, and CPU seconds of the latter."""

    lost: float
    blocking: float
    blocking_cpu: float


def compare_saves(engine, writer, step: Callable[[], float], step_seconds: float) -> SaveSeconds:
    """Measure saves in the background and blocking ones in turns, and return the medians."""
    lost: dict[bool, list[float]] = {True: [], False: []}
    cpu_seconds = []
    first = writer.last_step + 1
    for number in range(2 * ROUNDS + 1):
        blocking, cpu_started = number % 2 == 1, time.process_time()
        seconds = save(engine, writer, first + number, blocking, step, step_seconds)
        if number:  # the first one warms up
            lost[blocking].append(seconds)
        if blocking:
            cpu_seconds.append(time.process_time() - cpu_started)
    return SaveSeconds(statistics.median(lost[False]), statistics.median(lost[True]), statistics.median(cpu_seconds))


def save(engine, writer, number: int, blocking: bool, step: Callable[[], float], step_seconds: float) -> float:
    """Save, train on until the checkpoint is sealed unless `blocking`, and return the seconds that training lost."""
    from sdxl_trainer.train.checkpoint.state import TrainState

    started, num_steps = time.perf_counter(), 0
    writer.save(engine, TrainState(step=number, world_size=1))
    while writer.is_writing() and not blocking:
        step()
        num_steps += 1
    writer.wait()
    return time.perf_counter() - started - num_steps * step_seconds


def write_plainly(path: Path, num_bytes: int) -> float:
    """Write `num_bytes` to disk with fsync, and return the seconds."""
    block = bytes(16 << 20)
    started = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(-(-num_bytes // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


if __name__ == "__main__":
    sys.exit(main())
