"""The fast way through latent files that are laid out alike, which in a cache are nearly all of a bucket.

`np.savez` gives the same bytes around the same arrays, but for checksums and values. A file that was parsed whole
leaves its layout behind. One of the same size and with the same bytes around its arrays needs no parsing: its numbers
are read from the same places, and only the checksums and the values are looked at.
"""

import struct
from dataclasses import dataclass
from functools import partial

import numpy as np
from isal.isal_zlib import crc32

from sdxl_trainer.data.npz import END_SIZE, Member, list_members

KEYS = ("latents", "original_size", "crop_ltrb")
LETTERS = {"<f4": "f", "<f8": "d", "<i4": "i", "<i8": "q"}  # of struct, for numpy's names
CHANGING = slice(10, 18)  # of a local header: time, date, CRC-32
HEAD = slice(18, 189)  # the rest of the first local header and its npy header
CRC = struct.Struct("<L")
CRC_PLACE = 14
MAX_LAYOUTS = 1024


@dataclass(frozen=True)
class Values:
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
    values: tuple[int, int, int]  # where each array's numbers begin
    size: struct.Struct  # of original_size
    crop: struct.Struct  # of crop_ltrb
    fixed: list[tuple[int, int, bytes]]  # (start, end, bytes) of what is the same in all files


_layouts: dict[tuple[int, bytes], _Layout] = {}  # by the file's size and its HEAD


def read_plain(content: memoryview, check_crc: bool) -> Values | None:
    """The values of a file of a known layout, or None: unknown, or something is wrong with it."""
    layout = _layouts.get((len(content), bytes(content[HEAD])))
    if layout is None or any(content[start:end] != same for start, end, same in layout.fixed):
        return None
    for member in layout.members if check_crc else ():
        if crc32(content[member.start : member.end]) != CRC.unpack_from(content, member.header + CRC_PLACE)[0]:
            return None
    latents_at, size_at, crop_at = layout.values
    latents = np.frombuffer(content[latents_at : layout.members[0].end], layout.dtype)
    width, height = layout.size.unpack_from(content, size_at)
    left, top, right, bottom = layout.crop.unpack_from(content, crop_at)
    if not (is_finite(latents) and abs(left) + abs(top) + abs(right) + abs(bottom) < np.inf):
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
    values = {member.key: member.end - arrays[member.key].nbytes for member in members}
    ends = [0, *(member.end for member in members)]
    same = partial(_keep, content)
    fixed = [
        part
        for end, member in zip(ends, members, strict=False)
        for part in (same(end, member.header + CHANGING.start), same(member.header + CHANGING.stop, values[member.key]))
    ]
    fixed += [same(ends[-1], ends[-1] + 4), same(len(content) - END_SIZE, len(content) - END_SIZE + 4)]
    places = (values["latents"], values["original_size"], values["crop_ltrb"])
    size, crop = (struct.Struct(f"<{array.size}{letter}") for array, letter in zip(numbers, letters, strict=True))
    key = (len(content), bytes(content[HEAD]))
    _layouts[key] = _Layout(members, latents.dtype, latents.dtype.name, latents.shape, places, size, crop, fixed)


def is_finite(array: np.ndarray) -> bool:
    """Whether all values are. Their sum of squares tells, unless it overflows, and reads them but once."""
    if array.dtype == np.float32 and array.flags.aligned and array.flags.c_contiguous:
        flat = array.reshape(-1)
        if np.dot(flat, flat) < np.inf:
            return True
    return bool(np.isfinite(array).all())


def _keep(content: memoryview, start: int, end: int) -> tuple[int, int, bytes]:
    return start, end, bytes(content[start:end])
