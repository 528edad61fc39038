"""Files of adapters, with the tensor names of kohya's scripts and of LyCORIS: write a run's, read and merge any."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open

from sdxl_trainer.cache.models.single_file import HASH_KEY
from sdxl_trainer.cache.models.single_file_check import NotSafetensorsError, read_safetensors_header
from sdxl_trainer.cache.models.single_file_names import (
    COMPONENT_PREFIXES,
    Shape,
    build_name_table,
    get_canonical_name,
)
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.cache.models.tensor_stream import TensorItem, TensorSource, write_safetensors
from sdxl_trainer.configs.lora import LoraConfig
from sdxl_trainer.configs.problems import Problem, UserInputError, format_count
from sdxl_trainer.train.networks.adapter_formulas import (
    ALPHA,
    DORA_SCALE,
    DOWN,
    PART_NAMES,
    UP,
    compute_product,
    merge_adapter,
)
from sdxl_trainer.train.networks.adapters import MAGNITUDE, group_parameters, resolve_rank

KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
# PEFT's part of a parameter's name → that in files. The parts of LoHa and LoKr have the same names.
FILE_PARTS = {"lora_A": DOWN, "lora_B": UP, MAGNITUDE: DORA_SCALE}
# Endings that diffusers and PEFT write.
FOREIGN_PARTS = {
    "lora_A.weight": DOWN,
    "lora_B.weight": UP,
    "lora.down.weight": DOWN,
    "lora.up.weight": UP,
    "lora_magnitude_vector": DORA_SCALE,
    "lora_magnitude_vector.weight": DORA_SCALE,
}
ENDINGS = {**{name: name for name in PART_NAMES}, **FOREIGN_PARTS}
MAX_NAMED = 5  # names that a message lists

Layers = Mapping[str, Mapping[str, TensorSource]]  # layer → name of the part in files → tensor, or a reader of it


@dataclass(frozen=True, kw_only=True)
class LayerWeight:
    """The weight of a model that an adapter's layer changes."""

    component: str
    name: str
    shape: Shape


def write_adapters(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    source: ModelSource,
    config: LoraConfig,
    dtype: torch.dtype,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a run's adapters as one safetensors file that LyCORIS, ComfyUI and kohya's scripts read.

    Args:
        weights: the adapters' weights by PEFT's names, such as `unet.….to_q.lora_A.default.weight`.
        metadata: of the file, besides rank and alpha; see `build_modelspec`.
    """
    layers = build_file_layers(weights, source, config)
    write_adapter_tensors(path, layers, dtype, {**build_adapter_metadata(config), **metadata})


def write_adapter_tensors(path: Path, layers: Layers, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Write the tensors of adapters by layer and part. Alphas stay in fp32, which holds every usual rank."""
    items = []
    for layer, parts in layers.items():
        for part, tensor in parts.items():
            assert isinstance(tensor, torch.Tensor)
            shape, kind = tuple(tensor.shape), torch.float32 if part == ALPHA else dtype
            items.append(
                TensorItem(name=f"{layer}.{part}", shape=shape, dtype=kind, pieces=(tensor,), piece_shape=shape)
            )
    # With the widest type first, every tensor is aligned to its item size.
    ordered = sorted(items, key=lambda item: (-item.dtype.itemsize, item.name))
    write_safetensors(path, ordered, metadata, HASH_KEY)


def build_adapter_metadata(config: LoraConfig) -> dict[str, str]:
    """Build the metadata by which other programs recognise kind, rank and alpha of adapters."""
    alpha = config.rank if config.alpha is None else config.alpha
    arguments: dict[str, str] = {}
    if config.kind != "lora":
        arguments["algo"] = "locon" if config.kind == "dora" else config.kind
    if config.kind == "dora":
        arguments |= {"dora_wd": "True", "wd_on_output": "True"}
    if config.kind == "lokr":
        arguments |= {"factor": str(config.factor or -1), "decompose_both": str(config.decompose_both)}
    if config.conv_rank:
        conv_alpha = config.conv_rank if config.conv_alpha is None else config.conv_alpha
        arguments |= {"conv_dim": str(config.conv_rank), "conv_alpha": f"{conv_alpha:g}"}
    return {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora" if config.kind == "lora" else "lycoris.kohya",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": f"{alpha:g}",
        **({"ss_network_args": json.dumps(arguments)} if arguments else {}),
    }


def build_file_layers(
    weights: Mapping[str, torch.Tensor], source: ModelSource, config: LoraConfig
) -> dict[str, dict[str, torch.Tensor]]:
    """Return a run's adapters as files have them: kohya's name of the layer → part → tensor, alphas included.

    Args:
        weights: the adapters' weights by PEFT's names.
    """
    unet_config = source.read_config("unet")
    names, large = map_layer_names(unet_config), list_large_kernels(unet_config)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for layer, given in group_parameters(weights).items():
        component, _, inner = layer.partition(".")
        rank, alpha = resolve_rank(layer, component == "unet" and inner in large, config)
        parts = {FILE_PARTS.get(part, part): weight.detach() for part, weight in given.items()}
        if DORA_SCALE in parts:
            parts[DORA_SCALE] = parts[DORA_SCALE].reshape(-1, *(1,) * (parts[UP].dim() - 1))
        if "lokr_w1" in parts and "lokr_w2" in parts:
            alpha = float(rank)  # not scaled in training: readers that divide by a rank find 1 as well
        layers[build_kohya_name(layer, names)] = {**parts, ALPHA: torch.tensor(alpha)}
    return layers


def map_layer_names(unet_config: Mapping[str, Any]) -> dict[str, str]:
    """Map diffusers' names of the U-Net's layers to the LDM names that kohya's scripts use."""
    prefix = COMPONENT_PREFIXES["unet"]
    return {
        row.sources[0].removesuffix(".weight"): row.file_name.removeprefix(prefix).removesuffix(".weight")
        for row in build_name_table("unet", unet_config)
        if row.file_name.endswith(".weight")
    }


def list_large_kernels(unet_config: Mapping[str, Any]) -> set[str]:
    """List the U-Net's convolutions with kernels larger than 1×1 by diffusers' names."""
    rows = build_name_table("unet", unet_config)
    return {row.sources[0].removesuffix(".weight") for row in rows if row.source_shape[2:] not in ((), (1, 1))}


def build_kohya_name(layer: str, layers: Mapping[str, str]) -> str:
    """Return kohya's name of a layer: `lora_unet_middle_block_…_to_q` for `unet.mid_block.….to_q`.

    Layers of text encoders keep transformers' names.

    Args:
        layers: names of the U-Net's layers, from `map_layer_names`.
    """
    component, _, inner = layer.partition(".")
    inner = layers[inner] if component == "unet" else get_canonical_name(component, inner)
    return f"{KOHYA_PREFIXES[component]}_{inner.replace('.', '_')}"


def map_adapted_weights(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, LayerWeight]:
    """Map every name that a file of adapters may have for a layer to the layer's weight.

    These are the names of kohya's scripts and LyCORIS, and those of diffusers with underscores for points.

    Args:
        configs: the config of each component.
    """
    ldm_names = map_layer_names(configs["unet"])
    weights: dict[str, LayerWeight] = {}
    for component, prefix in KOHYA_PREFIXES.items():
        for row in build_name_table(component, configs[component]):
            for name in row.sources:
                if not name.endswith(".weight") or len(row.source_shape) < 2:
                    continue
                weight = LayerWeight(component=component, name=name, shape=row.source_shape)
                layer = name.removesuffix(".weight")
                names = {f"{prefix}.{layer}", f"lora_{component}.{layer}"}
                names.add(f"{prefix}.{ldm_names[layer] if component == 'unet' else layer}")
                names.update(known.replace(".text_model.", ".") for known in tuple(names))
                weights |= {known.replace(".", "_"): weight for known in names}
    return weights


def read_adapter_file(path: Path, option: str = "--adapter") -> dict[str, dict[str, Callable[[], torch.Tensor]]]:
    """Open a file of adapters: layer → part → function that reads the tensor. Nothing is read yet.

    Layers have underscores for points, and begin with `lora_`.

    Args:
        option: of the command line, for messages.

    Raises:
        UserInputError: it is no file of adapters, or has tensors of another kind.
    """
    cure = "give a .safetensors file of LoRA, DoRA, LoHa or LoKr adapters for SDXL"
    if not path.is_file():
        raise UserInputError([Problem(option, path, "is not a file", cure)])
    try:
        header = read_safetensors_header(path)
    except (NotSafetensorsError, ValueError, OSError) as error:
        raise UserInputError([Problem(option, path, f"cannot be read: {error}", cure)]) from None
    layers: dict[str, dict[str, Callable[[], torch.Tensor]]] = defaultdict(dict)
    unknown = []
    for name in header.shapes:
        ending = next((ending for ending in ENDINGS if name.endswith(f".{ending}")), None)
        if ending is None:
            unknown.append(name)
            continue
        layer = name.removesuffix(f".{ending}").replace(".", "_")
        layer = layer if layer.startswith("lora_") else f"lora_{layer}"
        layers[layer][ENDINGS[ending]] = partial(_read_tensor, path, name)
    if unknown or not layers:
        rule = f"holds {format_count(len(unknown), 'tensor')} that no kind of adapter has: {list_names(unknown)}"
        raise UserInputError([Problem(option, path, rule if unknown else "holds no tensors", cure)])
    return dict(layers)


def _read_tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def check_layers(layers: Layers, weights: Mapping[str, LayerWeight], where: Any, option: str) -> Iterator[Problem]:
    """Yield problems of layers that the model does not have, or whose adapters lack tensors or have another shape.

    Args:
        weights: from `map_adapted_weights`.
        where, option: value and name of the option that the adapters come from.
    """
    cure = "give adapters that were trained on a model of this architecture"
    unknown = [layer for layer in layers if layer not in weights]
    if unknown:
        rule = f"{len(unknown)} of its {len(layers)} layers fit no layer of the model: {list_names(unknown)}"
        yield Problem(option, where, rule, cure)
    wrong = [layer for layer in layers if layer in weights and not _fits(layers[layer], weights[layer].shape)]
    if wrong:
        rule = f"{len(wrong)} of its {len(layers)} layers lack tensors or have another shape: {list_names(wrong)}"
        yield Problem(option, where, rule, cure)


def list_names(names: Sequence[str]) -> str:
    """Return the first names, for a message."""
    return ", ".join([*names[:MAX_NAMED], *(["…"] if len(names) > MAX_NAMED else [])])


def _fits(parts: Mapping[str, TensorSource], shape: Shape) -> bool:
    """Return whether the tensors of an adapter make a change of this shape, computed without values."""
    tensors = {name: read_tensor(source).to("meta") for name, source in parts.items() if name != ALPHA}
    try:
        product = compute_product(tensors)
    except (KeyError, RuntimeError):
        return False
    norms = tensors.get(DORA_SCALE)
    fits_norms = norms is None or norms.numel() in shape[:2]
    return product.shape[0] == shape[0] and product.numel() == torch.Size(shape).numel() and fits_norms


def merge_layers(
    components: Mapping[str, dict[str, TensorSource]],
    layers: Layers,
    weights: Mapping[str, LayerWeight],
    strength: float = 1.0,
) -> None:
    """Replace each weight of a model that has an adapter by the weight with the adapter in it, in place.

    The replacement is a function, which reads the weight and the adapter when it is called.

    Args:
        components: component → name → tensor of the model, or function that reads it.
        layers: adapters whose layers `check_layers` finds in `weights`.
        strength: factor of the change.
    """
    for layer, parts in layers.items():
        weight = weights[layer]
        tensors = components[weight.component]
        tensors[weight.name] = partial(_merge, tensors[weight.name], parts, strength)


def _merge(base: TensorSource, parts: Mapping[str, TensorSource], strength: float) -> torch.Tensor:
    return merge_adapter(read_tensor(base), {name: read_tensor(part) for name, part in parts.items()}, strength)


def read_tensor(source: TensorSource) -> torch.Tensor:
    """Return a tensor, or the one that a function reads."""
    return source if isinstance(source, torch.Tensor) else source()
