"""A rank hangs in a collective, as under NCCL without an exception: the watchdog saves the last whole step."""

import os
from pathlib import Path

import pytest
import torch
from forked_ranks import run_forked
from reshard_ranks import AVERAGE

from sdxl_trainer.train.checkpoint.folder import find_newest_checkpoint, recover_partial_checkpoints
from sdxl_trainer.train.engine.saved_state import AVERAGE as AVERAGE_PREFIX
from sdxl_trainer.train.engine.saved_state import STATE_TAG, SavedState, map_state_file

PROGRAM = Path(__file__).parents[2] / "support" / "hanging_ranks.py"
LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("stage", "place"),
    [(2, "norm"), (3, "forward"), pytest.param(1, "norm", marks=LONG), pytest.param(3, "norm", marks=LONG)],
)
def test_ranks_that_wait_for_a_hung_one_save_the_step(stage: int, place: str, tmp_path: Path) -> None:
    """Both ranks save, the hung one too, so the next start loses no step."""
    status, printed = run_forked(PROGRAM, [str(tmp_path), str(stage), place], 2, dict(os.environ), timeout=60)
    assert status == 1, printed
    assert printed.count(f"minutes in: training (waiting in {place}), last finished step 3") == 2, printed
    assert printed.count("shard of step 3 written") == 2, printed
    recover_partial_checkpoints(tmp_path)
    newest = find_newest_checkpoint(tmp_path)
    assert newest == tmp_path / "step-00000003", printed
    saved, expected = SavedState(newest / STATE_TAG, map_state_file), torch.load(tmp_path / "expected.pt")
    for name in saved.shapes:
        assert torch.equal(saved.read_whole(name), expected[name])
        assert torch.equal(saved.read_whole(name, AVERAGE_PREFIX + AVERAGE), expected[f"{name} {AVERAGE}"])
