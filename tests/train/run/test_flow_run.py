"""A rectified flow with everything that goes with it: equal on any number of ranks, and resumed on others."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from programs import read_losses, run_program

from sdxl_trainer.train.checkpoint.state import TrainState

STEPS = 12
SETTINGS = (
    "objective.prediction=flow",
    "objective.timestep_density=cosmap",
    "objective.timestep_shift=3",
    "objective.timestep_shift_base_px=128",
    "objective.low_discrepancy=true",
    "objective.noise_candidates=20",
    "objective.contrastive_weight=0.05",
    "optim.schedule=constant",
    "sample.prompts=[]",
)


@pytest.mark.long
def test_a_flow_resumes_on_one_and_two_ranks(cached_folder: Path) -> None:
    """1 → 2 → 1 ranks, with the nearest of 20 noises and negatives from the micro batch."""
    runs = cached_folder / "runs"
    whole, resumed = runs / "flow", runs / "flow-resumed"

    def train(run: Path, ranks: int, steps: int) -> None:
        words = ("--cfg", cached_folder / "tiny.yaml", f"run.name={run.name}", f"train.max_steps={steps}", *SETTINGS)
        run_program("train/main.py", *words, ranks=ranks)

    train(whole, ranks=1, steps=STEPS)
    shutil.copytree(whole / "checkpoints" / "step-00000004", resumed / "checkpoints" / "step-00000004")
    shutil.copytree(whole / "logs", resumed / "logs", ignore=shutil.ignore_patterns("tensorboard"))
    train(resumed, ranks=2, steps=8)
    assert TrainState.load(resumed / "checkpoints" / "step-00000008").world_size == 2
    train(resumed, ranks=1, steps=STEPS)
    losses = read_losses(resumed)
    assert len(losses) == STEPS
    np.testing.assert_allclose(losses, read_losses(whole), rtol=0, atol=1e-5)
