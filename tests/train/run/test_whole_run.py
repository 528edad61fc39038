"""The programs as users start them: cache on two ranks, train on one and two, resume, export, generate images."""

import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from diffusers_drawing import draw_with_diffusers
from PIL import Image
from programs import read_losses, run_program

from sdxl_trainer.configs.load import load_config
from sdxl_trainer.data.formats.manifest import read_entries
from sdxl_trainer.launch.folder_lock import lock_folder
from sdxl_trainer.train.run.finished import find_finished_step

STEPS_OF_TWO_EPOCHS = 11
PROMPTS = ["a red circle on a white background", "a blue star on a grey background"]


def test_cache_lists_every_image_once(cached_folder: Path) -> None:
    keys = [entry.key for entry in read_entries(cached_folder / "latents")]
    assert len(keys) == len(set(keys)) == 24
    report = json.loads((cached_folder / "latents" / "cache_report.json").read_text())
    assert report["encoded"] == 24 and report["bad"] == 0 and [r["done"] for r in report["ranks"]] == [12, 12]


def test_one_and_two_ranks_have_the_same_losses(one_rank: Path, two_ranks: Path) -> None:
    one, two = read_losses(one_rank), read_losses(two_ranks)
    assert len(one) == len(two) == 20
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
    assert one[0] != one[1] and one[-1] < 0.8 * one[0], "the model did not learn"


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_is_exact(ranks: int, request: pytest.FixtureRequest, cached_folder: Path) -> None:
    """The resumed run ends after two epochs, which have as many steps on one rank as on two."""
    whole = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")
    part = cached_folder / "runs" / f"resumed-{ranks}"
    shutil.copytree(whole / "checkpoints" / "step-00000004", part / "checkpoints" / "step-00000004")
    shutil.copytree(whole / "logs", part / "logs", ignore=shutil.ignore_patterns("tensorboard"))
    words = [f"run.name=resumed-{ranks}", "train.max_steps=null", "train.max_epochs=2", "sample.prompts=[]"]
    # Equal without GPUs, but drawn ahead by a thread.
    words.append(f"run.noise_device={'rank' if ranks == 1 else 'cpu'}")
    printed = run_program("train/main.py", "--cfg", cached_folder / "tiny.yaml", *words, ranks=ranks)
    assert read_losses(part) == read_losses(whole)[:STEPS_OF_TWO_EPOCHS]
    assert f"{STEPS_OF_TWO_EPOCHS} in 2 epochs: {4 * STEPS_OF_TWO_EPOCHS} samples, resumed at step 4" in printed
    config, _ = load_config(cached_folder / "tiny.yaml", words)
    assert find_finished_step(config) == STEPS_OF_TWO_EPOCHS
    longer, _ = load_config(cached_folder / "tiny.yaml", [*words, "train.max_epochs=3"])
    assert find_finished_step(longer) is None


def test_a_finished_run_and_one_in_use_are_left_as_they_are(cached_folder: Path, two_ranks: Path) -> None:
    words = ("--cfg", cached_folder / "tiny.yaml", "run.name=two", "sample.prompts=[]")
    before = {path: path.stat().st_mtime_ns for path in two_ranks.rglob("*") if path.is_file()}
    printed = run_program("train/main.py", *words, "optim.lr=5e-3", ranks=2)
    assert f"done: {two_ranks} is at step 20 and train.max_steps = 20; raise train.max_steps" in printed
    assert "these changed settings train nothing; set another run.name:\n  optim.lr: 0.001 -> 0.005\n" in printed
    assert printed.count(" -> ") == 1
    printed = run_program("train/main.py", *words, "model.path=/no/model", "--dry-run", expect=2)
    assert "model.path = '/no/model'\n      is neither a file nor a folder" in printed and "done: " not in printed
    (two_ranks / "stop").touch()  # for the job that uses the folder
    with lock_folder(two_ranks, "run.name", ""):
        printed = run_program("train/main.py", *words, "train.max_steps=21", expect=2)
    assert f"is being written by another job (host {socket.gethostname()}, process {os.getpid()}," in printed
    (two_ranks / "stop").unlink()
    assert {path: path.stat().st_mtime_ns for path in two_ranks.rglob("*") if path.is_file()} == before


def test_results_are_all_there(one_rank: Path) -> None:
    assert [path.name for path in sorted((one_rank / "checkpoints").iterdir())] == [
        f"step-{step:08d}" for step in (4, 8, 12, 16, 20)
    ]
    assert Image.open(one_rank / "samples" / "step-00000020.png").size == (128 + 4 + 128, 96)
    assert Image.open(one_rank / "report" / "loss.png").width > 400
    assert list((one_rank / "logs" / "tensorboard").glob("events.out.tfevents.*"))
    assert "max_steps: 20" in (one_rank / "config.yaml").read_text()


def test_exported_file_draws_the_live_models_images(one_rank: Path, cached_folder: Path) -> None:
    """diffusers loads the single file with its own code and tokenizer, and generates the live model's images."""
    from diffusers import StableDiffusionXLPipeline

    model = cached_folder / "model"
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(one_rank / "models" / "step-00000020.safetensors"), config=str(model), local_files_only=True
    )
    for number, prompt in enumerate(PROMPTS):
        drawn = draw_with_diffusers(pipeline, prompt, number)
        live = Image.open(one_rank / "samples" / "step-00000020" / f"{number:03d}.png")
        difference = np.abs(drawn - np.asarray(live, np.int16))
        assert difference.max() <= 1, f"image {number} differs by up to {difference.max()} of 255"


def test_bad_inputs_are_all_named_at_once(cached_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sd15" / "unet").mkdir(parents=True)
    words: list[str | Path] = ["train/main.py", "--cfg", cached_folder / "tiny.yaml", f"model.path={tmp_path}/sd15"]
    words += ["data.image_dirs=[no/such/folder]", "train.global_batch_size=5"]
    wrong_values = ("run.nmae", "did you mean run.name?", "optim.lr", "must be a number")
    others = ("model.path", "is not an SDXL model", "data.image_dirs.0", "is not a folder")
    others += ("train.global_batch_size", "is not a multiple")
    # What has no value is not compared with other settings and with data.
    printed = run_program(*words, "run.nmae=x", "optim.lr=fast", expect=2)
    assert [text for text in (*wrong_values, "2 problems") if text not in printed] == []
    printed = run_program(*words, expect=2)
    assert [text for text in others if text not in printed] == [] and "Traceback" not in printed
