"""Conversion with adapters: files merged into models, and differences of models as LoRAs, against NumPy."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from sdxl_trainer.cache.models.source import COMPONENTS, ModelSource
from sdxl_trainer.train.convert import main
from sdxl_trainer.train.export.difference import check_same_layers
from sdxl_trainer.train.networks.adapter_formulas import approximate
from sdxl_trainer.train.tiny.build import CONFIG_FOLDER

LAYER = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
FILES = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder_2": "model.safetensors"}
Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
CONV, NORM = "down_blocks.1.resnets.0.conv1.weight", "down_blocks.1.resnets.0.norm1.weight"


def load(folder: Path, part: str) -> dict[str, np.ndarray]:
    return load_file(folder / part / FILES[part])


def find(tensors: dict[str, np.ndarray], end: str) -> str:
    return next(name for name in tensors if name.endswith(end))


def test_files_of_adapters_are_merged_into_folders_and_files(
    cached_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, generator = cached_folder / "model", np.random.default_rng(0)
    base = {part: load(model, part) for part in FILES}
    fc1 = find(base["text_encoder_2"], "layers.0.mlp.fc1.weight")
    (out, width), (out_2, width_2) = base["unet"][Q].shape, base["text_encoder_2"][fc1].shape

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32)

    lora = {f"{LAYER}.lora_up.weight": draw(out, 2), f"{LAYER}.lora_down.weight": draw(2, width)}
    lora[f"{LAYER}.alpha"] = np.array(1, np.float32)
    te = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    lora |= {f"{te}.lora_up.weight": draw(out_2, 2), f"{te}.lora_down.weight": draw(2, width_2)}
    prefix = f"unet.{Q.removesuffix('.weight')}"  # names of diffusers
    other = {f"{prefix}.lora_A.weight": draw(3, width), f"{prefix}.lora_B.weight": draw(out, 3)}
    save_file(lora, tmp_path / "a.safetensors")
    save_file(other, tmp_path / "b.safetensors")
    words = ["--adapter", str(tmp_path / "a.safetensors"), "--strength", "0.5", "--dtype", "fp32"]
    both = [*words, "--adapter", str(tmp_path / "b.safetensors"), "--strength", "-2"]
    assert main([str(model), str(tmp_path / "merged"), *both]) == 0
    assert main([str(model), str(tmp_path / "merged.safetensors"), *both]) == 0
    assert main([str(tmp_path / "merged"), str(tmp_path / "again.safetensors"), "--dtype", "fp32"]) == 0
    first, again = load_file(tmp_path / "merged.safetensors"), load_file(tmp_path / "again.safetensors")
    assert all(np.array_equal(first[name], again[name]) for name in first)
    change = 0.5 * 0.5 * lora[f"{LAYER}.lora_up.weight"] @ lora[f"{LAYER}.lora_down.weight"]
    change += -2 * other[f"{prefix}.lora_B.weight"] @ other[f"{prefix}.lora_A.weight"]
    expected = {part: dict(tensors) for part, tensors in base.items()}
    expected["unet"][Q] = base["unet"][Q] + change
    expected["text_encoder_2"][fc1] = base["text_encoder_2"][fc1] + 0.5 * (
        lora[f"{te}.lora_up.weight"] @ lora[f"{te}.lora_down.weight"]
    )
    for part, tensors in expected.items():
        merged = load(tmp_path / "merged", part)
        for name, tensor in tensors.items():
            np.testing.assert_allclose(merged[name], tensor, rtol=1e-6, atol=2e-6, err_msg=name)

    save_file({**lora, "lora_unet_x.lora_up.weight": draw(2, 2)}, tmp_path / "unknown.safetensors")
    wide = {**lora, f"{LAYER}.lora_down.weight": draw(2, width + 1)}
    save_file(wide, tmp_path / "wide.safetensors")
    save_file({Q: base["unet"][Q]}, tmp_path / "model.safetensors")
    capsys.readouterr()
    refused = {
        "unknown": "1 of its 3 layers fit no layer of the model: lora_unet_x",
        "wide": f"1 of its 2 layers lack tensors or have another shape: {LAYER}",
        "model": f"holds 1 tensor that no kind of adapter has: {Q}",
        "absent": "is not a file",
    }
    for name, message in refused.items():
        assert main([str(model), str(tmp_path / "x"), "--adapter", str(tmp_path / f"{name}.safetensors")]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert main([str(model), str(tmp_path / "x"), *words, "--strength", "1"]) == 2
    assert "--strength\n      is given 2 times for 1 merged adapter" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_difference_of_two_models_is_a_lora(
    cached_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """A difference of low rank comes back whole; of the rest the LoRA holds the largest singular values."""
    model, tuned, generator = cached_folder / "model", tmp_path / "tuned", np.random.default_rng(1)
    shutil.copytree(model, tuned)
    changed = load(model, "unet")
    base = dict(changed)
    for name in (Q, CONV):
        out, *inner = base[name].shape
        product = generator.normal(size=(out, 3)) @ generator.normal(size=(3, int(np.prod(inner))))
        changed[name] = (base[name] + 0.1 * product.reshape(base[name].shape)).astype(np.float32)
    (tuned / "unet" / FILES["unet"]).unlink()
    save_file(changed, tuned / "unet" / FILES["unet"], {"format": "pt"})
    words = [str(tuned), str(tmp_path / "x.safetensors"), "--base", str(model), "--rank", "4", "--dtype", "fp32"]
    assert main([*words, "--conv-dim", "3"]) == 0
    assert "holds 100.0% of the squared norm" in capfd.readouterr().err
    layers = load_file(tmp_path / "x.safetensors")
    assert len(layers) == 6 and layers[f"{LAYER}.lora_down.weight"].shape[0] == 4 == layers[f"{LAYER}.alpha"]
    assert main([str(model), str(tmp_path / "again"), "--adapter", words[1], "--dtype", "fp32"]) == 0
    again = load(tmp_path / "again", "unet")
    for name in base:
        np.testing.assert_allclose(again[name], changed[name], rtol=1e-5, atol=1e-5, err_msg=name)
    changed[NORM] = changed[NORM] + 1
    (tuned / "unet" / FILES["unet"]).unlink()
    save_file(changed, tuned / "unet" / FILES["unet"], {"format": "pt"})
    assert main([*words, "--overwrite"]) == 0  # neither the convolution nor the norm
    squares = {name: float(np.square(changed[name] - base[name]).sum(dtype=np.float64)) for name in (Q, CONV, NORM)}
    assert f"holds {100 * squares[Q] / sum(squares.values()):.1f}% of the" in capfd.readouterr().err
    assert len(load_file(tmp_path / "x.safetensors")) == 3
    assert main([str(model), str(tmp_path / "y.safetensors"), "--base", str(model)]) == 2
    assert "differs from the source in no layer that a LoRA changes" in capfd.readouterr().err
    assert main([str(model), str(tmp_path / "y"), "--base", str(tmp_path / "none"), "--rank", "0"]) == 2
    printed = capfd.readouterr().err
    assert "--rank = 0" in printed and "is no name of a file for a LoRA" in printed


def test_the_approximation_is_that_of_the_largest_singular_values() -> None:
    generator = np.random.default_rng(2)
    for shape in ((12, 40), (40, 12), (10, 4, 3, 3), (40, 2, 3, 3)):
        difference = generator.normal(size=shape).astype(np.float32)
        left, values, right = np.linalg.svd(difference.reshape(shape[0], -1).astype(np.float64), full_matrices=False)
        for rank in (1, 5, 99):
            found = approximate(torch.from_numpy(difference), rank)
            kept = min(rank, len(values))
            assert found.down.shape == (kept, *shape[1:]) and found.up.shape == (
                shape[0],
                kept,
                *(1,) * (len(shape) - 2),
            )
            product = (found.up.flatten(1) @ found.down.flatten(1)).numpy()
            best = (left[:, :kept] * values[:kept]) @ right[:kept]
            np.testing.assert_allclose(product, best, atol=2e-5)
            assert found.squared_norm == pytest.approx(np.square(values[:kept]).sum(), rel=1e-9)
    zero = approximate(torch.zeros(4, 6), 2)
    assert zero.up.isfinite().all() and zero.down.isfinite().all()


def test_models_of_different_architectures_are_named() -> None:
    source = ModelSource(CONFIG_FOLDER)
    configs = {name: source.read_config(name) for name in COMPONENTS}
    other = copy.deepcopy(configs)
    other["unet"]["in_channels"] = 9
    assert not list(check_same_layers(configs, configs, "base"))
    (problem,) = check_same_layers(configs, other, "base")
    assert problem.key == "--base" and problem.value == "base"
    assert problem.rule == (
        "is of another architecture than the source: 1 tensors of the unet differ "
        "(model.diffusion_model.input_blocks.0.0.weight)"
    )
