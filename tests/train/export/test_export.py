"""Export of the live model, weights or averages, one tensor at a time under every ZeRO stage."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdxl_trainer.cache.models.diffusers_folder import open_folder_component
from sdxl_trainer.cache.models.source import resolve_model
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.launch.distributed import Ranks, init_ranks
from sdxl_trainer.train.engine.weights import Weights
from sdxl_trainer.train.export.export import (
    build_export_settings,
    export_local_model,
    export_model,
    get_model_path,
    list_gathered_parameters,
    open_components,
)
from sdxl_trainer.train.run.networks import build_networks

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(scope="module")
def built(tiny_folder: Path):
    """Build (config, engine, source) under ZeRO-3, with a moving average of the weights plus 1."""
    words = ["engine.zero_stage=3", "ema.decays=[0.9]", "run.name=exported"]
    words += ["optim.text_encoder_lr=1e-4", "optim.text_encoder_2_lr=1e-4"]
    config, problems = load_config(tiny_folder / "tiny.yaml", words)
    assert problems == []
    source = resolve_model(config.model)
    engine, _ = build_networks(config, source, init_ranks())
    assert engine.weights.ema is not None
    for average in engine.weights.ema.averages["0.9"]:
        average.add_(1.0)
    return config, engine, source


@pytest.mark.parametrize("average", [None, "0.9"])
def test_no_rank_holds_the_model_whole_in_fp32(built, average: str | None, tmp_path: Path, monkeypatch) -> None:
    """One gathered tensor is alive at a time, or the three that the file stacks into one."""
    config, engine, source = built
    alive: set[str] = set()
    most, gather = [], Weights.gather

    def gather_counted(self: Weights, name: str, average: str | None = None) -> torch.Tensor:
        weight = gather(self, name, average)
        alive.add(name)
        weakref.finalize(weight, alive.discard, name)
        most.append(len(alive))
        return weight

    monkeypatch.setattr(Weights, "gather", gather_counted)
    path = tmp_path / "model.safetensors"
    export_model(path, engine, build_export_settings(config, source), init_ranks(), average)
    assert len(most) > 600 and max(most) <= 4  # the next one is gathered before the ones before it are freed
    written, begun = load_file(path), engine.weights.gather("unet.conv_in.weight")
    assert torch.equal(written[CONV_IN], begun + (1.0 if average else 0.0))
    encoder = "conditioner.embedders.0.transformer.text_model.encoder.layers.0.layer_norm1.weight"
    name = next(
        n
        for n in engine.weights.trained_names
        if n.startswith("text_encoder.") and n.endswith("layers.0.layer_norm1.weight")
    )
    trained = gather(engine.weights, name, average)
    assert torch.equal(written[encoder], trained), "trained text encoders are exported"
    assert {name.split(".")[0] for name in written} == {"model", "conditioner", "first_stage_model"}


@pytest.mark.parametrize("name", ["model.safetensors", "model"])
def test_other_ranks_know_the_order_in_which_weights_are_gathered(
    built, name: str, tmp_path: Path, monkeypatch
) -> None:
    """Each is a collective: rank 0 follows the format writer, the others `list_source_names`."""
    config, engine, source = built
    settings = build_export_settings(config, source)
    asked, gather = [], Weights.gather

    def gather_noted(self: Weights, name: str, average: str | None = None) -> torch.Tensor:
        asked.append(name)
        return gather(self, name, average)

    monkeypatch.setattr(Weights, "gather", gather_noted)
    export_model(tmp_path / name, engine, settings, init_ranks())
    main, asked[:] = list(asked), []
    export_model(tmp_path / name, engine, settings, Ranks(1, 1, 2, torch.device("cpu")))
    assert main == asked and len(main) == len(set(main)) > 600


@pytest.mark.parametrize("local", [False, True])
def test_frozen_weights_are_those_of_the_base_model_to_the_bit(tiny_folder: Path, tmp_path: Path, local: bool) -> None:
    """Training in bf16 holds frozen weights in 16 bit; an fp32 export must not be made from those."""
    words = ["engine.precision=bf16", "engine.zero_stage=2", "optim.text_encoder_lr=1e-4", "run.name=frozen"]
    words += ["optim.groups=[{match: 'unet.mid_block', lr: 0}]", "checkpoint.export_dtype=fp32"]
    config, problems = load_config(tiny_folder / "tiny.yaml", words)
    assert problems == []
    source = resolve_model(config.model)
    engine, _ = build_networks(config, source, init_ranks())
    settings = build_export_settings(config, source)
    if local:
        export_local_model(tmp_path / "model", engine, settings)
    else:
        export_model(tmp_path / "model", engine, settings, init_ranks())
    base = open_components(source, config.model)
    trained = list_gathered_parameters(engine, source)
    assert trained.keys() == {"unet", "text_encoder"}
    num_frozen = num_rounded = 0
    for component, tensors in base.items():
        written = open_folder_component(tmp_path / "model", component)
        assert written.keys() == tensors.keys()
        for name, read in tensors.items():
            is_frozen = name not in trained.get(component, {})
            same = torch.equal(written[name](), read().float())
            assert same or not is_frozen, (component, name)
            num_frozen, num_rounded = num_frozen + is_frozen, num_rounded + (not same)
    assert num_frozen > 300 and (num_rounded > 300) == local  # masters are exact, a rank's own weights are bf16
    mid_block = next(name for name in base["unet"] if name.startswith("mid_block") and name.endswith("conv1.weight"))
    value = base["unet"][mid_block]()
    assert not torch.equal(value, value.bfloat16().float()), "the base model's weights are not bf16 already"


def test_files_are_named_by_step_and_average(built) -> None:
    config = built[0]
    folder = config.run.folder / "models"
    assert get_model_path(config, 12) == folder / "step-00000012.safetensors"
    assert get_model_path(config, 12, "0.9") == folder / "step-00000012-ema-0.9.safetensors"
    as_folder = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"export_format": "diffusers"})}
    )
    assert get_model_path(as_folder, 12) == folder / "step-00000012"
    adapters = as_folder.model_copy(update={"lora": config.lora.model_copy(update={"rank": 4})})
    assert get_model_path(adapters, 12) == folder / "step-00000012-lora.safetensors"
