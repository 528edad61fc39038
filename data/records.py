"""Records: what is known of each picture, read from metadata files or image folders.

A record is a dict with `key` (the file stem), `image_path` (absolute), `caption`, and whatever else its source holds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from sdxl_trainer.configs.problems import Problem

Record = dict[str, Any]
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
CAPTION_SUFFIXES = (".txt", ".caption")
MAX_SHOWN = 20  # items that an error lists


def check_sources(metadata: list[Path], image_dirs: list[Path]) -> list[Problem]:
    """What is wrong with the data settings before anything is read."""
    if not metadata and not image_dirs:
        cure = "set data.metadata to a metadata file, or data.image_dirs to folders with pictures"
        return [Problem("data", None, "names neither metadata nor image folders", cure)]
    missing = [
        Problem(f"data.metadata.{number}", path, "is not a file", "check the path (relative to the working directory)")
        for number, path in enumerate(metadata)
        if not path.is_file()
    ]
    missing += [
        Problem(
            f"data.image_dirs.{number}", path, "is not a folder", "check the path (relative to the working directory)"
        )
        for number, path in enumerate(image_dirs)
        if not path.is_dir()
    ]
    return missing


def read_records(metadata: list[Path], image_dirs: list[Path]) -> dict[str, Record]:
    """All records by key, in the order of their sources; later metadata files update earlier ones key by key.

    Raises:
        ValueError: malformed metadata (with file, line and column), or two pictures of one stem.
    """
    records: dict[str, Record] = {}
    if not metadata:
        twins = []
        for record in _read_folders(image_dirs):
            first = records.setdefault(record["key"], record)
            if first is not record:
                twins.append(f"'{record['key']}' ({first['image_path']} and {record['image_path']})")
        if twins:
            shown = ", ".join(twins[:MAX_SHOWN]) + (", ..." if len(twins) > MAX_SHOWN else "")
            raise ValueError(f"{len(twins)} pictures have the stem of another one: {shown}")
        return records
    for file in metadata:
        for key, fields in _read_metadata(file):
            known = records.setdefault(key, {"key": key})
            known.update({**fields, "key": key})  # a field of that name (img2dataset writes one) is not the stem
            if "image_path" in fields:
                known["_base"] = file.parent
    finder = _ImageFinder(image_dirs)
    for record in records.values():
        base = record.pop("_base", None)
        record["image_path"] = finder.find(record.get("image_path"), record["key"], base)
        record["caption"] = read_caption(record)
    return records


def read_caption(record: Record) -> str | None:
    """The caption of a record: `caption` or `tags` (a string, or a list of tags), else None."""
    text = record.get("caption") or record.get("tags")
    if isinstance(text, list):
        return ", ".join(str(tag) for tag in text)
    return None if text is None else str(text)


def _read_metadata(file: Path) -> Iterator[tuple[str, Record]]:
    try:
        content = orjson.loads(file.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}:{error.colno}: malformed JSON: {error.msg}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must be a JSON object keyed by file stem, not a {type(content).__name__}")
    for key, fields in content.items():
        if not isinstance(fields, dict):
            raise ValueError(f"{file}: the record '{key}' must be a JSON object, not a {type(fields).__name__}")
        yield key, fields


def _read_folders(image_dirs: list[Path]) -> Iterator[Record]:
    for path in _list_pictures(image_dirs):
        yield {"key": path.stem, "image_path": str(path), "caption": _read_sidecar(path)}


def _list_pictures(image_dirs: list[Path]) -> Iterator[Path]:
    """Absolute paths, in an order that the disk has no say in."""
    for folder in image_dirs:
        yield from (path.absolute() for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES)


def _read_sidecar(image: Path) -> str | None:
    for suffix in CAPTION_SUFFIXES:
        sidecar = image.with_suffix(suffix)
        if sidecar.is_file():
            try:
                return sidecar.read_text(encoding="utf-8-sig").strip()  # Windows editors put a mark in front
            except UnicodeDecodeError as error:
                raise ValueError(f"{sidecar}: is not UTF-8: {error.reason} at byte {error.start}") from None
    return None


class _ImageFinder:
    """Finds the picture of a record: where it says, else by file name, else by stem under the image folders."""

    def __init__(self, image_dirs: list[Path]):
        self._image_dirs = image_dirs
        self._by_name: dict[str, str] | None = None
        self._by_stem: dict[str, str] = {}

    def find(self, image_path: object, key: str, base: Path | None) -> str:
        """Absolute path of the picture; if there is none, where it should be (its latents may still be there)."""
        path = Path(str(image_path or key))
        candidates = [path] if path.is_absolute() or base is None else [base / path, path]
        for candidate in candidates:
            if candidate.is_file():
                return str(candidate.absolute())
        if self._by_name is None:
            self._scan()
        assert self._by_name is not None
        stem = path.stem if image_path else key  # a key is a stem already, and may hold a dot
        return self._by_name.get(path.name) or self._by_stem.get(stem) or str(candidates[0].absolute())

    def _scan(self) -> None:
        self._by_name = {}
        for path in _list_pictures(self._image_dirs):
            self._by_name.setdefault(path.name, str(path))
            self._by_stem.setdefault(path.stem, str(path))
