"""Which parameters are trained, at what learning rate and with what decay: by regular expression, block or network."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sdxl_trainer.cache.models.single_file_names import COMPONENT_PREFIXES, build_name_table
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import Problem, raise_if_any

# Where kohya's scripts begin to count each part of the U-Net, by its LDM name; the three lists have a number each.
BLOCK_STARTS = {"time_embed": 0, "label_emb": 0, "input_blocks": 1, "middle_block": 10, "output_blocks": 13, "out": 22}
BLOCK_LISTS = ("input_blocks", "middle_block", "output_blocks")
# peft wraps a layer and keeps its own weights within.
LORA_PART = re.compile(r"\.(lora_\w+|base_layer)\..*$")


def build_groups(networks: torch.nn.Module, config: OptimConfig, unet_config: Mapping[str, Any]) -> list[dict]:
    """Parameter groups for an optimizer; what has a learning rate of 0 is frozen and in none.

    Each group has `params`, `lr`, `weight_decay` and `lr_scale`, its rate as a multiple of `optim.lr`, which the
    schedule keeps.

    Raises:
        UserInputError: a pattern matches nothing, or nothing is left to train.
    """
    blocks = map_layers_to_blocks(unet_config) if config.block_lrs else {}
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    names = [name for name, parameter in networks.named_parameters() if parameter.requires_grad]
    raise_if_any(check_patterns(names, config))
    for name, parameter in networks.named_parameters():
        if parameter.requires_grad:
            lr, weight_decay = resolve_group_settings(name, parameter, config, blocks)
            parameter.requires_grad_(lr > 0)
            if lr > 0:
                parameter.use_muon = parameter.dim() == 2 and "embedding" not in name  # pyright: ignore  (DeepSpeed asks)
                groups.setdefault((lr, weight_decay), []).append(parameter)
    if not groups:
        raise_if_any([Problem("optim", None, "all learning rates are 0, nothing is trained", "give one above 0")])
    return [
        {"params": parameters, "lr": lr, "weight_decay": weight_decay, "lr_scale": lr / config.lr}
        for (lr, weight_decay), parameters in groups.items()
    ]


def resolve_group_settings(
    name: str, parameter: torch.nn.Parameter, config: OptimConfig, blocks: Mapping[str, int]
) -> tuple[float, float]:
    """(peak learning rate, weight decay) of a parameter: of the first pattern that finds it, its block, its network."""
    network = name.partition(".")[0]
    lr = {"text_encoder": config.text_encoder_lr, "text_encoder_2": config.text_encoder_2_lr}.get(network, config.lr)
    if config.block_lrs and network == "unet":
        lr = config.block_lrs[blocks[get_layer_name(name)]]
    weight_decay = config.weight_decay if parameter.dim() > 1 else 0.0
    group = next((group for group in config.groups if re.search(group.match, name)), None)
    if group is not None:
        lr = lr if group.lr is None else group.lr
        weight_decay = weight_decay if group.weight_decay is None else group.weight_decay
    return lr, weight_decay


def check_patterns(names: list[str], config: OptimConfig) -> Iterator[Problem]:
    """Patterns that find none of the names: surely a slip."""
    for number, group in enumerate(config.groups):
        if not any(re.search(group.match, name) for name in names):
            rule = f"finds none of the {len(names)} parameters"
            yield Problem(f"optim.groups.{number}.match", group.match, rule, f"names are such as {names[0]}")


def map_layers_to_blocks(unet_config: Mapping[str, Any]) -> dict[str, int]:
    """Layer of the U-Net, `unet.…` without `.weight`, to its number among kohya's 23 blocks."""
    prefix, blocks = COMPONENT_PREFIXES["unet"], {}
    for row in build_name_table("unet", unet_config):
        head, number, *_ = row.file_name.removeprefix(prefix).split(".")
        block = BLOCK_STARTS[head] + (int(number) if head in BLOCK_LISTS else 0)
        blocks |= {get_layer_name(f"unet.{source}"): block for source in row.sources}
    return blocks


def get_layer_name(name: str) -> str:
    """A parameter's name without what it is within its layer, peft's additions included."""
    return LORA_PART.sub("", name.removesuffix(".weight").removesuffix(".bias"))
