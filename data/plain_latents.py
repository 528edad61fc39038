"""The fast way through latent files that are laid out alike, which in a cache are nearly all of a bucket.

`np.savez` gives the same bytes around the same arrays, but for checksums and values. A file that was parsed whole
leaves its layout behind. One of the same size and with the same bytes around its arrays needs no parsing: its numbers
are read from the same places, and only the checksums and the values are looked at.
"""

import math
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from sdxl_trainer.data.npz import END_SIZE, Member, list_members

KEYS = ("latents", "original_size", "crop_ltrb")
LETTERS = {"<f4": "f", "<f8": "d", "<i4": "i", "<i8": "q"}  # of struct, for numpy's names
CHANGING = slice(10, 18)  # of a local header: time, date, CRC-32
HEAD = slice(18, 189)  # the rest of the first local header and its npy header
CRC_PLACE = 14
MAX_LAYOUTS = 1024


class Values(NamedTuple):
    """What a plain latent file holds."""

    latents: np.ndarray  # [4, h, w] floats, finite
    original_size: tuple[int, int]
    crop_ltrb: tuple[float, float, float, float]
    dtype: str


@dataclass(frozen=True)
class _Layout:
    members: list[Member]
    dtype: np.dtype  # of the latents
    dtype_name: str
    shape: tuple[int, ...]
    count: int
    start: int  # of the latents' values
    numbers: struct.Struct  # in the file's order: CRC-32, CRC-32, original_size, CRC-32, crop_ltrb
    frame: struct.Struct  # what is the same in all files
    framed: tuple[bytes, ...]


_layouts: dict[tuple[int, bytes], _Layout] = {}  # by the file's size and its HEAD


def read_plain(content: memoryview, check_crc: bool) -> Values | None:
    """The values of a file of a known layout, or None: unknown, or something is wrong with it."""
    layout = _layouts.get((len(content), bytes(content[HEAD])))
    if layout is None or layout.frame.unpack_from(content) != layout.framed:
        return None
    crc, size_crc, width, height, crop_crc, left, top, right, bottom = layout.numbers.unpack_from(content)
    for member, expected in zip(layout.members, (crc, size_crc, crop_crc), strict=True) if check_crc else ():
        if crc32(content[member.start : member.end]) != expected:
            return None
    latents = np.frombuffer(content, layout.dtype, layout.count, layout.start)
    if not (is_finite(latents) and abs(left) + abs(top) + abs(right) + abs(bottom) < math.inf):
        return None
    crop_ltrb = (float(left), float(top), float(right), float(bottom))
    return Values(latents.reshape(layout.shape), (width, height), crop_ltrb, layout.dtype_name)


def learn_layout(content: memoryview, arrays: dict[str, np.ndarray]) -> None:
    """Keep the layout of a file that has been found good, if it holds just what `read_plain` knows, in C order."""
    members = list_members(content)
    if members is None or tuple(arrays) != KEYS or len(_layouts) >= MAX_LAYOUTS:
        return
    latents, *numbers = arrays.values()
    letters = [LETTERS.get(array.dtype.str) for array in numbers]
    if not latents.flags.c_contiguous or latents.dtype.str[0] != "<" or None in letters:
        return
    starts = [member.end - arrays[member.key].nbytes for member in members]
    headers = [member.header for member in members]
    sizes = [f"{array.size}{letter}" for array, letter in zip(numbers, letters, strict=True)]
    values = list(zip(starts[1:], sizes, strict=True))
    numbers_at = sorted([*((header + CRC_PLACE, "L") for header in headers), *values])
    # All but times, checksums and values, as far as the directory's signature; and the last record's signature.
    ends = [0, *(member.end for member in members)]
    spans = [span for end, header, start in zip(ends[:-1], headers, starts, strict=True)
             for span in ((end, header + CHANGING.start), (header + CHANGING.stop, start))]  # fmt: skip
    spans += [(ends[-1], ends[-1] + 4), (len(content) - END_SIZE, len(content) - END_SIZE + 4)]
    frame = _build_struct([(start, f"{end - start}s") for start, end in spans])
    key = (len(content), bytes(content[HEAD]))
    _layouts[key] = _Layout(
        members, latents.dtype, latents.dtype.name, latents.shape, latents.size, starts[0],
        _build_struct(numbers_at), frame, frame.unpack_from(content),
    )  # fmt: skip


def _build_struct(fields: list[tuple[int, str]]) -> struct.Struct:
    """Fields at places in the file, in its order, without what lies between."""
    form, place = "<", 0
    for start, field in fields:
        form += f"{start - place}x{field}"
        place = start + struct.calcsize(f"<{field}")
    return struct.Struct(form)


def is_finite(array: np.ndarray) -> bool:
    """Whether all values are. Their sum of squares tells, unless it overflows, and reads them but once."""
    if array.dtype == np.float32 and array.flags.aligned and array.flags.c_contiguous:
        flat = array.reshape(-1)
        if np.dot(flat, flat) < np.inf:
            return True
    return bool(np.isfinite(array).all())
