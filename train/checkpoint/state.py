"""All that a resume needs besides the weights and the optimizer's moments."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import orjson

from sdxl_trainer.configs.renames import rename_settings
from sdxl_trainer.data.files import write_atomic

FILE = "trainer_state.json"


@dataclass
class TrainState:
    """Where training stands. All random numbers are functions of the seed and these, so there is no generator state."""

    # What the settings, the data and the ranks of now say in a resumed run; everything else goes on as it was saved.
    MADE_WITH: ClassVar[tuple[str, ...]] = (
        "seed",
        "global_batch_size",
        "world_size",
        "zero_stage",
        "index_fingerprint",
        "config",
    )

    step: int = 0  # optimizer steps done
    epoch: int = 0  # position of the next global batch
    index: int = 0
    epoch_batches: int = 0  # global batches in that epoch
    samples_seen: int = 0
    num_bad: int = 0  # samples passed over so far
    num_non_finite: int = 0  # steps without an update, because loss or gradient was not finite
    # What the state was made with; a resume compares.
    seed: int = 0
    global_batch_size: int = 0
    world_size: int = 0
    zero_stage: int = 0
    index_fingerprint: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `trainer_state.json`."""
        write_atomic(folder / FILE, orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2))

    @staticmethod
    def load(folder: Path) -> "TrainState":
        """Read `trainer_state.json`; settings that were saved with an old name get their current one."""
        state = orjson.loads((folder / FILE).read_bytes())
        rename_settings(state["config"])
        return TrainState(**state)
