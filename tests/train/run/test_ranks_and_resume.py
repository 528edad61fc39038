"""Settings that draw more than plain training does: equal on any number of ranks, and resumed on others."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from programs import read_losses, run_program

from sdxl_trainer.train.checkpoint.state import TrainState

STEPS = 12
FLOW = (
    "objective.prediction=flow",
    "objective.timestep_density=cosmap",
    "objective.timestep_shift=3",
    "objective.timestep_shift_base_px=128",
    "objective.low_discrepancy=true",
    "objective.noise_candidates=20",
    "objective.contrastive_weight=0.05",
)

# Captions of 60 to 180 tokens, in one to three windows, of which some words have weights.
STRATEGY = '''
class Described:
    """Describe each image at some length."""

    def caption(self, record, rng):
        details = [f"(detail {number}:{rng.uniform(0.5, 1.5):.2f})" for number in range(rng.integers(10, 30))]
        return ", ".join([record["caption"], "tiny shape", *details])
'''
LONG_CAPTIONS = (
    "data.max_tokens=225",
    "data.caption.weighted=true",
    "data.caption.shuffle=true",
    "data.caption.tag_dropout_rate=0.3",
    "data.caption.protected_tags=[drawing]",
)


@pytest.mark.long
@pytest.mark.parametrize("name", ["flow", "captions"])
def test_a_run_resumes_on_one_and_two_ranks(name: str, cached_folder: Path, tmp_path: Path) -> None:
    """1 → 2 → 1 ranks: a flow with the nearest of 20 noises and negatives from the batch; long weighted captions."""
    settings = list(FLOW)
    if name == "captions":
        (tmp_path / "strategy.py").write_text(STRATEGY)
        (tmp_path / "aliases.csv").write_text("tiny_shape,drawing\n")
        (tmp_path / "implications.csv").write_text("drawing,art\n")
        settings = [
            *LONG_CAPTIONS,
            f"data.strategy={tmp_path}/strategy.py:Described",
            f"data.caption.aliases={tmp_path}/aliases.csv",
            f"data.caption.implications={tmp_path}/implications.csv",
        ]
    runs = cached_folder / "runs"
    whole, resumed = runs / name, runs / f"{name}-resumed"

    def train(run: Path, ranks: int, steps: int) -> None:
        words = (f"run.name={run.name}", f"train.max_steps={steps}", "optim.schedule=constant", "sample.prompts=[]")
        run_program("train/main.py", "--cfg", cached_folder / "tiny.yaml", *words, *settings, ranks=ranks)

    train(whole, ranks=1, steps=STEPS)
    shutil.copytree(whole / "checkpoints" / "step-00000004", resumed / "checkpoints" / "step-00000004")
    shutil.copytree(whole / "logs", resumed / "logs", ignore=shutil.ignore_patterns("tensorboard"))
    train(resumed, ranks=2, steps=8)
    assert TrainState.load(resumed / "checkpoints" / "step-00000008").world_size == 2
    train(resumed, ranks=1, steps=STEPS)
    losses = read_losses(resumed)
    assert len(losses) == STEPS
    np.testing.assert_allclose(losses, read_losses(whole), rtol=0, atol=1e-5)
