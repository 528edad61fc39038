"""SDXL models as diffusers folders: writer and reader, which handle one tensor at a time."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sdxl_trainer.cache.models.single_file_check import SDXL_CONFIG_FOLDER
from sdxl_trainer.cache.models.single_file_names import COMPONENT_PREFIXES, build_name_table, get_canonical_name
from sdxl_trainer.cache.models.tensor_stream import TensorItem, TensorSource, write_safetensors
from sdxl_trainer.data.files import open_atomic_folder
from sdxl_trainer.data.text.tokens import write_vocabulary

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


def read_folder_component(folder: Path, component: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (source name, tensor) of one component, memory-mapped, in the file's dtype.

    Raises:
        FileNotFoundError: the component has no safetensors weights.
    """
    for path in find_weights(folder, component):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if not name.endswith("position_ids"):
                    yield get_canonical_name(component, name), file.get_tensor(name)


def open_folder_component(folder: Path, component: str) -> dict[str, TensorSource]:
    """Map each source name of one component to a function that reads its tensor.

    Raises:
        FileNotFoundError: the component has no safetensors weights.
    """
    sources: dict[str, TensorSource] = {}
    for path in find_weights(folder, component):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not name.endswith("position_ids")]
        sources |= {get_canonical_name(component, name): partial(_read_tensor, path, name) for name in names}
    return sources


def find_weights(folder: Path, component: str) -> list[Path]:
    """Find the safetensors files of one component: the plain one, else its parts, else the first of any name.

    Raises:
        FileNotFoundError: the component has no safetensors weights.
    """
    return choose_weights(folder / component, WEIGHTS[component])


def choose_weights(folder: Path, name: str) -> list[Path]:
    """Like `find_weights`, for the folder of the weights themselves, whose plain file has this name."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [path for path in files if path.name == name]
    parts = [path for path in files if "-of-" in path.name and path.suffixes == [".safetensors"]]
    chosen = plain or parts or files[:1]
    if not chosen:
        raise FileNotFoundError(f"{folder} has no safetensors weights")
    return chosen


def _read_tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def write_diffusers_folder(
    folder: Path,
    components: Mapping[str, Mapping[str, TensorSource]],
    configs: Mapping[str, Mapping[str, Any]],
    *,
    dtype: torch.dtype,
    scheduler: Mapping[str, Any],
    origin: Path,
    vocabularies: Mapping[str, Path],
) -> None:
    """Write the four components as a folder that diffusers' SDXL pipeline loads; it is written whole or not at all.

    Args:
        components: tensors by component and name, as for `write_single_file`.
        configs: `config.json` of each component.
        scheduler: `scheduler_config.json`.
        origin: diffusers folder from which the model index and the settings of the tokenizers are copied.
        vocabularies: file or folder of the vocabulary of `tokenizer` and `tokenizer_2`.

    Raises:
        ValueError: names or shapes do not match `configs`, or float16 cannot hold a value.
    """
    with open_atomic_folder(folder) as target:
        for component in COMPONENT_PREFIXES:
            items = _plan_items(component, components[component], configs[component], dtype)
            write_safetensors(target / component / WEIGHTS[component], items, {})
            _write_json(target / component / "config.json", configs[component])
        _write_json(target / "scheduler" / "scheduler_config.json", scheduler)
        for name, vocabulary in vocabularies.items():
            _write_tokenizer(target / name, origin / name, vocabulary)
        _write_model_index(target, origin, scheduler)


def _plan_items(
    component: str, given: Mapping[str, TensorSource], config: Mapping[str, Any], dtype: torch.dtype
) -> Sequence[TensorItem]:
    sources = {get_canonical_name(component, name): source for name, source in given.items()}
    rows = [row for row in build_name_table(component, config) if not row.carried]
    shapes = {name: row.source_shape for row in rows for name in row.sources}
    missing = [name for name in shapes if name not in sources]
    if missing:
        raise ValueError(f"{component} lacks {', '.join(missing[:5])}" + (" and more" if len(missing) > 5 else ""))
    return [
        TensorItem(name=name, shape=shape, dtype=dtype, pieces=(sources[name],), piece_shape=shape)
        for name, shape in shapes.items()
    ]


def _write_tokenizer(target: Path, origin: Path, vocabulary: Path) -> None:
    """Copy a tokenizer, or SDXL's settings for one, and write the vocabulary if it is another one than the tokenizer's.

    The settings of a single file carry no vocabulary, and `model.tokenizer` replaces the model's own.
    """
    shutil.copytree(origin if origin.is_dir() else SDXL_CONFIG_FOLDER / target.name, target)
    if vocabulary != origin:
        (target / "tokenizer.json").unlink(missing_ok=True)  # holds a copy of the replaced vocabulary
        write_vocabulary(vocabulary, target)


def _write_model_index(target: Path, origin: Path, scheduler: Mapping[str, Any]) -> None:
    content = json.loads((origin / "model_index.json").read_text(encoding="utf-8"))
    content["scheduler"] = ["diffusers", scheduler["_class_name"]]
    _write_json(target / "model_index.json", content)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
