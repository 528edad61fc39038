"""Checksums at the end of an index file: CRC-32 of each chunk, their number, and a mark.

Arrow checks neither values nor offsets of a file that it maps: damage could end the process or change captions.
"""

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from isal.isal_zlib import crc32

CHUNK_BYTES = 16 << 20
NUM_THREADS = 4
MARK = b"checked1"
TAIL = struct.Struct("<I8s")  # number of chunks, MARK


class DamagedIndexError(ValueError):
    """An index file does not hold what was written."""


def append_checksums(file: IO[bytes]) -> None:
    """Append the checksums of a file's content to the file, which is open for writing."""
    file.flush()
    crcs = _compute_crcs(Path(file.name), file.tell())
    file.write(struct.pack(f"<{len(crcs)}I", *crcs) + TAIL.pack(len(crcs), MARK))


def verify_checksums(path: Path) -> None:
    """Verify a file that `append_checksums` completed.

    Raises:
        DamagedIndexError: the content differs, or the file ends before its checksums.
        OSError: the file cannot be read.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - TAIL.size))
        tail = file.read()
        num_chunks, mark = TAIL.unpack(tail) if len(tail) == TAIL.size else (0, b"")
        content_bytes = size - TAIL.size - 4 * num_chunks
        if mark != MARK or num_chunks != -(-content_bytes // CHUNK_BYTES):
            raise DamagedIndexError("is cut short")
        file.seek(content_bytes)
        crcs = struct.unpack(f"<{num_chunks}I", file.read(4 * num_chunks))
    if list(crcs) != _compute_crcs(path, content_bytes):
        raise DamagedIndexError("differs from its checksums")


def count_content_bytes(content: memoryview) -> int:
    """Return the length of a whole file's content without the checksums."""
    num_chunks, _ = TAIL.unpack(content[-TAIL.size :])
    return len(content) - TAIL.size - 4 * num_chunks


def _compute_crcs(path: Path, content_bytes: int) -> list[int]:
    def compute(start: int) -> int:
        return crc32(os.pread(descriptor, min(CHUNK_BYTES, content_bytes - start), start))

    descriptor = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return list(pool.map(compute, range(0, content_bytes, CHUNK_BYTES)))
    finally:
        os.close(descriptor)
