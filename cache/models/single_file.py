"""Single-file SDXL checkpoints (safetensors): writer and reader.

`write_single_file` streams (cache.tensor_stream): it asks for one model tensor at a time, in a fixed order. Names and
shapes come from `cache.single_file_names`, the checks before a read from `cache.single_file_check`.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sdxl_trainer.cache.models.single_file_check import (
    find_component_problems,
    find_single_file_problems,
    guess_foreign_format,
    read_safetensors_header,
)
from sdxl_trainer.cache.models.single_file_names import (
    COMPONENT_PREFIXES,
    LOGIT_SCALE_FILE_NAME,
    TableRow,
    TextProjection,
    build_name_table,
    get_canonical_name,
    list_source_names,
)
from sdxl_trainer.cache.models.tensor_stream import TensorItem, TensorSource, write_safetensors
from sdxl_trainer.data.files import read_patiently

__all__ = [
    "build_component",
    "build_modelspec",
    "find_single_file_problems",
    "list_source_names",
    "load_component",
    "open_single_file",
    "list_prediction_marks",
    "read_carried_tensors",
    "read_single_file",
    "write_single_file",
]

HASH_KEY = "modelspec.hash_sha256"
MARKS = ("v_pred", "ztsnr")  # empty tensors whose mere presence tells ComfyUI how the model predicts

# OpenCLIP trains log(temperature) and clips it at log(100), where bigG ended. Image generation never uses it, but
# loaders that insist on every OpenCLIP tensor do.
_DEFAULT_LOGIT_SCALE = math.log(100)


def read_single_file(
    path: str | os.PathLike[str],
    component: str,
    config: Mapping[str, Any],
    *,
    text_projection: TextProjection = "correct",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (source name, tensor) of one component, memory-mapped, in the file's own dtype.

    Names are those of diffusers and of transformers with the classic `text_model.` prefix; `load_component` adapts
    them to a module. Everything is checked before the first tensor: raises FileNotFoundError, or one ValueError that
    lists the missing, unexpected and misshapen tensors and says what the file looks like instead.
    """
    rows = build_name_table(component, config, text_projection)
    header = read_safetensors_header(path)
    problems = find_component_problems(header, component, rows)
    if problems:
        foreign = guess_foreign_format(header.shapes)
        verdict = f"it looks like {foreign}; " if foreign else ""
        raise ValueError(f"{path} cannot be read as SDXL {component}: {verdict}{'; '.join(problems)}")
    return _iterate_tensors(path, [row for row in rows if not row.carried])


def open_single_file(
    path: str | os.PathLike[str],
    component: str,
    config: Mapping[str, Any],
    *,
    text_projection: TextProjection = "correct",
) -> dict[str, TensorSource]:
    """Source name → function that reads the tensor. Raises like `read_single_file`."""
    read_single_file(path, component, config, text_projection=text_projection)  # for its checks
    rows = [row for row in build_name_table(component, config, text_projection) if not row.carried]
    places = {name: (row, place) for row in rows for place, name in enumerate(row.sources)}
    return {name: lambda at=at: list(_iterate_tensors(path, [at[0]]))[at[1]][1] for name, at in places.items()}


def _iterate_tensors(path: str | os.PathLike[str], rows: Sequence[TableRow]) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for row in rows:
            tensor = file.get_tensor(row.file_name)
            if row.transposed:
                tensor = tensor.t()
            for name, piece in zip(row.sources, tensor.chunk(len(row.sources)), strict=True):
                yield name, piece.reshape(row.source_shape)


def load_component(
    module: torch.nn.Module,
    path: str | os.PathLike[str],
    component: str,
    config: Mapping[str, Any],
    *,
    text_projection: TextProjection = "correct",
) -> None:
    """Copy one component of a single file into a module that is already built, whatever transformers calls its parts.

    Raises like `read_single_file`, and RuntimeError when the module is not the one that `config` describes.
    """
    names = {get_canonical_name(component, name): name for name in module.state_dict()}
    tensors = read_single_file(path, component, config, text_projection=text_projection)
    module.load_state_dict({names.get(name, name): tensor for name, tensor in tensors}, strict=True)


def build_component(
    build: Callable[[], Any],
    path: str | os.PathLike[str],
    component: str,
    config: Mapping[str, Any],
    *,
    device: torch.device | str = "cpu",
    text_projection: TextProjection = "correct",
) -> Any:
    """`build()` with the weights of a single file, made on the device they will be on.

    The file stays memory-mapped, so the ranks of a machine share what is read of it, and a rank whose device is a GPU
    has no copy in host memory. No weight is initialised before it is read: for SDXL's networks that takes a minute.
    Raises like `load_component`.
    """
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights():
        module = build()

    def load() -> None:
        load_component(module, path, component, config, text_projection=text_projection)

    read_patiently(load, Path(path))
    return module


def read_carried_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Tensors that belong to no model and live on in the next file: give them to `write_single_file` as `extra`."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name == LOGIT_SCALE_FILE_NAME}


def write_single_file(
    path: str | os.PathLike[str],
    components: Mapping[str, Mapping[str, TensorSource]],
    configs: Mapping[str, Mapping[str, Any]],
    *,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    text_projection: TextProjection = "correct",
    marks: Sequence[str] = (),
    extra: Mapping[str, torch.Tensor] | None = None,
) -> str:
    """Write the four components as one file, atomically, and return its `modelspec.hash_sha256`.

    `components` maps `unet`, `vae`, `text_encoder`, `text_encoder_2` to name → tensor, or name → function that returns
    the tensor (on any device). A function is called once, in the order of `list_source_names`, and its tensor is
    dropped before the next call. `marks` come from `list_prediction_marks`; `extra` maps file names to tensors that are
    written unchanged. Raises ValueError before the first byte when names or shapes are not those of `configs`, and
    when float16 cannot hold a value. Whatever is raised, nothing stays under the final name.
    """
    items = _plan_items(components, configs, dtype, text_projection, dict(extra or {}))
    items += [TensorItem(mark, (0,), dtype, (), (0,)) for mark in _check_marks(marks)]
    return write_safetensors(Path(path), items, metadata, HASH_KEY)


def list_prediction_marks(prediction_type: str, zero_terminal_snr: bool = False) -> tuple[str, ...]:
    """Marks of a model by its objective: `v_pred` for v-prediction, and `ztsnr` with zero terminal SNR."""
    if prediction_type != "v":
        return ()
    return MARKS if zero_terminal_snr else MARKS[:1]


def _check_marks(marks: Sequence[str]) -> list[str]:
    unknown = [mark for mark in marks if mark not in MARKS]
    if unknown or ("ztsnr" in marks and "v_pred" not in marks):
        raise ValueError(f"marks are {list(marks)}; they must be of {', '.join(MARKS)}, and ztsnr needs v_pred")
    return [mark for mark in MARKS if mark in marks]


def _plan_items(
    components: Mapping[str, Mapping[str, TensorSource]],
    configs: Mapping[str, Mapping[str, Any]],
    dtype: torch.dtype,
    text_projection: TextProjection,
    extra: dict[str, torch.Tensor],
) -> list[TensorItem]:
    """All tensors of the file in their order; raises one ValueError that lists every name and shape that is wrong."""
    problems = [
        f"no {what} for {component}"
        for what, given in (("tensors", components), ("config", configs))
        for component in COMPONENT_PREFIXES
        if component not in given
    ]
    if problems:
        raise ValueError(f"a single file needs all components: {'; '.join(problems)}")
    items: list[TensorItem] = []
    for component in COMPONENT_PREFIXES:
        sources = {get_canonical_name(component, name): source for name, source in components[component].items()}
        sources.pop("text_model.embeddings.position_ids", None)  # arange(77), which transformers kept as a buffer once
        rows = build_name_table(component, configs[component], text_projection)
        problems += _compare_sources(component, rows, sources)
        for row in rows:
            if row.carried and row.file_name in extra:
                continue
            pieces = tuple(sources[name] for name in row.sources if name in sources) or (_default_logit_scale,)
            items.append(TensorItem(row.file_name, row.file_shape, dtype, pieces, row.source_shape, row.transposed))
    taken = {item.name for item in items}.union(MARKS)
    problems += [f"extra holds {name}, which is written from elsewhere" for name in extra if name in taken]
    if problems:
        raise ValueError(f"the tensors do not fit their configs: {'; '.join(problems)}")
    extras = [
        TensorItem(name, tuple(tensor.shape), tensor.dtype, (tensor,), tuple(tensor.shape))
        for name, tensor in extra.items()
    ]
    # Widest type first keeps every tensor aligned to its own size, which memory-mapping readers like.
    return sorted([*items, *extras], key=lambda item: -item.dtype.itemsize)


def _compare_sources(component: str, rows: Sequence[TableRow], sources: Mapping[str, TensorSource]) -> list[str]:
    wanted = {name: row for row in rows for name in row.sources}
    problems = [f"{component} lacks {name}" for name, row in wanted.items() if name not in sources and not row.carried]
    problems += [f"{component} has {name}, which SDXL has not" for name in sources if name not in wanted]
    for name, source in sources.items():
        if name not in wanted or not isinstance(source, torch.Tensor):
            continue
        if tuple(source.shape) != wanted[name].source_shape:
            problems.append(f"{component} {name} is {list(source.shape)}, not {list(wanted[name].source_shape)}")
    return problems if len(problems) <= 5 else [*problems[:5], f"and {len(problems) - 5} more"]


def _default_logit_scale() -> torch.Tensor:
    return torch.tensor(_DEFAULT_LOGIT_SCALE)


def build_modelspec(
    title: str,
    resolution: tuple[int, int],
    prediction_type: str,
    date: datetime | str,
    *,
    timestep_range: tuple[int, int] = (0, 999),
    about: Mapping[str, str | None] | None = None,
) -> dict[str, str]:
    """Metadata of the Stability model metadata standard 1.0.1, all but the hash, which the writer adds.

    `resolution` is (width, height) in pixels, `timestep_range` the first and the last trained timestep, `about` may
    hold author, description, license, tags (and any other key of the standard); what is None or empty is left out.
    Source: github.com/Stability-AI/ModelSpec.
    """
    if prediction_type not in ("epsilon", "v", "flow"):
        raise ValueError(f"prediction_type is {prediction_type!r}; it must be epsilon, v or flow")
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
        "resolution": f"{resolution[0]}x{resolution[1]}",
        "date": date if isinstance(date, str) else date.replace(microsecond=0).isoformat(),
        "prediction_type": prediction_type,
        "timestep_range": f"{timestep_range[0]},{timestep_range[1]}",
        **{key: value for key, value in (about or {}).items() if value},
    }
    return {f"modelspec.{key}": value for key, value in fields.items()}
