"""The list of files that `--adopt` refused, in the folder of a cache's manifest."""

from collections.abc import Mapping
from pathlib import Path

import orjson
from loguru import logger

from sdxl_trainer.data.files import write_atomic


def read_refused(folder: Path) -> dict[str, tuple[int, int]]:
    """Read which files `--adopt` refused: absolute path → (size, modification time in ns) that each had then."""
    file = get_refused_file(folder)
    try:
        lines = list(map(orjson.loads, file.read_bytes().splitlines())) if file.is_file() else []
        return {str(line["file"]): (int(line["bytes"]), int(line["mtime_ns"])) for line in lines}
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("{} is damaged and ignored; --adopt writes it anew: {}", file, error)
        return {}


def write_refused(folder: Path, refused: Mapping[str, tuple[int, int]]) -> None:
    """Write the files that `read_refused` returns."""
    lines = ({"file": file, "bytes": size, "mtime_ns": time} for file, (size, time) in refused.items())
    write_atomic(get_refused_file(folder), b"".join(orjson.dumps(line) + b"\n" for line in lines))


def get_refused_file(folder: Path) -> Path:
    """Return the file that lists the files that `--adopt` refused, of which training must not use any."""
    return folder / "manifest" / "refused.jsonl"
