"""VAEs by path: what decides their channels, statistics and padding, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from safetensors.torch import save_file

from sdxl_trainer.cache.models.encoders import hash_weights
from sdxl_trainer.cache.models.single_file_check import SafetensorsHeader, read_component_config
from sdxl_trainer.cache.models.single_file_names import build_name_table
from sdxl_trainer.cache.models.source import ModelSource, check_model
from sdxl_trainer.cache.models.vae import load_vae, pad_convolutions, read_vae_config
from sdxl_trainer.cache.models.vae_config import (
    VAE_PREFIX,
    build_exported_vae_config,
    build_vae_metadata,
    derive_config,
    resolve_vae_config,
)
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.configs.schema import ModelConfig
from sdxl_trainer.train.objective.diffusion import normalize_latents
from sdxl_trainer.train.objective.objective import resolve_latent_statistics

SDXL = read_component_config(Path(__file__).parents[3] / "configs" / "sdxl", "vae")
SMALL = {**SDXL, "block_out_channels": [32, 32, 64, 64], "layers_per_block": 1}
SOURCE = ModelSource(Path("/absent"))
NO_SCALING = {key: value for key, value in SDXL.items() if key != "scaling_factor"}


def build_vae(**config: Any) -> AutoencoderKL:
    """Build a small VAE with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL.from_config({**SMALL, **config}).eval().requires_grad_(False)


def list_file_tensors(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """Return a VAE's tensors as single files hold them, without a prefix."""
    weights = vae.state_dict()
    return {
        row.file_name.removeprefix(VAE_PREFIX): weights[row.sources[0]].reshape(row.file_shape).clone()
        for row in build_name_table("vae", vae.config)
    }


def nest_quant_layers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return Flux2's own file: the quant layers inside encoder and decoder, and the batch norm of its patches."""
    parts = {"quant_conv.": "encoder.", "post_quant_conv.": "decoder."}
    nested = {
        next((part for start, part in parts.items() if name.startswith(start)), "") + name: tensor
        for name, tensor in tensors.items()
    }
    return {**nested, "bn.running_mean": torch.zeros(128), "bn.num_batches_tracked": torch.zeros((), dtype=torch.int64)}


@pytest.mark.parametrize(
    ("channels", "is_quantised", "form"),
    [(16, False, "plain"), (32, True, "nested"), (4, True, "model")],
    ids=["Flux: no quant layers", "Flux2: quant layers inside", "4 channels, prefixed"],
)
def test_a_single_file_gives_the_same_vae_as_its_modules(tmp_path, channels, is_quantised, form):
    vae = build_vae(latent_channels=channels, use_quant_conv=is_quantised, use_post_quant_conv=is_quantised)
    tensors = list_file_tensors(vae)
    if form == "nested":
        tensors = nest_quant_layers(tensors)
    if form == "model":
        tensors = {VAE_PREFIX + name: tensor for name, tensor in tensors.items()} | {"other.weight": torch.ones(1)}
    save_file(tensors, tmp_path / "ae.safetensors")
    model = ModelConfig(vae=str(tmp_path / "ae.safetensors"), vae_scaling_factor=0.5, vae_shift_factor=0.25)
    loaded = load_vae(SOURCE, model)
    assert hash_weights(loaded) == hash_weights(vae)
    assert (loaded.config.latent_channels, loaded.config.scaling_factor) == (channels, 0.5)
    assert loaded.config.shift_factor == 0.25
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.testing.assert_close(loaded.encode(pixels).latent_dist.mean, vae.encode(pixels).latent_dist.mean)
    assert loaded.encode(pixels).latent_dist.mean.shape == (1, channels, 4, 4)


def test_a_folder_of_fluxs_second_class_gives_its_unpatched_latents(tmp_path):
    settings = {key: value for key, value in SMALL.items() if key not in ("scaling_factor", "force_upcast")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae: Any = AutoencoderKLFlux2.from_config({**settings, "latent_channels": 32}).eval().requires_grad_(False)
    vae.save_pretrained(tmp_path / "vae")
    loaded = load_vae(SOURCE, ModelConfig(vae=str(tmp_path / "vae")))
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.testing.assert_close(loaded.encode(pixels).latent_dist.mean, vae.encode(pixels).latent_dist.mean)
    config = loaded.config
    assert (type(loaded), config.scaling_factor, config.shift_factor) == (AutoencoderKL, 0.6043, 0.0760)


@pytest.mark.parametrize(
    ("config", "settings", "x0"),
    [
        (SDXL, {}, 2 * 0.13025),
        (NO_SCALING, {}, 2 * 0.13025),
        ({**SDXL, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}, {}, 2.96779255),
        ({**SDXL, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}, {}, 0.68034851),
        ({**NO_SCALING, "latent_channels": 32}, {}, 1.1626732),
        ({**NO_SCALING, "_class_name": "AutoencoderKLFlux2", "latent_channels": 32}, {}, 1.1626732),
        (NO_SCALING, {"vae_padding": "reflect", "vae_scaling_factor": 0.1406, "vae_shift_factor": -0.4743}, 0.34788658),
        ({**NO_SCALING, "latent_channels": 16}, {"vae_scaling_factor": 0.5}, 1.0),
        ({**SDXL, "latents_mean": [1.0] * 4, "latents_std": [0.5] * 4}, {}, 0.2605),
        ({**NO_SCALING, "latents_mean": [1.0] * 4, "latents_std": [0.5] * 4}, {}, 2.0),
        (SDXL, {"latents_mean": [1, 1, 1, 1], "latents_std": [4, 4, 4, 4]}, 0.25),
        ({**SDXL, "latent_channels": 2}, {"latents_mean": [1, 1], "latents_std": [4, 4]}, 0.25),
    ],
    ids=[
        "SDXL",
        "SDXL, bare",
        "SD3",
        "Flux",
        "Flux2",
        "Flux2's class",
        "EQ-VAE",
        "given",
        "own",
        "own, bare",
        "settings",
        "2",
    ],
)
def test_x0_of_known_and_given_statistics(config, settings, x0):
    """x0 = (z - shift)·scaling or (z - mean)/std, computed by hand for z = 2."""
    resolved = resolve_vae_config(config, ModelConfig.model_validate(settings))
    latents = torch.full((1, resolved["latent_channels"], 1, 1), 2.0)
    found = normalize_latents(latents, *resolve_latent_statistics(resolved)).flatten().tolist()
    assert found == pytest.approx([x0] * resolved["latent_channels"], rel=1e-6)
    # What diffusers' SDXL pipeline does with the exported config gives the latents back. It ignores `shift_factor`, so
    # with 4 channels a mean stands for that; with others it stops at a mean.
    exported = build_exported_vae_config(resolved)
    mean, std = (exported.get(name) for name in ("latents_mean", "latents_std"))
    shift = 0.0 if resolved["latent_channels"] == 4 else exported.get("shift_factor") or 0.0
    scaled = x0 / exported["scaling_factor"]
    assert (scaled + shift if mean is None else scaled * std[0] + mean[0]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("config", "settings", "key", "rule"),
    [
        ({"scaling_factor": None, "latent_channels": 16}, {}, "vae_scaling_factor", "must be set: the VAE, of 16"),
        ({"scaling_factor": None}, {"vae_padding": "reflect"}, "vae_scaling_factor", "must be set: the VAE, of 4"),
        ({}, {"vae_scaling_factor": 0.18}, "vae_scaling_factor", "contradicts the VAE's own config, which has 0.13025"),
        ({"shift_factor": 0.1}, {"vae_shift_factor": 0.2}, "vae_shift_factor", "contradicts"),
        ({}, {"latents_mean": [0, 0], "latents_std": [1, 1]}, "latents_mean", "has 2 values, and the VAE has 4"),
        (
            {"latents_mean": [1] * 4, "latents_std": [1] * 4},
            {"latents_mean": [0] * 4, "latents_std": [1] * 4},
            "latents_mean",
            "contradicts",
        ),
        ({"latents_mean": [1] * 4, "latents_std": [1] * 4}, {"vae_shift_factor": 3}, "vae_shift_factor", "contradicts"),
        ({"padding_mode": "zeros"}, {"vae_padding": "reflect"}, "vae_padding", "which has zeros"),
        ({"padding_mode": "circular"}, {}, "vae", "has the padding_mode 'circular'"),
        ({"block_out_channels": [32] * 5}, {}, "vae", "encodes 16x16 pixels as one latent, and SDXL needs 8x8"),
        ({"_class_name": "AutoencoderDC"}, {}, "vae", "is a AutoencoderDC"),
        ({"_class_name": "AutoencoderKLFlux2", "decoder_block_out_channels": [96] * 4}, {}, "vae", "has a decoder of"),
        ({"latent_channels": 0}, {}, "vae", "has 0 latent channels"),
        ({"latents_mean": [1] * 4}, {}, "vae", "has one of latents_mean and latents_std"),
        ({"latents_mean": [1] * 3, "latents_std": [1] * 4}, {}, "vae", "its latents_mean is not a list"),
        ({"latents_mean": [1] * 4, "latents_std": [0] * 4}, {}, "vae", "not above 0"),
        ({"scaling_factor": "a"}, {}, "vae", "has the scaling_factor 'a'"),
    ],
)
def test_contradictions_are_named_with_a_cure(tmp_path, config, settings, key, rule):
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SDXL, **config}))
    (folder / "x.safetensors").touch()
    model = ModelConfig.model_validate({"path": "somebody/model", "vae": str(folder), **settings})
    [problem] = check_model(model)
    assert problem.key == f"model.{key}" and rule in problem.rule and problem.cure
    with pytest.raises(UserInputError, match=f"model.{key}"):
        read_vae_config(SOURCE, model)


@pytest.mark.parametrize(
    ("tensors", "rule"),
    [
        ({"encoder.down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "holds a VAE in diffusers names"),
        ({"lora_unet.weight": (8, 8)}, "holds no VAE in LDM names"),
        ({"encoder.conv_out.weight": (9, 8, 3, 3)}, "encodes 4.5 latent channels and decodes 4"),
    ],
)
def test_files_that_hold_no_vae_are_refused(tmp_path, tensors, rule):
    whole = {
        "encoder.conv_in.weight": (8, 3, 3, 3),
        "encoder.conv_out.weight": (8, 8, 3, 3),
        "decoder.conv_in.weight": (8, 4, 3, 3),
        "encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3),
    }
    shapes = {**whole, **tensors} if "encoder.conv_out.weight" in tensors else tensors
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    [problem] = check_model(ModelConfig(path="somebody/model", vae=str(path)))
    assert problem.key == "model.vae" and rule in problem.rule


def test_convolutions_are_padded_by_reflection(tmp_path):
    """A 3x3 convolution of ones sums 27 at the corner of [[1, 2], [3, 4]], whose reflection is [[4, 3], [2, 1]]."""
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(1, 1, 3, padding=1, bias=False), torch.nn.Conv2d(1, 1, 3, stride=2), torch.nn.Conv2d(1, 1, 1)
    )
    torch.nn.init.ones_(layers[0].weight)
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert layers[0](image).flatten().tolist() == [10, 10, 10, 10]
    pad_convolutions(layers, "reflect")
    assert layers[0](image).flatten().tolist() == [27, 24, 21, 18]
    assert [layer.padding_mode for layer in layers] == ["reflect", "zeros", "zeros"]
    build_vae().save_pretrained(tmp_path / "vae")
    model = ModelConfig(vae=str(tmp_path / "vae"))
    zeros, reflect = (
        load_vae(SOURCE, model.model_copy(update={"vae_padding": padding})) for padding in (None, "reflect")
    )
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert (zeros.encode(pixels).latent_dist.mean - reflect.encode(pixels).latent_dist.mean).abs().max() > 1e-3
    assert {module.padding_mode for module in reflect.modules() if getattr(module, "padding", 0) == (1, 1)} == {
        "reflect"
    }


def test_statistics_and_padding_travel_in_a_single_file():
    settings = ModelConfig(vae_scaling_factor=0.1406, vae_shift_factor=-0.4743, vae_padding="reflect")
    resolved = resolve_vae_config({**NO_SCALING, "norm_num_groups": 8}, settings)
    tensors = list_file_tensors(build_vae())
    header = SafetensorsHeader(
        types={}, shapes={name: tuple(each.shape) for name, each in tensors.items()}, metadata={}, data_start=0
    )
    bare = derive_config(header, SDXL)
    assert "scaling_factor" not in bare and bare["block_out_channels"] == [32, 32, 64, 64]
    header.metadata.update(build_vae_metadata(resolved))
    derived = resolve_vae_config(derive_config(header, SDXL), ModelConfig())
    for name in ("scaling_factor", "shift_factor", "padding_mode", "norm_num_groups"):
        assert derived[name] == resolved[name]
    assert derived["block_out_channels"] == [32, 32, 64, 64]
