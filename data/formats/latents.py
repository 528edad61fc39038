"""Latent files in the npz form that kohya-ss/sd-scripts and the first sdxl-trainer read: writer and reader.

| key | dtype, shape | meaning |
|---|---|---|
| `latents` | float32 or float16 [4, h, w] | posterior sample or mean, not multiplied by the scaling factor |
| `latents_flipped` | the same | of the mirrored pixels |
| `latents_std`, `latents_flipped_std` | the same | of the posterior; `latents` is then its mean |
| `alpha_mask` | float32 [H, W] = bucket in pixels | optional: 0 to 1, where the loss counts (unflipped) |
| `original_size` | int64 [2] | (width, height) before any resize |
| `crop_ltrb` | float64 [4] | left, top, right, bottom in the pixel grid of the resized image |

numpy knows no bfloat16. Arrays of it have the suffix `_bf16` and are uint16;
`(a.astype("uint32") << 16).view("float32")` gives the values. Programs that expect
`latents` then stop with a missing key instead of training on wrong numbers.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.formats.npz import NpzError, load_arrays
from sdxl_trainer.data.formats.shards import OpenFile, locate_shard

LATENT_CHANNELS = 4
VAE_FACTOR = 8
BF16_SUFFIX = "_bf16"
ARRAY_KEYS = {
    "latents": "latents",
    "std": "latents_std",
    "flipped": "latents_flipped",
    "flipped_std": "latents_flipped_std",
}
# The latents of a 16384 x 16384 image in float64, and what the few numbers need; what claims more is no latent file.
MAX_BYTES = {
    **{key + suffix: 4 * 2048 * 2048 * 8 for key in ARRAY_KEYS.values() for suffix in ("", BF16_SUFFIX)},
    "alpha_mask": 4096 * 4096 * 8,
    "original_size": 4096,
    "crop_ltrb": 4096,
}


class BadLatentError(ValueError):
    """A latent file that cannot be trained on; the message is the reason."""


@dataclass(frozen=True)
class LatentSample:
    """What a latent file holds. Sizes are in pixels."""

    latents: np.ndarray  # [4, h, w] floats
    original_size: tuple[int, int]  # (width, height)
    crop_ltrb: tuple[float, float, float, float]
    std: np.ndarray | None = None  # like latents; if given, `latents` is the posterior's mean
    flipped: np.ndarray | None = None
    flipped_std: np.ndarray | None = None
    alpha_mask: np.ndarray | None = None  # [H, W] floats, the bucket in pixels
    dtype: str = "float32"  # in which a file that was read holds them

    @property
    def bucket(self) -> tuple[int, int]:
        """(width, height) in pixels of the image that was encoded."""
        return (self.latents.shape[2] * VAE_FACTOR, self.latents.shape[1] * VAE_FACTOR)


def pack_latents(sample: LatentSample, dtype: str = "float32") -> bytes:
    """The bytes of an npz file: stored uncompressed, the same for the same content.

    Args:
        dtype: of the arrays: float32, float16 or bfloat16.
    """
    arrays = {}
    for name, key in ARRAY_KEYS.items():
        array = getattr(sample, name)
        if array is not None and dtype == "bfloat16":
            arrays[key + BF16_SUFFIX] = round_to_bfloat16(array)
        elif array is not None:
            arrays[key] = array.astype(dtype)
    if sample.alpha_mask is not None:
        arrays["alpha_mask"] = sample.alpha_mask.astype(np.float32)
    arrays["original_size"] = np.array(sample.original_size, np.int64)
    arrays["crop_ltrb"] = np.array(sample.crop_ltrb, np.float64)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def write_latents(path: Path, sample: LatentSample, dtype: str = "float32") -> bytes:
    """Write a latent file, whole or not at all, and return its bytes."""
    content = pack_latents(sample, dtype)
    write_atomic(path, content)
    return content


def read_latents(
    path: Path, bucket: tuple[int, int] | None = None, span: tuple[int, int] | None = None
) -> LatentSample:
    """Read and check a latent file, or one that lies in a shard.

    Args:
        bucket: the (width, height) in pixels that the latents must have been encoded at, if known.
        span: (offset, size) in bytes of the npz within a shard; None for a file of its own.

    Raises:
        BadLatentError: missing, torn, pickled, of another form or shape, or not finite.
    """
    try:
        content = OpenFile(path).read() if span is None else OpenFile(locate_shard(path)).read(*span)
    except OSError as error:
        raise BadLatentError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return parse_latents(content, bucket)
    except BadLatentError as error:
        raise BadLatentError(f"{path}: {error}") from None


def parse_latents(
    content: bytes | memoryview, bucket: tuple[int, int] | None = None, check_crc: bool = True
) -> LatentSample:
    """`read_latents` from bytes; arrays are views of them where the file is stored uncompressed.

    Args:
        check_crc: False where the bytes' SHA-256 has been checked.
    """
    try:
        arrays = load_arrays(content, MAX_BYTES, check_crc)
    except NpzError as error:
        raise BadLatentError(str(error)) from None
    parts = {name: _read_array(arrays, key, bucket) for name, key in ARRAY_KEYS.items()}
    latents = parts.pop("latents")
    if latents is None:
        form = "of another model family" if any(key.startswith("latents_") for key in arrays) else "no latent file"
        raise BadLatentError(f"has no `latents` but {', '.join(arrays) or 'nothing'}: {form}")
    for name, part in parts.items():
        if part is not None and part.shape != latents.shape:
            raise BadLatentError(f"`{ARRAY_KEYS[name]}` is {list(part.shape)}, unlike latents {list(latents.shape)}")
    width, height = latents.shape[2] * VAE_FACTOR, latents.shape[1] * VAE_FACTOR
    size = _read_numbers(arrays, "original_size", (width, height))
    crop = _read_numbers(arrays, "crop_ltrb", (0, 0, width, height))
    dtype = "bfloat16" if "latents" + BF16_SUFFIX in arrays else latents.dtype.name
    crop_ltrb = (crop[0], crop[1], crop[2], crop[3])
    mask = _read_mask(arrays, (height, width))
    return LatentSample(latents, (int(size[0]), int(size[1])), crop_ltrb, **parts, alpha_mask=mask, dtype=dtype)


def compute_shape(bucket: tuple[int, int]) -> tuple[int, int, int]:
    """[4, h, w] of the latents of a bucket, (width, height) px."""
    return (LATENT_CHANNELS, bucket[1] // VAE_FACTOR, bucket[0] // VAE_FACTOR)


def find_latent_file(image: Path, folder: Path) -> Path | None:
    """The latent file of an image, under any name that kohya's scripts or ours give it, beside it or in `folder`.

    `{stem}.npz` goes before `{stem}_{W:04d}x{H:04d}_sdxl.npz`, as kohya's scripts have it. A "image" may be an npz.
    """
    if image.suffix == ".npz" and image.is_file():
        return image
    for place in dict.fromkeys((image.parent, folder)):
        plain = place / f"{image.stem}.npz"
        if plain.is_file():
            return plain
        sized = sorted(place.glob(f"{_escape_glob(image.stem)}_[0-9]*x[0-9]*_sdxl.npz"))
        if sized:
            return sized[0]
    return None


def _read_array(arrays: dict[str, np.ndarray], key: str, bucket: tuple[int, int] | None) -> np.ndarray | None:
    """A checked array of floats [4, h, w], or None if the file has none under `key`."""
    if key + BF16_SUFFIX in arrays:
        stored = arrays[key + BF16_SUFFIX]
        if stored.dtype != np.uint16:
            raise BadLatentError(f"`{key}{BF16_SUFFIX}` is {stored.dtype}, not uint16")
        array = (stored.astype(np.uint32) << 16).view(np.float32)
    elif key in arrays:
        array = arrays[key]
    else:
        return None
    if array.ndim != 3 or array.shape[0] != LATENT_CHANNELS or array.dtype.kind != "f" or array.size == 0:
        raise BadLatentError(f"{key} are {array.dtype}{list(array.shape)}, not floats [{LATENT_CHANNELS}, h, w]")
    if bucket is not None and array.shape != compute_shape(bucket):
        found = (array.shape[2] * VAE_FACTOR, array.shape[1] * VAE_FACTOR)
        raise BadLatentError(f"was encoded at {found[0]}x{found[1]} px, not at its bucket's {bucket[0]}x{bucket[1]} px")
    if not _is_finite(array):
        raise BadLatentError("holds values that are not finite")
    return array


def _is_finite(array: np.ndarray) -> bool:
    """Return whether every value is finite; a finite sum of squares shows it in one pass."""
    if array.dtype == np.float32 and array.flags.aligned and array.flags.c_contiguous:
        flat = array.reshape(-1)
        if np.dot(flat, flat) < np.inf:
            return True
    return bool(np.isfinite(array).all())


def _read_mask(arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray | None:
    """The checked `alpha_mask`, or None if the file has none."""
    mask = arrays.get("alpha_mask")
    if mask is None:
        return None
    if mask.shape != shape or mask.dtype.kind != "f" or not (mask.min() >= 0 and mask.max() <= 1):  # nor NaN
        raise BadLatentError(f"`alpha_mask` is {mask.dtype}{list(mask.shape)}, not floats of 0 to 1 {list(shape)}")
    return mask


def _read_numbers(arrays: dict[str, np.ndarray], key: str, default: tuple[float, ...]) -> list[float]:
    """A short vector of as many numbers as its default has."""
    if key not in arrays:
        return list(default)
    array = arrays[key]
    numbers = array.tolist() if array.shape == (len(default),) and array.dtype.kind in "iuf" else []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise BadLatentError(f"`{key}` is {array.dtype}{list(array.shape)}, not {len(default)} finite numbers")
    return [float(number) for number in numbers]


def round_to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float32 to the upper half of its bits as uint16, rounded to nearest even. [..] in and out."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _escape_glob(text: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)
