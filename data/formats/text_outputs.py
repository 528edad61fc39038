"""Text encoder outputs: writer and reader of the npz format that kohya-ss/sd-scripts uses.

| key | dtype, shape | meaning |
|---|---|---|
| `hidden_state1` | floats [L, 768] | penultimate layer of encoder 1, without the final norm; L = 75·n + 2 |
| `hidden_state2` | floats [L, 1280] | penultimate layer of encoder 2 |
| `pool2` | floats [1280] | encoder 2's pooled output of the first 75 tokens |
| `hidden_state1_v1`, `hidden_state2_v1`, `pool2_v1`, `..._v2` | like the first three | more variants of the caption |

Programs that know only the first three keys read the first variant. bfloat16 is stored as in latent files: as uint16,
the upper half of the float32, under a key that ends in `_bf16`.
"""

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdxl_trainer.data.files import open_regular, read_with_retries
from sdxl_trainer.data.formats.latents import BF16_SUFFIX, expand_bfloat16, round_to_bfloat16
from sdxl_trainer.data.formats.npz import READ_ERRORS, NpzError, SpanReader, load_arrays, load_member
from sdxl_trainer.data.formats.shards import locate_shard

KEYS = ("hidden_state1", "hidden_state2", "pool2")
# Of a compressed array: 225 tokens of far wider encoders than SDXL's, in float64. This project writes uncompressed
# arrays, which cannot be larger than their file.
MAX_PACKED_BYTES = 227 * 8192 * 8


class BadTextError(ValueError):
    """Text encoder outputs that cannot be trained on; the message is the reason."""


@dataclass(frozen=True)
class TextOutputs:
    """Outputs of both encoders for one caption."""

    hidden_1: np.ndarray  # [L, C1] floats
    hidden_2: np.ndarray  # [L, C2]
    pooled: np.ndarray  # [C2]


def pack_text(variants: Sequence[TextOutputs], dtype: str = "float32") -> bytes:
    """Return the bytes of an npz file, stored uncompressed. Equal outputs give equal bytes.

    Args:
        dtype: type of the arrays: float32, float16 or bfloat16.
    """
    arrays = {}
    for number, outputs in enumerate(variants):
        for key, array in zip(_list_keys(number), (outputs.hidden_1, outputs.hidden_2, outputs.pooled), strict=True):
            if dtype == "bfloat16":
                arrays[key + BF16_SUFFIX] = round_to_bfloat16(array)
            else:
                arrays[key] = array.astype(dtype)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def parse_text_outputs(content: bytes | memoryview, variants: int, check_crc: bool = True) -> list[TextOutputs]:
    """Parse and check all variants of a text file. bfloat16 becomes float32.

    Args:
        variants: number of variants in the file.
        check_crc: False skips the CRC-32, for callers that have checked the bytes' SHA-256.

    Raises:
        BadTextError: the file is torn or pickled, or an array is missing, has another type or shape, or is not finite.
    """
    keys = [key for number in range(variants) for key in _list_keys(number)]
    limit = max(MAX_PACKED_BYTES, len(content))
    limits = dict.fromkeys([*keys, *(key + BF16_SUFFIX for key in keys)], limit)
    try:
        arrays = load_arrays(content, limits, check_crc)
    except NpzError as error:
        raise BadTextError(str(error)) from None
    found = [_build_outputs(arrays, number) for number in range(variants)]
    if len({(each.hidden_1.shape, each.hidden_2.shape) for each in found}) > 1:
        raise BadTextError("holds variants of different shapes")
    return found


def read_text_variant(path: Path, offset: int | None, size: int, variant: int, variants: int) -> TextOutputs:
    """Read and check one variant of a text file, without reading the others.

    Args:
        offset: first byte of the npz in its shard; None for a file of its own.
        size: size of the npz in bytes.
        variant: number of the variant, from 0.
        variants: number of variants in the file.

    Raises:
        BadTextError: the file is missing, torn or pickled, or an array is missing, has another type or shape, or is
            not finite.
    """

    def read() -> TextOutputs:
        descriptor = open_regular(path if offset is None else locate_shard(path))
        try:
            if variants == 1:
                return parse_text_outputs(os.pread(descriptor, size, offset or 0), 1)[0]
            return _load_variant(SpanReader(descriptor, offset or 0, size), variant, max(MAX_PACKED_BYTES, size))
        finally:
            os.close(descriptor)

    try:
        return read_with_retries(read, path)
    except OSError as error:
        raise BadTextError(f"{path}: cannot be read: {error.strerror}") from None
    except (BadTextError, NpzError) as error:
        raise BadTextError(f"{path}: {error}") from None


def _load_variant(file: SpanReader, variant: int, limit: int) -> TextOutputs:
    """Load the arrays of one variant, each of at most `limit` bytes.

    Raises:
        OSError: the disk cannot be read.
        BadTextError, NpzError: the archive is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = {key + suffix for key in _list_keys(variant) for suffix in ("", BF16_SUFFIX)}
            found = names.intersection(name.removesuffix(".npy") for name in archive.namelist())
            return _build_outputs({key: load_member(archive, key, limit) for key in found}, variant)
    except (ValueError, *READ_ERRORS) as error:
        if file.disk_error is not None:
            raise file.disk_error from None
        if isinstance(error, (BadTextError, NpzError)):
            raise
        raise NpzError(f"not a readable npz file: {error}") from None


def _list_keys(variant: int) -> list[str]:
    return [f"{key}_v{variant}" if variant else key for key in KEYS]


def _build_outputs(arrays: dict[str, np.ndarray], variant: int) -> TextOutputs:
    hidden_1, hidden_2, pooled = (_read_array(arrays, key) for key in _list_keys(variant))
    shapes = (hidden_1.shape, hidden_2.shape, pooled.shape)
    if [len(shape) for shape in shapes] != [2, 2, 1] or len(hidden_1) != len(hidden_2) or 0 in sum(shapes, ()):
        raise BadTextError(
            f"holds arrays of {', '.join(str(list(shape)) for shape in shapes)}, not [L, C], [L, C], [C]"
        )
    return TextOutputs(hidden_1, hidden_2, pooled)


def _read_array(arrays: dict[str, np.ndarray], key: str) -> np.ndarray:
    if key + BF16_SUFFIX in arrays and arrays[key + BF16_SUFFIX].dtype == np.uint16:
        array = expand_bfloat16(arrays[key + BF16_SUFFIX])
    elif key in arrays and arrays[key].dtype.kind == "f":
        array = arrays[key]
    else:
        raise BadTextError(f"has no array of floats `{key}` but {', '.join(arrays) or 'nothing'}")
    if not np.isfinite(array).all():
        raise BadTextError(f"`{key}` holds values that are not finite")
    return array
