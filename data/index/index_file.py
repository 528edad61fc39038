"""Index files: Arrow files with a description and checksums at the end, which map into memory.

Arrow checks neither values nor offsets of a file that it maps: damage could end the process or change captions.
"""

import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow as pa
from isal.isal_zlib import crc32
from loguru import logger

from sdxl_trainer.data.files import open_atomic

CHUNK_BYTES = 16 << 20
NUM_THREADS = 4
MARK = b"checked2"
TAIL = struct.Struct("<QI8s")  # bytes of the description, number of chunks, MARK


class DamagedIndexError(ValueError):
    """An index file does not hold what was written."""


class IndexFile:
    """A mapped index file. Its pages are shared with other processes.

    Args:
        descriptor: of the file, if the caller holds it open; else the file is closed once it is mapped.

    Raises:
        DamagedIndexError: the file ends before its checksums.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: Path, descriptor: int | None = None):
        self.path = path
        opened = os.open(path, os.O_RDONLY) if descriptor is None else descriptor
        try:
            if os.fstat(opened).st_size < TAIL.size:
                raise DamagedIndexError("is cut short")
            self._map = mmap.mmap(opened, 0, prot=mmap.PROT_READ)
        finally:
            if descriptor is None:
                os.close(opened)
        content = memoryview(self._map)
        num_bytes, num_chunks, mark = TAIL.unpack(content[-TAIL.size :])
        end = len(content) - TAIL.size - 4 * num_chunks
        if mark != MARK or num_chunks != -(-end // CHUNK_BYTES) or num_bytes > end:
            raise DamagedIndexError("is cut short")
        self._checked_bytes = end
        self._crcs = struct.unpack(f"<{num_chunks}I", content[end : end + 4 * num_chunks])
        self._description = content[end - num_bytes : end]
        self._arrow = content[: end - num_bytes]

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return len(self._map)

    def read_batches(self) -> list[pa.RecordBatch]:
        """Return the rows; their values stay in the file."""
        reader = pa.ipc.open_file(pa.py_buffer(self._arrow))
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]

    def read_description(self) -> dict[str, Any]:
        """Return the description."""
        return orjson.loads(self._description)

    def verify(self) -> None:
        """Verify the checksums.

        Raises:
            DamagedIndexError: the content differs.
        """
        if list(self._crcs) != compute_crcs(self.path, self._checked_bytes):
            raise DamagedIndexError("differs from its checksums")

    def release_pages(self) -> None:
        """Drop the pages read so far. All processes share them, but they count as each process' own memory."""
        self._map.madvise(mmap.MADV_DONTNEED)


def write_index_file(
    path: Path,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    describe: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Write an index file.

    Args:
        describe: returns the description, after the last batch has been written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        _finish(file, orjson.dumps(describe(), option=orjson.OPT_SERIALIZE_NUMPY))


def _finish(file: IO[bytes], description: bytes) -> None:
    """Append the description and the checksums."""
    file.write(description)
    file.flush()
    crcs = compute_crcs(Path(file.name), file.tell())
    file.write(struct.pack(f"<{len(crcs)}I", *crcs) + TAIL.pack(len(description), len(crcs), MARK))


def compute_crcs(path: Path, num_bytes: int) -> list[int]:
    """Return the CRC-32 of each chunk of a file's first bytes."""

    def compute(start: int) -> int:
        return crc32(os.pread(descriptor, min(CHUNK_BYTES, num_bytes - start), start))

    descriptor = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return list(pool.map(compute, range(0, num_bytes, CHUNK_BYTES)))
    finally:
        os.close(descriptor)


def open_undamaged(path: Path) -> IndexFile | None:
    """Open a file and verify its checksums; None if there is none. A damaged file is deleted."""
    try:
        file = IndexFile(path)
        file.verify()
        return file
    except FileNotFoundError:  # also if another process deletes it
        return None
    except (DamagedIndexError, OSError) as error:
        logger.warning("{}: the index is damaged and is built again: {}", path, error)
        path.unlink(missing_ok=True)
        return None
