"""The difference of two models as a LoRA: the products of low rank that are closest to it, layer by layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from sdxl_trainer.cache.models.single_file_names import build_name_table
from sdxl_trainer.cache.models.tensor_stream import TensorSource
from sdxl_trainer.configs.lora import LoraConfig
from sdxl_trainer.configs.problems import Problem, UserInputError, format_count
from sdxl_trainer.train.export.export import ExportSettings, build_adapter_file_metadata, describe_files
from sdxl_trainer.train.networks.adapter_files import (
    KOHYA_PREFIXES,
    build_adapter_metadata,
    build_kohya_name,
    list_names,
    map_layer_names,
    read_tensor,
    write_adapter_tensors,
)
from sdxl_trainer.train.networks.adapter_formulas import ALPHA, DOWN, UP, LowRank, approximate
from sdxl_trainer.train.networks.adapters import RESIDUAL_TARGETS

Components = Mapping[str, Mapping[str, TensorSource]]
BASE_CURE = "give the model that the source was trained from"
PROGRESS_LAYERS = 100  # between lines of progress


@dataclass(frozen=True, kw_only=True)
class ExtractedRanks:
    """Ranks of the LoRA; 0 for convolutions leaves out the residual blocks."""

    linear: int
    convolution: int


def check_same_layers(
    source: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]], where: str
) -> Iterator[Problem]:
    """Yield a problem if two models have other layers or shapes.

    Args:
        source, base: configs of the components.
        where: value of --base.
    """
    for component in KOHYA_PREFIXES:
        shapes = [
            {row.file_name: row.file_shape for row in build_name_table(component, configs[component])}
            for configs in (source, base)
        ]
        names = {name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name)}
        if names:
            rule = (
                f"is of another architecture than the source: {len(names)} tensors of the {component} differ "
                f"({list_names(sorted(names))})"
            )
            yield Problem("--base", where, rule, BASE_CURE)


def write_difference(
    path: Path, tuned: Components, base: Components, ranks: ExtractedRanks, settings: ExportSettings
) -> None:
    """Write the difference of two models of one architecture as a LoRA, and log how much of it the LoRA holds.

    One tensor of each model is read at a time. Layers without a difference are left out.

    Raises:
        UserInputError: no layer differs.
    """
    lora = LoraConfig.model_validate({"rank": ranks.linear, "conv_rank": ranks.convolution})
    names, ends = map_layer_names(settings.source.read_config("unet")), list_ends(lora)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    held = whole = 0.0
    for component, own_ends in ends.items():
        for name, weight in tuned[component].items():
            difference = read_tensor(weight).float() - read_tensor(base[component][name]).float()
            squared_norm = float(difference.double().square().sum())
            whole += squared_norm
            layer = name.removesuffix(".weight")
            if not squared_norm or difference.dim() < 2 or not f".{layer}".endswith(own_ends):
                continue
            found = approximate_layer(difference, ranks)
            held += found.squared_norm
            layers[build_kohya_name(f"{component}.{layer}", names)] = {
                UP: found.up.to("cpu", settings.dtype),
                DOWN: found.down.to("cpu", settings.dtype),
                ALPHA: torch.tensor(float(found.down.shape[0])),
            }
            if len(layers) % PROGRESS_LAYERS == 0:
                logger.info("difference of {}", format_count(len(layers), "layer"))
    if not layers:
        rule = "differs from the source in no layer that a LoRA changes"
        raise UserInputError([Problem("--base", None, rule, BASE_CURE)])
    metadata = {**build_adapter_metadata(lora), **build_adapter_file_metadata(settings)}
    write_adapter_tensors(path, layers, settings.dtype, metadata)
    count, share = format_count(len(layers), "layer"), f"{100 * held / whole:.1f}%"
    logger.info("LoRA of {} written to {}", count, describe_files(path))
    logger.info("the LoRA holds {} of the squared norm of the difference of U-Net and text encoders", share)


def approximate_layer(difference: torch.Tensor, ranks: ExtractedRanks) -> LowRank:
    """Return the product of low rank that is closest to the difference of a layer, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has_kernel = difference.shape[2:] not in ((), (1, 1))
    return approximate(difference.to(device), ranks.convolution if has_kernel else ranks.linear)


def list_ends(lora: LoraConfig) -> dict[str, tuple[str, ...]]:
    """Return the ends of the names of the layers that a LoRA with these settings changes, by component."""
    unet = [*lora.targets, *(RESIDUAL_TARGETS if lora.conv_rank else ())]
    ends = {"unet": unet, "text_encoder": lora.text_targets, "text_encoder_2": lora.text_targets}
    return {component: tuple(f".{end}" for end in given) for component, given in ends.items()}
