"""SDXL models as diffusers folders: writer and reader, which handle one tensor at a time."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sdxl_trainer.cache.models.single_file_names import COMPONENT_PREFIXES, build_name_table, get_canonical_name
from sdxl_trainer.cache.models.tensor_stream import TensorItem, TensorSource, write_safetensors
from sdxl_trainer.data.files import sync_folder

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
# A pipeline also needs these files, which are copied from the model that training started from.
COPIED = ("model_index.json", "tokenizer", "tokenizer_2")


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
        sources |= {get_canonical_name(component, name): lambda at=(path, name): _read(*at) for name in names}
    return sources


def find_weights(folder: Path, component: str) -> list[Path]:
    """Find the safetensors files of one component: the plain one, else its parts, else the first of any name.

    Raises:
        FileNotFoundError: the component has no safetensors weights.
    """
    files = sorted((folder / component).glob("*.safetensors"))
    plain = [path for path in files if path.name == WEIGHTS[component]]
    parts = [path for path in files if "-of-" in path.name and path.suffixes == [".safetensors"]]
    chosen = plain or parts or files[:1]
    if not chosen:
        raise FileNotFoundError(f"{folder / component} has no safetensors weights")
    return chosen


def _read(path: Path, name: str) -> torch.Tensor:
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
) -> None:
    """Write the four components as a folder that diffusers' SDXL pipeline loads; it is written whole or not at all.

    Args:
        components: tensors by component and name, as for `write_single_file`.
        configs: `config.json` of each component.
        scheduler: `scheduler_config.json`.
        origin: diffusers folder from which the model index and the tokenizers are copied, if it has them.

    Raises:
        ValueError: names or shapes do not match `configs`, or float16 cannot hold a value.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    for component in COMPONENT_PREFIXES:
        items = _plan_items(component, components[component], configs[component], dtype)
        write_safetensors(temporary / component / WEIGHTS[component], items, {})
        _write_json(temporary / component / "config.json", configs[component])
    _write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
    for name in COPIED:
        if (origin / name).is_dir():
            shutil.copytree(origin / name, temporary / name)
        elif (origin / name).is_file():
            shutil.copyfile(origin / name, temporary / name)
    _set_scheduler(temporary / "model_index.json", scheduler)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync_folder(folder.parent)


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


def _set_scheduler(index: Path, scheduler: Mapping[str, Any]) -> None:
    content = json.loads(index.read_text())
    content["scheduler"] = ["diffusers", scheduler["_class_name"]]
    _write_json(index, content)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
