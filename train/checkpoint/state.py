"""Progress of a run: everything that a resume needs besides the weights and the optimizer's moments."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import orjson

from sdxl_trainer.configs.renames import rename_settings
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.train.objective.loss_feedback import FeedbackState

STATE_FILE = "trainer_state.json"


@dataclass
class TrainState:
    """Progress of a run. All random numbers are functions of the seed and of these fields, so no generator is saved."""

    # Fields that a resumed run takes from its present settings, data and ranks; the others are the checkpoint's.
    MADE_WITH: ClassVar[tuple[str, ...]] = (
        "seed",
        "global_batch_size",
        "world_size",
        "zero_stage",
        "index_fingerprint",
        "config",
        "own_code",
    )

    step: int = 0  # optimizer steps done
    epoch: int = 0  # position of the next global batch
    index: int = 0
    epoch_batches: int = 0  # global batches in that epoch
    samples_seen: int = 0
    num_bad: int = 0  # samples skipped so far
    num_non_finite: int = 0  # steps without an update, because loss or gradient was not finite
    num_until_update: int = 0  # steps done by the last one with an update
    # Replaced and never changed in place, because a checkpoint may be writing it.
    feedback: FeedbackState = field(default_factory=FeedbackState)
    # Network → hash, of the base model's networks with frozen weights, which checkpoints do not hold.
    base_model: dict[str, str] = field(default_factory=dict)
    # The choice of `engine.gradient_checkpointing: auto`, which a resume keeps; "" in checkpoints before version 0.3.0
    gradient_checkpointing: str = ""
    # The settings and data of the run that saved the state; a resume compares them with its own.
    seed: int = 0
    global_batch_size: int = 0
    world_size: int = 0
    zero_stage: int = 0
    index_fingerprint: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    own_code: dict[str, str] = field(default_factory=dict)  # setting → hash of the user's file that it names

    def save(self, folder: Path) -> None:
        """Write `trainer_state.json`."""
        write_atomic(folder / STATE_FILE, orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2))

    @staticmethod
    def load(folder: Path) -> "TrainState":
        """Read `trainer_state.json`; settings that were saved with an old name get their current one."""
        state = orjson.loads((folder / STATE_FILE).read_bytes())
        rename_settings(state["config"])
        state.setdefault("num_until_update", state["step"])  # before version 0.3.0
        if "feedback" in state:  # since version 0.3.0
            state["feedback"] = FeedbackState.parse(state["feedback"])
        return TrainState(**state)
