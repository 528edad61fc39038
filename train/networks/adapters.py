"""Adapters of low rank, added to the networks by PEFT: LoRA, DoRA, LoHa and LoKr (formulas in adapter_formulas.py)."""

import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sdxl_trainer.configs.lora import LoraConfig
from sdxl_trainer.configs.problems import Problem, UserInputError, raise_if_any
from sdxl_trainer.data.order.keyed_random import derive_seed

# A parameter's name in PEFT: the layer, then the part.
PARAMETER_NAME = re.compile(r"(.*)\.(lora_A|lora_B|lora_magnitude_vector|hada_\w+|lokr_\w+)\.default(?:\.weight)?")
MAGNITUDE = "lora_magnitude_vector"
ZERO_PARTS = ("lora_B", "hada_w2_b", "lokr_w2", "lokr_w2_b")  # so that a new adapter changes nothing
# Further layers of the U-Net that get adapters with `lora.conv_rank`, as kohya's scripts choose them for `conv_dim`.
RESIDUAL_TARGETS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")


class LayerRank(NamedTuple):
    """Rank and alpha of the adapter of one layer."""

    rank: int
    alpha: float


def add_adapters(networks: Mapping[str, Any], config: LoraConfig, seed: int = 0) -> None:
    """Freeze the networks and add adapters to the target layers that were trainable.

    New adapters do not change the output of a network. They are in fp32, and equal on every rank.

    Args:
        networks: the networks to train, by name (`unet`, `text_encoder`, `text_encoder_2`).

    Raises:
        UserInputError: a network has no target layer, or a pattern matches none.
    """
    ranks = {name: choose_ranks(name, network, config) for name, network in networks.items()}
    raise_if_any(check_rank_patterns(ranks, config))
    for number, (name, network) in enumerate(networks.items()):
        network.requires_grad_(False)
        layers = {layer: rank for layer, rank in ranks[name].items() if rank.rank}
        if not layers:
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, number))
            network.add_adapter(build_peft_config(layers, config))
            initialize_adapters(network)
        if config.kind == "lokr":
            remove_scale_of_whole_matrices(network)


def choose_ranks(name: str, network: torch.nn.Module, config: LoraConfig) -> dict[str, LayerRank]:
    """Return rank and alpha of each target layer of a network, by the layer's name in it.

    Raises:
        UserInputError: the network has no target layer.
    """
    key, targets = ("targets", config.targets) if name == "unet" else ("text_targets", config.text_targets)
    residual = RESIDUAL_TARGETS if name == "unet" and config.conv_rank else ()
    layers = find_target_layers(network, [*targets, *residual])
    if not layers or not find_target_layers(network, targets):
        rule = f"matches no trainable layer of the {name}"
        cure = "leave it out: the default is the layers that kohya's scripts train"
        raise UserInputError([Problem(f"lora.{key}", targets, rule, cure)])
    return {
        layer: resolve_rank(f"{name}.{layer}", is_large_kernel(network.get_submodule(layer)), config)
        for layer in layers
    }


def find_target_layers(network: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """List the linear layers and convolutions with trainable weights whose names end in one of the targets."""
    endings = tuple(f".{target}" for target in targets)
    return sorted(
        name
        for name, layer in network.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
        and layer.weight.requires_grad
        and f".{name}".endswith(endings)
    )


def is_large_kernel(layer: torch.nn.Module) -> bool:
    """Return whether a layer is a convolution whose kernel is larger than 1×1."""
    return isinstance(layer, torch.nn.Conv2d) and layer.kernel_size != (1, 1)


def resolve_rank(name: str, has_large_kernel: bool, config: LoraConfig) -> LayerRank:
    """Return rank and alpha of a layer: those of the first matching pattern, else those of its type.

    Args:
        name: of the layer, with the network's: `unet.down_blocks.…`.
    """
    rank, alpha = config.rank, config.alpha
    if has_large_kernel and config.conv_rank:
        rank, alpha = config.conv_rank, config.conv_alpha
    rank = next((value for pattern, value in config.rank_pattern.items() if matches(pattern, name)), rank)
    alpha = next((value for pattern, value in config.alpha_pattern.items() if matches(pattern, name)), alpha)
    return LayerRank(rank, float(rank) if alpha is None else alpha)


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern matches the end of a layer's name from a dot on, as in PEFT's own patterns."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def check_rank_patterns(ranks: Mapping[str, Mapping[str, LayerRank]], config: LoraConfig) -> Iterator[Problem]:
    """Yield a problem for each pattern that matches no layer, and if no layer has a rank above 0."""
    names = [f"{network}.{layer}" for network, layers in ranks.items() for layer in layers]
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                rule = f"matches none of the {len(names)} layers with adapters"
                yield Problem(f"lora.{key}", pattern, rule, f"match the end of names such as {names[0]}")
    if not any(rank.rank for layers in ranks.values() for rank in layers.values()):
        yield Problem("lora.rank_pattern", config.rank_pattern, "gives every layer rank 0", "leave some layers out")


def build_peft_config(layers: Mapping[str, LayerRank], config: LoraConfig) -> Any:
    """Build PEFT's settings of the adapters of one network."""
    from peft import LoHaConfig, LoKrConfig
    from peft import LoraConfig as PeftConfig

    rank, alpha = next(iter(layers.values()))
    patterns = {
        "r": rank,
        "target_modules": list(layers),
        "rank_pattern": group_layers({layer: given.rank for layer, given in layers.items() if given.rank != rank}),
        "alpha_pattern": group_layers({layer: given.alpha for layer, given in layers.items() if given.alpha != alpha}),
    }
    # PEFT declares integers and accepts any number.
    scale: Any = alpha
    if config.kind == "loha":
        return LoHaConfig(alpha=scale, **patterns)
    if config.kind == "lokr":
        factor, both = config.factor or -1, config.decompose_both
        return LoKrConfig(alpha=scale, decompose_factor=factor, decompose_both=both, **patterns)
    return PeftConfig(lora_alpha=scale, use_dora=config.kind == "dora", **patterns)


def group_layers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return one of PEFT's patterns for each value. PEFT tries every pattern with every layer, so few are faster."""
    layers: dict[Any, list[str]] = defaultdict(list)
    for layer, value in values.items():
        layers[value].append(re.escape(layer))
    return {"|".join(names): value for value, names in layers.items()}


def initialize_adapters(network: torch.nn.Module) -> None:
    """Draw the adapters' weights in fp32 on the host, from PEFT's distributions (LoKr: those of LyCORIS).

    PEFT rounds its own draws to the type of the frozen layer.
    """
    for name, weight in network.named_parameters():
        if not weight.requires_grad or weight.is_meta:
            continue
        layer, part = split_parameter_name(name)
        drawn = torch.zeros(weight.shape)
        if part == MAGNITUDE:
            base: Any = network.get_submodule(layer)
            drawn = base.get_base_layer().weight.float().flatten(1).norm(dim=1).reshape(weight.shape)
        elif part not in ZERO_PARTS:
            torch.nn.init.kaiming_uniform_(drawn, a=5**0.5)
        weight.data = drawn.to(weight.device)


def remove_scale_of_whole_matrices(network: torch.nn.Module) -> None:
    """Set the scale of LoKr's layers without a matrix of low rank to 1, as LyCORIS does whatever their alpha is."""
    from peft.tuners.lokr import LoKrLayer

    for layer in network.modules():
        if isinstance(layer, LoKrLayer) and "default" in layer.lokr_w1 and "default" in layer.lokr_w2:
            layer.scaling["default"] = 1.0


def split_parameter_name(name: str) -> tuple[str, str]:
    """Split a parameter's name in PEFT into layer and part, such as `unet.….to_q` and `lora_A`."""
    match = PARAMETER_NAME.fullmatch(name)
    assert match is not None, f"{name} is no weight of an adapter"
    return match[1], match[2]


def group_parameters(weights: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the weights of adapters as layer → part → tensor."""
    layers: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, weight in weights.items():
        layer, part = split_parameter_name(name)
        layers[layer][part] = weight
    return dict(layers)


def check_adapters(config: LoraConfig) -> Iterator[Problem]:
    """Yield a problem if the settings ask for adapters and PEFT is not installed."""
    if config.rank and importlib.util.find_spec("peft") is None:
        yield Problem("lora.rank", config.rank, "needs peft, which is not installed", "pip install peft")
