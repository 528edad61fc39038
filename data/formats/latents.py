"""Latent files: writer and reader of the npz format that kohya-ss/sd-scripts and the first sdxl-trainer use.

| key | dtype, shape | meaning |
|---|---|---|
| `latents` | float32 or float16 [C, h, w] | posterior sample or mean, not multiplied by the scaling factor |
| `latents_flipped` | like `latents` | of the mirrored image |
| `latents_std`, `latents_flipped_std` | like `latents` | of the posterior; `latents` is then its mean |
| `alpha_mask` | float32 [H, W] = bucket in pixels | optional: weight of the loss, 0 to 1 (unflipped) |
| `original_size` | int64 [2] | (width, height) before any resize |
| `crop_ltrb` | float64 [4] | left, top, right, bottom in the pixel grid of the resized image |

C is the VAE's number of latent channels: 4 for SDXL's own, 16 for Flux's and SD3's, 32 for Flux2's.

Recent versions of kohya's scripts end all keys in the latents' height and width, `latents_128x96`, so that a file may
hold several resolutions. Of these the one of the sample's bucket is read, or else the largest.

numpy has no bfloat16. The keys of such arrays end in `_bf16`, and the arrays are uint16;
`(a.astype("uint32") << 16).view("float32")` gives the values. Programs that expect `latents` then stop with a missing
key instead of training on wrong numbers.
"""

import glob
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from sdxl_trainer.data.files import Span, read_with_retries, write_atomic
from sdxl_trainer.data.formats.npz import NpzError, load_arrays
from sdxl_trainer.data.formats.shards import OpenFile, locate_shard
from sdxl_trainer.data.images.bucket import CropBox, Size

SDXL_CHANNELS = 4  # of the latents of SDXL's own VAE
VAE_FACTOR = 8
BF16_SUFFIX = "_bf16"
ARRAY_KEYS = {
    "latents": "latents",
    "std": "latents_std",
    "flipped": "latents_flipped",
    "flipped_std": "latents_flipped_std",
}
RESOLUTION = re.compile(r"_(\d+)x(\d+)$")  # end of a key: height and width of the latents
# Enough for 4 channels of a 16384 x 16384 image, or 32 of 5792 x 5792, in float64. A file that claims more is not a
# latent file.
MAX_BYTES = {
    **{key + suffix: 4 * 2048 * 2048 * 8 for key in ARRAY_KEYS.values() for suffix in ("", BF16_SUFFIX)},
    "alpha_mask": 4096 * 4096 * 8,
    "original_size": 4096,
    "crop_ltrb": 4096,
}


class ArrayLimits(dict[str, int]):
    """Limits of arrays by their keys, which may end in a resolution."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or super().__contains__(RESOLUTION.sub("", str(key)))

    def __missing__(self, key: str) -> int:
        return super().__getitem__(RESOLUTION.sub("", key))


LIMITS = ArrayLimits(MAX_BYTES)
T = TypeVar("T")


class BadLatentError(ValueError):
    """A latent file that cannot be trained on; the message is the reason."""


class UnreadLatentError(BadLatentError):
    """A latent file that the storage did not give. It may be whole."""


@dataclass(frozen=True)
class LatentSample:
    """The content of a latent file."""

    latents: np.ndarray  # [C, h, w] floats
    original_size: Size  # of the image
    crop_ltrb: CropBox  # in the resized image
    std: np.ndarray | None = None  # [C, h, w]; if given, `latents` is the posterior's mean
    flipped: np.ndarray | None = None  # [C, h, w] of the mirrored image
    flipped_std: np.ndarray | None = None
    alpha_mask: np.ndarray | None = None  # [H, W] floats of 0 to 1, of the bucket's size
    dtype: str = "float32"  # of the arrays in a file that was read

    @property
    def bucket(self) -> Size:
        """Size of the image that was encoded."""
        return compute_bucket(self.latents.shape)


def pack_latents(sample: LatentSample, dtype: str = "float32") -> bytes:
    """Return the bytes of an npz file, stored uncompressed. Equal samples give equal bytes.

    Args:
        dtype: type of the arrays: float32, float16 or bfloat16.
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
    """Write a latent file atomically and return its bytes."""
    content = pack_latents(sample, dtype)
    write_atomic(path, content)
    return content


def read_latents(path: Path, bucket: Size | None = None, span: Span | None = None) -> LatentSample:
    """Read and check a latent file, or one within a shard.

    Args:
        bucket: the size that the latents must have been encoded at, if known.
        span: bytes of the shard that the npz takes; None for a file of its own.

    Raises:
        BadLatentError: the file is missing, torn or pickled, or an array is missing, has another type or shape, or is
            not finite.
    """

    def read() -> memoryview:
        return OpenFile(path).read() if span is None else OpenFile(locate_shard(path)).read(*span)

    try:
        content = read_with_retries(read, path)
    except OSError as error:
        raise BadLatentError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return parse_latents(content, bucket)
    except BadLatentError as error:
        raise BadLatentError(f"{path}: {error}") from None


def describe_missing_array(arrays: Iterable[str]) -> str:
    """Return the reason why an npz without `latents` is bad: what it holds, and what it needs."""
    needed = "`latents`, floats [channels, height / 8, width / 8] of a VAE"
    return f"holds {', '.join(arrays) or 'nothing'}, but no {needed}"


def parse_latents(
    content: bytes | memoryview, bucket: Size | None = None, check_crc: bool = True, channels: int | None = None
) -> LatentSample:
    """Like `read_latents`, but for the bytes of a file. Arrays of uncompressed files are views of `content`.

    Args:
        check_crc: False skips the CRC-32, for callers that have checked the bytes' SHA-256.
        channels: number of channels that the latents must have; None accepts any number.
    """
    try:
        arrays = select_resolution(load_arrays(content, LIMITS, check_crc), bucket)
    except NpzError as error:
        raise BadLatentError(str(error)) from None
    parts = {name: _read_array(arrays, key, bucket) for name, key in ARRAY_KEYS.items()}
    latents = parts.pop("latents")
    if latents is None:
        raise BadLatentError(f"{describe_missing_array(arrays)}: not a latent file")
    if channels is not None and len(latents) != channels:
        raise BadLatentError(describe_other_channels(len(latents), channels))
    for name, part in parts.items():
        if part is not None and part.shape != latents.shape:
            raise BadLatentError(f"`{ARRAY_KEYS[name]}` is {list(part.shape)}, unlike latents {list(latents.shape)}")
    size = compute_bucket(latents.shape)
    width, height = _read_vector(arrays, "original_size", size)
    return LatentSample(
        latents=latents,
        original_size=Size(int(width), int(height)),
        crop_ltrb=CropBox(*_read_vector(arrays, "crop_ltrb", CropBox(0, 0, size.width, size.height))),
        **parts,
        alpha_mask=_read_mask(arrays, (size.height, size.width)),
        dtype="bfloat16" if "latents" + BF16_SUFFIX in arrays else latents.dtype.name,
    )


def select_resolution(arrays: Mapping[str, T], bucket: Size | None = None) -> dict[str, T]:
    """Return the arrays of one resolution, by keys without it, of a file whose keys end in resolutions.

    Args:
        arrays: by key, of any file; those of a file with `latents` are returned as they are.
        bucket: of the wanted latents; the largest ones are returned if it is None, or if the file has none of it.
    """
    if "latents" in arrays or "latents" + BF16_SUFFIX in arrays:
        return dict(arrays)
    found = [match for key in arrays if key.startswith("latents_") and (match := RESOLUTION.search(key))]
    sizes = {match[0]: (int(match[1]), int(match[2])) for match in found if match.string == f"latents{match[0]}"}
    if not sizes:
        return dict(arrays)
    wanted = compute_shape(bucket, 1)[1:] if bucket is not None else None
    chosen = max(sizes, key=lambda suffix: (sizes[suffix] == wanted, math.prod(sizes[suffix])))
    shared = {key: array for key, array in arrays.items() if not RESOLUTION.search(key)}
    return shared | {key.removesuffix(chosen): array for key, array in arrays.items() if key.endswith(chosen)}


def describe_other_channels(found: int, wanted: int) -> str:
    """Return the reason why latents of another number of channels than the VAE's are bad."""
    return f"has {found} latent channels, and the VAE of the settings gives {wanted}"


def compute_shape(bucket: Size, channels: int) -> tuple[int, int, int]:
    """Return the shape [C, h, w] of the latents of a bucket."""
    return (channels, bucket[1] // VAE_FACTOR, bucket[0] // VAE_FACTOR)


def compute_bucket(shape: Sequence[int]) -> Size:
    """Return the bucket of latents of shape [C, h, w]."""
    return Size(shape[2] * VAE_FACTOR, shape[1] * VAE_FACTOR)


def find_latent_file(image: Path, folder: Path) -> Path | None:
    """Find the latent file of an image, beside the image or in `folder`, by this project's name or kohya's.

    `{stem}.npz` is preferred to kohya's `{stem}_{W:04d}x{H:04d}_sdxl.npz`. If `image` is an npz file, it is returned.
    """
    if image.suffix == ".npz" and image.is_file():
        return image
    for parent in dict.fromkeys((image.parent, folder)):
        plain = parent / f"{image.stem}.npz"
        if plain.is_file():
            return plain
        sized = sorted(parent.glob(f"{glob.escape(image.stem)}_[0-9]*x[0-9]*_sdxl.npz"))
        if sized:
            return sized[0]
    return None


def _read_array(arrays: dict[str, np.ndarray], key: str, bucket: Size | None) -> np.ndarray | None:
    """Check and return the array of floats [C, h, w] under `key`, or None if the file has none."""
    if key + BF16_SUFFIX in arrays:
        stored = arrays[key + BF16_SUFFIX]
        if stored.dtype != np.uint16:
            raise BadLatentError(f"`{key}{BF16_SUFFIX}` is {stored.dtype}, not uint16")
        array = expand_bfloat16(stored)
    elif key in arrays:
        array = arrays[key]
    else:
        return None
    if array.ndim != 3 or array.dtype.kind != "f" or array.size == 0:
        raise BadLatentError(f"{key} are {array.dtype}{list(array.shape)}, not floats [channels, h, w]")
    if bucket is not None and array.shape != compute_shape(bucket, len(array)):
        found = compute_bucket(array.shape)
        raise BadLatentError(f"was encoded at {found} px, not at its bucket's {Size(*bucket)} px")
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
    """Check and return the `alpha_mask` [H, W], or None if the file has none."""
    mask = arrays.get("alpha_mask")
    if mask is None:
        return None
    if mask.shape != shape or mask.dtype.kind != "f" or not (mask.min() >= 0 and mask.max() <= 1):
        raise BadLatentError(f"`alpha_mask` is {mask.dtype}{list(mask.shape)}, not floats of 0 to 1 {list(shape)}")
    return mask


def _read_vector(arrays: dict[str, np.ndarray], key: str, default: tuple[float, ...]) -> list[float]:
    """Check and return the vector under `key`, which has the length of `default`; `default` if the file has none."""
    if key not in arrays:
        return list(default)
    array = arrays[key]
    vector = array.tolist() if array.shape == (len(default),) and array.dtype.kind in "iuf" else []
    if not vector or not all(map(math.isfinite, vector)):
        raise BadLatentError(f"`{key}` is {array.dtype}{list(array.shape)}, not {len(default)} finite numbers")
    return [float(number) for number in vector]


def round_to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round float32 [...] to bfloat16, to nearest even, and return its bits as uint16 [...]."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def expand_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 numbers, given as their bits in uint16 [...], as float32 [...]."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
