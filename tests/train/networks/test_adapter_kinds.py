"""Kinds of adapters: formulas written out in NumPy, names and shapes at SDXL's size, and runs with the real engine."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import read_losses, run_program
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

from sdxl_trainer.cache.models.single_file_check import SDXL_CONFIG_FOLDER
from sdxl_trainer.cache.models.source import COMPONENTS, ModelSource
from sdxl_trainer.configs.lora import LoraConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.train.convert import main
from sdxl_trainer.train.networks.adapter_files import (
    build_file_layers,
    build_kohya_name,
    map_adapted_weights,
    map_layer_names,
    merge_layers,
    read_adapter_file,
    write_adapters,
)
from sdxl_trainer.train.networks.adapter_formulas import merge_adapter
from sdxl_trainer.train.networks.adapters import add_adapters
from sdxl_trainer.train.networks.empty_networks import build_empty_networks
from sdxl_trainer.train.networks.parameter_groups import build_parameter_groups
from sdxl_trainer.train.tiny.build import CONFIG_FOLDER, build_tiny_sdxl, build_tiny_unet

BLOCK = "lora_unet_input_blocks_4_1_transformer_blocks_0_"
LINEAR = f"{BLOCK}attn1_to_q"
CONVOLUTION, POINTWISE = (f"lora_unet_input_blocks_4_0_{name}" for name in ("in_layers_2", "skip_connection"))
# Layers of diffusers' U-Net with those names.
WEIGHTS = {
    LINEAR: "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    CONVOLUTION: "down_blocks.1.resnets.0.conv1",
    POINTWISE: "down_blocks.1.resnets.0.conv_shortcut",
}
KINDS = ("lora", "dora", "loha", "lokr")


def build_config(kind: str, **settings: Any) -> LoraConfig:
    """Return settings with convolutions, ranks and alphas of their own."""
    given = {"rank": 4, "kind": kind, "alpha": 2.0, "conv_rank": 2, "conv_alpha": 6.0, **settings}
    return LoraConfig.model_validate(given)


def build_adapted_unet(config: LoraConfig) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a tiny U-Net with random adapters, the base weights, and the adapters by PEFT's names."""
    torch.manual_seed(0)
    unet = build_tiny_unet().eval()
    base = {name: weight.detach().clone() for name, weight in unet.state_dict().items()}
    outputs = [predict(unet)]
    add_adapters({"unet": unet}, config, seed=5)
    outputs.append(predict(unet))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=2e-6)  # new adapters change nothing
    weights = {}
    for name, weight in unet.named_parameters():
        if weight.requires_grad:
            start = weight.data if "magnitude" in name else 0
            weight.data = start + 0.8 * (torch.rand(weight.shape) - 0.5)
            weights[f"unet.{name}"] = weight
    return unet, base, weights


@torch.no_grad()
def predict(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    conditions = {"text_embeds": torch.ones(1, pooled), "time_ids": torch.ones(1, 6)}
    hidden = torch.randn(1, 7, unet.config.cross_attention_dim, generator=generator)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    return unet(sample, 500, hidden, added_cond_kwargs=conditions).sample


def merge_by_hand(kind: str, weight: np.ndarray, parts: dict[str, np.ndarray]) -> np.ndarray:
    """Return W + ΔW, or m · (W + ΔW)/‖W + ΔW‖, by the formulas of the papers, in fp64."""
    parts = {name: part.astype(np.float64) for name, part in parts.items()}
    flat = weight.astype(np.float64).reshape(weight.shape[0], -1)
    if kind in ("lora", "dora"):
        up, down = parts["lora_up.weight"], parts["lora_down.weight"]
        rank = down.shape[0]
        change = up.reshape(-1, rank) @ down.reshape(rank, -1)
    elif kind == "loha":
        rank = parts["hada_w1_b"].shape[0]
        change = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    else:
        first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        whole = "lokr_w2" in parts
        second = parts["lokr_w2"] if whole else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        second = second.reshape(second.shape[0], -1)
        change = np.kron(first, second)  # inputs are (left, right, kernel): the kernel stays innermost
        rank = parts["alpha"] if whole and "lokr_w1" in parts else second_rank(parts)
    merged = flat + change.reshape(flat.shape) * parts["alpha"] / rank
    if kind == "dora":
        merged *= parts["dora_scale"].reshape(-1, 1) / np.linalg.norm(merged, axis=1, keepdims=True)
    return merged.reshape(weight.shape)


def second_rank(parts: dict[str, np.ndarray]) -> int:
    return parts["lokr_w2_b"].shape[0] if "lokr_w2_b" in parts else parts["lokr_w1_b"].shape[0]


def group_file(path: Path) -> dict[str, dict[str, np.ndarray]]:
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in load_file(path).items():
        layer, _, part = name.partition(".")
        layers.setdefault(layer, {})[part] = tensor
    return layers


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(kind, {}) for kind in KINDS] + [("lokr", {"rank": 1, "factor": 4, "decompose_both": True, "conv_rank": 99})],
)
def test_merged_weights_are_those_of_the_formulas_and_of_the_network(kind: str, settings: dict, tmp_path: Path) -> None:
    """The file's tensors, merged by hand, make the network compute what it computes with its live adapters."""
    config = build_config(kind, rank_pattern={r"mid_block\..*": 0, "attn2.to_k": 3}, alpha_pattern={"attn2.to_k": 9.0})
    config = config.model_copy(update=settings)
    unet, base, weights = build_adapted_unet(config)
    source = ModelSource(CONFIG_FOLDER)
    write_adapters(tmp_path / "x.safetensors", weights, source, config, torch.float32)
    layers = group_file(tmp_path / "x.safetensors")
    targets = map_adapted_weights({name: source.read_config(name) for name in COMPONENTS})
    expected = dict(base)
    merged: dict[str, dict[str, Any]] = {"unet": dict(base)}
    assert layers.keys() <= targets.keys() and not any("middle_block" in layer for layer in layers)
    for layer, parts in layers.items():
        name = targets[layer].name
        expected[name] = torch.from_numpy(merge_by_hand(kind, base[name].numpy(), parts)).float()
    merge_layers(merged, read_adapter_file(tmp_path / "x.safetensors"), targets)
    for name in (targets[layer].name for layer in layers):
        torch.testing.assert_close(merged["unet"][name](), expected[name], rtol=1e-6, atol=1e-6)
        assert (expected[name] - base[name]).abs().max() > 1e-3
    assert {float(layers[layer]["alpha"]) for layer in (LINEAR, POINTWISE)} <= {2.0, float(config.rank)}
    to_k = layers[f"{BLOCK}attn2_to_k"]
    assert to_k["alpha"] == (3 if "lokr_w2" in to_k and "lokr_w1" in to_k else 9)
    plain = build_tiny_unet().eval()
    plain.load_state_dict(expected)
    torch.testing.assert_close(predict(plain), predict(unet), rtol=1e-4, atol=1e-4)
    assert (predict(unet) - predict(build_plain(base))).abs().max() > 1e-3


def build_plain(weights: dict[str, torch.Tensor]) -> Any:
    unet = build_tiny_unet().eval()
    unet.load_state_dict(weights)
    return unet


def test_strength_and_older_forms_of_files() -> None:
    """Tucker decomposition, norms by input, names of diffusers, and half the strength, each against NumPy."""
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32)

    weight = draw(6, 4, 3, 3)
    core, left, right = draw(2, 2, 3, 3), draw(2, 6), draw(2, 4)
    pair = np.einsum("rshw,ro,si->oihw", core, left, right)
    hada = {"hada_t1": core, "hada_w1_a": left, "hada_w1_b": right}
    hada |= {name.replace("1", "2", 1): part for name, part in hada.items()}
    down, up = draw(2, 4, 1, 1), draw(6, 2, 1, 1)
    cases = {
        "loha": ({**hada, "alpha": np.float32(1)}, weight + 0.5 * 0.5 * pair * pair),
        "locon": (
            {"lora_mid.weight": core, "lora_down.weight": down, "lora_up.weight": up},
            weight + 0.5 * np.einsum("or,rshw,si->oihw", up[..., 0, 0], core, down[..., 0, 0]),
        ),
        "lokr": (
            {"lokr_w1": draw(3, 2), "lokr_t2": core, "lokr_w2_a": left[:, :2], "lokr_w2_b": right[:, :2]},
            None,
        ),
    }
    kron = cases["lokr"][0]
    second = np.einsum("rshw,ro,si->oihw", core, left[:, :2], right[:, :2])
    whole = np.einsum("ab,oihw->aobihw", kron["lokr_w1"], second).reshape(weight.shape)
    cases["lokr"] = (kron, weight + 0.5 * whole)
    norms = np.abs(draw(1, 4, 1, 1))
    merged = weight + 2 * (up[..., 0, 0] @ down[..., 0, 0])[:, :, None, None]
    scaled = merged * norms / np.sqrt(np.square(merged).sum(axis=(0, 2, 3), keepdims=True))
    full_down = np.zeros((2, 4, 3, 3), np.float32) + down
    parts = {"lora_down.weight": full_down, "lora_up.weight": up, "alpha": np.float32(4), "dora_scale": norms}
    cases["norms by input"] = (parts, weight + 0.5 * (scaled - weight))
    for case, (given, expected) in cases.items():
        tensors = {name: torch.from_numpy(np.asarray(part)) for name, part in given.items()}
        found = merge_adapter(torch.from_numpy(weight), tensors, strength=0.5)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=case)


# Layers of SDXL with adapters: 722 of the attention blocks; with `conv_rank` 66 of the residual blocks besides, which
# are the 788 modules that LyCORIS reports; 258 of the text encoders.
SHAPES = {
    "dora": {  # LoRA's keys and the norms
        LINEAR: {"lora_down.weight": (16, 640), "lora_up.weight": (640, 16), "alpha": (), "dora_scale": (640, 1)},
        CONVOLUTION: {
            "lora_down.weight": (8, 320, 3, 3),
            "lora_up.weight": (640, 8, 1, 1),
            "alpha": (),
            "dora_scale": (640, 1, 1, 1),
        },
        POINTWISE: {"lora_down.weight": (16, 320, 1, 1), "lora_up.weight": (640, 16, 1, 1), "alpha": ()},
    },
    "loha": {
        LINEAR: {"hada_w1_a": (640, 16), "hada_w1_b": (16, 640), "hada_w2_a": (640, 16), "hada_w2_b": (16, 640)},
        CONVOLUTION: {"hada_w1_a": (640, 8), "hada_w2_b": (8, 320 * 9)},
    },
    # 640 = 20 · 32 and 320 = 16 · 20; a rank of at least half the larger side keeps the second matrix whole.
    "lokr": {
        LINEAR: {"lokr_w1": (20, 20), "lokr_w2": (32, 32), "alpha": ()},
        CONVOLUTION: {"lokr_w1": (20, 16), "lokr_w2_a": (32, 8), "lokr_w2_b": (8, 20 * 9), "alpha": ()},
    },
}
NUM_KEYS = {"dora": 4 * 1046, "loha": 5 * 1046, "lokr": 4065}


@pytest.mark.parametrize("kind", SHAPES)
def test_every_key_of_sdxl_belongs_to_a_weight_that_it_fits(kind: str) -> None:
    source = ModelSource(SDXL_CONFIG_FOLDER)
    networks = build_empty_networks(source, ["text_encoder", "text_encoder_2"])
    config = LoraConfig.model_validate({"rank": 16, "kind": kind, "conv_rank": 8})
    add_adapters(dict(networks.named_children()), config)
    weights = {name: weight for name, weight in networks.named_parameters() if weight.requires_grad}
    layers = build_file_layers(weights, source, config)
    targets = map_adapted_weights({name: source.read_config(name) for name in COMPONENTS})
    assert len(layers) == 722 + 66 + 66 + 192
    assert sum(layer.startswith("lora_unet") for layer in layers) == 788
    assert len({(targets[layer].component, targets[layer].name) for layer in layers}) == len(layers)
    assert sum(map(len, layers.values())) == NUM_KEYS[kind]
    for layer, parts in SHAPES[kind].items():
        found = {name: tuple(tensor.shape) for name, tensor in layers[layer].items()}
        assert parts.items() <= found.items()
        assert targets[layer].name == f"{WEIGHTS[layer]}.weight"


def test_the_learning_rate_of_b_and_the_decay_of_norms() -> None:
    unet = build_tiny_unet()
    add_adapters({"unet": unet}, build_config("dora", b_lr_ratio=16.0))
    networks = torch.nn.ModuleDict({"unet": unet})
    optim = OptimConfig.model_validate({"lr": 1e-4, "weight_decay": 0.1})
    groups = build_parameter_groups(networks, optim, unet.config, b_lr_ratio=16.0)
    names = {id(parameter): name for name, parameter in networks.named_parameters()}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            part = re.search("lora_A|lora_B|magnitude", names[id(parameter)])
            assert part is not None
            found.setdefault(part[0], set()).add((group["lr"], group["lr_scale"], group["weight_decay"]))
    assert found == {"lora_A": {(1e-4, 1.0, 0.1)}, "lora_B": {(1.6e-3, 16.0, 0.1)}, "magnitude": {(1e-4, 1.0, 0.0)}}


def test_options_that_a_kind_lacks_are_refused() -> None:
    wrong = {
        "factor": ({"kind": "loha", "factor": 8}, "set that to lokr"),
        "decompose_both": ({"decompose_both": True}, "does not work with lora.kind lora; set that to lokr"),
        "b_lr_ratio": ({"kind": "lokr", "b_lr_ratio": 16}, "set that to lora or dora"),
        "quantised_base": ({"kind": "dora", "quantised_base": "nf4"}, "set that to lora, or leave it out"),
        "conv_alpha": ({"conv_alpha": 1}, "lora.conv_rank is 0"),
        "rank_pattern": ({"rank_pattern": {"(": 4}}, "is not a regular expression"),
    }
    for key, (settings, message) in wrong.items():
        with pytest.raises(ValidationError, match=message) as caught:
            LoraConfig.model_validate({"rank": 4, **settings})
        assert [error["loc"][0] for error in caught.value.errors()] == [key]
    with pytest.raises(ValidationError, match="lora.rank is 0"):
        LoraConfig.model_validate({"kind": "loha"})
    cases = ({"rank_pattern": {"to_x": 4}}, "to_x"), ({"rank_pattern": {".*": 0}}, "gives every layer rank 0")
    for settings, message in cases:
        with pytest.raises(UserInputError, match=message):
            add_adapters({"unet": build_tiny_unet()}, LoraConfig.model_validate({"rank": 4, **settings}))


RUNS = {
    "dora": ("engine.zero_stage=3", "train.global_batch_size=2", "optim.text_encoder_2_lr=1e-3", "lora.b_lr_ratio=4"),
    "loha": ("engine.zero_stage=3", "train.global_batch_size=2", "engine.precision=bf16"),
    "lokr": ("engine.gradient_release=true", "train.global_batch_size=2", "optim.max_grad_norm=0"),
}


def run_kinds(settings: Path, starts: list[tuple[str, int]], ranks: int = 1) -> None:
    """Train with each kind in one launch: for each start, a run of this ending of its name, up to this step."""
    words: list[Any] = []
    for kind, own in RUNS.items():
        shared = (f"lora.kind={kind}", "lora.rank=2", "lora.conv_rank=2", "sample.prompts=[]", "ema.decays=[0.5]", *own)
        shared += (f"train.micro_batch_size={2 // ranks}", "checkpoint.every_steps=1")
        for ending, steps in starts:
            words += ["+", "train", settings, f"run.name={kind}{ending}", f"train.max_steps={steps}", *shared]
    run_program("tests/support/several_runs.py", *words[1:], ranks=ranks)


@pytest.mark.long
def test_runs_of_each_kind_resume_exactly(cached_folder: Path) -> None:
    settings, runs = cached_folder / "tiny.yaml", cached_folder / "runs"
    run_kinds(settings, [("-whole", 2), ("-twice", 1), ("-twice", 2)])
    for kind in RUNS:
        run, twice = (runs / f"{kind}-{name}" for name in ("whole", "twice"))
        assert read_losses(run) == read_losses(twice) and len(read_losses(run)) == 2
        for file in ("step-00000002-lora.safetensors", "step-00000002-lora-ema-0.5.safetensors"):
            straight, resumed = (load_tensors(folder / "models" / file) for folder in (run, twice))
            assert straight.keys() == resumed.keys() and all(straight[name].equal(resumed[name]) for name in straight)
    # 1 → 2 → 1 ranks.
    run_kinds(settings, [("-whole", 4)])
    run_kinds(settings, [("-twice", 3)], ranks=2)
    run_kinds(settings, [("-twice", 4)])
    for kind in RUNS:
        straight, resumed = (read_losses(runs / f"{kind}-{name}") for name in ("whole", "twice"))
        assert len(resumed) == 4
        np.testing.assert_allclose(resumed, straight, rtol=0, atol=2e-3 if kind == "loha" else 1e-5)  # loha in bf16


def test_runs_of_each_kind_export_what_the_formulas_merge(cached_folder: Path, tmp_path: Path) -> None:
    run_kinds(cached_folder / "tiny.yaml", [("-once", 1)])
    for kind in RUNS:
        run, target = cached_folder / "runs" / f"{kind}-once", tmp_path / kind
        assert main([str(run), str(tmp_path / f"{kind}.safetensors"), "--dtype", "fp32"]) == 0
        assert main([str(run), str(target), "--merge", "--dtype", "fp32"]) == 0
        layers = group_file(tmp_path / f"{kind}.safetensors")
        source = ModelSource(cached_folder / "model")
        targets = map_adapted_weights({name: source.read_config(name) for name in COMPONENTS})
        base, merged = (load_unet(folder) for folder in (cached_folder / "model", target))
        num_changed = 0
        for layer, parts in layers.items():
            if targets[layer].component == "unet":
                name = targets[layer].name
                expected = merge_by_hand(kind, base[name], parts)
                np.testing.assert_allclose(merged[name], expected, rtol=1e-6, atol=1e-6)
                num_changed += not np.array_equal(merged[name], base[name])
        assert num_changed == sum(layer.startswith("lora_unet") for layer in layers) > 20
        with safe_open(tmp_path / f"{kind}.safetensors", "np") as file:
            metadata = file.metadata()
        arguments = json.loads(metadata["ss_network_args"])
        assert metadata["ss_network_module"] == "lycoris.kohya" and arguments["conv_dim"] == "2"
        assert arguments["algo"] == ("locon" if kind == "dora" else kind)


def load_unet(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_diffusers_and_peft_compute_the_same(tmp_path: Path) -> None:
    """diffusers reads LoRA alone. PEFT reads its own names of the other kinds, with the scale that files have."""
    from diffusers import StableDiffusionXLPipeline
    from peft import set_peft_model_state_dict

    folder, file = build_tiny_sdxl(tmp_path / "model"), tmp_path / "x.safetensors"
    unet, base, weights = build_adapted_unet(build_config("lora"))
    write_adapters(file, weights, ModelSource(folder), build_config("lora"), torch.float32)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.unet.load_state_dict(base)
    pipeline.load_lora_weights(str(file))
    torch.testing.assert_close(predict(pipeline.unet), predict(unet), rtol=1e-4, atol=1e-4)
    for kind in ("dora", "loha", "lokr"):
        config = build_config(kind)
        unet, base, weights = build_adapted_unet(config)
        write_adapters(file, weights, ModelSource(folder), config, torch.float32)
        other = build_plain(base)
        add_adapters({"unet": other}, config, seed=6)
        names = {name.removeprefix("unet.").replace(".default", ""): weight for name, weight in weights.items()}
        loaded = read_by_peft_names(file, names, ModelSource(folder))
        set_peft_model_state_dict(other, loaded)
        torch.testing.assert_close(predict(other), predict(unet), rtol=1e-5, atol=1e-5)


def read_by_peft_names(file: Path, names: dict[str, torch.Tensor], source: ModelSource) -> dict[str, torch.Tensor]:
    """Return the tensors of a file under PEFT's names, with PEFT's shapes."""
    tensors, layers, loaded = load_tensors(file), map_layer_names(source.read_config("unet")), {}
    parts = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    parts["lora_magnitude_vector.weight"] = "dora_scale"
    for name, weight in names.items():
        match = re.fullmatch(r"(.*)\.((?:lora|hada|lokr)_.*)", name)
        assert match is not None
        key = f"{build_kohya_name(f'unet.{match[1]}', layers)}.{parts.get(match[2], match[2])}"
        loaded[name] = tensors.pop(key).reshape(weight.shape)
    assert all(name.endswith(".alpha") for name in tensors)  # every other tensor is used
    return loaded
