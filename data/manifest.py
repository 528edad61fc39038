"""The manifest of a latent cache: `cache.json` says what made it, `manifest/part-<rank>.jsonl` lists every item.

Parts are append-only, one JSON object a line; of several lines with one key the newest wins. Any tool that knows JSON
and SHA-256 can audit a cache with them.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from loguru import logger

from sdxl_trainer.data.files import write_atomic

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Identity:
    """What decides the latents of a picture besides its pixels. An item made under another identity is stale."""

    vae_sha256: str
    dtype: str
    posterior: str
    resolution_px: int
    min_bucket_px: int
    max_bucket_px: int
    bucket_step_px: int
    no_upscale: bool
    crop: str = "center"
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Entry:
    """One cached item. `file` is relative to the cache folder; sizes in pixels, (width, height)."""

    key: str
    file: str
    bytes: int
    sha256: str
    bucket: tuple[int, int]
    original_size: tuple[int, int]
    crop: tuple[int, int, int, int]  # left, top, right, bottom in the resized picture
    source_path: str
    source_bytes: int
    source_mtime_ns: int
    source_sha256: str


def write_identity(folder: Path, identity: Identity) -> None:
    """Write `cache.json`."""
    write_atomic(folder / "cache.json", orjson.dumps(asdict(identity), option=orjson.OPT_INDENT_2))


def read_identity(folder: Path) -> dict[str, Any] | None:
    """The content of `cache.json`, or None if the folder holds no cache."""
    file = folder / "cache.json"
    return orjson.loads(file.read_bytes()) if file.is_file() else None


def list_parts(folder: Path) -> list[Path]:
    """The manifest's parts that hold lines, oldest first, so that the newest line of a key is read last."""
    parts = [part for part in folder.glob("manifest/part-*.jsonl") if part.stat().st_size]
    return sorted(parts, key=lambda part: (part.stat().st_mtime_ns, part.name))


def read_entries(folder: Path) -> Iterator[Entry]:
    """Every line of every part, in order. A damaged line is passed over with a warning: its item is done again.

    A torn last line is passed over silently, because the job may be writing it just now.
    """
    for part in list_parts(folder):
        with open(part, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    if line.endswith(b"\n"):
                        yield _parse_entry(line)
                except (ValueError, TypeError, KeyError) as error:
                    logger.warning("{}:{}: damaged line passed over: {}", part, number, error)


def _parse_entry(line: bytes) -> Entry:
    fields = orjson.loads(line)
    source = fields.pop("source")
    for name in ("bucket", "original_size", "crop"):
        fields[name] = tuple(fields[name])
    return Entry(
        **fields,
        source_path=source["path"],
        source_bytes=source["size"],
        source_mtime_ns=source["mtime_ns"],
        source_sha256=source["sha256"],
    )


class ManifestWriter:
    """Appends entries to a rank's part."""

    def __init__(self, folder: Path, rank: int):
        (folder / "manifest").mkdir(parents=True, exist_ok=True)
        path = folder / "manifest" / f"part-{rank:05d}.jsonl"
        if path.is_file():
            _cut_torn_line(path)
        self._file = open(path, "ab")

    def append(self, entry: Entry) -> None:
        """Add one line. The item it names must be on disk already."""
        fields = asdict(entry)
        fields["source"] = {
            "path": fields.pop("source_path"),
            "size": fields.pop("source_bytes"),
            "mtime_ns": fields.pop("source_mtime_ns"),
            "sha256": fields.pop("source_sha256"),
        }
        self._file.write(orjson.dumps(fields) + b"\n")

    def flush(self) -> None:
        """Hand the lines written so far to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    """Remove a last line that a killed job left without its end, so that the next one starts on a line of its own."""
    content = path.read_bytes()
    if content and not content.endswith(
        b"\n"
    ):  # a whole part must keep its time, or all that is made from it is remade
        os.truncate(path, content.rfind(b"\n") + 1)
