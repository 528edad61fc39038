"""Low-rank adapters: put into the networks by peft, and written with the names of kohya's scripts."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from sdxl_trainer.cache.models.single_file_names import COMPONENT_PREFIXES, build_name_table, get_canonical_name
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.lora import LoraConfig
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.order.keyed_random import derive_seed

DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def add_adapters(networks: Mapping[str, Any], config: LoraConfig, seed: int = 0) -> None:
    """Freeze networks, and give those of their layers that were not frozen adapters, which change nothing yet.

    They are the same on every rank.

    Args:
        networks: of `unet`, `text_encoder` and `text_encoder_2` those that are trained.

    Raises:
        UserInputError: none of a network's layers is a target.
    """
    from peft import LoraConfig as PeftConfig

    alpha: Any = config.alpha or config.rank  # peft asks for a whole number, and takes any
    for place, (name, network) in enumerate(networks.items()):
        key, targets = ("targets", config.targets) if name == "unet" else ("text_targets", config.text_targets)
        layers = find_target_layers(network, targets)
        if not layers:
            rule, cure = f"names no layer of the {name} that is trained", "the default names those of kohya's scripts"
            raise UserInputError([Problem(f"lora.{key}", targets, rule, cure)])
        network.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, place))
            network.add_adapter(PeftConfig(r=config.rank, lora_alpha=alpha, target_modules=layers))


def find_target_layers(network: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """Layers with weights that are trained, by names that end in a target."""
    learning = {name.rpartition(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    ends = tuple(f".{target}" for target in targets)
    return sorted(layer for layer in learning if f".{layer}".endswith(ends))


def check_adapters(config: LoraConfig) -> Iterator[Problem]:
    """Whether adapters can be made."""
    if config.rank and importlib.util.find_spec("peft") is None:
        yield Problem("lora.rank", config.rank, "needs peft, which is not installed", "pip install peft")


def write_adapters(
    path: Path, weights: Mapping[str, torch.Tensor], source: ModelSource, config: LoraConfig, dtype: torch.dtype
) -> None:
    """Write adapters as one safetensors file that kohya's scripts, ComfyUI and diffusers read.

    Args:
        weights: by name, `unet.….lora_A.default.weight` and so on.
    """
    layers = map_layer_names(source.read_config("unet"))
    alpha = torch.tensor(float(config.alpha or config.rank))
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        layer = name.removesuffix(DOWN).removesuffix(UP)
        base = build_kohya_name(layer, layers)
        tensors[f"{base}.{'lora_down' if name.endswith(DOWN) else 'lora_up'}.weight"] = weight.detach().to("cpu", dtype)
        tensors[f"{base}.alpha"] = alpha.clone()  # safetensors writes no tensor under two names
    metadata = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": f"{alpha.item():g}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": path.stem,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def map_layer_names(unet_config: Mapping[str, Any]) -> dict[str, str]:
    """Layers of the U-Net by diffusers' names to their LDM names, which kohya's scripts use."""
    prefix = COMPONENT_PREFIXES["unet"]
    return {
        row.sources[0].removesuffix(".weight"): row.file_name.removeprefix(prefix).removesuffix(".weight")
        for row in build_name_table("unet", unet_config)
        if row.file_name.endswith(".weight")
    }


def build_kohya_name(layer: str, layers: Mapping[str, str]) -> str:
    """`unet.mid_block.….to_q` to `lora_unet_middle_block_…_to_q`; text encoders keep the names of transformers."""
    component, _, inner = layer.partition(".")
    inner = layers[inner] if component == "unet" else get_canonical_name(component, inner)
    return f"{PREFIXES[component]}_{inner.replace('.', '_')}"
