"""Export of the model in training, its weights or averages, one tensor at a time under ZeRO-3."""

import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from programs import TINY
from safetensors.torch import load_file

from sdxl_trainer.cache.models.diffusers_folder import open_folder_component
from sdxl_trainer.cache.models.encoders import load_tokenizers
from sdxl_trainer.cache.models.source import resolve_model
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.launch.distributed import Ranks, init_ranks
from sdxl_trainer.launch.signals import BrokenOff
from sdxl_trainer.train.engine.weights import Weights
from sdxl_trainer.train.export.export import (
    build_export_settings,
    export_local_model,
    export_model,
    get_model_path,
    list_gathered_parameters,
    open_components,
    write_model,
)
from sdxl_trainer.train.run.networks import build_networks

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(scope="module")
def zero_3(tiny_folder: Path):
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
def test_no_rank_holds_the_whole_model_in_fp32(zero_3, average: str | None, tmp_path: Path, monkeypatch) -> None:
    """Only one gathered tensor is alive at a time, or three that the file stacks into one."""
    config, engine, source = zero_3
    alive: set[str] = set()
    num_alive, gather = [], Weights.gather

    def gather_counted(self: Weights, name: str, average: str | None = None) -> torch.Tensor:
        weight = gather(self, name, average)
        alive.add(name)
        weakref.finalize(weight, alive.discard, name)
        num_alive.append(len(alive))
        return weight

    monkeypatch.setattr(Weights, "gather", gather_counted)
    path = tmp_path / "model.safetensors"
    export_model(path, engine, build_export_settings(config, source), init_ranks(), average)
    assert len(num_alive) > 600 and max(num_alive) <= 4  # the next tensor is gathered before the last three are freed
    written, conv_in = load_file(path), engine.weights.gather("unet.conv_in.weight")
    assert torch.equal(written[CONV_IN], conv_in + (1.0 if average else 0.0))
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
def test_all_ranks_gather_weights_in_the_same_order(zero_3, name: str, tmp_path: Path, monkeypatch) -> None:
    """Rank 0 gathers in the order of the format writer, the other ranks in that of `list_gathered_parameters`."""
    config, engine, source = zero_3
    settings = build_export_settings(config, source)
    gathered, gather = [], Weights.gather

    def gather_recorded(self: Weights, name: str, average: str | None = None) -> torch.Tensor:
        gathered.append(name)
        return gather(self, name, average)

    monkeypatch.setattr(Weights, "gather", gather_recorded)
    export_model(tmp_path / name, engine, settings, init_ranks())
    by_rank_0, gathered[:] = list(gathered), []
    export_model(tmp_path / name, engine, settings, Ranks(1, 1, 2, torch.device("cpu")))
    assert by_rank_0 == gathered and len(gathered) == len(set(gathered)) > 600


@pytest.mark.parametrize("name", ["model.safetensors", "model"])
def test_an_export_that_is_broken_off_leaves_nothing(zero_3, name: str, tmp_path: Path) -> None:
    config, engine, source = zero_3
    settings = build_export_settings(config, source)
    counts = []
    for rank in range(2):
        passes = iter(range(100))

        def break_off(passes=passes) -> None:
            if next(passes, None) is None:
                raise BrokenOff

        with pytest.raises(BrokenOff):
            export_model(tmp_path / name, engine, settings, Ranks(rank, rank, 2, torch.device("cpu")), None, break_off)
        counts.append(next(passes, "all"))
    assert counts == ["all", "all"] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("local", [False, True])
def test_frozen_weights_are_bit_equal_to_the_base_model(tiny_folder: Path, tmp_path: Path, local: bool) -> None:
    """Training in bf16 keeps frozen weights in 16 bit; an fp32 export must not use these copies."""
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


def test_files_are_named_by_step_and_average(zero_3) -> None:
    config = zero_3[0]
    folder = config.run.folder / "models"
    assert get_model_path(config, 12) == folder / "step-00000012.safetensors"
    assert get_model_path(config, 12, "0.9") == folder / "step-00000012-ema-0.9.safetensors"
    as_folder = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"export_format": "diffusers"})}
    )
    assert get_model_path(as_folder, 12) == folder / "step-00000012"
    adapters = as_folder.model_copy(update={"lora": config.lora.model_copy(update={"rank": 4})})
    assert get_model_path(adapters, 12) == folder / "step-00000012-lora.safetensors"


def test_diffusers_loads_a_folder_written_from_a_single_file(tiny_folder: Path, tmp_path: Path) -> None:
    """The folder of `model.config` lacks a vocabulary, as configs/sdxl does; the exported one has that of training."""
    config, problems = load_config(tiny_folder / "tiny.yaml", ["checkpoint.export_dtype=fp32"])
    assert problems == []
    settings = build_export_settings(config, resolve_model(config.model))
    write_model(tmp_path / "model.safetensors", {}, settings)
    bare = tmp_path / "bare"
    shutil.copytree(TINY, bare, ignore=shutil.ignore_patterns("vocab.json", "merges.txt", "tokenizer_2"))
    (bare / "tokenizer" / "tokenizer.json").write_text("that of another vocabulary")
    model = config.model.model_copy(
        update={"path": str(tmp_path / "model.safetensors"), "config": bare, "tokenizer": TINY / "tokenizer"}
    )
    write_model(tmp_path / "folder", {}, replace(settings, source=resolve_model(model), model=model))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "folder")
    for name, tokenizer in zip(
        ("tokenizer", "tokenizer_2"), load_tokenizers(settings.source, config.model), strict=True
    ):
        ids = getattr(pipeline, name)("a red circle", padding="max_length", max_length=77)["input_ids"]
        assert ids == tokenizer.encode("a red circle")[0].tolist()
