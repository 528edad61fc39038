"""Two ranks of which one hangs in step 4, run by test_hanging.py: `hanging_ranks.py FOLDER STAGE PLACE`.

PLACE is where the other rank then waits in a collective: `norm`, before the update, or `forward`, under ZeRO 3.
"""

import signal
import sys
import time
from pathlib import Path

import torch
from reshard_ranks import WHOLE, build_engine, gather_all, train

from sdxl_trainer.launch.activity import ACTIVITY, Watchdog
from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.launch.logger import init_logger
from sdxl_trainer.train.checkpoint.emergency import EmergencySaver
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter

STEPS, LIMIT_SECONDS = 3, 2.0


def hang(*_: object) -> None:
    time.sleep(600)


folder, stage, place = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
ranks = init_ranks()
init_logger(ranks.rank)
signal.signal(signal.SIGTERM, lambda *_: None)  # the launcher's, once the first rank has ended
# Under ZeRO 3 every weight is gathered anew in each pass, as large ones are.
engine = build_engine(stage, WHOLE, ranks, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}))
train(engine, ranks, range(STEPS))
weights = gather_all(engine)
if ranks.is_main:
    torch.save(weights, folder / "expected.pt")
writer = CheckpointWriter(folder=folder, rank=ranks.rank, world_size=2, token="t", keep_last=1)
saver = EmergencySaver(
    engine, writer, lambda step: TrainState(step=step, world_size=2, zero_stage=stage), None, folder / "models"
)
ACTIVITY.finish_step(STEPS)
with Watchdog(LIMIT_SECONDS, lambda: saver.save("no progress")), saver, ACTIVITY.during("training"):
    ACTIVITY.note(f"waiting in {place}")
    if ranks.rank == 1 and place == "norm":
        engine._engine.optimizer.step = hang
    elif ranks.rank == 1:
        hang()
    train(engine, ranks, range(STEPS, STEPS + 1))
