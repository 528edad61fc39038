"""Latent files in the npz form that kohya-ss/sd-scripts and the first sdxl-trainer read: writer and reader.

Keys: `latents` [4, h, w] not multiplied by the scaling factor, `original_size` (width, height) before any resize,
`crop_ltrb` (left, top, right, bottom) in the pixel grid of the resized picture.
"""

import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format

from sdxl_trainer.data.files import write_atomic

LATENT_CHANNELS = 4
VAE_FACTOR = 8
# The latents of a 16384 x 16384 picture in float64, and what the few numbers need; what claims more is no latent file.
MAX_BYTES = {"latents": 4 * 2048 * 2048 * 8, "original_size": 4096, "crop_ltrb": 4096}


class BadLatentError(ValueError):
    """A latent file that cannot be trained on; the message is the reason."""


@dataclass(frozen=True)
class LatentSample:
    """What a latent file holds. Sizes are in pixels."""

    latents: np.ndarray  # [4, h, w] as stored
    original_size: tuple[int, int]  # (width, height)
    crop_ltrb: tuple[float, float, float, float]

    @property
    def bucket(self) -> tuple[int, int]:
        """(width, height) in pixels of the picture that was encoded."""
        return (self.latents.shape[2] * VAE_FACTOR, self.latents.shape[1] * VAE_FACTOR)


def pack_latents(sample: LatentSample) -> bytes:
    """The bytes of an npz file: stored uncompressed, the same for the same content."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        latents=sample.latents,
        original_size=np.array(sample.original_size, np.int64),
        crop_ltrb=np.array(sample.crop_ltrb),
    )
    return buffer.getvalue()


def write_latents(path: Path, sample: LatentSample) -> bytes:
    """Write a latent file, whole or not at all, and return its bytes."""
    content = pack_latents(sample)
    write_atomic(path, content)
    return content


def read_latents(path: Path, bucket: tuple[int, int] | None = None) -> LatentSample:
    """Read and check a latent file.

    Args:
        bucket: the (width, height) in pixels that the latents must have been encoded at, if known.

    Raises:
        BadLatentError: missing, torn, pickled, of another form or shape, or not finite.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadLatentError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return _parse(content, bucket)
    except BadLatentError as error:
        raise BadLatentError(f"{path}: {error}") from None
    except (ValueError, KeyError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise BadLatentError(f"{path}: not a readable npz file: {error}") from None


def _parse(content: bytes, bucket: tuple[int, int] | None) -> LatentSample:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        _check_claims(archive)
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        if "latents" not in arrays:
            form = "of another model family" if any(key.startswith("latents_") for key in arrays) else "no latent file"
            raise BadLatentError(f"has no `latents` but {', '.join(arrays) or 'nothing'}: {form}")
        latents = arrays["latents"]
        _check_array(latents, bucket)
        width, height = latents.shape[2] * VAE_FACTOR, latents.shape[1] * VAE_FACTOR
        size = _read_numbers(arrays, "original_size", (width, height))
        crop = _read_numbers(arrays, "crop_ltrb", (0, 0, width, height))
    return LatentSample(latents, (int(size[0]), int(size[1])), (crop[0], crop[1], crop[2], crop[3]))


def _check_claims(archive: zipfile.ZipFile) -> None:
    """Compare what the arrays claim to hold with what the file holds, before memory is set aside for it."""
    sizes = {member.filename.removesuffix(".npy"): member.file_size for member in archive.infolist()}
    for key in sizes.keys() & MAX_BYTES.keys():
        if sizes[key] > MAX_BYTES[key]:
            raise BadLatentError(f"`{key}` claims to unpack to {sizes[key]} bytes (a bomb?)")
        with archive.open(f"{key}.npy") as member:
            read_header = {(1, 0): format.read_array_header_1_0, (2, 0): format.read_array_header_2_0}
            shape, _, dtype = read_header[format.read_magic(member)](member)
            if dtype.hasobject:
                raise BadLatentError(f"`{key}` is pickled, which is not read because it may run code")
            if math.prod(shape) * dtype.itemsize != sizes[key] - member.tell():
                raise BadLatentError(
                    f"`{key}` claims {dtype}{list(shape)} but holds {sizes[key] - member.tell()} bytes"
                )


def _read_numbers(arrays: Mapping[str, np.ndarray], key: str, default: tuple[float, ...]) -> list[float]:
    """A short vector of as many numbers as its default has."""
    if key not in arrays:
        return list(default)
    numbers = arrays[key]
    if numbers.shape != (len(default),) or numbers.dtype.kind not in "iuf" or not np.isfinite(numbers).all():
        raise BadLatentError(f"`{key}` is {numbers.dtype}{list(numbers.shape)}, not {len(default)} finite numbers")
    return [float(number) for number in numbers]


def _check_array(latents: np.ndarray, bucket: tuple[int, int] | None) -> None:
    if latents.ndim != 3 or latents.shape[0] != LATENT_CHANNELS or latents.dtype.kind != "f":
        raise BadLatentError(f"latents are {latents.dtype}{list(latents.shape)}, not floats [{LATENT_CHANNELS}, h, w]")
    if bucket is not None and latents.shape[1:] != (bucket[1] // VAE_FACTOR, bucket[0] // VAE_FACTOR):
        found = (latents.shape[2] * VAE_FACTOR, latents.shape[1] * VAE_FACTOR)
        raise BadLatentError(f"was encoded at {found[0]}x{found[1]} px, not at its bucket's {bucket[0]}x{bucket[1]} px")
    if not np.isfinite(latents).all():
        raise BadLatentError("holds values that are not finite")
