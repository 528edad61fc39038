"""Adapters: their trained layers, and diffusers' own loading of their file, which gives the same outputs."""

import shutil
from pathlib import Path

import pytest
import torch
from programs import read_losses, run_program
from safetensors import safe_open
from safetensors.torch import load_file

from sdxl_trainer.cache.models.single_file_check import SDXL_CONFIG_FOLDER
from sdxl_trainer.cache.models.single_file_names import COMPONENT_PREFIXES, build_name_table, get_canonical_name
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.lora import LoraConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.train.checkpoint.writer import count_tensor_bytes
from sdxl_trainer.train.convert import main
from sdxl_trainer.train.doctor.doctor import examine_settings
from sdxl_trainer.train.engine.deepspeed_config import resolve_zero_stage
from sdxl_trainer.train.estimates.checkpoint_size import compute_checkpoint_bytes
from sdxl_trainer.train.export.average_snapshots import list_snapshots
from sdxl_trainer.train.networks.adapter_files import build_kohya_name, map_layer_names, write_adapters
from sdxl_trainer.train.networks.adapters import add_adapters, find_target_layers
from sdxl_trainer.train.networks.empty_networks import build_empty_networks
from sdxl_trainer.train.networks.parameter_groups import build_parameter_groups
from sdxl_trainer.train.networks.trained_networks import TrainedNetworks, unfreeze_text_encoder
from sdxl_trainer.train.run.networks import list_trained_shapes
from sdxl_trainer.train.sampling.job import load_image_generator
from sdxl_trainer.train.tiny.build import build_tiny_sdxl, build_tiny_text_encoders, build_tiny_unet

CONFIG = LoraConfig(rank=4, alpha=2.0)


def build_networks() -> tuple[TrainedNetworks, dict]:
    torch.manual_seed(0)
    unet, encoders = build_tiny_unet(), build_tiny_text_encoders()
    for encoder in encoders.values():
        unfreeze_text_encoder(encoder, gradient_checkpointing=False)
    networks = TrainedNetworks(unet, **encoders)
    add_adapters(dict(networks.named_children()), CONFIG, seed=5)
    return networks, encoders


def test_only_adapters_are_trained_and_new_ones_change_nothing():
    networks, _ = build_networks()
    trained = {name: parameter for name, parameter in networks.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert not any(".layers.1." in name for name in trained if name.startswith("text_encoder.")), (
        "the last layer of encoder 1 does not affect the loss"
    )
    assert any(".layers.1." in name for name in trained if name.startswith("text_encoder_2."))
    assert not any(parameter.any() for name, parameter in trained.items() if "lora_B" in name)
    assert all(
        parameter.equal(trained[name]) for name, parameter in build_networks()[0].named_parameters() if name in trained
    )
    rates = [float(block) for block in range(23)]
    config = OptimConfig(lr=1.0, block_lrs=rates, text_encoder_lr=0.5)
    groups = build_parameter_groups(networks, config, networks.unet.config)
    assert {group["lr"] for group in groups} == {0.5, 5.0, 6.0, 8.0, 9.0, 11.0, 13.0, 14.0, 15.0, 16.0, 17.0, 18.0}
    with pytest.raises(UserInputError, match="lora.targets = .*\n.*matches no trainable layer of the unet"):
        add_adapters({"unet": build_tiny_unet()}, LoraConfig(rank=4, targets=["to_x"]))


def test_diffusers_loads_the_file_and_computes_the_same_outputs(tmp_path: Path):
    from diffusers import StableDiffusionXLPipeline

    folder = build_tiny_sdxl(tmp_path / "model")
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    networks, encoders = build_networks()
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, parameter in networks.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            weights[name] = parameter
    for name, part in parts.items():  # the same base weights in both
        live = {key.replace(".base_layer", ""): value for key, value in getattr(networks, name).state_dict().items()}
        part.load_state_dict({key: value for key, value in live.items() if ".lora_" not in key})
    write_adapters(tmp_path / "x.safetensors", weights, ModelSource(folder), CONFIG, torch.float32)

    names = set(load_file(tmp_path / "x.safetensors"))
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in names
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha" in names
    assert "lora_te2_text_model_encoder_layers_1_mlp_fc2.lora_up.weight" in names
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "4" and file.metadata()["ss_network_alpha"] == "2"

    ids = torch.randint(3, 200, (1, 77), generator=generator)
    sample, hidden = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 64, generator=generator)
    hidden = hidden[..., :1].expand(-1, -1, networks.unet.config.cross_attention_dim)
    pooled_width = (
        networks.unet.config.projection_class_embeddings_input_dim - 6 * networks.unet.config.addition_time_embed_dim
    )
    conditions = {"text_embeds": torch.ones(1, pooled_width), "time_ids": torch.ones(1, 6)}

    def compute(unet, encoder, encoder_2) -> list[torch.Tensor]:
        with torch.no_grad():
            return [
                unet(sample, 500, hidden, added_cond_kwargs=conditions).sample,
                encoder(ids, output_hidden_states=True).hidden_states[-2],
                encoder_2(ids, output_hidden_states=True).text_embeds,
            ]

    before = compute(*parts.values())
    pipeline.load_lora_weights(str(tmp_path / "x.safetensors"))
    after, live = compute(*parts.values()), compute(networks.unet, *encoders.values())
    for base_output, loaded_output, live_output in zip(before, after, live, strict=True):
        torch.testing.assert_close(loaded_output, live_output, rtol=1e-4, atol=1e-4)
        assert (base_output - live_output).abs().max() > 1e-2


def test_sdxl_gets_the_adapters_of_kohyas_scripts():
    """kohya's scripts report 722 modules of SDXL's U-Net, 72 of text encoder 1 and 192 of text encoder 2.

    Six modules of encoder 1 are in its last layer, which SDXL does not use. ComfyUI derives the same names from the
    tensor names of the single file.
    """
    source = ModelSource(SDXL_CONFIG_FOLDER)
    networks = build_empty_networks(source, ["text_encoder", "text_encoder_2"])
    layers = map_layer_names(source.read_config("unet"))
    names = {
        network: {
            build_kohya_name(f"{network}.{layer}", layers)
            for layer in find_target_layers(getattr(networks, network), targets)
        }
        for network, targets in (
            ("unet", CONFIG.targets),
            ("text_encoder", CONFIG.text_targets),
            ("text_encoder_2", CONFIG.text_targets),
        )
    }
    assert {network: len(found) for network, found in names.items()} == {
        "unet": 722,
        "text_encoder": 72 - 6,
        "text_encoder_2": 192,
    }
    prefix = COMPONENT_PREFIXES["unet"]
    assert names["unet"] == {
        "lora_unet_" + row.file_name.removeprefix(prefix).removesuffix(".weight").replace(".", "_")
        for row in build_name_table("unet", source.read_config("unet"))
        if len(row.file_shape) == 2 and ("transformer_blocks" in row.file_name or "proj_" in row.file_name)
    }
    parts = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2")
    for network, prefix, count in (("text_encoder", "lora_te1", 11), ("text_encoder_2", "lora_te2", 32)):
        expected = [f"{prefix}_text_model_encoder_layers_{number}_{part}" for number in range(count) for part in parts]
        assert names[network] == set(expected)


def test_a_run_writes_adapters_instead_of_the_model_and_resumes(
    cached_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run resumes on its own base model, and is refused on another one, whose frozen weights it would need."""
    settings, other = cached_folder / "tiny.yaml", build_tiny_sdxl(tmp_path / "other", seed=1)
    ema = ("ema.decays=[0.5]", "ema.lengths=[0.1,0.2]", "ema.snapshot_every_steps=2", "ema.snapshot_dtype=fp32")
    words = ("lora.rank=2", "optim.text_encoder_2_lr=1e-3", *ema, "sample.prompts=[]")
    whole = ("train", settings, "run.name=lora", "train.max_steps=6", *words)
    parts = [("train", settings, "run.name=lora-twice", f"train.max_steps={steps}", *words) for steps in (4, 6)]
    refused = ("train", settings, "run.name=lora", "train.max_steps=7", f"model.path={other}", *words)
    runs = (*whole, "+", *parts[0], "+", *parts[1], "+", *refused)
    printed = run_program("tests/support/several_runs.py", *runs, expect=2)
    assert "is not the base model of the checkpoint: the weights of text_encoder and text_encoder_2 and unet" in printed
    assert f"restore the model that step 6 was trained on ({cached_folder / 'model'})" in printed
    shutil.copytree(cached_folder / "model", tmp_path / "moved")
    for model, faults in ((other, ["model.path"]), (tmp_path / "moved", [])):  # the doctor tells before the start
        config, _ = load_config(settings, [*words, "run.name=lora", "train.max_steps=7", f"model.path={model}"])
        found = list(examine_settings(resolve_zero_stage(config, 1)[0], world_size=1))
        assert [finding.name for finding in found if not finding.is_ok] == faults
        assert any("is not the base model of the checkpoint" in finding.detail for finding in found) == bool(faults)
    models, twice = (cached_folder / "runs" / name / "models" for name in ("lora", "lora-twice"))
    names = ["step-00000006-lora-ema-0.5.safetensors", "step-00000006-lora.safetensors"]
    assert sorted(path.name for path in models.iterdir()) == names
    for name in names:
        straight, resumed = load_file(models / name), load_file(twice / name)
        assert straight.keys() == resumed.keys(), name
        assert all(straight[key].equal(resumed[key]) for key in straight), name
    assert_equal_snapshots(models.parent, twice.parent, tmp_path)
    losses = [read_losses(folder.parent) for folder in (models, twice)]
    assert losses[0] == losses[1] and len(set(losses[0])) == 6
    tensors = load_file(models / names[1])
    assert any(name.startswith("lora_te2_") for name in tensors) and not any("lora_te1_" in name for name in tensors)
    assert all(tensor.any() for name, tensor in tensors.items() if name.endswith("lora_up.weight"))
    run = cached_folder / "runs" / "lora"
    assert main([str(run), str(models / "again.safetensors"), "--dtype", "fp32"]) == 0
    again = load_file(models / "again.safetensors")
    assert again.keys() == tensors.keys() and all(again[name].equal(tensors[name]) for name in tensors)
    assert_merged(run, cached_folder / "model", again, tmp_path / "merged")
    assert_another_base_is_named(run, other, tmp_path / "wrong.safetensors", capsys)
    with safe_open(models / names[1], "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_output_name"] == metadata["modelspec.title"] == "lora"
    assert metadata["modelspec.prediction_type"] == "epsilon" and metadata["modelspec.architecture"].endswith("/lora")
    assert main([str(run), str(tmp_path / "v.safetensors"), "objective.prediction=v"]) == 0
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "v"
    config, _ = load_config(settings, [*words, "run.name=lora", "engine.zero_stage=0"])
    state = run / "checkpoints" / "step-00000006" / "state"
    written = [torch.load(path, weights_only=False) for path in state.glob("*.pt")]
    num_trained = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith("alpha"))
    shapes = list_trained_shapes(config)
    assert sum(shape.numel() for shape in shapes) == num_trained
    # Besides, each weight has a counter of its steps, a tensor of 4 bytes.
    counters = 4 * (len(tensors) * 2 // 3)
    assert sum(map(count_tensor_bytes, written)) == compute_checkpoint_bytes(config, shapes) + counters
    generator = load_image_generator(config, run / "checkpoints" / "step-00000006", torch.device("cpu"))
    layer = generator.unet.mid_block.attentions[0].proj_in
    up = layer.lora_B["default"].weight
    assert up.equal(tensors["lora_unet_middle_block_1_proj_in.lora_up.weight"]) and layer.scaling["default"] == 1


def assert_another_base_is_named(run: Path, other: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Merge a run's adapters into another model, which is a warning. Its own base model has caused none so far."""
    assert "is not the base model" not in capsys.readouterr().err
    assert main([str(run), str(target), "--merge", f"model.path={other}"]) == 0
    assert f"model.path={other}: is not the base model of the checkpoint" in capsys.readouterr().err


def assert_equal_snapshots(straight: Path, resumed: Path, folder: Path) -> None:
    """Assert that a resume changes no stored average, and that a file of adapters is summed up from them."""
    one, two = (list_snapshots(run) for run in (straight, resumed))
    assert [(s.facts.step, s.facts.length) for s in one] == [(n, length) for n in (2, 4, 6) for length in (0.1, 0.2)]
    for first, second in zip(one, two, strict=True):
        assert first.facts == second.facts and first.file.read_bytes() == second.file.read_bytes()
    rebuilt, kept = folder / "rebuilt.safetensors", folder / "kept.safetensors"
    assert main([str(straight), str(rebuilt), "--ema-length", "0.2"]) == 0
    assert main([str(straight), str(kept), "--ema", "length-0.2"]) == 0
    tensors, expected = load_file(rebuilt), load_file(kept)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-9)
    with safe_open(rebuilt, "pt") as file:
        assert file.metadata()["sdxl_trainer.ema_length"] == "0.2"


def assert_merged(run: Path, base_folder: Path, adapters: dict[str, torch.Tensor], target: Path) -> None:
    """Merge a run's adapters in fp32, and compare each weight with W + alpha/rank · up · down."""
    assert main([str(run), str(target), "--merge", "--dtype", "fp32", "lora.alpha=1"]) == 0  # of rank 2
    layers, num_merged = map_layer_names(ModelSource(base_folder).read_config("unet")), 0
    for part in ("unet", "text_encoder", "text_encoder_2"):
        base, merged = (load_file(next((folder / part).glob("*.safetensors"))) for folder in (base_folder, target))
        names = {get_canonical_name(part, name): name for name in base}
        for name, found in merged.items():
            weight, layer = base[names[get_canonical_name(part, name)]].float(), name.removesuffix(".weight")
            key = build_kohya_name(f"{part}.{layer}", layers) if part != "unet" or layer in layers else ""
            if f"{key}.lora_up.weight" in adapters:
                up, down = (adapters[f"{key}.lora_{side}.weight"] for side in ("up", "down"))
                weight = weight + 0.5 * (up @ down)
                num_merged += 1
            assert found.dtype == torch.float32 and found.equal(weight), name
    assert num_merged == len(adapters) // 3
