"""The arrays of an npz file whose members are stored uncompressed, without unpacking: views of the bytes themselves.

`np.savez` writes such files. Reading them through zipfile costs most of a loader's time, so the local headers (APPNOTE
4.3.7) are read directly. Whatever is out of the ordinary is left to numpy (`load_arrays`).
"""

import ast
import io
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from isal.isal_zlib import crc32  # thirty times as fast as zlib's

from sdxl_trainer.data.files import SeekableBytes

LOCAL_HEADER = struct.Struct("<4s5H3L2H")
SIGNATURE, DATA_DESCRIPTOR, STORED, ZIP64 = b"PK\x03\x04", 0x08, 0, 0x0001
DIRECTORY, END_SIGNATURE, END_SIZE = b"PK\x01\x02", b"PK\x05\x06", 22
NPY_MAGIC = b"\x93NUMPY"
READ_ERRORS = (KeyError, OSError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)


class NpzError(ValueError):
    """No readable npz file, or one that is not read because it is not safe; the message is the reason."""


def load_arrays(content: bytes | memoryview, limits: dict[str, int], check_crc: bool = True) -> dict[str, np.ndarray]:
    """The arrays named in `limits` (key → most bytes it may unpack to), as far as the file has them.

    Stored members come as read-only views of `content`, compressed ones are unpacked. Pickles are refused. A key that
    is not asked for is named with an empty array, so that a caller can tell what the file holds instead.

    Args:
        check_crc: False skips the members' CRC-32, where a better checksum has been checked already.

    Raises:
        NpzError: torn, no npz, pickled, or claiming more than it holds or may hold.
    """
    arrays = _load_stored(memoryview(content), limits, check_crc)
    return arrays if arrays is not None else _load_any(bytes(content), limits)


class SpanReader(SeekableBytes):
    """Bytes [offset, offset + size) of an open file, as a file: lets zipfile read an archive that lies in a shard."""

    def __init__(self, descriptor: int, offset: int, size: int):
        super().__init__(size)
        self._descriptor, self._offset = descriptor, offset

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._bytes - self._place)
        content = os.pread(self._descriptor, left if size < 0 else min(size, left), self._offset + self._place)
        self._place += len(content)
        return content


def load_member(archive: zipfile.ZipFile, key: str, limit: int) -> np.ndarray:
    """One array of an open npz file; `limit` is the most bytes it may unpack to.

    Raises:
        NpzError: torn, pickled, or claiming more than it holds or may hold.
    """
    try:
        member = archive.getinfo(f"{key}.npy")
        if member.file_size > limit:
            raise NpzError(f"`{key}` claims to unpack to {member.file_size} bytes (a bomb?)")
        return _view_npy(memoryview(archive.read(member)), key)
    except READ_ERRORS as error:
        raise NpzError(f"not a readable npz file: {error}") from None


@dataclass(frozen=True, slots=True)
class Member:
    """Where a stored member of a zip lies: its local header, and its bytes [start, end)."""

    key: str
    header: int
    start: int
    end: int
    crc: int


def list_members(content: memoryview) -> list[Member] | None:
    """The members of a file whose npy arrays are all stored, from its local headers; None if it is not of that form."""
    members: list[Member] = []
    place = 0
    while content[place : place + 4] == SIGNATURE:
        if place + LOCAL_HEADER.size > len(content):
            return None
        fields = LOCAL_HEADER.unpack_from(content, place)
        flags, method, size, name_length, extra_length = fields[2], fields[3], fields[8], fields[9], fields[10]
        name_start = place + LOCAL_HEADER.size
        data_start = name_start + name_length + extra_length
        if flags & DATA_DESCRIPTOR or method != STORED:
            return None
        if size == 0xFFFFFFFF:
            size = _read_zip64_size(content[name_start + name_length : data_start])
        name = bytes(content[name_start : name_start + name_length])
        if size is None or data_start + size > len(content) or not name.endswith(b".npy"):
            return None
        members.append(Member(name[:-4].decode("utf-8", "replace"), place, data_start, data_start + size, fields[6]))
        place = data_start + size
    # The central directory must follow and be whole, or the file was cut.
    whole = content[place : place + 4] == DIRECTORY and content[-END_SIZE : 4 - END_SIZE] == END_SIGNATURE
    return members if members and whole else None


def _load_stored(content: memoryview, limits: dict[str, int], check_crc: bool) -> dict[str, np.ndarray] | None:
    """The fast way, or None if the file is not of the plain form."""
    arrays: dict[str, np.ndarray] = {}
    for member in list_members(content) or ():
        key, data = member.key, content[member.start : member.end]
        if key not in limits:
            return None  # perhaps a damaged name; zipfile compares it with the one in the directory
        if len(data) > limits[key]:
            raise NpzError(f"`{key}` holds {len(data)} bytes (a bomb?)")
        if check_crc and crc32(data) != member.crc:
            raise NpzError(f"not a readable npz file: `{key}` has another CRC-32 than it should have")
        arrays[key] = _view_npy(data, key)
    return arrays or None


def _read_zip64_size(extra: memoryview) -> int | None:
    if len(extra) >= 12 and struct.unpack_from("<H", extra)[0] == ZIP64:
        return struct.unpack_from("<Q", extra, 4)[0]
    return None


def _view_npy(data: memoryview, key: str) -> np.ndarray:
    start = 10 + struct.unpack_from("<H", data, 8)[0] if len(data) >= 10 else 0
    if bytes(data[:6]) != NPY_MAGIC or data[6] != 1 or start > len(data):
        raise NpzError(f"`{key}` is no npy array of version 1")
    dtype, shape, fortran = _parse_header(bytes(data[10:start]))
    if dtype.hasobject:
        raise NpzError(f"`{key}` is pickled, which is not read because it may run code")
    count = int(np.prod(shape, dtype=object))
    if count * dtype.itemsize != len(data) - start:
        raise NpzError(f"`{key}` claims {dtype}{list(shape)} but holds {len(data) - start} bytes")
    array = np.frombuffer(data, dtype, count, start)
    return array.reshape(shape, order="F" if fortran else "C")


@lru_cache(maxsize=1024)
def _parse_header(header: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    """(dtype, shape, Fortran order) of an npy header. All files of one bucket share it."""
    try:
        fields = ast.literal_eval(header.decode("latin1").strip())
        shape = tuple(int(side) for side in fields["shape"])
        if any(side < 0 for side in shape):
            raise ValueError("negative side")
        return np.dtype(fields["descr"]), shape, bool(fields["fortran_order"])
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError) as error:
        raise NpzError(f"unreadable npy header: {error}") from None


def _load_any(content: bytes, limits: dict[str, int]) -> dict[str, np.ndarray]:
    """The slow way, for compressed members and whatever else zipfile understands."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            keys = [member.filename.removesuffix(".npy") for member in archive.infolist()]
            return {key: load_member(archive, key, limits[key]) if key in limits else np.empty(0) for key in keys}
    except NpzError:
        raise
    except (ValueError, *READ_ERRORS) as error:
        raise NpzError(f"not a readable npz file: {error}") from None
