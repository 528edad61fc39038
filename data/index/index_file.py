"""Index files: Arrow files with a description and checksums at the end, which map into memory.

Arrow checks neither values nor offsets of a file that it maps: damage could end the process or change captions. Reading
a large index takes minutes, so that a part is read whole only if it was written to since its last check: a finished
file holds its own modification time, which every write changes. Each start checks a further share of the parts.
"""

import mmap
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow as pa
from isal.isal_zlib import crc32
from loguru import logger

from sdxl_trainer.data.files import open_atomic

CHUNK_BYTES = 16 << 20
NUM_THREADS = 4
ROWS_PER_GROUP = 1 << 17  # a process keeps 40 KB for each group of rows
GROUP_BYTES = 128 << 20  # Arrow's texts of one group take less than 2 GiB
CHECKED_BYTES = 512 << 20  # of unchanged parts that a start checks
MARK = b"checked3"
TAIL = struct.Struct("<QIq8s")  # bytes of the description, number of chunks, modification time (ns), MARK
NS = 1_000_000_000


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
            status = os.fstat(opened)
            if status.st_size < TAIL.size:
                raise DamagedIndexError("is cut short")
            self._map = mmap.mmap(opened, 0, prot=mmap.PROT_READ)
        finally:
            if descriptor is None:
                os.close(opened)
        content = memoryview(self._map)
        num_bytes, num_chunks, self._finished_ns, mark = TAIL.unpack(content[-TAIL.size :])
        end = len(content) - TAIL.size - 4 * num_chunks
        if mark != MARK or num_chunks != -(-end // CHUNK_BYTES) or num_bytes > end:
            raise DamagedIndexError("is cut short")
        self.is_unchanged = status.st_mtime_ns == self._finished_ns  # since it was finished, or last verified
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

    def mark_unchanged(self) -> None:
        """Note in the modification time that the content was verified."""
        with suppress(OSError):  # another user's index
            os.utime(self.path, ns=(self._finished_ns, self._finished_ns))

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
    """Append the description, the checksums and the modification time, and set the latter."""
    file.write(description)
    file.flush()
    crcs = compute_crcs(Path(file.name), file.tell())
    finished_ns = int(time.time()) * NS  # file systems may keep whole seconds
    file.write(struct.pack(f"<{len(crcs)}I", *crcs) + TAIL.pack(len(description), len(crcs), finished_ns, MARK))
    file.flush()
    os.fsync(file.fileno())  # a later write to disk would change the time
    os.utime(file.fileno(), ns=(finished_ns, finished_ns))


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


def regroup(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the rows in batches of about ROWS_PER_GROUP or GROUP_BYTES, as a file of many small ones opens slowly."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= ROWS_PER_GROUP or sum(each.nbytes for each in waiting) >= GROUP_BYTES:
            yield waiting[0] if len(waiting) == 1 else pa.concat_batches(waiting)
            waiting = []
    if waiting:
        yield pa.concat_batches(waiting)


def open_undamaged(path: Path, is_part: bool = False) -> IndexFile | None:
    """Open a file and verify its checksums; None if there is none. A damaged file is deleted.

    Args:
        is_part: verify the checksums only if the file was written to since they were last verified. The modification
            time of other files is that of their last use.
    """
    try:
        file = IndexFile(path)
        if not (is_part and file.is_unchanged):
            file.verify()
            if is_part:
                file.mark_unchanged()
        return file
    except FileNotFoundError:  # also if another process deletes it
        return None
    except (DamagedIndexError, OSError) as error:
        logger.warning("{}: the index is damaged and is built again: {}", path, error)
        path.unlink(missing_ok=True)
        return None


def are_undamaged(paths: Sequence[Path]) -> bool:
    """Return whether the parts of an index exist and are whole. Damaged files are deleted.

    Of parts that were not written to, CHECKED_BYTES are verified, from another part on at each start.
    """
    files = [open_undamaged(path, is_part=True) for path in paths]
    start, num_bytes = secrets.randbelow(len(files) + 1), 0
    for at in [*range(start, len(files)), *range(start)]:
        file = files[at]
        if file is not None and file.is_unchanged and num_bytes + file.num_bytes <= CHECKED_BYTES:
            num_bytes += file.num_bytes
            files[at] = open_undamaged(file.path)
    return None not in files
