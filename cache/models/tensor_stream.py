"""Safetensors files written as a stream, one tensor at a time.

The library's own `save_file` wants all tensors at once; a run under ZeRO-3 never has them.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdxl_trainer.cache.models.single_file_check import ITEM_BYTES
from sdxl_trainer.cache.models.single_file_names import Shape
from sdxl_trainer.data.files import open_atomic, sync_folder

TensorSource = torch.Tensor | Callable[[], torch.Tensor]

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
class TensorItem:
    """One tensor of the file to be: its pieces are written one behind the other (q, k, v of a stacked weight)."""

    name: str
    shape: Shape
    dtype: torch.dtype
    pieces: tuple[TensorSource, ...]
    piece_shape: Shape
    transposed: bool = False


def write_safetensors(
    path: Path, items: Sequence[TensorItem], metadata: Mapping[str, str], hash_key: str | None = None
) -> str:
    """Write the items in their order, atomically, and return the SHA-256 of their bytes as `0x…`.

    A piece that is a function is called once, and its tensor is dropped before the next is asked for. The hash also
    goes into the metadata under `hash_key`. Raises ValueError when a tensor has another shape than announced, or
    float16 cannot hold a value. Whatever is raised, nothing stays under the final name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header = _build_header(items, metadata, hash_key)
    digest = hashlib.sha256()
    with open_atomic(path) as file:
        file.write(header)
        for item in items:
            for piece in item.pieces:
                data = _to_bytes(item, piece)
                file.write(data)
                digest.update(data)
                del data  # or this tensor would still be there while the next one is gathered
        tensor_hash = f"0x{digest.hexdigest()}"
        if hash_key is not None:
            # The hash covers what follows the header that holds it: its place was kept, now it is filled in.
            file.seek(header.index(_HASH_PLACEHOLDER.encode()))
            file.write(tensor_hash.encode())
    sync_folder(path.parent)
    return tensor_hash


def _build_header(items: Sequence[TensorItem], metadata: Mapping[str, str], hash_key: str | None) -> bytes:
    """Length and JSON header of the file, padded to 8 bytes; the hash is a placeholder of its final width."""
    strings = {"format": "pt", **metadata, **({hash_key: _HASH_PLACEHOLDER} if hash_key else {})}
    wrong = [key for key, value in strings.items() if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"safetensors metadata are strings; {', '.join(wrong)} is not")
    if any(_HASH_PLACEHOLDER in value for value in metadata.values()):
        raise ValueError(f"metadata may not hold the placeholder of {hash_key}")
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


def _to_bytes(item: TensorItem, source: TensorSource) -> memoryview:
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
