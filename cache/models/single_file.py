"""Single-file SDXL models (safetensors): writer and reader.

`write_single_file` reads one model tensor at a time, in a fixed order (tensor_stream.py). Names and shapes come from
single_file_names.py, the checks before reading from single_file_check.py.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sdxl_trainer.cache.models.single_file_check import (
    find_component_problems,
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
)
from sdxl_trainer.cache.models.tensor_stream import TensorItem, TensorSource, write_safetensors

HASH_KEY = "modelspec.hash_sha256"
FLOW_SHIFT_KEY = "ss_discrete_flow_shift"
MARKS = ("v_pred", "ztsnr")  # empty tensors by whose presence ComfyUI recognises the prediction type

# OpenCLIP trains log(temperature) and clips it at log(100), the final value of bigG. Image generation never uses it,
# but some loaders require every OpenCLIP tensor.
_DEFAULT_LOGIT_SCALE = math.log(100)


def read_single_file(
    path: str | os.PathLike[str],
    component: str,
    config: Mapping[str, Any],
    *,
    text_projection: TextProjection = "correct",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Check a file and yield (source name, tensor) of one component, memory-mapped, in the file's dtype.

    Text encoders' names have the classic `text_model.` prefix; `copy_weights` adapts them to a module. All checks
    run before the first tensor is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: tensors are missing, unknown or misshapen; the message lists them and the kind of file it may be.
    """
    rows = build_name_table(component, config, text_projection)
    header = read_safetensors_header(path)
    problems = find_component_problems(header, component, rows)
    if problems:
        foreign = guess_foreign_format(header.shapes)
        guess = f"it looks like {foreign}; " if foreign else ""
        raise ValueError(f"{path} cannot be read as SDXL {component}: {guess}{'; '.join(problems)}")
    return iterate_tensors(path, [row for row in rows if not row.carried])


def open_single_file(
    path: str | os.PathLike[str],
    component: str,
    config: Mapping[str, Any],
    *,
    text_projection: TextProjection = "correct",
) -> dict[str, TensorSource]:
    """Map each source name to a function that reads its tensor. Raises like `read_single_file`."""
    # Only the checks run here, because the iterator is dropped.
    read_single_file(path, component, config, text_projection=text_projection)
    rows = [row for row in build_name_table(component, config, text_projection) if not row.carried]
    return {name: partial(_read_tensor, path, row, name) for row in rows for name in row.sources}


def _read_tensor(path: str | os.PathLike[str], row: TableRow, name: str) -> torch.Tensor:
    """Read one source tensor, which may share its row, a tensor of the file, with others."""
    return dict(iterate_tensors(path, [row]))[name]


def iterate_tensors(path: str | os.PathLike[str], rows: Sequence[TableRow]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (source name, tensor) of rows whose tensors a file holds, memory-mapped, in the file's dtype."""
    with safe_open(path, framework="pt") as file:
        for row in rows:
            tensor = file.get_tensor(row.file_name)
            if row.transposed:
                tensor = tensor.t()
            for name, piece in zip(row.sources, tensor.chunk(len(row.sources)), strict=True):
                yield name, piece.reshape(row.source_shape)


def read_carried_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read the tensors that belong to no model, which `write_single_file` copies to the next file as `extra`."""
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

    After an error there is no file at `path`.

    Args:
        components: for `unet`, `vae`, `text_encoder` and `text_encoder_2`, a mapping from names to tensors, or to
            functions that return the tensor on any device. Functions are called once, in the order of
            `list_source_names`, and each tensor is dropped before the next call.
        configs: config of each component.
        marks: marks from `list_prediction_marks`.
        extra: tensors by file name that are written unchanged.

    Raises:
        ValueError: names or shapes do not match `configs`, or float16 cannot hold a value.
    """
    items = _plan_items(components, configs, dtype, text_projection, dict(extra or {}))
    for mark in _sort_marks(marks):
        items.append(TensorItem(name=mark, shape=(0,), dtype=dtype, pieces=(), piece_shape=(0,)))
    return write_safetensors(Path(path), items, metadata, HASH_KEY)


def list_prediction_marks(prediction_type: str, zero_terminal_snr: bool = False) -> tuple[str, ...]:
    """List the marks of a model: `v_pred` for v-prediction, and also `ztsnr` with zero terminal SNR."""
    if prediction_type != "v":
        return ()
    return MARKS if zero_terminal_snr else MARKS[:1]


def _sort_marks(marks: Sequence[str]) -> list[str]:
    unknown = [mark for mark in marks if mark not in MARKS]
    if unknown or ("ztsnr" in marks and "v_pred" not in marks):
        raise ValueError(f"marks are {list(marks)}; possible are {', '.join(MARKS)}, and ztsnr needs v_pred")
    return [mark for mark in MARKS if mark in marks]


def _plan_items(
    components: Mapping[str, Mapping[str, TensorSource]],
    configs: Mapping[str, Mapping[str, Any]],
    dtype: torch.dtype,
    text_projection: TextProjection,
    extra: dict[str, torch.Tensor],
) -> list[TensorItem]:
    """List all tensors of the file in their order; raise one ValueError that lists every wrong name and shape."""
    problems = [
        f"no {kind} for {component}"
        for kind, given in (("tensors", components), ("config", configs))
        for component in COMPONENT_PREFIXES
        if component not in given
    ]
    if problems:
        raise ValueError(f"a single file needs all components: {'; '.join(problems)}")
    items: list[TensorItem] = []
    for component in COMPONENT_PREFIXES:
        sources = {get_canonical_name(component, name): source for name, source in components[component].items()}
        # Older transformers releases hold arange(77) as a buffer.
        sources.pop("text_model.embeddings.position_ids", None)
        rows = build_name_table(component, configs[component], text_projection)
        problems += _compare_sources(component, rows, sources)
        for row in rows:
            if row.carried and row.file_name in extra:
                continue
            pieces = tuple(sources[name] for name in row.sources if name in sources) or (_default_logit_scale,)
            item = TensorItem(
                name=row.file_name,
                shape=row.file_shape,
                dtype=dtype,
                pieces=pieces,
                piece_shape=row.source_shape,
                transposed=row.transposed,
            )
            items.append(item)
    taken = {item.name for item in items}.union(MARKS)
    problems += [f"extra holds {name}, which the components already hold" for name in extra if name in taken]
    if problems:
        raise ValueError(f"the tensors do not match their configs: {'; '.join(problems)}")
    for name, tensor in extra.items():
        shape = tuple(tensor.shape)
        items.append(TensorItem(name=name, shape=shape, dtype=tensor.dtype, pieces=(tensor,), piece_shape=shape))
    # With the widest type first, every tensor is aligned to its item size, which helps memory-mapping readers.
    return sorted(items, key=lambda item: -item.dtype.itemsize)


def _compare_sources(component: str, rows: Sequence[TableRow], sources: Mapping[str, TensorSource]) -> list[str]:
    wanted = {name: row for row in rows for name in row.sources}
    problems = [f"{component} lacks {name}" for name, row in wanted.items() if name not in sources and not row.carried]
    problems += [f"{component} has {name}, which SDXL does not have" for name in sources if name not in wanted]
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
    flow_shift: float | None = None,
    about: Mapping[str, str | None] | None = None,
) -> dict[str, str]:
    """Build the metadata of Stability's model metadata standard 1.0.1, except the hash, which the writer adds.

    Source: github.com/Stability-AI/ModelSpec.

    Args:
        resolution: (width, height) in pixels.
        timestep_range: first and last trained timestep.
        flow_shift: shift of the timesteps of a rectified flow, under the key that kohya's scripts use. The standard has
            no key for it.
        about: author, description, license, tags, or other keys of the standard; empty values are left out.
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
        "encoder_layer": "2",  # counted from the last: SDXL's encoders give their penultimate layer
        **{key: value for key, value in (about or {}).items() if value},
    }
    metadata = {f"modelspec.{key}": value for key, value in fields.items()}
    return metadata if flow_shift is None else metadata | {FLOW_SHIFT_KEY: f"{flow_shift:.6g}"}
