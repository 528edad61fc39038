"""What a latent file holds, told from its headers: some preads of 1 KB each instead of reading it.

`np.savez` writes one local header (APPNOTE 4.3.7) and one npy header a member; the numbers follow. Whatever is out of
the ordinary (compressed, streamed) is read whole by `parse_latents`.
"""

import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sdxl_trainer.data.formats.latents import (
    ARRAY_KEYS,
    BF16_SUFFIX,
    LATENT_CHANNELS,
    VAE_FACTOR,
    BadLatentError,
    parse_latents,
)
from sdxl_trainer.data.formats.npz import DATA_DESCRIPTOR, DIRECTORY, LOCAL_HEADER, NPY_MAGIC, SIGNATURE, STORED, ZIP64
from sdxl_trainer.data.images.bucket import Size

HEADER_BYTES = 1024  # a local header, an npy header, and the few numbers of `original_size` or `crop_ltrb`
MAX_MEMBERS = 32
NUMBERS = {"original_size": 2, "crop_ltrb": 4}


@dataclass(frozen=True)
class LatentHeader:
    """What the header of a latent file tells. Sizes are (width, height) px."""

    bucket: Size
    original_size: Size | None  # None: it does not tell
    crop_ltrb: tuple[float, ...]  # empty: it does not tell
    bytes: int
    flipped: bool  # it holds latents of the mirrored image too
    masked: bool = False  # it holds an `alpha_mask`


def read_latent_header(path: str, offset: int = 0, size: int | None = None) -> LatentHeader:
    """The header of an npz file, or of one within a shard.

    Raises:
        BadLatentError: missing, torn, or no latents of SDXL's; the message is the reason without the path.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            length = os.fstat(descriptor).st_size
            end = length if size is None else offset + size
            if end > length:
                raise BadLatentError(f"is cut short: {length} bytes of {end}")
            return parse_latent_header(lambda place, count: os.pread(descriptor, count, place), offset, end)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BadLatentError(f"cannot be read: {error.strerror}") from None


def parse_latent_header(read: Callable[[int, int], bytes], offset: int, end: int) -> LatentHeader:
    """The same of bytes [offset, end) of whatever `read(place, count)` reads from."""
    try:
        members = _read_members(read, offset, end)
        return _read_whole(read(offset, end - offset)) if members is None else _build_header(members, end - offset)
    except BadLatentError:
        raise
    except (ValueError, struct.error, IndexError) as error:
        raise BadLatentError(f"not a readable npz file: {error}") from None


def _read_members(
    read: Callable[[int, int], bytes], place: int, end: int
) -> dict[str, tuple[np.dtype, tuple, bytes]] | None:
    """Key → (dtype, shape, the first bytes of the values), or None if the file is not of the plain form."""
    members = {}
    for _ in range(MAX_MEMBERS):
        head = read(place, min(HEADER_BYTES, end - place))
        if head[:4] == DIRECTORY and members:
            return members
        if head[:4] != SIGNATURE:
            break
        fields = LOCAL_HEADER.unpack_from(head)
        size, name_end = fields[8], LOCAL_HEADER.size + fields[9]
        start = name_end + fields[10]
        if fields[2] & DATA_DESCRIPTOR or fields[3] != STORED:
            return None
        if size == 0xFFFFFFFF:
            if struct.unpack_from("<H", head, name_end)[0] != ZIP64:
                return None
            size = struct.unpack_from("<Q", head, name_end + 4)[0]
        if head[start : start + 6] != NPY_MAGIC:
            return None
        values = start + 10 + struct.unpack_from("<H", head, start + 8)[0]
        dtype, shape = _parse_npy_header(head[start + 8 : values])
        members[head[LOCAL_HEADER.size : name_end].decode().removesuffix(".npy")] = (dtype, shape, head[values:])
        place += start + size
    raise BadLatentError("not a readable npz file: it is cut short, or no zip")


@lru_cache(maxsize=4096)
def _parse_npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    shape, _, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    return dtype, shape


def _build_header(members: dict[str, tuple[np.dtype, tuple, bytes]], size: int) -> LatentHeader:
    key = "latents" + BF16_SUFFIX if "latents" + BF16_SUFFIX in members else "latents"
    if key not in members:
        raise BadLatentError(f"has no `latents` but {', '.join(members)}")
    dtype, shape, _ = members[key]
    if len(shape) != 3 or shape[0] != LATENT_CHANNELS or dtype.kind not in ("f" if key == "latents" else "u"):
        raise BadLatentError(f"latents are {dtype}{list(shape)}, not floats [{LATENT_CHANNELS}, h, w]")
    numbers = {}
    for name, count in NUMBERS.items():
        dtype, numbers_shape, start = members.get(name, (np.dtype("f8"), (0,), b""))
        plain = numbers_shape == (count,) and dtype.kind in "iuf"
        numbers[name] = np.frombuffer(start, dtype, count).tolist() if plain else []
    width, height = (int(side) for side in numbers["original_size"] or (0, 0))
    original = (width, height) if min(width, height) > 0 else None
    bucket, flipped = (shape[2] * VAE_FACTOR, shape[1] * VAE_FACTOR), key.replace("latents", ARRAY_KEYS["flipped"])
    crop, masked = tuple(numbers["crop_ltrb"]), "alpha_mask" in members
    return LatentHeader(bucket, original, crop, size, flipped in members, masked)


def _read_whole(content: bytes) -> LatentHeader:
    sample = parse_latents(content)
    masked = sample.alpha_mask is not None
    return LatentHeader(
        sample.bucket, sample.original_size, sample.crop_ltrb, len(content), sample.flipped is not None, masked
    )
