"""Lines appended to a growing file. Each poll reads only what is new."""

import os
from pathlib import Path

from sdxl_trainer.data.files import open_regular

MARK_BYTES = 64  # before the place of reading; they reveal that the file was cut and has grown again


class FileTail:
    """Whole lines that are appended to a file, which may be cut, replaced or deleted at any time.

    A line that no line break ends yet is left for a later call. A line longer than a call's limit is skipped.

    Attributes:
        generation: number of times that the file was begun anew, because it was cut or replaced.
        share: part of the file that has been read, 0 to 1; 1 also if only a line without its end is left.
    """

    def __init__(self, path: Path):
        self._path = path
        self.generation, self.share = 0, 1.0
        self._offset, self._mark, self._is_in_long_line = 0, b"", False
        self._file: tuple[int, int] | None = None  # device and inode
        self._seen: tuple[int, ...] = ()

    def read(self, max_bytes: int) -> bytes:
        """Return the next whole lines, at most `max_bytes`; b"" if there are none now."""
        try:
            status = os.stat(self._path)
            seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if seen == self._seen and self._offset == status.st_size:
                return b""
            descriptor = open_regular(self._path)
        except OSError:
            self._begin_anew(None)
            return b""
        try:
            self._seen = seen
            return self._read_lines(descriptor, max_bytes)
        except OSError:  # of the storage; the next call tries again
            return b""
        finally:
            os.close(descriptor)

    def _read_lines(self, descriptor: int, max_bytes: int) -> bytes:
        status = os.fstat(descriptor)
        file, size = (status.st_dev, status.st_ino), status.st_size
        mark = os.pread(descriptor, len(self._mark), self._offset - len(self._mark))
        if file != self._file or size < self._offset or mark != self._mark:
            self._begin_anew(file)
        block = os.pread(descriptor, max_bytes, self._offset)
        end = block.rfind(b"\n") + 1
        if not end and len(block) == max_bytes:
            end, self._is_in_long_line = max_bytes, True
            self._advance(block, max_bytes, size)
            return b""
        self._advance(block, end, size)
        lines = block[:end]
        if self._is_in_long_line and lines:
            lines, self._is_in_long_line = lines[lines.index(b"\n") + 1 :], False
        return lines

    def _advance(self, block: bytes, num_bytes: int, size: int) -> None:
        """Move on by the first bytes of a block. A block with the end of the file leaves nothing to read."""
        self._offset += num_bytes
        self._mark = (self._mark + block[:num_bytes])[-MARK_BYTES:]
        is_last = self._offset - num_bytes + len(block) >= size
        self.share = 1.0 if is_last else self._offset / size

    def _begin_anew(self, file: tuple[int, int] | None) -> None:
        if self._offset:
            self.generation += 1
        self._offset, self._mark, self._is_in_long_line, self._file = 0, b"", False, file
        self._seen, self.share = (), 1.0
