"""Records: what is known of each image, from metadata of any form or from image folders.

A record is a dict with `key` (the file stem), `image_path` (absolute), `caption`, and whatever else its source holds.
sources.py reads the forms, blocks.py makes columns of them, merge.py puts several sources together; here
images are found and captions and sizes settled.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.data.images.bucket import split_key
from sdxl_trainer.data.images.image_files import (
    FileChecker,
    ImageTable,
    read_sidecar,
    strip_suffix,
    walk_images,
)
from sdxl_trainer.data.metadata.blocks import SIDE_FIELDS, SIZE_FIELDS, Block
from sdxl_trainer.data.metadata.sources import ROWS_AT_ONCE, SOURCE, KeyedRecords, list_source_files
from sdxl_trainer.data.stores.remote import StoreError, describe_objects, is_remote

Record = dict[str, Any]
RECORD_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_path", pa.string()),  # the image, or the latent file or shard in place of it
        ("captioned", pa.bool_()),  # whether the record has a caption; what it is, the record tells
        ("record", pa.binary()),  # JSON as the source has it; `parse_record` completes it
        ("width", pa.int32()),  # 0: the metadata do not say
        ("height", pa.int32()),
        ("offset", pa.int64()),  # of the latents in the shard; null: no shard
        ("bytes", pa.int64()),
        ("source", pa.int32()),  # number of the entry of the settings where it first appears
    ]
)


def check_sources(metadata: Sequence[Path | str], image_dirs: Sequence[Path]) -> Iterator[Problem]:
    """Yield a problem for each metadata file and image folder of the settings that does not exist."""
    if not metadata and not image_dirs:
        cure = "set data.metadata to a metadata file, or data.image_dirs to folders with images"
        yield Problem("data", None, "names neither metadata nor image folders", cure)
        return
    cure = "check the path (relative to the working directory)"
    for number, pattern in enumerate(metadata):
        try:
            missing = _find_missing(pattern)
        except StoreError as error:
            cure_store = "check the URL, the credentials and the network (docs/DATA.md says where they are set)"
            yield Problem(f"data.metadata.{number}", pattern, str(error), cure_store)
            continue
        if missing and missing[0][0] == str(pattern):
            yield Problem(f"data.metadata.{number}", pattern, missing[0][1], cure)
        elif missing:
            rule = f"names {len(missing)} that are no files, {missing[0][0]} first"
            yield Problem(f"data.metadata.{number}", pattern, rule, cure)
    for number, path in enumerate(image_dirs):
        if not path.is_dir():
            yield Problem(f"data.image_dirs.{number}", path, "is not a folder", cure)


def _find_missing(pattern: Path | str) -> list[tuple[str, str]]:
    """(name, why) of each file that a setting names and that is not there.

    Raises:
        StoreError: a store cannot be asked.
    """
    files = list_source_files([pattern])
    missing = [(str(file), "is not a file") for file in files if not is_remote(file) and not Path(file).is_file()]
    urls = [str(file) for file in files if is_remote(file)]
    answers = zip(urls, describe_objects(urls), strict=True)
    return missing + [(url, f"is not there: {item}") for url, item in answers if isinstance(item, FileNotFoundError)]


def read_image_folders(
    image_dirs: Sequence[Path], regularisation_dirs: Sequence[Path] = (), masks: str | None = None
) -> Iterator[KeyedRecords]:
    """Images with the captions beside them, each folder a source; those of the second kind have `is_reg`. `masks`, as
    in `data.masks`, are none."""
    roots = [*((root, {}) for root in image_dirs), *((root, {"is_reg": True}) for root in regularisation_dirs)]
    for source, (root, marks) in enumerate(roots):
        for folder, names, everything in walk_images([root], masks):
            for start in range(0, len(names), ROWS_AT_ONCE):
                yield [
                    (
                        strip_suffix(name, always=True),
                        {
                            "image_path": os.path.join(folder, name),
                            "caption": read_sidecar(folder, name, everything),
                            SOURCE: source,
                            **marks,
                        },
                    )
                    for name in names[start : start + ROWS_AT_ONCE]
                ]


def build_record_rows(block: Block, finder: "ImageFinder", separator: str) -> pa.RecordBatch:
    """Rows of the index from what sources hold: find images, settle captions and sizes.

    Args:
        separator: stands between caption and tags where a record has both and is of kohya's form, keyed by its path.
    """
    named = block.column("image_path")
    captioned, widths_heights = _settle_captions(block, named, separator), _read_sizes(block)
    images: list[str] = [place[0] if place else "" for place in block.places]
    seekers = [at for at, image in enumerate(images) if not image]
    wanted = [str(path or name or key) for path, name, key in zip(named, block.names, block.keys, strict=True)]
    if len(seekers) < len(images):
        wanted = [wanted[at] for at in seekers]
    found = finder.find(wanted, [block.bases[at] for at in seekers], [named[at] is None for at in seekers])
    for at, path in zip(seekers, found, strict=True):
        images[at] = path
    columns = [
        block.keys,
        images,
        captioned,
        block.contents,
        np.ascontiguousarray(widths_heights[:, 0]),
        np.ascontiguousarray(widths_heights[:, 1]),
        [place and place[1] for place in block.places],
        [place and place[2] for place in block.places],
        block.sources,
    ]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, RECORD_SCHEMA.types, strict=True)]
    return pa.record_batch(arrays, RECORD_SCHEMA)


def parse_record(row: Mapping[str, Any]) -> Record:
    """The whole record of a row of an index, with what the index has found out."""
    record = orjson.loads(row["record"])
    # A field of that name (img2dataset writes one) is not the stem; nor are latents at a further resolution a record.
    record["key"] = split_key(row["key"])[1]
    record["image_path"] = row["image_path"]
    record["caption"] = _join_tags(record.get("caption") or record.get("tags"))
    return record


def _settle_captions(block: Block, named: list[str | None], separator: str) -> list[bool]:
    """Whether each record has a caption: `caption` or `tags` (a string, or a list of tags), or else a description.

    In kohya's form caption and tags are one text, and the record is changed to say so.
    """
    captions, tags = block.column("caption"), block.column("tags")
    texts = [caption or some or None for caption, some in zip(captions, tags, strict=True)]
    for at in [at for at, name in enumerate(named) if name is None]:
        if captions[at] and tags[at] and block.places[at] is None:
            texts[at] = f"{_join_tags(captions[at])}{separator}{_join_tags(tags[at])}"
            block.contents[at] = orjson.dumps({**orjson.loads(block.contents[at]), "caption": texts[at]})
    if None in texts:
        described = zip(texts, block.column("description"), block.column("nl_caption"), strict=True)
        texts = [text or first or second or None for text, first, second in described]
    return list(map(bool, texts))


def _read_sizes(block: Block) -> np.ndarray:
    """[N, 2] int32 (width, height) of the images as the metadata tell, (0, 0) where they do not."""
    values = block.column(SIZE_FIELDS[0])
    if set(map(type, values)) == {list} and set(map(len, values)) == {2}:
        sizes = np.array(list(chain.from_iterable(values)))
        if sizes.dtype.kind in "iu" and sizes.min() > 0 and sizes.max() < 2**31:
            return sizes.reshape(-1, 2).astype(np.int32)
    sizes = np.zeros((len(block.keys), 2), np.int32)
    for field in SIZE_FIELDS:
        for at, value in enumerate(block.column(field)):
            if value is not None and not sizes[at, 0]:
                sizes[at] = _parse_size(value)
    for names in SIDE_FIELDS:
        for at, sides in enumerate(zip(*map(block.column, names), strict=True)):
            if None not in sides and not sizes[at, 0]:
                sizes[at] = _read_sides(*sides)
    return sizes


class ImageFinder:
    """Finds the image of a record: where it says, else by file name, else by stem under the image folders."""

    def __init__(self, image_dirs: Sequence[Path], masks: str | None = None):
        self._masks = masks
        self._image_dirs = [str(folder) for folder in image_dirs]
        self._checker = FileChecker()
        self._table: ImageTable | None = None

    def find(self, paths: Sequence[str], bases: Sequence[str], are_keys: Sequence[bool]) -> list[str]:
        """Absolute paths of images; of one that is nowhere, where it should be (its latents may still be there).

        Args:
            bases: folders of the metadata that name them.
            are_keys: whether each path was the record's key and is relative to image folders.
        """
        kinds, found = list(zip(bases, are_keys, strict=True)), [""] * len(paths)
        for kind in dict.fromkeys(kinds):
            rows = [at for at, other in enumerate(kinds) if other == kind]
            for at, path in zip(rows, self._find([paths[at] for at in rows], *kind), strict=True):
                found[at] = path
        return found

    def _find(self, paths: list[str], base: str, is_key: bool) -> list[str]:
        """`find` for paths of one metadata folder."""
        folders = self._list_folders(base, is_key)
        found = [path if path.startswith("/") else folders[0] + path.removeprefix("./") for path in paths]
        lost = ~self._checker.exist(found)
        for folder in folders[1:]:
            relative = [at for at in np.flatnonzero(lost).tolist() if not paths[at].startswith("/")]
            below = {paths[at].rpartition("/")[0] for at in relative}
            if not any(os.path.isdir(folder + name) for name in below):
                continue
            candidates = [folder + paths[at].removeprefix("./") for at in relative]
            there = self._checker.exist(candidates)
            for at, candidate in compress(zip(relative, candidates, strict=True), there.tolist()):
                found[at] = candidate
            lost[relative] = ~there
        missing = np.flatnonzero(lost).tolist()
        if missing and self._image_dirs:
            self._table = self._table or ImageTable([Path(folder) for folder in self._image_dirs], self._masks)
            names = [paths[at].replace("\\", "/").rsplit("/", 1)[-1] for at in missing]
            stems = [strip_suffix(name, always=not is_key) for name in names]
            for at, path in zip(missing, self._table.find(names, stems), strict=True):
                found[at] = path or found[at]
        return found

    def _list_folders(self, base: str, is_key: bool) -> list[str]:
        """Where to look: below the metadata's folder, then the working directory; a key first below image folders."""
        names = [*(self._image_dirs if is_key else ()), base, ""]
        return list(dict.fromkeys(os.path.abspath(name) + "/" for name in names))


def _join_tags(text: Any) -> str | None:
    """A text, or a list of tags, as a text; None if there is nothing."""
    if isinstance(text, str) or not text:
        return text or None
    return ", ".join(map(str, text)) if isinstance(text, (list, tuple)) else str(text)


def _parse_size(size: Any) -> tuple[int, int]:
    """(width, height) of a list or of a text such as 1500x1000, (0, 0) if it is neither."""
    if isinstance(size, str):
        size = re.findall(r"\d+", size)
    return _read_sides(*size) if isinstance(size, (list, tuple)) and len(size) == 2 else (0, 0)


def _read_sides(width: Any, height: Any) -> tuple[int, int]:
    try:
        sides = (int(width), int(height))
    except (ValueError, TypeError, OverflowError):
        return (0, 0)
    return sides if 0 < min(sides) and max(sides) < 2**31 else (0, 0)
