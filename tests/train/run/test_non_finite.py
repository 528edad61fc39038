"""A loss or gradient that is not finite makes no update, lists its samples, and continues or stops as set."""

import math
import shutil
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from programs import run_program

from sdxl_trainer.data.formats.manifest import read_entries
from sdxl_trainer.train.checkpoint.folder import list_checkpoints
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.report.metrics import read_metrics
from sdxl_trainer.train.run.non_finite import propagate_non_finite


def test_the_engine_forgets_a_step_that_is_not_finite() -> None:
    """ZeRO 0 to 3 in fp32 and bf16, with a spoilt loss or gradient on the last of two ranks only."""
    printed = run_program("tests/support/engine_updates.py", ranks=2)
    assert printed.count(": ok") == 16 and "WRONG" not in printed, printed


def test_a_loss_that_is_not_finite_has_a_gradient_that_is_not() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    propagate_non_finite((weight - math.inf).abs().mean()).backward()
    assert weight.grad is not None and weight.grad.isnan().all()
    weight.grad = None
    loss = propagate_non_finite(weight.square().sum())
    loss.backward()
    assert loss.item() == 5 and weight.grad.tolist() == [2, 4]


@pytest.fixture(scope="module")
def spoilt_cache(cached_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Copy the cache with one latent set to 1e30, which is finite while its square is not; return folder and key."""
    folder = tmp_path_factory.mktemp("spoilt") / "latents"
    shutil.copytree(cached_folder / "latents", folder, ignore=shutil.ignore_patterns("index"))
    entry = min(read_entries(folder), key=lambda entry: entry.key)
    with np.load(folder / entry.file) as arrays:
        content = dict(arrays)
    content["latents"][:] = 1e30
    np.savez(folder / entry.file, **content)
    return folder, entry.key


def read_named(run: Path) -> list[dict]:
    return [
        orjson.loads(line)
        for file in sorted((run / "logs").glob("bad_samples*.jsonl"))
        for line in file.read_bytes().splitlines()
    ]


def read_losses(run: Path) -> list[float | None]:
    return [line["loss"] for line in read_metrics(run / "logs" / "metrics.jsonl")]


def test_a_run_can_go_back_before_the_update_that_broke_its_weights(cached_folder: Path, tmp_path: Path) -> None:
    """The third step moves each weight by 1e30, so that no later step makes an update."""
    words = ["--cfg", cached_folder / "tiny.yaml", f"run.dir={tmp_path}", "run.name=run", "sample.prompts=[]"]
    words += [
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=1",
        "validation.share=0",
        "train.max_non_finite_steps=5",
    ]
    run_program("train/main.py", *words, "train.max_steps=2")
    broken = ["train.max_steps=30", "optim.lr=1.0e+30"]
    printed = run_program("train/main.py", *words, *broken, expect=1)
    folder = tmp_path / "run" / "checkpoints"
    assert "the last update, that of step 2, has probably broken the weights" in printed
    assert f"Delete the checkpoints after {folder / 'step-00000002'}" in printed
    first, last = list_checkpoints(folder)
    assert (first.name, last.name) == ("step-00000002", "step-00000008")
    shutil.rmtree(last)
    printed = run_program("train/main.py", *words, "train.max_steps=4")
    assert "made no update" not in printed and TrainState.load(list_checkpoints(folder)[-1]).step == 4


def test_samples_are_named_and_the_policy_is_kept(cached_folder: Path, spoilt_cache: tuple[Path, str]) -> None:
    """A run on one rank skips each bad step and continues. Two ranks may skip one step; they stop at the second,
    and save the state before it."""
    cache, key = spoilt_cache
    words = (
        "--cfg",
        cached_folder / "tiny.yaml",
        f"cache.dir={cache}",
        "sample.prompts=[]",
        "objective.prediction=v",
        "checkpoint.every_steps=0",
    )
    skipping, stopping = (cached_folder / "runs" / name for name in ("skipping", "stopping"))
    printed = run_program("train/main.py", *words, "run.name=skipping")
    named = read_named(skipping)
    assert {(line["key"], line["file"], line["reason"]) for line in named} == {(key, f"{key}.npz", "its loss is nan")}
    first, second = sorted({line["step"] for line in named})[:2]
    assert f"step {first} made no update: its loss is nan; samples: {key} (1 of at most 10 such steps)" in printed
    losses = read_losses(skipping)
    assert len(losses) == 20
    assert [step for step, loss in enumerate(losses) if loss is None] == sorted({line["step"] for line in named})
    assert all(math.isfinite(loss) for loss in losses if loss is not None)

    printed = run_program(
        "train/main.py", *words, "run.name=stopping", "train.max_non_finite_steps=1", ranks=2, expect=1
    )
    assert f"the loss is nan in step {second}, which made no update" in printed
    steps = sorted(line["step"] for line in named if line["step"] <= second)
    assert sorted(line["step"] for line in read_named(stopping)) == steps
    np.testing.assert_allclose(
        np.array(read_losses(stopping), float), np.array(losses[:second], float), rtol=0, atol=1e-5
    )
    saved = list_checkpoints(stopping / "checkpoints")
    assert [path.name for path in saved] == [f"step-{second:08d}"]
    state = TrainState.load(saved[0])
    assert (state.step, state.num_non_finite, state.samples_seen) == (second, 1, 4 * second)
