"""Files below image folders that are not taken: counted by kind, and reported with the reason and the cure."""

from pathlib import Path

import orjson
from loguru import logger

from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.data.files import write_atomic

MAX_NAMED = 3  # files that a message names
MAX_LISTED = 10_000  # files of each kind that the list holds
FILE = "skipped_files.jsonl"
# Kind → level of its message, the reason, and the cure.
KINDS = {
    "hidden": ("INFO", "hidden or of the system", ""),
    "not_utf8": ("WARNING", "the name is not UTF-8", "rename them, for example with convmv"),
    "no_plug_in": (
        "WARNING",
        "Pillow needs a plug-in for this format",
        "pip install pillow-heif (.heic, .heif) or pillow-jxl-plugin (.jxl)",
    ),
    "captioned": (
        "WARNING",
        "beside a caption, but not an image of a known format",
        "convert them to PNG, or rename them if the suffix is wrong",
    ),
    "json": (
        "WARNING",
        "JSON beside an image is not read",
        "write the captions to .txt files, or to one file for data.metadata",
    ),
}


class SkippedFiles:
    """Counts skipped files by kind, and keeps the first MAX_LISTED paths of each kind."""

    def __init__(self) -> None:
        self._paths: dict[str, list[str]] = {}
        self.counts: dict[str, int] = {}

    def add(self, kind: str, path: str) -> None:
        """Note a file or folder of one of KINDS."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        paths = self._paths.setdefault(kind, [])
        if len(paths) < MAX_LISTED:
            paths.append(path)

    def report(self, folder: Path) -> None:
        """Log a line for each kind, and list the files in `skipped_files.jsonl` in a folder."""
        if not self.counts:
            return
        file = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        lines = (orjson.dumps({"kind": kind, "path": path}) for kind in self._paths for path in self._paths[kind])
        write_atomic(file, b"".join(line + b"\n" for line in lines))
        for kind, (level, what, cure) in KINDS.items():
            count, paths = self.counts.get(kind, 0), self._paths.get(kind, [])
            if count:
                named = ", ".join(paths[:MAX_NAMED]) + (f", ... (all in {file})" if count > MAX_NAMED else "")
                ending = f"; cure: {cure}" if cure else ""
                logger.log(level, "skipped {} ({}): {}{}", format_count(count, "file"), what, named, ending)
