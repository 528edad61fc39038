"""Text encoders trained with the U-Net: trained and frozen layers, resuming, export, moving averages."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import read_losses, run_program
from safetensors.torch import load_file

from sdxl_trainer.cache.encode.text_encoder import encode_text
from sdxl_trainer.cache.models.encoders import TextEncoders
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.train.convert import main
from sdxl_trainer.train.engine.saved_state import check_average
from sdxl_trainer.train.networks.conditioning import TextConditioner
from sdxl_trainer.train.networks.trained_networks import TrainedNetworks, unfreeze_text_encoder
from sdxl_trainer.train.sampling.job import load_image_generator
from sdxl_trainer.train.tiny.build import build_tiny_text_encoders, build_tiny_unet

SETTINGS = (
    "optim.text_encoder_lr=1e-3",
    "optim.text_encoder_2_lr=5e-4",
    "optim.groups=[{match: 'unet.mid_block', lr: 0}]",
    "ema.decays=[0.9]",
    # Weighted captions of five windows, whose tags are replaced, added, shuffled and protected.
    "data.max_tokens=375",
    "data.caption.weighted=true",
    "data.caption.prefix='(sketch, drawing:1.4), (shape), '",
    "data.caption.shuffle=true",
    "data.caption.protected_tags=[shape]",
    "objective.text_dropout_rate=0.2",
    # All keyed parts of the objective of a flow, whose losses must not depend on the ranks either.
    "objective.prediction=flow",
    "objective.timestep_density=mode",
    "objective.timestep_shift_base_px=64",
    "objective.noise_candidates=20",
    "objective.contrastive_weight=0.05",
    "train.max_steps=4",
    "checkpoint.every_steps=2",
    "sample.num_inference_steps=1",
)


def list_words(folder: Path) -> tuple[str, ...]:
    """Return the settings of the runs, with files of tags in a folder."""
    files = (f"data.caption.{name}={folder / name}.csv" for name in ("aliases", "implications"))
    return (*SETTINGS, *files)


def make_text(windows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 200, (2, windows, 77), generator=torch.Generator().manual_seed(1))
    ids[:, :, 0], ids[:, :, 40:] = 0, 1
    return ids, ids.clone()


@pytest.mark.parametrize("trained", [("text_encoder",), ("text_encoder_2",), ("text_encoder", "text_encoder_2")])
def test_exactly_the_unfrozen_parameters_have_a_gradient(trained):
    torch.manual_seed(0)
    encoders = build_tiny_text_encoders()
    for name, encoder in encoders.items():
        encoder.requires_grad_(False)
        if name in trained:
            unfreeze_text_encoder(encoder, gradient_checkpointing=False)
    networks = TrainedNetworks(build_tiny_unet(), **{name: encoders[name] for name in trained})
    text = TextConditioner(TextEncoders(*encoders.values()), trained).encode_frozen(*make_text())
    prediction = networks(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), text, torch.ones(2, 6))
    prediction.square().mean().backward()
    with_gradient = {name for name, parameter in networks.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in networks.named_parameters() if parameter.requires_grad}
    frozen_names = {name for name, parameter in networks.named_parameters() if not parameter.requires_grad}
    assert len(frozen_names) == (18 if "text_encoder" in trained else 0)  # 16 of the last layer, 2 of the final norm
    assert all("text_encoder.encoder.layers.1." in name or "final_layer_norm" in name for name in frozen_names)
    # Trained and frozen encoders give the same embeddings.
    with torch.no_grad():
        frozen = TextConditioner(TextEncoders(*encoders.values())).encode(*make_text())
        live = networks.encode(text)
    assert live[0].equal(frozen[0]) and live[1].equal(frozen[1])


@pytest.mark.parametrize("trained", [(), ("text_encoder", "text_encoder_2")])
def test_weights_multiply_the_states_of_both_encoders_and_not_the_pooled_one(trained):
    """As kohya's scripts do: the mean of the states is not restored."""
    torch.manual_seed(0)
    encoders = build_tiny_text_encoders()
    ids, ids_2 = make_text()
    weights = 1 + torch.rand(2, 152, generator=torch.Generator().manual_seed(2))
    weights_2 = weights.flip(1)
    conditioner = TextConditioner(TextEncoders(*encoders.values()), trained)
    networks = TrainedNetworks(build_tiny_unet(), **{name: encoders[name] for name in trained})
    with torch.no_grad():
        plain, pooled = conditioner.encode(ids, ids_2)
        found = networks.encode(conditioner.encode_frozen(ids, ids_2, weights, weights_2))
        again = conditioner.encode(ids, ids_2, weights, weights_2)
        half = encode_text(encoders["text_encoder"].to(torch.bfloat16), ids, weights).hidden
    width = encoders["text_encoder"].config.hidden_size
    expected = torch.cat([plain[..., :width] * weights[..., None], plain[..., width:] * weights_2[..., None]], -1)
    assert found.hidden.equal(expected) and found.pooled.equal(pooled)
    assert again.hidden.equal(expected) and again.pooled.equal(pooled)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected[..., :width], rtol=0.05, atol=0.05)


@pytest.fixture(scope="module")
def trained_run(cached_folder: Path) -> Path:
    """Train four steps on two ranks under ZeRO-2."""
    (cached_folder / "aliases.csv").write_text("drawing,line_drawing\n")
    (cached_folder / "implications.csv").write_text("line_drawing,monochrome\n")
    run_program(
        "train/main.py", "--cfg", cached_folder / "tiny.yaml", "run.name=te", *list_words(cached_folder), ranks=2
    )
    return cached_folder / "runs" / "te"


def test_resuming_on_another_stage_and_number_of_ranks(trained_run: Path, cached_folder: Path) -> None:
    resumed = cached_folder / "runs" / "te-resumed"
    shutil.copytree(trained_run / "checkpoints" / "step-00000002", resumed / "checkpoints" / "step-00000002")
    shutil.copytree(trained_run / "logs", resumed / "logs", ignore=shutil.ignore_patterns("tensorboard"))
    words = (*list_words(cached_folder), "engine.zero_stage=1", "sample.prompts=[]", "data.num_workers=1")
    run_program("train/main.py", "--cfg", cached_folder / "tiny.yaml", "run.name=te-resumed", *words)
    losses, expected = read_losses(resumed), read_losses(trained_run)
    assert len(losses) == 4
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    for name in ("step-00000004.safetensors", "step-00000004-ema-0.9.safetensors"):
        tensors, expected_tensors = load_file(resumed / "models" / name), load_file(trained_run / "models" / name)
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected_tensors[key], rtol=0, atol=2e-4, msg=f"{name}: {key}")


def test_the_exported_file_contains_the_trained_weights(trained_run: Path, one_rank: Path) -> None:
    """The run `one_rank` trained no text encoders, so its file contains the original ones."""
    now = load_file(trained_run / "models" / "step-00000004.safetensors")
    mean = load_file(trained_run / "models" / "step-00000004-ema-0.9.safetensors")
    before = load_file(one_rank / "models" / "step-00000020.safetensors")
    changed = {key for key in now if not now[key].equal(before[key])}
    encoder, encoder_2 = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
    assert f"{encoder}encoder.layers.0.mlp.fc1.weight" in changed
    assert {f"{encoder_2}text_projection", f"{encoder_2}transformer.resblocks.1.mlp.c_fc.weight"} <= changed
    assert not any(key.startswith((f"{encoder}encoder.layers.1.", f"{encoder}final_layer_norm")) for key in changed)
    assert not any(key.startswith("first_stage_model.") for key in changed)
    for key in (f"{encoder}encoder.layers.0.mlp.fc1.weight", "model.diffusion_model.out.2.weight"):
        assert not mean[key].equal(now[key]) and (mean[key] - now[key]).abs().max() < 5e-3, key


def test_a_moving_average_is_read_from_a_checkpoint(trained_run: Path, tmp_path: Path, capsys) -> None:
    """`convert.py` and sampling read the average that training exported; an unknown decay is refused."""
    exported = load_file(trained_run / "models" / "step-00000004-ema-0.9.safetensors")
    target = tmp_path / "average.safetensors"
    assert main([str(trained_run), str(target), "--ema", "0.9", "--dtype", "fp32"]) == 0
    converted = load_file(target)
    assert converted.keys() == exported.keys() and all(converted[key].equal(exported[key]) for key in converted)
    checkpoint = trained_run / "checkpoints" / "step-00000004"
    config, _ = load_config(trained_run / "config.yaml")
    generator = load_image_generator(config, checkpoint, torch.device("cpu"), "0.9")
    assert generator.unet.conv_out.weight.equal(exported["model.diffusion_model.out.2.weight"])
    projection = generator.conditioner.encoders.encoder_2.text_projection.weight
    assert projection.T.equal(exported["conditioner.embedders.1.model.text_projection"])
    assert main([str(trained_run), str(tmp_path / "other.safetensors"), "--ema", "0.99"]) == 2
    assert "give one of 0.9" in capsys.readouterr().err
    assert "needs a checkpoint" in next(check_average(None, "0.9")).rule
