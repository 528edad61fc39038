"""Records: the metadata of each image, from metadata files of any format or from image folders.

A record is a dict with `key` (the file stem), `image_path` (absolute), `caption`, and all other fields of its source.
sources.py reads the formats, blocks.py turns records into columns, and merge.py merges several sources. This module
finds the images, joins captions and tags, and reads sizes.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, compress
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from sdxl_trainer.configs.paths import CHECK_PATH
from sdxl_trainer.configs.problems import Problem, choose_cure, format_count, join_reasons
from sdxl_trainer.data.images.bucket import split_key
from sdxl_trainer.data.images.folder_keys import FolderKeys
from sdxl_trainer.data.images.image_files import ImageFolder, get_image_stem, read_caption_file, walk_images
from sdxl_trainer.data.images.image_lookup import FileChecker, ImageTable
from sdxl_trainer.data.images.kohya_folders import find_kohya_folder
from sdxl_trainer.data.metadata.blocks import RecordBlock
from sdxl_trainer.data.metadata.shard_list import ShardListError
from sdxl_trainer.data.metadata.sources import ROWS_AT_ONCE, SourceRecord, list_source_files
from sdxl_trainer.data.metadata.sqlite_file import split_table
from sdxl_trainer.data.metadata.values import (
    DESCRIPTION_FIELDS,
    MAX_SIDE_PX,
    REGULARISATION_FIELD,
    SIDE_FIELDS,
    SIZE_FIELDS,
    has_text,
    join_texts,
    read_size,
)
from sdxl_trainer.data.stores.remote import StoreError, describe_objects, is_remote

Record = dict[str, Any]
RECORD_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_path", pa.string()),  # the image, or the latent file or shard in place of it
        ("captioned", pa.bool_()),  # whether the record has a caption
        ("is_reg", pa.bool_()),  # whether the record is one of a regularisation image
        ("record", pa.binary()),  # JSON as the source has it; `parse_record` completes it
        ("width", pa.int32()),  # px of the image, by the metadata; 0: the metadata hold no size
        ("height", pa.int32()),
        ("offset", pa.int64()),  # of the latents in the shard; null: not in a shard
        ("bytes", pa.int64()),
        ("source", pa.int32()),  # number of the source in which the record first appears
    ]
)


def check_sources(metadata: Sequence[Path | str], image_dirs: Sequence[Path]) -> Iterator[Problem]:
    """Yield a problem for each metadata file and image folder of the settings that does not exist."""
    if not metadata and not image_dirs:
        cure = "set data.metadata to a metadata file, or data.image_dirs to folders with images"
        yield Problem("data", None, "names neither metadata nor image folders", cure)
        return
    for number, pattern in enumerate(metadata):
        cure = "check the bucket, the folder and the name in the URL" if is_remote(pattern) else CHECK_PATH
        try:
            missing = _list_missing_files(pattern)
        except ShardListError as error:
            yield Problem(f"data.metadata.{number}", pattern, str(error), error.cure)
            continue
        except StoreError as error:
            cure_store = "check the URL, the credentials and the network (docs/SHARDS.md explains where they are set)"
            rule = f"cannot be read: {str(error).removeprefix(f'{pattern}: ')}"
            yield Problem(f"data.metadata.{number}", pattern, rule, cure_store)
            continue
        if Path(str(pattern)).is_dir():
            rule, cure = "is a folder, not a metadata file", "name folders of images in data.image_dirs"
            yield Problem(f"data.metadata.{number}", pattern, rule, cure)
        elif missing and missing[0].name == str(pattern):
            yield Problem(f"data.metadata.{number}", pattern, missing[0].reason, cure)
        elif missing:
            rule = f"names {format_count(len(missing), 'missing file')}, the first is {missing[0].name}"
            yield Problem(f"data.metadata.{number}", pattern, rule, cure)
    for number, path in enumerate(image_dirs):
        if path.is_file():
            rule, cure = (
                "is a file, not a folder",
                "name metadata files in data.metadata, and folders of images here",
            )
            yield Problem(f"data.image_dirs.{number}", path, rule, cure)
        elif not path.is_dir():
            yield Problem(f"data.image_dirs.{number}", path, "is not a folder", choose_cure(path, CHECK_PATH))


class _MissingFile(NamedTuple):
    """A file that a setting names but that does not exist."""

    name: str
    reason: str


def _list_missing_files(pattern: Path | str) -> list[_MissingFile]:
    """List the files that a setting names and that do not exist.

    Raises:
        StoreError: a store cannot be reached.
    """
    files = list_source_files([pattern])
    missing = [
        _MissingFile(str(file), "matches no file" if set("*?") & set(str(file)) else "is not a file")
        for file in files
        if not is_remote(file) and not split_table(file).file.is_file()
    ]
    urls = [str(file) for file in files if is_remote(file)]
    answers = zip(urls, describe_objects(urls), strict=True)
    return missing + [
        _MissingFile(url, f"is not on the store: {_describe_absence(url, item)}")
        for url, item in answers
        if isinstance(item, FileNotFoundError)
    ]


def _describe_absence(url: str, error: FileNotFoundError) -> str:
    """Return what a store says of a missing object. Some stores only repeat its path."""
    if "*" in url:
        return "no object matches the name"
    said = str(error).strip()
    return "it has no such object" if not said or said.strip("/") in url else said


def read_image_folders(
    image_dirs: Sequence[Path],
    regularisation_dirs: Sequence[Path] = (),
    masks: str | None = None,
    kohya_folders: bool = False,
) -> Iterator[list[SourceRecord]]:
    """Yield the images below folders as records, with the captions beside them. Each folder is a source.

    The keys are those of `FolderKeys`.

    Args:
        regularisation_dirs: folders whose records get `is_reg`.
        masks: as in `data.masks`; mask files are not images.
        kohya_folders: as in `data.kohya_folders`; the names of folders are the captions of images without one.

    Raises:
        ValueError: captions cannot be read or are not UTF-8; the message names up to a hundred of them.
    """
    bad_captions: list[str] = []
    keys = FolderKeys([*image_dirs, *regularisation_dirs], masks)
    roots = [*((root, {}) for root in image_dirs), *((root, {"is_reg": True}) for root in regularisation_dirs)]
    for source, (root, flags) in enumerate(roots):
        for folder in walk_images([root], masks):
            named = find_kohya_folder(folder.path, [os.path.abspath(root)]) if kohya_folders else None
            for start in range(0, len(folder.images), ROWS_AT_ONCE):
                records = []
                for name in folder.images[start : start + ROWS_AT_ONCE]:
                    caption = _read_caption(folder, name, bad_captions)
                    caption = named.caption if caption is None and named is not None else caption
                    fields = {"image_path": os.path.join(folder.path, name), "caption": caption, **flags}
                    records.append(SourceRecord(key=keys.get(folder.path, name), fields=fields, source=source))
                yield records
    if bad_captions:
        raise ValueError(join_reasons(bad_captions))


def _read_caption(folder: ImageFolder, name: str, bad: list[str]) -> str | None:
    """Read the caption file of an image, or append the reason why it cannot be read."""
    try:
        return read_caption_file(folder, name)
    except ValueError as error:
        bad.append(str(error))
        return None


def build_record_rows(block: RecordBlock, finder: "ImageFinder", separator: str) -> pa.RecordBatch:
    """Build rows of the record index: find images, join captions and tags, and read sizes.

    Args:
        separator: between the tags of a caption, and between caption and tags of records that have both and no
            `image_path`, as kohya's have.
    """
    captioned, sizes = _join_captions(block, separator), _read_sizes(block)
    columns = [
        block.keys,
        _find_images(block, finder),
        captioned,
        [value is True for value in block.column(REGULARISATION_FIELD)],
        block.contents,
        np.ascontiguousarray(sizes[:, 0]),
        np.ascontiguousarray(sizes[:, 1]),
        [span and span.offset for span in block.spans],
        [span and span.bytes for span in block.spans],
        block.sources,
    ]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, RECORD_SCHEMA.types, strict=True)]
    return pa.record_batch(arrays, RECORD_SCHEMA)


def parse_record(row: Mapping[str, Any]) -> Record:
    """Return the record of a row: the source's JSON, with the row's key and image path and the caption as text."""
    record = orjson.loads(row["record"])
    # The source may have a field `key` of its own (img2dataset writes one), and a sample's key may have a prefix.
    record["key"] = split_key(row["key"])[1]
    record["image_path"] = row["image_path"]
    record["caption"] = join_texts(record.get("caption")) or join_texts(record.get("tags"))
    return record


def _find_images(block: RecordBlock, finder: "ImageFinder") -> list[str]:
    """Return each record's image, or the shard that holds its latents."""
    named = block.column("image_path")
    images = [span.shard if span else "" for span in block.spans]
    rows = [at for at, image in enumerate(images) if not image]
    paths = [str(named[at] or block.keyed_paths[at] or block.keys[at]) for at in rows]
    found = finder.find(paths, [block.base_folders[at] for at in rows], [named[at] is None for at in rows])
    for at, path in zip(rows, found, strict=True):
        images[at] = path
    return images


def _join_captions(block: RecordBlock, separator: str) -> list[bool]:
    """Join the captions and tags of kohya's records in `block.contents`. Return whether each record has a caption.

    A caption is `caption` or `tags` (a text, or a list of tags), or else a description. Lists of tags are joined too,
    unless the separator is the comma, with which `parse_record` joins them.
    """
    captions, tags, joiner = block.column("caption"), block.column("tags"), f"{separator} "
    have_caption, have_tags = list(map(has_text, captions)), list(map(has_text, tags))
    texts: dict[int, str | None] = {}
    if separator != ",":
        chosen = [caption if has else own for caption, has, own in zip(captions, have_caption, tags, strict=True)]
        texts = {at: join_texts(value, joiner) for at, value in enumerate(chosen) if isinstance(value, (list, dict))}
    for at in [at for at, path in enumerate(block.column("image_path")) if path is None]:
        if have_caption[at] and have_tags[at] and block.spans[at] is None:
            texts[at] = f"{join_texts(captions[at], joiner)}{separator}{join_texts(tags[at], joiner)}"
    for at, text in texts.items():
        block.contents[at] = orjson.dumps({**orjson.loads(block.contents[at]), "caption": text})
    captioned = list(map(or_, have_caption, have_tags))
    for name in DESCRIPTION_FIELDS if not all(captioned) else ():
        captioned = list(map(or_, captioned, map(has_text, block.column(name))))
    return captioned


def _read_sizes(block: RecordBlock) -> np.ndarray:
    """Return the (width, height) of each image that its metadata hold, [N, 2] int32; (0, 0) if they hold none."""
    values = block.column(SIZE_FIELDS[0])
    if set(map(type, values)) == {list} and set(map(len, values)) == {2}:
        sizes = np.array(list(chain.from_iterable(values)))
        if sizes.dtype.kind in "iu" and sizes.min() > 0 and sizes.max() < 2**31:
            return sizes.reshape(-1, 2).astype(np.int32)
    sizes = np.zeros((len(block.keys), 2), np.int32)
    for field in SIZE_FIELDS:
        for at, value in enumerate(block.column(field)):
            if value is not None and not sizes[at, 0]:
                sizes[at] = read_size(value) or (0, 0)
    for names in SIDE_FIELDS:
        columns = list(map(block.column, names))
        if not sizes.any() and all(set(map(type, column)) == {int} for column in columns):
            sides = np.array(columns)
            if sides.dtype.kind == "i" and sides.min() > 0 and sides.max() < MAX_SIDE_PX:
                return np.ascontiguousarray(sides.T, np.int32)
        for at, sides in enumerate(zip(*columns, strict=True)):
            if None not in sides and not sizes[at, 0]:
                sizes[at] = read_size(sides) or (0, 0)
    return sizes


class ImageFinder:
    """Finds the image of a record: by its path, or else by its file name or its stem under the image folders."""

    def __init__(self, image_dirs: Sequence[Path], masks: str | None = None):
        self._masks = masks
        self._image_dirs = [str(folder) for folder in image_dirs]
        self._checker = FileChecker()
        self._table: ImageTable | None = None

    def find(self, paths: Sequence[str], base_folders: Sequence[str], are_keys: Sequence[bool]) -> list[str]:
        """Return absolute paths of images. A missing image gets the path where it should be: its latents may exist.

        Args:
            base_folders: the folder of the metadata file that names each image.
            are_keys: whether each path was the record's key, and is relative to image folders.

        Raises:
            AmbiguousImageError: several images under the image folders have the name of a missing one.
        """
        kinds, found = list(zip(base_folders, are_keys, strict=True)), [""] * len(paths)
        if len(set(kinds)) == 1:
            return self._find(list(paths), *kinds[0])
        for kind in dict.fromkeys(kinds):
            rows = [at for at, other in enumerate(kinds) if other == kind]
            for at, path in zip(rows, self._find([paths[at] for at in rows], *kind), strict=True):
                found[at] = path
        return found

    def _find(self, paths: list[str], base_folder: str, is_key: bool) -> list[str]:
        """Like `find`, for paths of one metadata folder."""
        folders = self._list_folders(base_folder, is_key)
        found = [path if path.startswith("/") else folders[0] + path.removeprefix("./") for path in paths]
        missing = ~self._checker.exist(found)
        for folder in folders[1:]:
            relative = [at for at in np.flatnonzero(missing).tolist() if not paths[at].startswith("/")]
            below = {paths[at].rpartition("/")[0] for at in relative}
            if not any(os.path.isdir(folder + name) for name in below):
                continue
            candidates = [folder + paths[at].removeprefix("./") for at in relative]
            exist = self._checker.exist(candidates)
            for at, candidate in compress(zip(relative, candidates, strict=True), exist.tolist()):
                found[at] = candidate
            missing[relative] = ~exist
        rows = np.flatnonzero(missing).tolist()
        if rows and self._image_dirs:
            self._table = self._table or ImageTable([Path(folder) for folder in self._image_dirs], self._masks)
            names = [paths[at].replace("\\", "/").rsplit("/", 1)[-1] for at in rows]
            stems = [get_image_stem(name, has_suffix=not is_key) for name in names]
            for at, path in zip(rows, self._table.find(names, stems), strict=True):
                found[at] = path or found[at]
        return found

    def _list_folders(self, base_folder: str, is_key: bool) -> list[str]:
        """List the folders to search: for a key the image folders first, for a path the metadata's folder first."""
        names = [*self._image_dirs, base_folder, ""] if is_key else [base_folder, "", *self._image_dirs]
        return list(dict.fromkeys(os.path.abspath(name) + "/" for name in names))
