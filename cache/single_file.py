"""Single-file SDXL checkpoints (safetensors): writer and reader.

`write_single_file` streams: it asks for one model tensor at a time, in a fixed order, and writes the safetensors
container itself, because the library's `save_file` wants all tensors at once (a run under ZeRO-3 never has them).
Names and shapes come from `cache.single_file_names`, the checks before a read from `cache.single_file_check`.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from sdxl_trainer.cache.single_file_check import (
    ITEM_BYTES,
    describe_single_file,
    find_problems,
    guess_foreign_format,
    read_header,
)
from sdxl_trainer.cache.single_file_names import (
    COMPONENT_PREFIXES,
    LOGIT_SCALE_FILE_NAME,
    Shape,
    TableRow,
    TextProjection,
    build_table,
    canonical_name,
    list_sources,
)

__all__ = [
    "build_modelspec",
    "describe_single_file",
    "list_sources",
    "load_component",
    "prediction_marks",
    "read_carried",
    "read_single_file",
    "write_single_file",
]

TensorSource = torch.Tensor | Callable[[], torch.Tensor]

HASH_KEY = "modelspec.hash_sha256"
MARKS = ("v_pred", "ztsnr")  # empty tensors whose mere presence tells ComfyUI how the model predicts

# OpenCLIP trains log(temperature) and clips it at log(100), where bigG ended. Image generation never uses it, but
# loaders that insist on every OpenCLIP tensor do.
_DEFAULT_LOGIT_SCALE = math.log(100)
_HASH_PLACEHOLDER = "0x" + "0" * 64
_FLOAT16_MAX = 65504.0
_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class _Item:
    """One tensor of the file to be: its pieces are written one behind the other (q, k, v of a stacked weight)."""

    name: str
    shape: Shape
    dtype: torch.dtype
    pieces: tuple[TensorSource, ...]
    piece_shape: Shape
    transposed: bool = False


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
    rows = build_table(component, config, text_projection)
    header = read_header(path)
    problems = find_problems(header, component, rows)
    if problems:
        foreign = guess_foreign_format(header.shapes)
        verdict = f"it looks like {foreign}; " if foreign else ""
        raise ValueError(f"{path} cannot be read as SDXL {component}: {verdict}{'; '.join(problems)}")
    return _iterate_tensors(path, [row for row in rows if not row.carried])


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
    names = {canonical_name(component, name): name for name in module.state_dict()}
    tensors = read_single_file(path, component, config, text_projection=text_projection)
    module.load_state_dict({names.get(name, name): tensor for name, tensor in tensors}, strict=True)


def read_carried(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
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
    the tensor (on any device); a function is called once, in the order of `list_sources`, and its tensor is dropped
    before the next is asked for. `marks` are those of `prediction_marks`; `extra` are file names → tensors that are
    written as they are. Raises ValueError before the first byte when names or shapes are not those of `configs`, and
    when float16 cannot hold a value. Whatever is raised, nothing stays under the final name.
    """
    items = _plan_items(components, configs, dtype, text_projection, dict(extra or {}))
    items += [_Item(mark, (0,), dtype, (), (0,)) for mark in _check_marks(marks)]
    header = _build_header(items, metadata)
    digest = hashlib.sha256()
    with _replace_atomically(Path(path)) as file:
        file.write(header)
        for item in items:
            for piece in item.pieces:
                data = _to_bytes(item, piece)
                file.write(data)
                digest.update(data)
                del data  # or this tensor would still be there while the next one is gathered
        tensor_hash = f"0x{digest.hexdigest()}"
        # The hash covers what follows the header that holds it: its place was kept, now it is filled in.
        file.seek(header.index(_HASH_PLACEHOLDER.encode()))
        file.write(tensor_hash.encode())
    return tensor_hash


def prediction_marks(prediction_type: str, zero_terminal_snr: bool = False) -> tuple[str, ...]:
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
) -> list[_Item]:
    """All tensors of the file in their order; raises one ValueError that lists every name and shape that is wrong."""
    problems = [
        f"no {what} for {component}"
        for what, given in (("tensors", components), ("config", configs))
        for component in COMPONENT_PREFIXES
        if component not in given
    ]
    if problems:
        raise ValueError(f"a single file needs all components: {'; '.join(problems)}")
    items: list[_Item] = []
    for component in COMPONENT_PREFIXES:
        sources = {canonical_name(component, name): source for name, source in components[component].items()}
        sources.pop("text_model.embeddings.position_ids", None)  # arange(77), which transformers kept as a buffer once
        rows = build_table(component, configs[component], text_projection)
        problems += _compare_sources(component, rows, sources)
        for row in rows:
            if row.carried and row.file_name in extra:
                continue
            pieces = tuple(sources[name] for name in row.sources if name in sources) or (_default_logit_scale,)
            items.append(_Item(row.file_name, row.file_shape, dtype, pieces, row.source_shape, row.transposed))
    taken = {item.name for item in items}.union(MARKS)
    problems += [f"extra holds {name}, which is written from elsewhere" for name in extra if name in taken]
    if problems:
        raise ValueError(f"the tensors do not fit their configs: {'; '.join(problems)}")
    extras = [
        _Item(name, tuple(tensor.shape), tensor.dtype, (tensor,), tuple(tensor.shape)) for name, tensor in extra.items()
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


def _build_header(items: Sequence[_Item], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header of the file, padded to 8 bytes; the hash is a placeholder of its final width."""
    strings = {"format": "pt", **metadata, HASH_KEY: _HASH_PLACEHOLDER}
    wrong = [key for key, value in strings.items() if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"safetensors metadata are strings; {', '.join(wrong)} is not")
    if any(_HASH_PLACEHOLDER in value for value in metadata.values()):
        raise ValueError(f"metadata may not hold the placeholder of {HASH_KEY}")
    entries: dict[str, Any] = {"__metadata__": strings}
    begin = 0
    for item in items:
        kind = _TYPE_NAMES.get(item.dtype)
        if kind is None:
            choices = ", ".join(str(dtype) for dtype in _TYPE_NAMES)
            raise ValueError(f"{item.name}: {item.dtype} cannot be written; choose from {choices}")
        end = begin + math.prod(item.shape) * ITEM_BYTES[kind]
        entries[item.name] = {"dtype": kind, "shape": list(item.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _to_bytes(item: _Item, source: TensorSource) -> memoryview:
    """Bytes of one piece in the file's type and layout; the source tensor is free when this returns."""
    tensor = (source if isinstance(source, torch.Tensor) else source()).detach()
    if tuple(tensor.shape) != item.piece_shape:
        raise ValueError(f"{item.name} is made of a tensor {list(tensor.shape)}, not {list(item.piece_shape)}")
    if item.dtype == torch.float16 and tensor.dtype != torch.float16 and tensor.numel():
        largest = float(tensor.abs().max())
        if _FLOAT16_MAX < largest < math.inf:
            raise ValueError(f"{item.name} holds {largest:g}, which float16 cannot; choose bfloat16 or float32")
    tensor = (tensor.t() if item.transposed else tensor).to(item.dtype).cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def _replace_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name only when the block ends well; the old file, if any, stays until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
