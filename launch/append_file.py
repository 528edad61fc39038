"""Append-only files that neither a full disk nor a deletion takes from a running job, and counts of losses."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from loguru import logger

from sdxl_trainer.configs.problems import format_count

COPY_BYTES = 1 << 20


class LossCount:
    """Count of failed writes in a row: the first loss is reported, and their number at the end of the row.

    Args:
        name: the name of the files, such as a path.
        noun: the noun of one loss, such as "record".
        report: gets the messages.
    """

    def __init__(self, name: Path | str, noun: str, report: Callable[[str], None] = logger.warning):
        self._name, self._noun, self._report = name, noun, report
        self._num_lost = 0

    def add(self, reason: str, count: int = 1) -> None:
        """Count losses, and report the first one."""
        if not self._num_lost:
            self._report(f"{self._name} cannot be written: {reason}; further losses are counted")
        self._num_lost += count

    def end(self, state: str = "is written again") -> None:
        """Report the losses since the last call, if there are any."""
        number, self._num_lost = self._num_lost, 0
        if number:
            self._report(f"{self._name} {state}; {format_count(number, self._noun)} could not be written")


class AppendFile:
    """File to which whole records are appended. It is opened when the first one comes.

    A record that cannot be written, as on a full disk, is dropped whole. The first one in a row is reported, and so is
    the number of dropped records, when a record is written again or the file is closed. A file that is deleted
    meanwhile is written anew with all that it held. Only one process may write it.

    Args:
        report: gets the messages.
    """

    def __init__(self, path: Path, report: Callable[[str], None] = logger.warning):
        self.path = path
        self._report = report
        self._descriptor = -1
        self._losses = LossCount(path, "record", report)

    def append(self, records: bytes, count: int = 1) -> bool:
        """Append records, or drop them. Returns whether they were appended.

        Args:
            count: number of the records.
        """
        try:
            self._append(records)
        except OSError as error:
            self._losses.add(error.strerror or str(error), count)
            return False
        self._losses.end()
        return True

    def sync(self) -> None:
        """Flush all records to disk, where no power cut takes them, and write the file anew if it was deleted."""
        if self._descriptor >= 0:
            with suppress(OSError):  # the next record reports what is wrong with the disk
                self._open()
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Flush and close the file. A record that comes later opens it again."""
        self.sync()
        self._losses.end("is closed")
        self._close()

    def _append(self, records: bytes) -> None:
        self._open()
        end, left = os.fstat(self._descriptor).st_size, memoryview(records)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, end)  # a part of a record would make the next one unreadable
            raise

    def _open(self) -> None:
        """Open the file, or write it anew if it was deleted. A file that has replaced it is appended to."""
        if self._descriptor >= 0:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self.path)):
                    return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_deleted = self._descriptor >= 0 and not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        if is_deleted:
            try:
                _copy(self._descriptor, descriptor)
            except OSError:
                os.close(descriptor)
                self.path.unlink(missing_ok=True)  # a later record tries again
                raise
            self._report(f"{self.path} was deleted while it was in use, and is written anew")
        self._close()
        self._descriptor = descriptor

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _copy(source: int, target: int) -> None:
    """Copy the content of an open file, which may be deleted, to the end of another one."""
    offset = 0
    while block := os.pread(source, COPY_BYTES, offset):
        offset += len(block)
        while block:
            block = block[os.write(target, block) :]
