"""Parameter groups: the learning rate and weight decay of each parameter, by network, block and regular expression."""

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from sdxl_trainer.cache.models.single_file_names import COMPONENT_PREFIXES, build_name_table
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import Problem, raise_if_any

# The number of the first block in each part of the U-Net, as kohya's scripts count, by the part's LDM name. Each entry
# of the three lists is a block of its own.
BLOCK_STARTS = {"time_embed": 0, "label_emb": 0, "input_blocks": 1, "middle_block": 10, "output_blocks": 13, "out": 22}
BLOCK_LISTS = ("input_blocks", "middle_block", "output_blocks")
# The suffix that PEFT adds to a parameter's name when it wraps a layer.
PEFT_SUFFIX = re.compile(r"\.((?:lora|hada|lokr)_\w+|base_layer)\..*$")
# Parts of adapters' names: the matrix B of a LoRA, and the norms of a DoRA, which do not decay, as those of layers.
ADAPTER_B, ADAPTER_NORM = ".lora_B.", ".lora_magnitude_vector."


class GroupSettings(NamedTuple):
    """Optimizer settings that the parameters of one group share."""

    lr: float  # peak learning rate
    weight_decay: float


def build_parameter_groups(
    networks: torch.nn.Module, config: OptimConfig, unet_config: Mapping[str, Any], b_lr_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Build parameter groups for an optimizer. Parameters with a learning rate of 0 are frozen and left out.

    Each group has `params`, `lr`, `weight_decay` and `lr_scale`, the ratio of its rate to `optim.lr`. The schedule
    keeps that ratio.

    Args:
        b_lr_ratio: factor of the learning rate of the matrices B of adapters, those that begin at zero (LoRA+).

    Raises:
        UserInputError: a pattern matches no parameter, or every learning rate is 0.
    """
    blocks = map_layers_to_blocks(unet_config) if config.block_lrs else {}
    trainable = {name: parameter for name, parameter in networks.named_parameters() if parameter.requires_grad}
    raise_if_any(check_patterns(list(trainable), config))
    groups: dict[GroupSettings, list[torch.nn.Parameter]] = {}
    for name, parameter in trainable.items():
        settings = resolve_group_settings(name, parameter, config, blocks)
        if ADAPTER_B in name:
            settings = settings._replace(lr=settings.lr * b_lr_ratio)
        parameter.requires_grad_(settings.lr > 0)
        if settings.lr > 0:
            # DeepSpeed reads this attribute to choose between Muon and Adam.
            parameter.use_muon = parameter.dim() == 2 and "embedding" not in name  # pyright: ignore
            groups.setdefault(settings, []).append(parameter)
    if not groups:
        raise_if_any([Problem("optim", None, "all learning rates are 0, so nothing is trained", "set one above 0")])
    return [
        {
            "params": parameters,
            "lr": settings.lr,
            "weight_decay": settings.weight_decay,
            "lr_scale": settings.lr / config.lr,
        }
        for settings, parameters in groups.items()
    ]


def split_groups(groups: Sequence[Mapping[str, Any]], max_values: int) -> list[dict[str, Any]]:
    """Split parameter groups into pieces of at most `max_values` values, with the settings of their group.

    Parameters keep their order. A group has as few pieces as possible, of sizes as equal as whole parameters allow. A
    parameter of more values is a piece of its own: optimizers take whole parameters only.
    """
    pieces = []
    for group in groups:
        parameters = group["params"]
        sizes = [parameter.numel() for parameter in parameters]
        num_pieces = len(find_piece_starts(sizes, max_values))
        # Smaller pieces are never fewer, so the smallest limit that keeps their number is found by bisection.
        limit = bisect_left(range(max_values), -num_pieces, key=lambda limit: -len(find_piece_starts(sizes, limit)))
        bounds = pairwise([*find_piece_starts(sizes, limit), len(parameters)])
        pieces += [{**group, "params": parameters[start:end]} for start, end in bounds]
    return pieces


def find_piece_starts(sizes: Sequence[int], max_values: int) -> list[int]:
    """Return the place of the first parameter of each piece, when pieces are filled one after the other."""
    starts, filled = [], 0
    for place, size in enumerate(sizes):
        if not starts or filled + size > max_values:
            starts.append(place)
            filled = 0
        filled += size
    return starts


def resolve_group_settings(
    name: str, parameter: torch.nn.Parameter, config: OptimConfig, blocks: Mapping[str, int]
) -> GroupSettings:
    """Return the settings of a parameter: those of the first matching pattern, else those of its block or network."""
    network = name.partition(".")[0]
    lr = {"text_encoder": config.text_encoder_lr, "text_encoder_2": config.text_encoder_2_lr}.get(network, config.lr)
    if config.block_lrs and network == "unet":
        lr = config.block_lrs[blocks[get_layer_name(name)]]
    weight_decay = config.weight_decay if parameter.dim() > 1 and ADAPTER_NORM not in name else 0.0
    group = next((group for group in config.groups if re.search(group.match, name)), None)
    if group is not None:
        lr = lr if group.lr is None else group.lr
        weight_decay = weight_decay if group.weight_decay is None else group.weight_decay
    return GroupSettings(lr, weight_decay)


def check_patterns(names: Sequence[str], config: OptimConfig) -> Iterator[Problem]:
    """Yield a problem for each pattern that matches none of the parameters."""
    for number, group in enumerate(config.groups):
        if not any(re.search(group.match, name) for name in names):
            rule = f"matches none of the {len(names)} parameters"
            yield Problem(f"optim.groups.{number}.match", group.match, rule, f"match names such as {names[0]}")


def map_layers_to_blocks(unet_config: Mapping[str, Any]) -> dict[str, int]:
    """Map each layer of the U-Net, such as `unet.conv_in`, to its block, 0 to 22 as kohya's scripts count."""
    prefix, blocks = COMPONENT_PREFIXES["unet"], {}
    for row in build_name_table("unet", unet_config):
        head, number, *_ = row.file_name.removeprefix(prefix).split(".")
        block = BLOCK_STARTS[head] + (int(number) if head in BLOCK_LISTS else 0)
        blocks |= {get_layer_name(f"unet.{source}"): block for source in row.sources}
    return blocks


def get_layer_name(name: str) -> str:
    """Return the name of a parameter's layer, without PEFT's suffix: `unet.conv_in` for `unet.conv_in.weight`."""
    return PEFT_SUFFIX.sub("", name.removesuffix(".weight").removesuffix(".bias"))
