"""Single-file models: loading by diffusers, bit-equal round trips, metadata, streaming, failures."""

import hashlib
import json
import math
import shutil
import weakref

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from samples.single_file_samples import LOGIT_SCALE, POSITION_IDS, TINY, build_modules, build_tiny_modules

from sdxl_trainer.cache.models.components import build_component, copy_weights, hash_component
from sdxl_trainer.cache.models.diffusers_folder import WEIGHTS
from sdxl_trainer.cache.models.single_file import (
    build_modelspec,
    list_prediction_marks,
    read_carried_tensors,
    read_single_file,
    write_single_file,
)
from sdxl_trainer.cache.models.single_file_check import (
    SDXL_CONFIG_FOLDER,
    find_single_file_problems,
    read_safetensors_header,
)
from sdxl_trainer.cache.models.single_file_names import (
    COMPONENT_PREFIXES,
    build_name_table,
    get_canonical_name,
    list_source_names,
)
from sdxl_trainer.cache.models.source import ModelSource


@pytest.fixture(scope="module")
def tiny_modules():
    return build_tiny_modules()


def get_states(modules):
    return {component: module.state_dict() for component, module in modules.items()}


def write_tiny(path, modules, **options):
    options = {"dtype": torch.float32, "metadata": {}, **options}
    return write_single_file(path, get_states(modules), TINY, **options)


def make_diffusers_folder(folder):
    """Write the shipped configs with tiny sizes and a vocabulary of single letters."""
    shutil.copytree(SDXL_CONFIG_FOLDER, folder)
    for component, config in TINY.items():
        (folder / component / "config.json").write_text(json.dumps(config))
    letters = ["!", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        (folder / name / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return folder


def test_diffusers_loads_the_file_with_identical_weights(tmp_path, tiny_modules):
    path = tmp_path / "model.safetensors"
    write_tiny(path, tiny_modules, marks=list_prediction_marks("v", zero_terminal_snr=True))
    folder = make_diffusers_folder(tmp_path / "configs")
    pipeline = StableDiffusionXLPipeline.from_single_file(str(path), config=str(folder), local_files_only=True)
    for component, module in tiny_modules.items():
        loaded = getattr(pipeline, component).state_dict()
        assert loaded.keys() == module.state_dict().keys()
        for name, tensor in module.state_dict().items():
            assert torch.equal(loaded[name], tensor), f"{component} {name}"
    assert pipeline.vae.config.scaling_factor == 0.13025 and pipeline.vae.config.force_upcast is True
    assert pipeline.scheduler.config.timestep_spacing == "leading" and pipeline.scheduler.config.steps_offset == 1
    assert pipeline.tokenizer.pad_token == "<|endoftext|>" and pipeline.tokenizer_2.pad_token == "!"
    assert pipeline.tokenizer("red").input_ids == pipeline.tokenizer_2("red").input_ids
    assert pipeline.tokenizer_2("red", padding="max_length").input_ids[-1] == 0


def test_reading_back_is_bit_equal(tmp_path, tiny_modules):
    path = tmp_path / "folder" / "model.safetensors"
    write_tiny(path, tiny_modules)
    assert find_single_file_problems(path, TINY) == []
    fresh = build_modules(TINY, "cpu")
    for component, module in tiny_modules.items():
        expected = {get_canonical_name(component, name): tensor for name, tensor in module.state_dict().items()}
        found = dict(read_single_file(path, component, TINY[component]))
        assert list(found) == list_source_names(component, TINY[component]) and found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        copy_weights(fresh[component], component, found.items())
        copied = {get_canonical_name(component, name): tensor for name, tensor in fresh[component].state_dict().items()}
        assert all(torch.equal(copied[name], expected[name]) for name in expected)
    again = tmp_path / "again.safetensors"
    write_tiny(again, fresh)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("component", TINY)
def test_networks_are_built_in_their_type_without_drawing_weights(tmp_path, tiny_modules, component, dtype):
    path = tmp_path / "model.safetensors"
    write_tiny(path, tiny_modules)
    source = ModelSource(make_diffusers_folder(tmp_path / "configs"), path)
    before = torch.get_rng_state()
    module = build_component(lambda: build_modules(TINY, "cpu")[component], source, component, dtype=dtype)
    assert torch.equal(torch.get_rng_state(), before)  # drawing SDXL's weights would take a minute
    weights = tiny_modules[component].state_dict()
    expected = {get_canonical_name(component, name): tensor for name, tensor in weights.items()}
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected[get_canonical_name(component, name)].to(dtype)), name
    buffers, wanted = dict(module.named_buffers()), dict(tiny_modules[component].named_buffers())
    assert buffers.keys() == wanted.keys() and all(torch.equal(buffers[name], wanted[name]) for name in buffers)


def test_a_network_that_lacks_a_weight_or_has_another_shape_is_refused(tiny_modules):
    vae = build_modules(TINY, "cpu")["vae"]
    found = dict(tiny_modules["vae"].state_dict())
    bias = found.pop("encoder.conv_in.bias")
    with pytest.raises(ValueError, match="vae lacks encoder.conv_in.bias"):
        copy_weights(vae, "vae", found.items())
    with pytest.raises(ValueError, match=r"vae encoder.conv_in.bias is \[1\], not \[8\]"):
        copy_weights(vae, "vae", {**found, "encoder.conv_in.bias": bias[:1]}.items())


def test_one_value_decides_on_the_hash_of_a_network_and_its_form_on_disk_does_not(tmp_path, tiny_modules):
    folder, path = make_diffusers_folder(tmp_path / "folder"), tmp_path / "model.safetensors"
    write_tiny(path, tiny_modules)
    for component, module in build_tiny_modules().items():
        module.float()
        save_file(module.state_dict(), folder / component / WEIGHTS[component])
        single = hash_component(ModelSource(folder, path), component)
        assert hash_component(ModelSource(folder), component) == single
        next(weight for name, weight in module.state_dict().items() if name.endswith("bias"))[-1] += 2**-10
        save_file(module.state_dict(), folder / component / WEIGHTS[component])
        assert hash_component(ModelSource(folder), component) != single


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_rounded_once(tmp_path, tiny_modules, dtype):
    path = tmp_path / "model.safetensors"
    write_tiny(path, tiny_modules, dtype=dtype)
    for component, module in tiny_modules.items():
        found = dict(read_single_file(path, component, TINY[component]))
        for name, tensor in module.state_dict().items():
            assert torch.equal(found[get_canonical_name(component, name)], tensor.to(dtype))


def test_fused_and_transposed_tensors_by_hand(tmp_path, tiny_modules):
    path = tmp_path / "model.safetensors"
    write_tiny(path, tiny_modules)
    state = tiny_modules["text_encoder_2"].state_dict()
    attention = "text_model.encoder.layers.2.self_attn"
    with safe_open(path, framework="pt") as file:
        prefix = COMPONENT_PREFIXES["text_encoder_2"]
        fused = file.get_tensor(f"{prefix}transformer.resblocks.2.attn.in_proj_weight")
        assert torch.equal(fused, torch.cat([state[f"{attention}.{part}_proj.weight"] for part in "qkv"]))
        pooled = torch.randn(3, 40)
        projection = file.get_tensor(f"{prefix}text_projection")  # OpenCLIP: x @ W
        assert torch.equal(projection, state["text_projection.weight"].t())
        assert torch.allclose(pooled @ projection, tiny_modules["text_encoder_2"].text_projection(pooled), atol=1e-5)
        assert file.get_tensor(LOGIT_SCALE).shape == ()
        assert float(file.get_tensor(LOGIT_SCALE)) == pytest.approx(math.log(100))


def test_legacy_text_projection(tmp_path, tiny_modules):
    path = tmp_path / "model.safetensors"
    write_tiny(path, tiny_modules, text_projection="legacy")
    weight = tiny_modules["text_encoder_2"].state_dict()["text_projection.weight"]
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor(COMPONENT_PREFIXES["text_encoder_2"] + "text_projection"), weight)
    found = dict(read_single_file(path, "text_encoder_2", TINY["text_encoder_2"], text_projection="legacy"))
    assert torch.equal(found["text_projection.weight"], weight)
    assert find_single_file_problems(path, TINY, text_projection="legacy") == []
    with pytest.raises(ValueError, match=r"text_projection is \[56, 40\], not \[40, 56\]"):
        read_single_file(path, "text_encoder_2", TINY["text_encoder_2"])
    with pytest.raises(ValueError, match="must be 'correct' or 'legacy'"):
        build_name_table("text_encoder_2", TINY["text_encoder_2"], "transposed")


def test_old_and_new_transformers_names_give_one_file(tmp_path, tiny_modules):
    hashes = set()
    for spell in (
        lambda name: get_canonical_name("text_encoder", name),
        lambda name: get_canonical_name("text_encoder", name).removeprefix("text_model."),
    ):
        state = get_states(tiny_modules)
        state["text_encoder"] = {spell(name): tensor for name, tensor in state["text_encoder"].items()}
        state["text_encoder"][spell("text_model.embeddings.position_ids")] = torch.arange(77)[None]
        hashes.add(write_single_file(tmp_path / "model.safetensors", state, TINY, dtype=torch.float32, metadata={}))
    assert len(hashes) == 1


def test_carried_tensors_and_extra(tmp_path, tiny_modules):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    extra = {LOGIT_SCALE: torch.tensor(4.25), POSITION_IDS: torch.arange(77)[None]}
    write_tiny(first, tiny_modules, dtype=torch.float16, extra=extra)
    header = read_safetensors_header(first)
    assert header.types[LOGIT_SCALE] == "F32" and header.types[POSITION_IDS] == "I64"
    assert find_single_file_problems(first, TINY) == []
    dict(read_single_file(first, "text_encoder", TINY["text_encoder"]))  # position_ids are ignored
    write_tiny(second, tiny_modules, extra=read_carried_tensors(first))
    assert read_carried_tensors(second) == {LOGIT_SCALE: torch.tensor(4.25)}
    assert POSITION_IDS not in read_safetensors_header(second).shapes
    state = get_states(tiny_modules)
    state["text_encoder_2"]["logit_scale"] = torch.tensor(2.5)
    write_single_file(second, state, TINY, dtype=torch.float32, metadata={})
    assert read_carried_tensors(second) == {LOGIT_SCALE: torch.tensor(2.5)}
    with pytest.raises(ValueError, match="extra holds v_pred, which the components already hold"):
        write_tiny(second, tiny_modules, extra={"v_pred": torch.zeros(0)})


def test_metadata_and_hash(tmp_path, tiny_modules):
    path = tmp_path / "model.safetensors"
    metadata = build_modelspec(
        "Ein Modell — 模型",
        (1024, 768),
        "v",
        "2025-01-02T03:04:05",
        about={"author": "somebody", "license": None, "tags": "a, b"},
    )
    returned = write_tiny(path, tiny_modules, metadata=metadata, marks=("v_pred",))
    header = read_safetensors_header(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == header.metadata
    assert header.metadata == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "Ein Modell — 模型",
        "modelspec.resolution": "1024x768",
        "modelspec.date": "2025-01-02T03:04:05",
        "modelspec.prediction_type": "v",
        "modelspec.timestep_range": "0,999",
        "modelspec.encoder_layer": "2",
        "modelspec.author": "somebody",
        "modelspec.tags": "a, b",
        "modelspec.hash_sha256": returned,
    }
    assert header.data_start % 8 == 0
    assert returned == f"0x{hashlib.sha256(path.read_bytes()[header.data_start :]).hexdigest()}"
    with pytest.raises(ValueError, match="must be epsilon, v or flow"):
        build_modelspec("t", (8, 8), "velocity", "2025-01-02")
    with pytest.raises(ValueError, match="metadata must be strings; step is not"):
        write_tiny(path, tiny_modules, metadata={"step": 3})


def test_marks(tmp_path, tiny_modules):
    path = tmp_path / "model.safetensors"
    for prediction, zero_snr, expected in (
        ("epsilon", False, set()),
        ("v", False, {"v_pred"}),
        ("v", True, {"v_pred", "ztsnr"}),
    ):
        write_tiny(path, tiny_modules, marks=list_prediction_marks(prediction, zero_snr))
        with safe_open(path, framework="pt") as file:
            marks = {name for name in file.keys() if "." not in name}
            assert marks == expected and all(file.get_tensor(name).shape == (0,) for name in marks)
    for marks in (("ztsnr",), ("v-pred",)):
        with pytest.raises(ValueError, match="ztsnr needs v_pred"):
            write_tiny(path, tiny_modules, marks=marks)


def test_tensors_are_read_one_at_a_time_in_the_documented_order(tmp_path, tiny_modules):
    requested, alive = [], []

    def make_loader(component, name, tensor):
        def load():
            assert not any(reference() is not None for reference in alive), f"{requested[-1]} is still held"
            array = np.array(tensor.numpy())
            requested.append((component, get_canonical_name(component, name)))
            alive[:] = [weakref.ref(array)]  # torch holds the array while its memory is in use
            return torch.from_numpy(array)

        return load

    loaders = {
        component: {name: make_loader(component, name, tensor) for name, tensor in state.items()}
        for component, state in get_states(tiny_modules).items()
    }
    streamed = write_single_file(tmp_path / "a.safetensors", loaders, TINY, dtype=torch.float32, metadata={})
    assert streamed == write_tiny(tmp_path / "b.safetensors", tiny_modules)
    assert requested == [
        (component, name) for component in COMPONENT_PREFIXES for name in list_source_names(component, TINY[component])
    ]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, tiny_modules):
    path = tmp_path / "model.safetensors"

    def fail():
        raise OSError("the link is down")

    def fail_with(source, match, error):
        state = get_states(tiny_modules)
        state["vae"]["decoder.conv_out.bias"] = source
        with pytest.raises(error, match=match):
            write_single_file(path, state, TINY, dtype=torch.float16, metadata={})

    fail_with(fail, "the link is down", OSError)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"old")
    fail_with(fail, "the link is down", OSError)
    fail_with(lambda: torch.zeros(4), r"conv_out.bias has a piece of shape \[4\] instead of \[3\]", ValueError)
    fail_with(torch.tensor([1.0, 70000.0, 0.0]), "70000, which float16 cannot", ValueError)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"


def test_all_mismatched_sources_are_named_before_writing(tmp_path, tiny_modules):
    state = get_states(tiny_modules)
    del state["unet"]["conv_in.bias"]
    state["unet"]["conv_in.weight"] = torch.zeros(16, 9, 3, 3)
    state["vae"]["module.conv_in.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        write_single_file(tmp_path / "model.safetensors", state, TINY, dtype=torch.float32, metadata={})
    for part in (
        "unet lacks conv_in.bias",
        "unet conv_in.weight is [16, 9, 3, 3], not [16, 4, 3, 3]",
        "vae has module.conv_in.weight",
    ):
        assert part in str(error.value)
    del state["vae"]
    with pytest.raises(ValueError, match="needs all components: no tensors for vae"):
        write_single_file(tmp_path / "model.safetensors", state, TINY, dtype=torch.float32, metadata={})
    with pytest.raises(ValueError, match="torch.complex64 cannot be written"):
        write_tiny(tmp_path / "model.safetensors", tiny_modules, dtype=torch.complex64)
    assert list(tmp_path.iterdir()) == []
