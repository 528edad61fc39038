"""U-Nets for VAEs with another number of channels: refused, or given new first and last layers."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from sdxl_trainer.cache.models.adaptation import NEW_WEIGHTS
from sdxl_trainer.cache.models.components import open_component, read_component
from sdxl_trainer.cache.models.model_pair import check_pair, describe_adaptation, resolve_pair
from sdxl_trainer.cache.models.single_file import write_single_file
from sdxl_trainer.cache.models.source import COMPONENTS, ModelSource, check_model
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.networks.trained_networks import load_unet
from sdxl_trainer.train.tiny.build import CONFIG_FOLDER, build_tiny_sdxl, load_wide_vae

CHANNELS = 16
LAYERS = ("conv_in.weight", "conv_in.bias", "conv_out.weight", "conv_out.bias")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL with 4 channels as a folder and as a file, and the tiny VAE with 16."""
    folder = tmp_path_factory.mktemp("models")
    base = ModelSource(build_tiny_sdxl(folder / "base"))
    load_wide_vae(CHANNELS).save_pretrained(folder / "vae")
    tensors = {name: dict(read_component(base, name)) for name in COMPONENTS}
    configs = {name: base.read_config(name) for name in COMPONENTS}
    write_single_file(folder / "base.safetensors", tensors, configs, dtype=torch.float32, metadata={})
    return folder


def build(models: Path, *words: str, path: str = "base", vae: bool = True) -> Config:
    given = [f"model.path={models / path}", *([f"model.vae={models / 'vae'}"] if vae else []), *words]
    given += [f"model.config={CONFIG_FOLDER}"] if path.endswith(".safetensors") else []
    config, problems = build_config({}, given)
    assert problems == []
    return config


@pytest.mark.parametrize("path", ["base", "base.safetensors"])
def test_only_the_first_and_the_last_layer_are_new(models: Path, path: str) -> None:
    config = build(models, "model.adapt_channels=true", "run.seed=7", path=path)
    source = resolve_pair(config)
    assert source.read_config("unet") == source.read_stored_config("unet") | {"in_channels": 16, "out_channels": 16}
    stored = dict(read_component(ModelSource(source.folder, source.file), "unet"))
    adapted = dict(read_component(source, "unet"))
    opened = {name: read() for name, read in open_component(source, "unet").items() if callable(read)}
    unet = dict(load_unet(source, config.engine).named_parameters())
    assert adapted.keys() == opened.keys() == unet.keys() == stored.keys()
    changed = {name for name in stored if not adapted[name].equal(stored[name])}
    assert changed == set(LAYERS) == set(NEW_WEIGHTS)
    assert all(opened[name].equal(adapted[name]) and unet[name].equal(adapted[name]) for name in stored)
    width = len(stored["conv_in.bias"])
    shapes = [(width, CHANNELS, 3, 3), (width,), (CHANNELS, width, 3, 3), (CHANNELS,)]
    assert [tuple(adapted[name].shape) for name in LAYERS] == shapes
    first, bias, last, zeros = (adapted[name] for name in LAYERS)
    bound = 1 / math.sqrt(CHANNELS * 9)  # torch's own for a new convolution
    assert first.abs().max() <= bound and first.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert 0.5 * bound < bias.abs().max() <= bound
    assert 0 < last.std().item() == pytest.approx(1e-3, rel=0.05) and not zeros.any()


def test_new_weights_depend_on_the_seed_alone(models: Path) -> None:
    words = ["model.adapt_channels=true"]
    first, again, other = (
        dict(read_component(resolve_pair(build(models, *words, f"run.seed={seed}", path=path)), "unet"))
        for seed, path in ((7, "base"), (7, "base.safetensors"), (8, "base"))
    )
    assert all(first[name].equal(again[name]) for name in LAYERS)
    assert not any(first[name].equal(other[name]) for name in LAYERS[:3])


@pytest.mark.parametrize("path", ["base", "base.safetensors"])
def test_other_channels_are_refused_unless_the_settings_adapt_them(models: Path, path: str) -> None:
    config = build(models, path=path)
    assert list(check_model(config.model)) == []
    [problem] = check_pair(config)
    assert problem.key == "model.adapt_channels" and "a U-Net of 4 channels with a VAE of 16" in problem.rule
    assert "set it to true" in problem.cure and "set model.vae to a VAE of 4 channels" in problem.cure
    assert list(check_pair(build(models, "model.adapt_channels=true", path=path))) == []
    [problem] = check_pair(build(models, "model.adapt_channels=true", "lora.rank=4", path=path))
    assert problem.key == "lora.rank" and "lora.rank: 0" in problem.cure


def test_a_fitting_pair_is_left_as_it_is(models: Path, tmp_path: Path) -> None:
    """A start from the exported model keeps the settings, adapters included."""
    build_tiny_sdxl(tmp_path / "wide", channels=CHANNELS)
    for path, vae, channels in ((models / "base", False, 4), (tmp_path / "wide", True, CHANNELS)):
        config = build(models, "model.adapt_channels=true", "lora.rank=4", path=str(path), vae=vae)
        assert list(check_pair(config)) == []
        source = resolve_pair(config)
        assert source == ModelSource(path)
        text = f"nothing to adapt: U-Net and VAE have {channels} channels"
        assert describe_adaptation(config, source) == text


def test_a_unet_with_other_inputs_than_outputs_is_no_base_model(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "base", tmp_path / "inpainting")
    file = folder / "unet" / "config.json"
    file.write_text(file.read_text().replace('"in_channels": 4', '"in_channels": 9'))
    [problem] = check_model(build(models, path=str(folder), vae=False).model)
    assert problem.rule == "has a U-Net with 9 input channels and 4 output channels (an inpainting model?)"
