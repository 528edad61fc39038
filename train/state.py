"""All that a resume needs besides the weights and the optimizer's moments."""

from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from sdxl_trainer.data.files import write_atomic

FILE = "trainer_state.json"


@dataclass
class TrainState:
    """Where training stands. All random numbers are functions of the seed and these, so there is no generator state."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # position of the next global batch
    index: int = 0
    samples_seen: int = 0
    num_bad: int = 0  # samples passed over so far
    # What the state was made with; a resume compares.
    seed: int = 0
    global_batch_size: int = 0
    world_size: int = 0
    zero_stage: int = 0
    index_fingerprint: str = ""

    def save(self, folder: Path) -> None:
        """Write `trainer_state.json`."""
        write_atomic(folder / FILE, orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2))

    @staticmethod
    def load(folder: Path) -> "TrainState":
        """Read `trainer_state.json`."""
        return TrainState(**orjson.loads((folder / FILE).read_bytes()))
