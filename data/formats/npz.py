"""npz files: a zip of npy arrays, which `np.savez` stores uncompressed.

Reading them through zipfile takes most of a loader's time. `list_members` therefore parses the zip's local headers
(APPNOTE 4.3.7) itself, and arrays are views of the file's bytes. Only files of another form are read through zipfile.
"""

import ast
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from isal.isal_zlib import crc32  # thirty times as fast as zlib's

from sdxl_trainer.data.files import SeekableBytes

LOCAL_HEADER = struct.Struct("<4s5H3L2H")
SIGNATURE, DATA_DESCRIPTOR, STORED, ZIP64 = b"PK\x03\x04", 0x08, 0, 0x0001
ZIP64_SIZE = struct.Struct("<HHQ")  # tag, length, size
DIRECTORY, END_SIGNATURE, END_SIZE = b"PK\x01\x02", b"PK\x05\x06", 22
HEAD_BYTES = 1024  # holds a local header, an npy header, and the values of a short vector
MAX_MEMBERS = 1024
NPY_MAGIC = b"\x93NUMPY\x01"
# zipfile raises all of these on damaged bytes.
READ_ERRORS = (KeyError, OSError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)

Bytes = bytes | memoryview
ReadBytes = Callable[[int, int], Bytes]  # (offset, count) → bytes, fewer at the end of the file


class NpzError(ValueError):
    """An npz file that is unreadable or unsafe to read; the message is the reason."""


class Member(NamedTuple):
    """A member of a zip that is stored uncompressed."""

    key: str  # its name without `.npy`
    crc: int
    start: int  # of its content, in bytes from the start of the file
    end: int
    head: Bytes  # the first bytes of its content, at most HEAD_BYTES


class NpyHeader(NamedTuple):
    """The header of an npy array."""

    dtype: np.dtype
    shape: tuple[int, ...]
    is_fortran: bool
    bytes: int  # length of the header; the values follow


def load_arrays(content: bytes | memoryview, limits: dict[str, int], check_crc: bool = True) -> dict[str, np.ndarray]:
    """Return the arrays named in `limits` that the file has.

    Arrays of stored members are read-only views of `content`; compressed ones are unpacked. Pickles are refused. Keys
    that are not in `limits` get an empty array, so that a caller can report what the file holds instead.

    Args:
        limits: key → maximum number of bytes that the array may unpack to.
        check_crc: False skips the members' CRC-32, for callers that have checked a better checksum.

    Raises:
        NpzError: the file is torn, not an npz or pickled, or claims more bytes than it holds or may hold.
    """
    arrays = _load_stored(memoryview(content), limits, check_crc)
    return arrays if arrays is not None else _load_with_zipfile(bytes(content), limits)


class SpanReader(SeekableBytes):
    """File object over bytes [offset, offset + size) of an open file, for zipfile to read an archive within a shard.

    `disk_error` is the last error of the disk, which zipfile reports as damage of the archive.
    """

    def __init__(self, descriptor: int, offset: int, size: int):
        super().__init__(size)
        self._descriptor, self._offset = descriptor, offset
        self.disk_error: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._bytes - self._place)
        try:
            content = os.pread(self._descriptor, left if size < 0 else min(size, left), self._offset + self._place)
        except OSError as error:
            self.disk_error = error
            raise
        self._place += len(content)
        return content


def load_member(archive: zipfile.ZipFile, key: str, limit: int) -> np.ndarray:
    """Read one array of an open npz file.

    Args:
        limit: maximum number of bytes that the array may unpack to.

    Raises:
        NpzError: the array is torn or pickled, or claims more bytes than it holds or may hold.
    """
    try:
        member = archive.getinfo(f"{key}.npy")
        if member.file_size > limit:
            raise NpzError(f"`{key}` claims to unpack to {member.file_size} bytes (a decompression bomb?)")
        return _view_npy(memoryview(archive.read(member)), key)
    except READ_ERRORS as error:
        raise NpzError(f"not a readable npz file: {error}") from None


def list_members(read: ReadBytes, start: int, end: int) -> list[Member] | None:
    """Return the members of the zip in bytes [start, end), from its local headers alone.

    Returns:
        None for a zip of another form: compressed or streamed members, or members that are not npy arrays.

    Raises:
        NpzError: the bytes are not a zip, or are cut short.
    """
    members: list[Member] = []
    for _ in range(MAX_MEMBERS):
        head = read(start, min(HEAD_BYTES, end - start)) if start < end else b""  # a claimed size may be 2^64
        if head[:4] == DIRECTORY and members:
            return members
        if head[:4] != SIGNATURE or len(head) < LOCAL_HEADER.size:
            raise NpzError("not a readable npz file: cut short, or not a zip")
        member = _parse_local_header(head, start)
        if member is None:
            return None
        members.append(member)
        start = member.end
    return None


def parse_npy_header(key: str, head: Bytes) -> NpyHeader:
    """Parse the header of an npy array from its first bytes.

    Raises:
        NpzError: the bytes are not an npy array of version 1.
    """
    size = 10 + int.from_bytes(head[8:10], "little")
    if head[:7] != NPY_MAGIC or size > len(head):
        raise NpzError(f"`{key}` is not an npy array of version 1")
    return _parse_npy_fields(bytes(head[10:size]))


def verify_num_bytes(key: str, header: NpyHeader, num_bytes: int) -> None:
    """Verify that an npy array of `num_bytes`, header included, holds the values that its header claims.

    Raises:
        NpzError: the array holds more or fewer bytes.
    """
    value_bytes = num_bytes - header.bytes
    if math.prod(header.shape) * header.dtype.itemsize != value_bytes:
        raise NpzError(f"`{key}` claims {header.dtype}{list(header.shape)} but holds {value_bytes} bytes")


def _parse_local_header(head: Bytes, offset: int) -> Member | None:
    fields = LOCAL_HEADER.unpack_from(head)
    flags, method, crc, size, name_bytes, extra_bytes = fields[2], fields[3], fields[6], *fields[8:11]
    extra = LOCAL_HEADER.size + name_bytes
    start = extra + extra_bytes
    name = bytes(head[LOCAL_HEADER.size : extra])
    if flags & DATA_DESCRIPTOR or method != STORED or start > len(head) or not name.endswith(b".npy"):
        return None
    if size == 0xFFFFFFFF:
        if extra_bytes < ZIP64_SIZE.size:
            return None
        tag, _, size = ZIP64_SIZE.unpack_from(head, extra)
        if tag != ZIP64:
            return None
    key = name[:-4].decode("utf-8", "replace")
    return Member(key=key, crc=crc, start=offset + start, end=offset + start + size, head=head[start:])


def _load_stored(content: memoryview, limits: dict[str, int], check_crc: bool) -> dict[str, np.ndarray] | None:
    """Return views of the arrays, or None for a file of another form than `np.savez` writes."""
    try:
        members = list_members(lambda offset, count: content[offset : offset + count], 0, len(content))
    except NpzError:
        members = None  # zipfile may still read the file, or reports the damage more exactly
    # A file that was cut within its central directory is torn, too.
    if members is None or content[-END_SIZE : 4 - END_SIZE] != END_SIGNATURE:
        return None
    arrays: dict[str, np.ndarray] = {}
    for key, crc, start, end, _ in members:
        data = content[start:end]
        if key not in limits:
            return None  # perhaps a damaged name; zipfile compares it with the one in the directory
        if len(data) > limits[key]:
            raise NpzError(f"`{key}` holds {len(data)} bytes (a decompression bomb?)")
        if check_crc and crc32(data) != crc:
            raise NpzError(f"not a readable npz file: the CRC-32 of `{key}` does not match")
        arrays[key] = _view_npy(data, key)
    return arrays


def _view_npy(data: memoryview, key: str) -> np.ndarray:
    """Return an npy array as a view of its bytes.

    Raises:
        NpzError: the array is not of version 1 or is pickled, or its header claims what numpy cannot build.
    """
    header = parse_npy_header(key, data)
    if header.dtype.hasobject:
        raise NpzError(f"`{key}` is pickled; pickles are refused because they may run code")
    verify_num_bytes(key, header, len(data))
    try:
        array = np.frombuffer(data, header.dtype, math.prod(header.shape), header.bytes)
        return array.reshape(header.shape, order="F" if header.is_fortran else "C")
    except (ValueError, OverflowError) as error:  # an item of no bytes, too many sides, or a side that is too long
        raise NpzError(f"`{key}` claims {header.dtype}{list(header.shape)}: {error}") from None


@lru_cache(maxsize=1024)
def _parse_npy_fields(fields_text: bytes) -> NpyHeader:
    """Parse the fields of an npy header. Files of one bucket have the same fields, so results are cached."""
    try:
        fields = ast.literal_eval(fields_text.decode("latin1").strip())
        shape = tuple(int(side) for side in fields["shape"])
        if any(side < 0 for side in shape):
            raise ValueError("negative side")
        return NpyHeader(np.dtype(fields["descr"]), shape, bool(fields["fortran_order"]), 10 + len(fields_text))
    except (ValueError, TypeError, KeyError, SyntaxError, OverflowError, RecursionError, MemoryError) as error:
        raise NpzError(f"unreadable npy header: {error}") from None


def _load_with_zipfile(content: bytes, limits: dict[str, int]) -> dict[str, np.ndarray]:
    """Load the arrays through zipfile, which reads compressed members and other forms."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            keys = [member.filename.removesuffix(".npy") for member in archive.infolist()]
            return {key: load_member(archive, key, limits[key]) if key in limits else np.empty(0) for key in keys}
    except NpzError:
        raise
    except (ValueError, *READ_ERRORS) as error:
        raise NpzError(f"not a readable npz file: {error}") from None
