"""What a checkpoint costs training: the time that steps lose to one written in the background, against a blocking save.

A network of 100 million weights (21 with --quick) trains under the real engine (ZeRO 1, fp32) on one CPU rank, with
one thread, so that a second core is free for the writer as it is beside a GPU. Both saves go through the same writer
and end with the sealed checkpoint. Lost is what the steps during a save, and the save call itself, take longer than as
many steps without one. Also shown: the bytes, and the time to write as many to the same disk plainly (write, fsync).
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Figure, finish, parse_arguments

WIDTH, BATCH = 2048, 64
ROUNDS = 3
DEVICE_STEP_SECONDS = 0.05


def main() -> int:
    from sdxl_trainer.launch.logger import init_logger

    arguments = parse_arguments(__doc__ or "")
    torch.set_num_threads(1)
    init_logger(0, "WARNING")
    with tempfile.TemporaryDirectory() as temporary:
        return finish("checkpoint", measure(arguments.work or Path(temporary), 5 if arguments.quick else 24))


def measure(folder: Path, num_layers: int) -> dict[str, Figure]:
    """The figures of a network of so many layers of 4.2 million weights."""
    from sdxl_trainer.launch.distributed import close_ranks, init_ranks
    from sdxl_trainer.train.checkpoint.writer import CheckpointWriter

    init_ranks()
    engine = build_engine(num_layers)
    writer = CheckpointWriter(folder=folder, rank=0, world_size=1, token="t", keep_last=1)
    step_seconds = statistics.median(time_step(engine) for _ in range(8))
    lost, blocking_seconds = compare_saves(engine, writer, lambda: time_step(engine), step_seconds)
    rest_seconds = statistics.median(rest() for _ in range(8))
    lost_beside_device, blocking_beside_device = compare_saves(engine, writer, rest, rest_seconds)
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*.pt"))
    plain_seconds = write_plainly(folder / "plain", num_bytes)
    close_ranks()
    return {
        "lost_share_of_blocking": Figure(lost / blocking_seconds, "<=", 0.15),
        "lost_share_of_blocking_beside_a_device": Figure(lost_beside_device / blocking_beside_device, "<=", 0.15),
        "lost_seconds": Figure(lost, "<="),
        "lost_seconds_beside_a_device": Figure(lost_beside_device, "<="),
        "blocking_seconds": Figure(blocking_seconds, "<="),
        "plain_write_seconds": Figure(plain_seconds, "<="),
        "step_seconds": Figure(step_seconds, "<="),
        "checkpoint_bytes": Figure(num_bytes, "<="),
    }


def build_engine(num_layers: int):
    """The real engine around a plain network that is cheap to run for its size."""
    from sdxl_trainer.configs.engine import EngineConfig
    from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
    from sdxl_trainer.train.engine.engine import Engine

    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(num_layers)]
    net = torch.nn.Sequential(*(module for layer in layers for module in (layer, torch.nn.GELU())))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    return Engine(net, optimizer, EngineConfig(zero_stage=1, precision="fp32"), BatchSizes(BATCH, BATCH, 1), 1.0)


def time_step(engine) -> float:
    """Seconds of one optimizer step."""
    started = time.perf_counter()
    engine.backward(engine(torch.ones(BATCH, WIDTH)).square().mean())
    engine.step()
    return time.perf_counter() - started


def rest() -> float:
    """Seconds of a step on the stand-in device."""
    started = time.perf_counter()
    time.sleep(DEVICE_STEP_SECONDS)
    return time.perf_counter() - started


def compare_saves(engine, writer, step: Callable[[], float], step_seconds: float) -> tuple[float, float]:
    """Median seconds that training loses to (a save in the background, a blocking one), in turns."""
    lost = {blocking: [] for blocking in (True, False)}
    first = writer.last_step + 1
    for number in range(2 * ROUNDS + 1):
        blocking = number % 2 == 1
        seconds = save(engine, writer, first + number, blocking, step, step_seconds)
        if number:  # the first one warms up
            lost[blocking].append(seconds)
    return statistics.median(lost[False]), statistics.median(lost[True])


def save(engine, writer, number: int, blocking: bool, step: Callable[[], float], step_seconds: float) -> float:
    """Seconds that training loses to a save: it goes on until the checkpoint is sealed."""
    from sdxl_trainer.train.checkpoint.state import TrainState

    started, num_steps = time.perf_counter(), 0
    writer.save(engine, TrainState(step=number, world_size=1))
    while writer.is_writing() and not blocking:
        step()
        num_steps += 1
    writer.wait()
    return time.perf_counter() - started - num_steps * step_seconds


def write_plainly(path: Path, num_bytes: int) -> float:
    """Seconds to bring so many bytes to disk."""
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
