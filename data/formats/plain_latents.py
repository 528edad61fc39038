"""The fast way through latent files that are laid out alike, which in a cache are nearly all of a bucket.

`np.savez` gives the same bytes around the same arrays, but for checksums and values. A file that was parsed whole
leaves its layout behind. One of the same size and with the same bytes around its arrays needs no parsing: its numbers
are read from the same places, and only the checksums and the values are looked at.
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from sdxl_trainer.data.formats.npz import END_SIZE, list_members

KEYS = ("latents", "original_size", "crop_ltrb")
LETTERS = {"<f4": "f", "<f8": "d", "<i4": "i", "<i8": "q"}  # of struct, for numpy's names
CHANGING = slice(10, 18)  # of a local header: time, date, CRC-32
HEAD = slice(18, 189)  # the rest of the first local header and its npy header
CRC_PLACE = 14
MAX_LAYOUTS = 1024

Bytes = bytes | bytearray | memoryview
Fill = Callable[[Sequence[Any]], int]


class Values(NamedTuple):
    """What a plain latent file holds."""

    latents: np.ndarray  # [4, h, w] floats, finite
    original_size: tuple[int, int]
    crop_ltrb: tuple[float, float, float, float]
    dtype: str


@dataclass(frozen=True)
class _Part:
    """The bytes before the latents' values, or those behind them, with what is the same in all files of a layout."""

    frame: struct.Struct
    framed: tuple[bytes, ...]
    numbers: struct.Struct


@dataclass(frozen=True)
class _Layout:
    dtype: np.dtype  # of the latents
    dtype_name: str
    shape: tuple[int, ...]
    start: int  # of the latents' values
    end: int
    crc_start: int  # of what the latents' CRC-32 is of
    others: tuple[tuple[int, int], ...]  # from where to where behind the latents the other arrays lie
    head: _Part  # its number: CRC-32
    tail: _Part  # CRC-32, original_size, CRC-32, crop_ltrb


_layouts: dict[tuple[int, bytes], _Layout] = {}  # by the file's size and its HEAD
_latest: dict[tuple[int, tuple[int, ...]], _Layout] = {}  # of float32, by the file's size and the latents' shape


def read_plain(content: memoryview, check_crc: bool) -> Values | None:
    """The values of a file of a known layout, or None: unknown, or something is wrong with it."""
    layout = _layouts.get((len(content), bytes(content[HEAD])))
    if layout is None:
        return None
    latents = np.frombuffer(content[layout.start : layout.end], layout.dtype)
    return _read_parts(layout, content[: layout.start], latents, content[layout.end :], check_crc)


def fill_plain(fill: Fill, size: int, out: np.ndarray) -> Values | None:
    """Read a file, its latents' values straight into `out`, if it is laid out as one of its size before.

    Args:
        fill: fills buffers with the file's bytes, one after the other, and returns how many there were.
        size: of the file, in bytes.
        out: [4, h, w] float32; what is in it afterwards only counts if the values are returned.

    Returns:
        None: no such layout is known, or something is wrong with the file.
    """
    layout = _latest.get((size, out.shape))
    if layout is None:
        return None
    head, tail = bytearray(layout.start), bytearray(size - layout.end)
    if fill((head, out, tail)) != size:
        return None
    return _read_parts(layout, head, out.reshape(-1), tail, True)


def _read_parts(layout: _Layout, head: Bytes, latents: np.ndarray, tail: Bytes, check_crc: bool) -> Values | None:
    for part, content in ((layout.head, head), (layout.tail, tail)):
        if part.frame.unpack_from(content) != part.framed:
            return None
    (crc,) = layout.head.numbers.unpack_from(head)
    size_crc, width, height, crop_crc, left, top, right, bottom = layout.tail.numbers.unpack_from(tail)
    if check_crc:
        if crc32(latents, crc32(memoryview(head)[layout.crc_start :])) != crc:
            return None
        view = memoryview(tail)
        for (start, end), expected in zip(layout.others, (size_crc, crop_crc), strict=True):
            if crc32(view[start:end]) != expected:
                return None
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
    crcs = [(header + CRC_PLACE, "L") for header in headers]
    # All but times, checksums and values, as far as the directory's signature; and the last record's signature.
    ends = [0, *(member.end for member in members)]
    spans = [
        span
        for end, header, start in zip(ends[:-1], headers, starts, strict=True)
        for span in ((end, header + CHANGING.start), (header + CHANGING.stop, start))
    ]
    spans += [(ends[-1], ends[-1] + 4), (len(content) - END_SIZE, len(content) - END_SIZE + 4)]
    start, end = starts[0], members[0].end
    layout = _Layout(
        latents.dtype,
        latents.dtype.name,
        latents.shape,
        start,
        end,
        members[0].start,
        tuple((member.start - end, member.end - end) for member in members[1:]),
        _build_part(content, 0, [span for span in spans if span[1] <= start], crcs[:1]),
        _build_part(content, end, [span for span in spans if span[0] >= end], sorted([*crcs[1:], *values])),
    )
    _layouts[len(content), bytes(content[HEAD])] = layout
    if latents.dtype == np.float32:
        _latest[len(content), latents.shape] = layout


def _build_part(content: memoryview, start: int, spans: list[tuple[int, int]], numbers: list[tuple[int, str]]) -> _Part:
    """The part from `start` on."""
    frame = _build_struct([(begin - start, f"{end - begin}s") for begin, end in spans])
    shifted = [(place - start, field) for place, field in numbers]
    return _Part(frame, frame.unpack_from(content[start:]), _build_struct(shifted))


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
