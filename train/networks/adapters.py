"""Low-rank adapters (LoRA, arXiv 2106.09685), added to the networks by PEFT and exported with kohya's tensor names."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save

from sdxl_trainer.cache.models.single_file_names import COMPONENT_PREFIXES, build_name_table, get_canonical_name
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.cache.models.tensor_stream import TensorSource
from sdxl_trainer.configs.lora import LoraConfig
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.data.files import create_folder, write_atomic
from sdxl_trainer.data.order.keyed_random import derive_seed

DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"  # PEFT's suffixes of a layer's name
KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def add_adapters(networks: Mapping[str, Any], config: LoraConfig, seed: int = 0) -> None:
    """Freeze the networks and add adapters to the target layers that were trainable.

    New adapters do not change the output of a network. They are in fp32, and equal on every rank.

    Args:
        networks: the networks to train, by name (`unet`, `text_encoder`, `text_encoder_2`).

    Raises:
        UserInputError: a network has no target layer.
    """
    from peft import LoraConfig as PeftConfig

    alpha: Any = config.alpha or config.rank  # PEFT declares an integer and accepts any number
    for number, (name, network) in enumerate(networks.items()):
        key, targets = ("targets", config.targets) if name == "unet" else ("text_targets", config.text_targets)
        layers = find_target_layers(network, targets)
        if not layers:
            rule = f"matches no trainable layer of the {name}"
            cure = "leave it out: the default is the layers that kohya's scripts train"
            raise UserInputError([Problem(f"lora.{key}", targets, rule, cure)])
        network.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, number))
            network.add_adapter(PeftConfig(r=config.rank, lora_alpha=alpha, target_modules=layers))
            initialize_adapters(network)


def initialize_adapters(network: torch.nn.Module) -> None:
    """Draw the adapters' weights from PEFT's distributions, in fp32 on the host.

    PEFT rounds its own draws to the type of the frozen layer.
    """
    for name, weight in network.named_parameters():
        if weight.requires_grad and not weight.is_meta:
            drawn = torch.zeros(weight.shape)
            weight.data = (torch.nn.init.kaiming_uniform_(drawn, a=5**0.5) if name.endswith(DOWN) else drawn).to(
                weight.device
            )


def find_target_layers(network: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """List the layers with trainable weights whose names end in one of the targets."""
    trainable = {name.rpartition(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    endings = tuple(f".{target}" for target in targets)
    return sorted(layer for layer in trainable if f".{layer}".endswith(endings))


def check_adapters(config: LoraConfig) -> Iterator[Problem]:
    """Yield a problem if the settings ask for adapters and PEFT is not installed."""
    if config.rank and importlib.util.find_spec("peft") is None:
        yield Problem("lora.rank", config.rank, "needs peft, which is not installed", "pip install peft")


def write_adapters(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    source: ModelSource,
    config: LoraConfig,
    dtype: torch.dtype,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write adapters as one safetensors file that kohya's scripts, ComfyUI and diffusers read.

    Args:
        weights: the adapters' weights by PEFT's names, such as `unet.….to_q.lora_A.default.weight`.
        metadata: of the file, besides rank and alpha; see `build_modelspec`.
    """
    layers = map_layer_names(source.read_config("unet"))
    alpha = torch.tensor(float(config.alpha or config.rank))
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        layer = name.removesuffix(DOWN).removesuffix(UP)
        base = build_kohya_name(layer, layers)
        tensors[f"{base}.{'lora_down' if name.endswith(DOWN) else 'lora_up'}.weight"] = weight.detach().to("cpu", dtype)
        tensors[f"{base}.alpha"] = alpha.clone()  # safetensors refuses one tensor under two names
    texts = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": f"{alpha.item():g}",
        **metadata,
    }
    create_folder(path.parent)
    write_atomic(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, texts))


def merge_adapters(
    components: Mapping[str, dict[str, TensorSource]], weights: Mapping[str, torch.Tensor], config: LoraConfig
) -> None:
    """Replace each weight of a base model that has an adapter by W + alpha/rank · up · down in fp32, in place.

    Args:
        components: component → name → tensor of the base model, or function that reads it.
        weights: the adapters' weights by PEFT's names.
    """
    scale = float(config.alpha or config.rank) / config.rank

    def add(base: TensorSource, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        weight = base if isinstance(base, torch.Tensor) else base()
        return weight.float() + scale * (up.float() @ down.float()).reshape(weight.shape)

    for name, down in weights.items():
        if name.endswith(DOWN):
            layer = name.removesuffix(DOWN)
            component, _, inner = layer.partition(".")
            tensors, base = components[component], get_canonical_name(component, f"{inner}.weight")
            tensors[base] = partial(add, tensors[base], weights[layer + UP], down)


def map_layer_names(unet_config: Mapping[str, Any]) -> dict[str, str]:
    """Map diffusers' names of the U-Net's layers to the LDM names that kohya's scripts use."""
    prefix = COMPONENT_PREFIXES["unet"]
    return {
        row.sources[0].removesuffix(".weight"): row.file_name.removeprefix(prefix).removesuffix(".weight")
        for row in build_name_table("unet", unet_config)
        if row.file_name.endswith(".weight")
    }


def build_kohya_name(layer: str, layers: Mapping[str, str]) -> str:
    """Return kohya's name of a layer: `lora_unet_middle_block_…_to_q` for `unet.mid_block.….to_q`.

    Layers of text encoders keep transformers' names.

    Args:
        layers: names of the U-Net's layers, from `map_layer_names`.
    """
    component, _, inner = layer.partition(".")
    inner = layers[inner] if component == "unet" else get_canonical_name(component, inner)
    return f"{KOHYA_PREFIXES[component]}_{inner.replace('.', '_')}"
