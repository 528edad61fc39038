"""Runs with a learned weighting and adaptive timesteps: equal on any number of ranks, resumed, and in the report."""

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
from programs import read_losses, run_program

from sdxl_trainer.train.checkpoint.state import TrainState

STEPS = 8
SETTINGS = ("objective.learned_weighting=true", "objective.adaptive_timestep_bins=2", "sample.prompts=[]")


def train(settings: Path, name: str, ranks: int, steps: int, with_report: bool = False) -> None:
    words = (f"run.name={name}", f"train.max_steps={steps}", "optim.schedule=constant", *SETTINGS)
    program = ("train/main.py", "--cfg") if with_report else ("tests/support/several_runs.py", "train")
    run_program(*program, settings, *words, ranks=ranks, writes_report=with_report)


def load_state(run: Path, step: int) -> TrainState:
    return TrainState.load(run / "checkpoints" / f"step-{step:08d}")


def test_one_and_two_ranks_and_a_resume_learn_the_same(cached_folder: Path, one_rank: Path) -> None:
    """1 → 2 → 1 ranks. After step 6 each bin has 10 losses, and timesteps are adaptive."""
    settings, runs = cached_folder / "tiny.yaml", cached_folder / "runs"
    whole, resumed = runs / "feedback", runs / "feedback-resumed"
    train(settings, whole.name, ranks=1, steps=STEPS)
    shutil.copytree(whole / "checkpoints" / "step-00000004", resumed / "checkpoints" / "step-00000004")
    shutil.copytree(whole / "logs", resumed / "logs", ignore=shutil.ignore_patterns("tensorboard"))
    train(settings, resumed.name, ranks=2, steps=7)
    assert load_state(resumed, 7).world_size == 2
    train(settings, resumed.name, ranks=1, steps=STEPS, with_report=True)
    losses = read_losses(whole)
    np.testing.assert_allclose(read_losses(resumed), losses, rtol=0, atol=1e-5)
    # The logged loss is unweighted, so it begins as that of a plain run; then the weights lead elsewhere.
    plain = read_losses(one_rank)[:STEPS]
    np.testing.assert_allclose(losses[:2], plain[:2], rtol=0, atol=1e-5)
    assert abs(losses[-1] - plain[-1]) > 1e-4
    first, last, other = load_state(whole, 4).feedback, load_state(whole, STEPS).feedback, load_state(resumed, STEPS)
    assert sum(map(len, first.timestep_losses)) == 16 and list(map(len, last.timestep_losses)) == [10, 10]
    np.testing.assert_allclose(other.feedback.timestep_losses, last.timestep_losses, rtol=0, atol=1e-5)
    assert last.weighting is not None and last.weighting.num_updates == STEPS and other.feedback.weighting is not None
    for name, values in asdict(last.weighting).items():
        np.testing.assert_allclose(getattr(other.feedback.weighting, name), values, rtol=0, atol=1e-5, err_msg=name)
    report = resumed / "report"
    assert (report / "learned_weighting.png").is_file() and (report / "adaptive_timesteps.png").is_file()
    page = (report / "report.html").read_text()
    assert "Learned weight of the loss" in page and "bins of timesteps: 2; from 0." in page
