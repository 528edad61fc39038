"""Contradictory settings end the programs with status 2 before weights are read, with one problem and its cure."""

import json
import shutil
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
from programs import TINY

from sdxl_trainer.configs.load import load_config
from sdxl_trainer.data.formats.latents import LatentSample, write_latents
from sdxl_trainer.data.images.bucket import CropBox, Size
from sdxl_trainer.train.main import main
from sdxl_trainer.train.run.checks import check_warmup, verify_run

BLOCKS = [1e-5] * 23


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a run on four latents, with a model whose weight files are empty, so that reading one would fail."""
    folder = tmp_path_factory.mktemp("settings")
    shutil.copytree(TINY, folder / "model")
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (folder / "model" / name / "x.safetensors").touch()
    (folder / "data").mkdir()
    for number in range(4):
        sample = LatentSample(
            latents=np.zeros((4, 8, 8), np.float32), original_size=Size(64, 64), crop_ltrb=CropBox(0, 0, 64, 64)
        )
        write_latents(folder / "data" / f"{number}.npz", sample)
        (folder / "data" / f"{number}.txt").write_text("a b, c")
    (folder / "settings.yaml").write_text(
        json.dumps(
            {
                "run": {"dir": str(folder / "runs")},
                "model": {"path": str(folder / "model")},
                "data": {"image_dirs": [str(folder / "data")], "resolution_px": 64, "min_bucket_px": 64},
            }
        )
    )
    return folder / "settings.yaml"


def test_consistent_settings_have_no_problems(settings: Path) -> None:
    config, problems = load_config(settings)
    assert [*problems, *verify_run(config, 1)[1]] == []


@pytest.mark.parametrize(
    ("words", "key", "message"),
    [
        ("train.max_steps=5 train.max_epochs=2", "train.max_epochs", "set one of them to null"),
        ("train.max_epochs=1 train.global_batch_size=64", "train.max_epochs", "is too few"),
        ("objective.zero_terminal_snr=true", "objective.zero_terminal_snr", "set it to v"),
        ("objective.prediction=flow objective.weighting=min_snr", "objective.weighting", "set it to none"),
        ("objective.weighting=v_like_epsilon", "objective.weighting", "needs objective.prediction v"),
        (
            "objective.learned_weighting=true objective.weighting=min_snr",
            "objective.learned_weighting",
            "cannot be used with objective.weighting, which is min_snr; set that to none",
        ),
        ("objective.masked_loss=true", "objective.masked_loss", "set data.masks, or cache.alpha_mask: true"),
        ("cache.text=true data.caption.shuffle=true", "cache.text_variants", "set cache.text_variants to 2 or more"),
        ("cache.text=true optim.text_encoder_lr=1e-6", "optim.text_encoder_lr", "set it to 0, or cache.text: false"),
        ("cache.text=true", "cache.text", "run bash launch/cache.sh with the same settings"),
        ("data.flip_rate=0.5", "data.flip_rate", "set cache.flip: true"),
        (f"optim.block_lrs={BLOCKS[1:]}", "optim.block_lrs", "needs 23 learning rates"),
        (f"optim.block_lrs={[0] * 23}", "optim", "set one above 0"),
        ("optim.groups=[{match: atn2}]", "optim.groups.0.match", "match names such as unet.conv_in.weight"),
        ("optim.groups=[{match: text_encoder}]", "optim.groups.0.match", "matches none of the"),
        ("optim.groups=[{match: unet, lr: 0}]", "optim", "nothing is trained"),
        ("optim.name=sgd", "optim.name", "for a class of your own write path/to/file.py:Class"),
        ("optim.name=nowhere.Adam", "optim.name", "pip install nowhere"),
        ("optim.name=adafactor engine.zero_stage=2", "optim.name", "set engine.zero_stage: 0"),
        ("optim.name=prodigy engine.zero_stage=0", "optim.lr", "set it to 1"),
        ("optim.schedule=cosine optim.decay_steps=5", "optim.decay_steps", "set that to wsd"),
        ("optim.schedule=wsd", "optim.decay_steps", "must be above 0"),
        ("optim.groups=[{match: '(', lr: 0}]", "optim.groups.0.match", "is not a regular expression"),
        ("optim.groups=[{match: a, lr: x}]", "optim.groups.0.lr", "must be a number"),
        ("optim.groups=[{lr: 0}]", "optim.groups.0.match", "must be set"),
        ("optim.min_lr_ratio=0.1", "optim.min_lr_ratio", "choose another, or leave this out"),
        ("engine.zero_stage=0 engine.precision=fp16", "engine.precision", "needs engine.zero_stage 1, 2 or 3"),
        ("engine.offload_param=true engine.zero_stage=3", "engine.offload_param", "engine.offload_optimizer: true"),
        ("engine.initial_loss_scale_power=8", "engine.initial_loss_scale_power", "engine.precision is not fp16"),
        ("engine.deepspeed={zero_optimization: {stage: 1}}", "engine.deepspeed", "set engine.zero_stage instead"),
        ("engine.deepspeed={gradient_clipping: 3}", "engine.deepspeed", "set optim.max_grad_norm instead"),
        ("engine.accumulation_dtype=fp16", "engine.accumulation_dtype", "set it to auto or fp32 or bf16"),
        ("engine.precision=fp32 engine.accumulation_dtype=bf16", "engine.accumulation_dtype", "set it to auto or fp32"),
        ("engine.communication_dtype=fp16", "engine.communication_dtype", "set it to auto or fp32 or bf16"),
        (
            "optim.name=muon optim.max_grad_norm=0 engine.accumulation_dtype=fp32",
            "engine.accumulation_dtype",
            "set it to auto, or set engine.precision: fp32",
        ),
        (
            "engine.deepspeed={communication_data_type: fp16}",
            "engine.deepspeed",
            "set engine.communication_dtype instead",
        ),
        (
            "engine.deepspeed={data_types: {grad_accum_dtype: fp32}}",
            "engine.deepspeed",
            "set engine.accumulation_dtype instead",
        ),
        ("engine.deepspeed={bf16: true}", "engine.deepspeed", "must contain a mapping under bf16"),
        ("lora.alpha=4", "lora.alpha", "lora.rank is 0; set that above 0"),
        (
            "lora.rank=4 lora.targets=[to_x]",
            "lora.targets",
            "the default is the layers that kohya's scripts train",
        ),
        ("lora.rank=4 checkpoint.export_format=diffusers", "checkpoint.export_format", "leave it out"),
        ("validation.every_steps=5", "validation.every_steps", "set validation.share"),
        ("validation.share=0.99", "validation.share", "did you mean 0.01?"),
        ("sample.at_start=true", "sample.at_start", "set sample.prompts"),
        ("sample.prompts=[a] sample.sampler=ddim objective.prediction=flow", "sample.sampler", "euler, dpmpp_2m"),
        (
            "objective.prediction=flow objective.contrastive_weight=0.05",
            "objective.contrastive_weight",
            "set train.micro_batch_size to 2 or more",
        ),
        (
            "train.global_batch_size=3 train.micro_batch_size=2",
            "train.global_batch_size",
            "set the global batch to a multiple of 2",
        ),
    ],
)
def test_a_contradiction_ends_with_status_2(
    settings: Path, words: str, key: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    overrides = words.replace(": ", ":\t").replace(", ", ",\t").split(" ")  # keep spaces inside a word
    assert main(["--cfg", str(settings), *(word.replace("\t", " ") for word in overrides)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n  - ") == 1 and f"\n  - {key}" in printed and message in printed, printed
    assert not list(settings.parent.glob("runs/*/config.yaml"))


@pytest.mark.skipif("wandb" in packages_distributions(), reason="wandb is installed")
@pytest.mark.parametrize(
    ("steps", "warmup_steps", "is_doubtful"), [(100, 100, True), (100, 99, False), (1, 100, False)]
)
def test_a_warmup_as_long_as_the_run_is_doubtful(settings: Path, steps: int, warmup_steps: int, is_doubtful: bool):
    words = [f"train.max_steps={steps}", f"optim.warmup_steps={warmup_steps}"]
    found = [problem.key for problem in check_warmup(load_config(settings, words)[0])]
    assert found == (["optim.warmup_steps"] if is_doubtful else [])


def test_a_missing_package_is_reported(settings: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--cfg", str(settings), "log.wandb=mine"]) == 2
    printed = capsys.readouterr().err
    assert "\n  - log.wandb = 'mine'" in printed and "cure: pip install wandb, or leave it out" in printed
    assert not list(settings.parent.glob("runs/*/config.yaml"))


def test_masked_loss_needs_at_least_one_mask(settings: Path, tmp_path: Path) -> None:
    data = shutil.copytree(settings.parent / "data", tmp_path / "data", ignore=shutil.ignore_patterns("index"))
    mask = np.ones((64, 64), np.float32)
    sample = LatentSample(
        latents=np.zeros((4, 8, 8), np.float32),
        original_size=Size(64, 64),
        crop_ltrb=CropBox(0, 0, 64, 64),
        alpha_mask=mask,
    )
    write_latents(data / "3.npz", sample)
    config, _ = load_config(settings, ["objective.masked_loss=true", f"data.image_dirs=[{data}]"])
    assert verify_run(config, 1)[1] == []


def test_regularisation_settings_need_regularisation_samples(settings: Path, capsys: pytest.CaptureFixture) -> None:
    """The problem is found when the order of batches is built, before weights are read."""
    assert main(["--cfg", str(settings), "objective.prior_loss_weight=0.5", "data.regularisation_repeats=2"]) == 2
    printed = capsys.readouterr().err
    assert "2 problems" in printed and "objective.prior_loss_weight = 0.5" in printed
    assert "give data.regularisation_dirs" in printed
