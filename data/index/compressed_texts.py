"""Texts of rows, compressed a few rows at a time, as a column of an Arrow file.

Of each block of BLOCK_ROWS rows the first row holds all texts of the block, and the others are empty. A row is
therefore read without the rest of the file. The checksum of a block is verified whenever it is read.
"""

import struct
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from isal.isal_zlib import compress, crc32, decompress

from sdxl_trainer.data.index.index_file import DamagedIndexError

# 32 records of 370 bytes take 92 bytes each and 19 µs to read, 64 take 89 and 27. zstd takes 85, and twice the time.
BLOCK_ROWS = 32
LEVEL = 1
RAW_DEFLATE = -15  # without zlib's own checksum
HEAD = struct.Struct("<II")  # CRC-32 of the rest of the block, bytes before compression


def compress_texts(texts: Sequence[bytes]) -> pa.Array:
    """Return texts as a column."""
    blocks = [b""] * len(texts)
    for start in range(0, len(texts), BLOCK_ROWS):
        block = texts[start : start + BLOCK_ROWS]
        raw = struct.pack(f"<{len(block)}I", *map(len, block)) + b"".join(block)
        content = struct.pack("<I", len(raw)) + compress(raw, LEVEL, RAW_DEFLATE)
        blocks[start] = struct.pack("<I", crc32(content)) + content
    return pa.array(blocks, pa.binary())


def read_text(column: pa.Array, row: int) -> bytes:
    """Return the text of a row.

    Raises:
        DamagedIndexError: the block differs from its checksum.
    """
    place = row % BLOCK_ROWS
    raw, start = _decompress(column, row - place)
    lengths = struct.unpack_from(f"<{place + 1}I", raw)
    start += sum(lengths[:-1])
    return raw[start : start + lengths[-1]]


def read_block(column: pa.Array, first: int) -> list[bytes]:
    """Return the texts of the block that begins at row `first`.

    Raises:
        DamagedIndexError: the block differs from its checksum.
    """
    raw, start = _decompress(column, first)
    lengths = np.frombuffer(raw, np.uint32, start // 4)
    ends = (start + np.cumsum(lengths)).tolist()
    return [raw[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]


def _decompress(column: pa.Array, first: int) -> tuple[bytes, int]:
    """Return a block, which begins with the lengths of its texts, and the place of the first text."""
    block, num_rows = memoryview(column[first].as_buffer()), min(BLOCK_ROWS, len(column) - first)
    crc, num_bytes = HEAD.unpack_from(block) if len(block) >= HEAD.size else (0, 0)
    if len(block) < HEAD.size or crc32(block[4:]) != crc:
        raise DamagedIndexError("the index is damaged: a block of records differs from its checksum")
    return decompress(block[HEAD.size :], RAW_DEFLATE, num_bytes), 4 * num_rows
