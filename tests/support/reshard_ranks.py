"""Resharding between ranks, run by test_resharding.py.

Two ranks save under ZeRO 1, 2 and 3, each while the other has ended or waits. Then one, two and four ranks continue
from each checkpoint under every stage, in fp32, with parameter groups in pieces that were whole when they were saved.
Checkpoints of pieces are continued with whole groups under the same stage. Ranks are forked from a process that has
imported everything. The last line states how many resumes were compared.
"""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from rank_port import find_rank_port

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.schema import EmaConfig
from sdxl_trainer.launch.distributed import Ranks, init_ranks, reduce_sum
from sdxl_trainer.train.checkpoint.folder import find_newest_checkpoint, seal_checkpoint
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.networks.parameter_groups import split_groups

STAGES, SAVED_STEPS, ALL_STEPS, GLOBAL_BATCH = (1, 2, 3), 3, 5, 4
AVERAGE = "0.9"
WHOLE, SPLIT = sys.maxsize, 14  # values in a piece of a parameter group
# (stage and pieces of the checkpoint, stage and pieces of the run that continues)
RESUMES = [
    *(((old, WHOLE), (new, SPLIT)) for old, new in product(STAGES, STAGES)),
    *(((stage, SPLIT), (stage, WHOLE)) for stage in STAGES),
]


def run_ranks(world_size: int, work: Callable[[Ranks], None]) -> None:
    """Run `work` on `world_size` ranks, each of which must succeed."""
    port = find_rank_port()
    processes = []
    for rank in range(world_size):
        process = os.fork()
        if process == 0:
            status = 1
            try:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
                os.environ.update({"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}})
                work(init_ranks(timeout_minutes=0.5))
                status = 0
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(status)
        processes.append(process)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    assert statuses == [0] * world_size, f"{world_size} ranks ended with {statuses}"


def build_engine(stage: int, max_values: int, ranks: Ranks, **zero_settings: int) -> Engine:
    """Build an engine over weights whose sizes no number of ranks divides, in two groups or in four pieces of them.

    Args:
        zero_settings: further entries of DeepSpeed's `zero_optimization`.
    """
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))
    groups = [
        {"params": [weight for weight in net.parameters() if weight.dim() > 1], "weight_decay": 0.1},
        {"params": [weight for weight in net.parameters() if weight.dim() <= 1], "weight_decay": 0.0},
    ]
    extra = {"zero_optimization": zero_settings} if zero_settings else {}
    batch = BatchSizes(GLOBAL_BATCH, GLOBAL_BATCH // ranks.world_size, 1)
    settings = EngineConfig(zero_stage=stage, precision="fp32", deepspeed=extra)
    optimizer, averages = (
        torch.optim.AdamW(split_groups(groups, max_values), lr=0.05),
        EmaConfig(decays=[float(AVERAGE)]),
    )
    assert len(optimizer.param_groups) == (4 if max_values == SPLIT else 2)
    return Engine(net, optimizer, settings, batch, max_grad_norm=1.0, ema=averages)


def train(engine: Engine, ranks: Ranks, steps: range) -> list[float]:
    """Return the losses of the global batches, of which each rank has its share."""
    losses, share = [], GLOBAL_BATCH // ranks.world_size
    for step in steps:
        inputs = torch.randn(GLOBAL_BATCH, 5, generator=torch.Generator().manual_seed(step))
        loss = (engine(inputs[ranks.rank * share :][:share]) - 1.0).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(reduce_sum(loss.detach().clone()).item() / ranks.world_size)
    return losses


def gather_all(engine: Engine) -> dict[str, torch.Tensor]:
    """Return weights and averages, whole."""
    names = engine.weights.trained_names
    return {
        **{name: engine.weights.gather(name) for name in names},
        **{f"{name} {AVERAGE}": engine.weights.gather(name, AVERAGE) for name in names},
    }


def save(folder: Path, ranks: Ranks) -> None:
    """Save the result of an uninterrupted run, and a checkpoint under each stage in the middle of it."""
    uninterrupted = build_engine(2, WHOLE, ranks)
    losses, weights = train(uninterrupted, ranks, range(ALL_STEPS)), gather_all(uninterrupted)
    if ranks.is_main:
        torch.save((losses[SAVED_STEPS:], weights), folder / "expected.pt")
    engines = {key: build_engine(*key, ranks) for key in product(STAGES, (WHOLE, SPLIT))}
    for engine in engines.values():
        train(engine, ranks, range(SAVED_STEPS))
    deadline = time.monotonic() + 60
    while ranks.rank and not (folder / "rank 0 has saved").exists():
        assert time.monotonic() < deadline, "rank 0 cannot save alone"
        time.sleep(0.01)
    for (stage, max_values), engine in engines.items():
        writer = CheckpointWriter(
            folder=folder / f"{stage}-{max_values}",
            rank=ranks.rank,
            world_size=ranks.world_size,
            token="t",
            keep_last=1,
        )
        state = TrainState(step=SAVED_STEPS, world_size=ranks.world_size, zero_stage=stage)
        partial = writer.write_shard(engine.capture_state(alone=True), state)
        assert (seal_checkpoint(partial) is not None) == (ranks.rank == 1)
    (folder / f"rank {ranks.rank} has saved").touch()


def resume(folder: Path, ranks: Ranks) -> None:
    """Continue from each checkpoint under each stage."""
    expected, weights = torch.load(folder / "expected.pt")
    for old, new in RESUMES:
        engine, checkpoint = build_engine(*new, ranks), find_newest_checkpoint(folder / "{}-{}".format(*old))
        assert checkpoint is not None
        engine.load_state(checkpoint)
        losses = train(engine, ranks, range(SAVED_STEPS, ALL_STEPS))
        worst = max(abs(one - other) for one, other in zip(losses, expected, strict=True))
        for name, weight in gather_all(engine).items():
            worst = max(worst, (weight - weights[name]).abs().max().item())
        assert worst < 1e-5, f"{old} on 2 ranks to {new} on {ranks.world_size}: {worst}"


def main() -> int:
    """Save, then resume."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_ranks(2, lambda ranks: save(folder, ranks))
        for world_size in (1, 2, 4):
            run_ranks(world_size, lambda ranks: resume(folder, ranks))
    print(f"{3 * len(RESUMES)} resumes compared")
    return 0


if __name__ == "__main__":
    sys.exit(main())
