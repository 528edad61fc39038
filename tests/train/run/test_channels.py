"""A run that adapts the 4-channel U-Net to a VAE with more: training, resume, images, export and import."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from programs import read_losses, run_program
from safetensors import safe_open
from safetensors.torch import load_file

from sdxl_trainer.cache.models.components import read_component
from sdxl_trainer.cache.models.model_pair import resolve_pair
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.data.images.demo_set import draw_demo_set
from sdxl_trainer.train.convert import main as convert
from sdxl_trainer.train.tiny.build import CONFIG_FOLDER, load_wide_vae
from sdxl_trainer.train.tiny.wide_vae import WIDE_SCALES

STEPS = 4
CONV_IN, CONV_OUT = "model.diffusion_model.input_blocks.0.0.", "model.diffusion_model.out.2."
# Only the two new layers train.
FIRST_STAGE = "optim.groups=[{match: '^unet[.]conv_(in|out)[.]', lr: 0.001}, {match: '', lr: 0}]"
RELEASE = ("engine.gradient_release=true", "engine.offload_blocks=20", "engine.gradient_checkpointing=full")


def write_settings(tiny_folder: Path, folder: Path, channels: int) -> Path:
    """Write the settings of a run of the 4-channel tiny SDXL with a VAE of `channels`, and its images."""
    load_wide_vae(channels).save_pretrained(folder / "vae")
    config = yaml.safe_load((tiny_folder / "tiny.yaml").read_text())
    config["run"] = {"dir": str(folder), "name": "unnamed"}
    config["model"] |= {"vae": str(folder / "vae"), "adapt_channels": True}
    config["data"]["metadata"] = [str(draw_demo_set(folder / "data", num_images=8))]
    config["cache"]["dir"] = str(folder / "latents")
    config["objective"] = {"prediction": "flow"}
    config["optim"] |= {"max_grad_norm": 0}
    config["train"] |= {"max_steps": STEPS, "micro_batch_size": 4, "global_batch_size": 4}
    config["checkpoint"] |= {"every_steps": 0}
    config["sample"] |= {"prompts": config["sample"]["prompts"][:1], "num_inference_steps": 2}
    config["ema"] = {"decays": [0.5], "sample": False}
    (folder / "settings.yaml").write_text(yaml.safe_dump(config))
    return folder / "settings.yaml"


@pytest.fixture(scope="module", params=[16, pytest.param(32, marks=pytest.mark.long)])
def runs(request, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `straight` (4 steps on one rank), `resumed` (on 1, 2 and 1 ranks), `first` (the new layers alone), and
    `released` (with gradient release and offloaded blocks)."""
    folder = tmp_path_factory.mktemp(f"channels-{request.param}")
    settings = write_settings(tiny_folder, folder, request.param)
    quiet = "sample.prompts=[]"
    starts = [
        ["cache", settings],
        ["train", settings, "run.name=straight", "engine.zero_stage=0"],
        ["train", settings, "run.name=resumed", "engine.zero_stage=1", "train.max_steps=1", quiet],
        ["train", settings, "run.name=first", "engine.zero_stage=2", "train.max_steps=2", FIRST_STAGE, quiet],
        ["train", settings, "run.name=released", "train.max_steps=2", *RELEASE, quiet],
    ]
    words = [word for start in starts for word in ("+", *start)][1:]
    (folder / "log").write_text(run_program("tests/support/several_runs.py", *words))
    resumed = ("--cfg", settings, "run.name=resumed", quiet)
    run_program(
        "train/main.py", *resumed, "engine.zero_stage=3", "train.micro_batch_size=2", "train.max_steps=3", ranks=2
    )
    run_program("train/main.py", *resumed, "engine.zero_stage=2")
    return folder


@pytest.fixture
def channels(runs: Path) -> int:
    return json.loads((runs / "vae" / "config.json").read_text())["latent_channels"]


def read_model(runs: Path, name: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(runs / name / "models" / f"step-{step:08d}.safetensors")


def test_losses_are_equal_on_any_ranks_and_engine(runs: Path, channels: int) -> None:
    straight = read_losses(runs / "straight")
    assert len(straight) == STEPS
    np.testing.assert_allclose(read_losses(runs / "resumed"), straight, rtol=0, atol=1e-5)
    np.testing.assert_allclose(read_losses(runs / "released"), straight[:2], rtol=0, atol=1e-5)
    # The new last layer predicts nearly nothing, so the first loss is that of the target alone: 1 for the noise, and
    # the energy of x0, which the VAE's statistics bring to about 1.
    assert 1.6 < straight[0] < 2.6
    text = f"the U-Net is adapted from 4 to {channels} channels: its conv_in and conv_out begin with new weights"
    assert (runs / "log").read_text().count(text) == 4  # once for each run, and not at a resume


def test_only_the_new_layers_move_in_the_first_stage(runs: Path, tiny_folder: Path) -> None:
    config, _ = load_config(runs / "settings.yaml")
    source = resolve_pair(config)
    start, found = dict(read_component(source, "unet")), read_model(runs, "first", step=2)
    exported = ModelSource(CONFIG_FOLDER, runs / "first" / "models" / "step-00000002.safetensors")
    moved = {name for name, weight in read_component(exported, "unet") if not weight.equal(start[name])}
    assert moved == {"conv_in.weight", "conv_in.bias", "conv_out.weight", "conv_out.bias"}
    assert found[CONV_IN + "weight"].shape[1] == found[CONV_OUT + "weight"].shape[0]


def test_the_exported_file_holds_unet_vae_and_statistics(runs: Path, channels: int) -> None:
    scale, path = WIDE_SCALES[channels], runs / "straight" / "models" / f"step-{STEPS:08d}.safetensors"
    config, problems = load_config(
        runs / "settings.yaml", [f"model.path={path}", f"model.config={CONFIG_FOLDER}", "model.vae=null"]
    )
    assert problems == []
    source = resolve_pair(config)
    assert source.adaptation is None and source.read_config("unet")["in_channels"] == channels
    vae = source.read_config("vae")
    assert (vae["latent_channels"], vae["scaling_factor"], vae["shift_factor"]) == (channels, *scale)
    expected = load_wide_vae(channels).state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in read_component(source, "vae"))
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["sdxl_trainer.vae"])["latent_channels"] == channels
    images = list((runs / "straight" / "samples").rglob("*.png"))
    assert images, "images are generated during the run"


def test_conversion_to_a_folder_and_back_is_bit_equal(runs: Path, channels: int, tmp_path: Path) -> None:
    path = runs / "straight" / "models" / f"step-{STEPS:08d}.safetensors"
    words = ["--dtype", "fp32", f"model.config={CONFIG_FOLDER}"]
    assert convert([str(path), str(tmp_path / "model"), *words]) == 0
    assert convert([str(tmp_path / "model"), str(tmp_path / "again.safetensors"), "--dtype", "fp32"]) == 0
    tensors, again = load_file(path), load_file(tmp_path / "again.safetensors")
    assert tensors.keys() == again.keys() and all(tensors[name].equal(again[name]) for name in tensors)
    with safe_open(path, "pt") as first, safe_open(tmp_path / "again.safetensors", "pt") as second:
        kept = [json.loads(file.metadata()["sdxl_trainer.vae"]) for file in (first, second)]
    assert [vae["shift_factor"] for vae in kept] == [WIDE_SCALES[channels].shift_factor] * 2
    assert_diffusers_decodes(tmp_path / "model", channels)


def assert_diffusers_decodes(model: Path, channels: int) -> None:
    """Assert that diffusers' own pipeline takes the channels and the scaling from the folder; it ignores the shift."""
    from diffusers import StableDiffusionXLPipeline

    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels == channels
    scale = WIDE_SCALES[channels]
    assert pipeline.vae.config.shift_factor == scale.shift_factor
    settings: dict[str, Any] = {"prompt": "a red circle", "width": 128, "height": 96, "num_inference_steps": 1}
    settings["latents"] = torch.randn(1, channels, 12, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x0 = pipeline(**settings, output_type="latent").images
        expected = pipeline.vae.decode(x0 / scale.scaling_factor).sample[0]
    image = pipeline(**settings, output_type="np").images[0]
    np.testing.assert_allclose(image, (expected.permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1), atol=1e-4)
