"""Warnings and errors in a run's log files, and its bad samples."""

import re
from collections import deque
from pathlib import Path
from typing import Any

import orjson

from sdxl_trainer.configs.language.translate import translate
from sdxl_trainer.train.watch.file_tail import FileTail
from sdxl_trainer.train.watch.run_folder import clean_text, locate

MAX_KEPT = 200  # messages of a run, and bad samples
MAX_FILES = 64  # of ranks
FILES = ("train*.log", "bad_samples*.jsonl")
READ_BYTES = 4 << 20  # of a file at a time
# As launch/logger.py writes them. Lines after the first one of a message do not begin with a time.
RECORD = re.compile(
    rb"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\.\d{3} (WARNING|ERROR|CRITICAL) +\[rank (\d+)\] [\w.<>]*: "
    rb"(.*(?:\n(?!\d{4}-).*){0,20})",
    re.MULTILINE,
)


class Messages:
    """The last warnings, errors and bad samples of a run.

    Args:
        folder: the run folder, without symbolic links.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._tails: dict[str, FileTail] = {}
        self._warnings: dict[str, deque[dict[str, Any]]] = {}
        self._bad_samples: dict[str, deque[dict[str, Any]]] = {}
        self._num_bad: dict[str, int] = {}

    def read(self) -> dict[str, Any]:
        """Read what is new in all files, and return the last messages, newest first, for JSON."""
        for name in self._list_files():
            generation = self._tails[name].generation if name in self._tails else 0
            tail = self._tails.setdefault(name, FileTail(self._folder / "logs" / name))
            lines = tail.read(READ_BYTES)
            if tail.generation != generation or name not in self._warnings:
                self._warnings[name], self._bad_samples[name] = deque(maxlen=MAX_KEPT), deque(maxlen=MAX_KEPT)
                self._num_bad[name] = 0
            self._add_lines(name, lines)
        warnings = sorted(
            (item for kept in self._warnings.values() for item in kept), key=lambda item: item["time"], reverse=True
        )
        bad = sorted(
            (item for kept in self._bad_samples.values() for item in kept), key=lambda item: item["step"], reverse=True
        )
        return {
            "warnings": warnings[:MAX_KEPT],
            "bad_samples": bad[:MAX_KEPT],
            "num_bad": sum(self._num_bad.values()),
            "complete": all(tail.share >= 1 for tail in self._tails.values()),
        }

    def _list_files(self) -> list[str]:
        try:
            logs = locate(self._folder, "logs")
            found = [sorted(logs.glob(pattern), key=_order)[:MAX_FILES] for pattern in FILES]
            return [path.name for paths in found for path in paths if not path.is_symlink()]
        except OSError:
            return []

    def _add_lines(self, name: str, lines: bytes) -> None:
        if name.endswith(".log"):
            self._warnings[name] += [
                {"time": time.decode(), "level": level.decode(), "rank": int(rank), "text": _decode(text)}
                for time, level, rank, text in RECORD.findall(lines)
            ]
            return
        self._num_bad[name] += lines.count(b"\n")
        for line in lines.splitlines()[-MAX_KEPT:]:
            try:
                values = orjson.loads(line)
                sample = {
                    "step": int(values["step"]),
                    "key": str(values["key"]),
                    "reason": translate(str(values["reason"])),
                }
            except (ValueError, TypeError, KeyError, OverflowError):
                continue
            texts = {field: clean_text(sample[field]) for field in ("key", "reason")}
            self._bad_samples[name].append({"step": sample["step"], **texts})


def _order(path: Path) -> tuple[int, str]:
    """Order the file of rank 0 before that of rank 1, and so on."""
    return len(path.name), path.name


def _decode(text: bytes) -> str:
    return clean_text(translate(text.decode("utf-8", "replace").rstrip()))
