"""AdamW in 8 bit under the engine, saved and resumed; test_eight_bit.py runs this on two ranks and imports it.

    eight_bit_updates.py FOLDER

For each ZeRO stage, and with gradient release (stage -1), writes FOLDER/STAGE/step-00000003 and prints its losses as a
line of JSON: those of six steps, and those of the last three after loading that checkpoint.
"""

import json
import sys
from pathlib import Path

import torch

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.launch.distributed import Ranks, close_ranks, init_ranks, reduce_sum
from sdxl_trainer.launch.program import end_program
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.optim.optimizers import build_optimizer

GLOBAL_BATCH_SIZE, LR = 4, 0.01
FEATURES, HIDDEN = 61, 199  # the last of two ranks has padding
STAGES = (0, 1, 2, 3)
RELEASED = -1  # gradient release with weights in bf16, instead of a ZeRO stage


def build_engine(stage: int, ranks: Ranks, name: str = "adamw8bit", precision: str = "fp32") -> Engine:
    """Build a network whose matrices are large enough for 8 bit, and whose vectors are only when flattened together."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(FEATURES, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, FEATURES))
    config, settings = OptimConfig(name=name, lr=LR), EngineConfig(zero_stage=max(stage, 0), precision=precision)
    if stage == RELEASED:
        settings = EngineConfig(zero_stage=0, gradient_release=True, precision="bf16_stochastic")
    groups = [{"params": list(net.parameters()), "lr": LR, "weight_decay": 0.01, "lr_scale": 1.0}]
    optimizer = build_optimizer(groups, config, settings)
    return Engine(
        net, optimizer, settings, BatchSizes(GLOBAL_BATCH_SIZE, GLOBAL_BATCH_SIZE // ranks.world_size, 1), 1.0
    )


def train(engine: Engine, steps: range, ranks: Ranks) -> list[float]:
    """Return the losses of `steps`, averaged over all ranks."""
    losses, share = [], GLOBAL_BATCH_SIZE // ranks.world_size
    for step in steps:
        inputs = torch.randn(GLOBAL_BATCH_SIZE, FEATURES, generator=torch.Generator().manual_seed(step))
        own = inputs[ranks.rank * share :][:share].to(engine.dtype)
        loss = (engine(own).float() - 1.0).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(reduce_sum(loss.detach()).item() / ranks.world_size)
    return losses


def save(engine: Engine, folder: Path, ranks: Ranks) -> Path:
    """Write a checkpoint of step 3."""
    writer = CheckpointWriter(folder=folder, rank=ranks.rank, world_size=ranks.world_size, token="t", keep_last=1)
    writer.save(engine, TrainState(step=3, world_size=ranks.world_size))
    writer.wait()
    return folder / "step-00000003"


def main() -> int:
    """Run all stages."""
    ranks, folder = init_ranks(), Path(sys.argv[1])
    for stage in (*STAGES, RELEASED):
        engine = build_engine(stage, ranks)
        losses = train(engine, range(3), ranks)
        path = save(engine, folder / str(stage), ranks)
        losses += train(engine, range(3, 6), ranks)
        again = build_engine(stage, ranks)
        again.load_state(path)
        resumed = train(again, range(3, 6), ranks)
        if ranks.is_main:
            sys.stdout.write(json.dumps({"stage": stage, "losses": losses, "resumed": resumed}) + "\n")
    close_ranks()
    return 0


if __name__ == "__main__":
    end_program(main())
