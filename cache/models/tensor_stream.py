"""Writing of safetensors files as a stream, one tensor at a time.

The library's own `save_file` needs all tensors at once, which a run under ZeRO-3 never holds.
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
from sdxl_trainer.data.files import create_folder, open_atomic

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


@dataclass(frozen=True, kw_only=True)
class TensorItem:
    """One tensor to write.

    Args:
        pieces: parts of the tensor, written one after the other, such as q, k and v of a stacked weight.
        piece_shape: shape of each piece, before it is transposed.
        transposed: the file holds the transpose of the pieces.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    pieces: tuple[TensorSource, ...]
    piece_shape: Shape
    transposed: bool = False


def write_safetensors(
    path: Path, items: Sequence[TensorItem], metadata: Mapping[str, str], hash_key: str | None = None
) -> str:
    """Write tensors in the given order, atomically, and return the SHA-256 of their bytes as `0x…`.

    A piece that is a function is called once, and its tensor is dropped before the next call. After an error there is
    no file at `path`.

    Args:
        hash_key: key of the metadata under which the hash is written too.

    Raises:
        ValueError: a tensor has another shape than its item, or float16 cannot hold a value.
    """
    create_folder(path.parent)
    header = _build_header(items, metadata, hash_key)
    digest = hashlib.sha256()
    with open_atomic(path) as file:
        file.write(header)
        for item in items:
            for piece in item.pieces:
                data = _to_bytes(item, piece)
                file.write(data)
                digest.update(data)
                # Free this tensor before the next one is gathered.
                del data
        tensor_hash = f"0x{digest.hexdigest()}"
        if hash_key is not None:
            # The hash covers only the bytes after the header, where a placeholder holds its place.
            file.seek(header.index(_HASH_PLACEHOLDER.encode()))
            file.write(tensor_hash.encode())
    return tensor_hash


def _build_header(items: Sequence[TensorItem], metadata: Mapping[str, str], hash_key: str | None) -> bytes:
    """Build the length and the JSON header of the file, padded to 8 bytes, with a placeholder for the hash."""
    strings = {"format": "pt", **metadata, **({hash_key: _HASH_PLACEHOLDER} if hash_key else {})}
    wrong = [key for key, value in strings.items() if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"safetensors metadata must be strings; {', '.join(wrong)} is not")
    if any(_HASH_PLACEHOLDER in value for value in metadata.values()):
        raise ValueError(f"metadata must not hold the placeholder of {hash_key}")
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
    """Return the bytes of one piece in the file's type and layout, without a reference to the source tensor."""
    tensor = (source if isinstance(source, torch.Tensor) else source()).detach()
    if tuple(tensor.shape) != item.piece_shape:
        raise ValueError(f"{item.name} has a piece of shape {list(tensor.shape)} instead of {list(item.piece_shape)}")
    if item.dtype == torch.float16 and tensor.dtype != torch.float16 and tensor.numel():
        largest = float(tensor.abs().max())
        if _FLOAT16_MAX < largest < math.inf:
            raise ValueError(f"{item.name} holds {largest:g}, which float16 cannot; choose bfloat16 or float32")
    tensor = (tensor.t() if item.transposed else tensor).to(item.dtype).cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data
