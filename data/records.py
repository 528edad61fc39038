"""Records: what is known of each picture, from metadata of any form or from image folders.

A record is a dict with `key` (the file stem), `image_path` (absolute), `caption`, and whatever else its source holds.
data/sources.py reads the forms, data/merge.py puts several sources together; here records become what all else uses.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.data.folders import (
    FileChecker,
    PictureTable,
    read_sidecar,
    strip_suffix,
    walk_pictures,
)
from sdxl_trainer.data.remote import StoreError, describe_objects, is_remote
from sdxl_trainer.data.sources import BASE, NAME, NPZ, ROWS_AT_ONCE, Items, expand_sources

Record = dict[str, Any]
SIZE_FIELDS = ("original_size", "image_size", "train_resolution")
SIDE_FIELDS = (("width", "height"), ("image_width", "image_height"))


@dataclass(frozen=True)
class Block:
    """Some records, and where in a tar each one's latents are: (tar, offset, bytes), or None."""

    records: list[Record]
    places: list[tuple[str, int, int] | None]


def check_sources(metadata: Sequence[Path | str], image_dirs: list[Path]) -> list[Problem]:
    """What is wrong with the data settings before anything is read."""
    if not metadata and not image_dirs:
        cure = "set data.metadata to a metadata file, or data.image_dirs to folders with pictures"
        return [Problem("data", None, "names neither metadata nor image folders", cure)]
    cure = "check the path (relative to the working directory)"
    problems = []
    for number, pattern in enumerate(metadata):
        try:
            missing = _find_missing(pattern)
        except StoreError as error:
            cure_store = "check the URL, the credentials and the network (docs/DATA.md says where they are set)"
            problems.append(Problem(f"data.metadata.{number}", pattern, str(error), cure_store))
            continue
        if missing and missing[0][0] == str(pattern):
            problems.append(Problem(f"data.metadata.{number}", pattern, missing[0][1], cure))
        elif missing:
            rule = f"names {len(missing)} that are no files, {missing[0][0]} first"
            problems.append(Problem(f"data.metadata.{number}", pattern, rule, cure))
    for number, path in enumerate(image_dirs):
        if not path.is_dir():
            problems.append(Problem(f"data.image_dirs.{number}", path, "is not a folder", cure))
    return problems


def _find_missing(pattern: Path | str) -> list[tuple[str, str]]:
    """(name, why) of each file that a setting names and that is not there.

    Raises:
        StoreError: a store cannot be asked.
    """
    files = expand_sources([pattern])
    missing = [(str(file), "is not a file") for file in files if not is_remote(file) and not Path(file).is_file()]
    urls = [str(file) for file in files if is_remote(file)]
    answers = zip(urls, describe_objects(urls), strict=True)
    return missing + [(url, f"is not there: {item}") for url, item in answers if isinstance(item, FileNotFoundError)]


def read_folders(image_dirs: Sequence[Path]) -> Iterator[Items]:
    """Pictures with the captions beside them, as a source of records."""
    for folder, names, everything in walk_pictures(image_dirs):
        for start in range(0, len(names), ROWS_AT_ONCE):
            yield [
                (
                    strip_suffix(name, always=True),
                    {"image_path": os.path.join(folder, name), "caption": read_sidecar(folder, name, everything)},
                )
                for name in names[start : start + ROWS_AT_ONCE]
            ]


def finish_records(items: Items, finder: "PictureFinder", separator: str) -> Block:
    """Make records of what sources and updates hold: find pictures, settle captions.

    Args:
        separator: stands between caption and tags where a record has both and is of kohya's form, keyed by its path.
    """
    wanted, seekers, places, records = [], [], [], []
    for key, fields in items:
        base, name, place = fields.pop(BASE, ""), fields.pop(NAME, None), fields.pop(NPZ, None)
        named = fields.get("image_path")
        if named is None and place is None and fields.get("caption") and fields.get("tags"):
            fields["caption"] = _join_tags(fields["caption"]) + separator + _join_tags(fields["tags"])
        fields["key"] = key  # a field of that name (img2dataset writes one) is not the stem
        fields["image_path"] = place[0] if place else None
        fields["caption"] = read_caption(fields)
        records.append(fields)
        places.append(place)
        if place is None:
            wanted.append((str(named or name or key), base, named is None))
            seekers.append(fields)
    for fields, path in zip(seekers, finder.find(wanted), strict=True):
        fields["image_path"] = path
    return Block(records, places)


def read_caption(record: Record) -> str | None:
    """The caption of a record: `caption` or `tags` (a string, or a list of tags), else None."""
    text = record.get("caption") or record.get("tags")
    return _join_tags(text) if text else None


def read_any_text(record: Record) -> str | None:
    """The caption of a finished record, or its description if it has only that, else None."""
    text = record["caption"] or record.get("description") or record.get("nl_caption")
    return _join_tags(text) if text else None


def read_size(record: Record) -> tuple[int, int]:
    """(width, height) of the picture as the metadata tell, (0, 0) if they do not."""
    for field in SIZE_FIELDS:
        size = record.get(field)
        if size is None:
            continue
        if isinstance(size, str):
            size = re.findall(r"\d+", size)
        if isinstance(size, (list, tuple)) and len(size) == 2 and (sides := _read_sides(*size)):
            return sides
    for width, height in SIDE_FIELDS:
        if width in record and height in record and (sides := _read_sides(record[width], record[height])):
            return sides
    return (0, 0)


class PictureFinder:
    """Finds the picture of a record: where it says, else by file name, else by stem under the image folders."""

    def __init__(self, image_dirs: Sequence[Path]):
        self._image_dirs = [str(folder) for folder in image_dirs]
        self._checker = FileChecker()
        self._folders: dict[tuple[str, bool], list[str]] = {}
        self._table: PictureTable | None = None

    def find(self, wanted: Sequence[tuple[str, str, bool]]) -> list[str]:
        """Absolute paths of pictures; of one that is nowhere, where it should be (its latents may still be there).

        Args:
            wanted: (path, folder of the metadata, whether it was the record's key and is relative to image folders).
        """
        found = [self._get_candidate(0, *each) for each in wanted]
        missing = np.flatnonzero(~self._checker.exist(found)).tolist()
        for turn in range(1, len(self._image_dirs) + 2):
            candidates = [self._get_candidate(turn, *wanted[at]) for at in missing]
            there = self._checker.exist(candidates).tolist() if any(candidates) else [False] * len(missing)
            for at, candidate, exists in zip(missing, candidates, there, strict=True):
                if exists:
                    found[at] = candidate
            missing = [at for at, exists in zip(missing, there, strict=True) if not exists]
        if missing and self._image_dirs:
            self._table = self._table or PictureTable([Path(folder) for folder in self._image_dirs])
            names = [wanted[at][0].replace("\\", "/").rsplit("/", 1)[-1] for at in missing]
            stems = [strip_suffix(name, always=not wanted[at][2]) for at, name in zip(missing, names, strict=True)]
            for at, path in zip(missing, self._table.find(names, stems), strict=True):
                found[at] = path or found[at]
        return found

    def _get_candidate(self, turn: int, path: str, base: str, is_key: bool) -> str:
        """Where to look: below the metadata's folder, then the working directory; a key first below image folders."""
        if path.startswith("/"):
            return path if turn == 0 else ""
        folders = self._folders.get((base, is_key))
        if folders is None:
            names = [*(self._image_dirs if is_key else ()), base, ""]
            folders = list(dict.fromkeys(os.path.abspath(name) + "/" for name in names))
            self._folders[base, is_key] = folders
        return folders[turn] + path.removeprefix("./") if turn < len(folders) else ""


def _join_tags(text: Any) -> str:
    if isinstance(text, str):
        return text
    return ", ".join(map(str, text)) if isinstance(text, (list, tuple)) else str(text)


def _read_sides(width: Any, height: Any) -> tuple[int, int] | None:
    try:
        sides = (int(width), int(height))
    except (ValueError, TypeError):
        return None
    return sides if min(sides) > 0 else None
