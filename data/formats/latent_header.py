"""Read the description of a latent file from its zip and npy headers.

That takes a few reads of 1 KB instead of a read of the whole file. Compressed and streamed files are read whole.
"""

import os
from dataclasses import dataclass

import numpy as np

from sdxl_trainer.data.files import open_regular, read_with_retries
from sdxl_trainer.data.formats.latents import (
    ARRAY_KEYS,
    BF16_SUFFIX,
    SDXL_CHANNELS,
    BadLatentError,
    UnreadLatentError,
    compute_bucket,
    describe_missing_array,
    parse_latents,
    select_resolution,
)
from sdxl_trainer.data.formats.npz import (
    Member,
    NpzError,
    ReadBytes,
    list_members,
    parse_npy_header,
    verify_num_bytes,
)
from sdxl_trainer.data.formats.shards import MAX_SAMPLE_BYTES
from sdxl_trainer.data.images.bucket import CropBox, Size

VECTOR_LENGTHS = {"original_size": 2, "crop_ltrb": 4}


@dataclass(frozen=True)
class LatentHeader:
    """The description of a latent file."""

    bucket: Size
    original_size: Size | None  # None: not in the file
    crop_ltrb: CropBox | None  # None: not in the file
    bytes: int  # size of the file
    flipped: bool  # has latents of the mirrored image too
    masked: bool = False  # has an `alpha_mask`
    channels: int = SDXL_CHANNELS  # of the latents; catalogues before 0.3.0 list only latents of SDXL's VAE


def read_latent_header(path: str, offset: int = 0, size: int | None = None) -> LatentHeader:
    """Read the header of an npz file, or of one within a shard.

    Args:
        offset: first byte of the npz in the shard.
        size: size of the npz in bytes; None: up to the end of the file.

    Raises:
        UnreadLatentError: the file is missing, or the storage failed.
        BadLatentError: the file is torn, or holds no latents. The message is the reason without the path.
    """

    def read() -> LatentHeader:
        descriptor = open_regular(path)
        try:
            length = os.fstat(descriptor).st_size
            end = length if size is None else offset + size
            if end > length:
                raise BadLatentError(f"is cut short: {length} bytes of {end}")
            return parse_latent_header(lambda start, count: os.pread(descriptor, count, start), offset, end)
        finally:
            os.close(descriptor)

    try:
        return read_with_retries(read, path)
    except OSError as error:
        raise UnreadLatentError(f"cannot be read: {error.strerror}") from None


def parse_latent_header(read: ReadBytes, offset: int, end: int) -> LatentHeader:
    """Like `read_latent_header`, but for the npz in bytes [offset, end) of any source.

    Args:
        read: `read(start, count)` returns `count` bytes of the source from byte `start` on.
    """
    if end - offset > MAX_SAMPLE_BYTES:
        raise BadLatentError(f"has {end - offset:,} bytes, more than {MAX_SAMPLE_BYTES:,}")
    try:
        members = list_members(read, offset, end)
        if members is not None:
            by_key = select_resolution({member.key: member for member in members})
            return _build_header(by_key, end - offset)
    except NpzError as error:
        raise BadLatentError(str(error)) from None
    sample = parse_latents(read(offset, end - offset))
    is_default = sample.crop_ltrb == CropBox(0, 0, *sample.bucket)  # also what a file without a crop gets
    return LatentHeader(
        bucket=sample.bucket,
        original_size=sample.original_size,
        crop_ltrb=None if is_default else sample.crop_ltrb,
        bytes=end - offset,
        flipped=sample.flipped is not None,
        masked=sample.alpha_mask is not None,
        channels=len(sample.latents),
    )


def _build_header(members: dict[str, Member], size: int) -> LatentHeader:
    key = "latents" + BF16_SUFFIX if "latents" + BF16_SUFFIX in members else "latents"
    if key not in members:
        raise BadLatentError(describe_missing_array(members))
    header = parse_npy_header(key, members[key].head)
    dtype, shape = header.dtype, header.shape
    if len(shape) != 3 or 0 in shape or dtype.kind not in ("f" if key == "latents" else "u"):
        raise BadLatentError(f"latents are {dtype}{list(shape)}, not floats [channels, h, w]")
    verify_num_bytes(key, header, members[key].end - members[key].start)
    vectors = {name: _read_vector(members[name], length) for name, length in VECTOR_LENGTHS.items() if name in members}
    width, height = (int(side) for side in vectors.get("original_size") or (0, 0))
    return LatentHeader(
        bucket=compute_bucket(shape),
        original_size=Size(width, height) if min(width, height) > 0 else None,
        crop_ltrb=CropBox(*vectors["crop_ltrb"]) if vectors.get("crop_ltrb") else None,
        bytes=size,
        flipped=key.replace("latents", ARRAY_KEYS["flipped"]) in members,
        masked="alpha_mask" in members,
        channels=shape[0],
    )


def _read_vector(member: Member, length: int) -> list[float]:
    """Return the values of a vector of `length` numbers, or an empty list if the member is something else."""
    header = parse_npy_header(member.key, member.head)
    if header.shape != (length,) or header.dtype.kind not in "iuf":
        return []
    if header.bytes + length * header.dtype.itemsize > len(member.head):
        raise BadLatentError(f"not a readable npz file: `{member.key}` is cut short")
    vector = np.frombuffer(member.head, header.dtype, length, header.bytes)
    if not np.isfinite(vector).all():
        raise BadLatentError(f"`{member.key}` is {vector.tolist()}, not {length} finite numbers")
    return vector.tolist()
