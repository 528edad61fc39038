"""Images that have no latents yet: the bucket of each, and the file that its latents will be written to.

With `cache.on_missing: encode` these images are part of the sample index. Their latents are encoded when training
reaches them (cache/encode/on_the_fly.py).
"""

import errno
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, starmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from sdxl_trainer.data.formats.shards import encode_key
from sdxl_trainer.data.formats.text_cache import EMPTY_FILE
from sdxl_trainer.data.images.bucket import (
    BucketRule,
    Placement,
    Size,
    list_buckets,
    place_image,
    split_key,
)
from sdxl_trainer.data.images.image_files import TEXT_OUTPUTS_SUFFIX
from sdxl_trainer.data.images.image_lookup import hash_texts
from sdxl_trainer.data.index.schema import fits_columns

NUM_THREADS = 16
MAX_CACHED_SIZES = 65_536  # image sizes whose placement is kept, because many images share a size
IMAGES_AT_ONCE = 16_384
# What `encode_key` and `_escape_stem` put into names; a key that holds it is escaped itself.
ESCAPED = re.compile(r"%(25|2E|2F|00|5F|65)|\0")
GIVEN_SUFFIXES = (".npz", ".tar")  # a record that names latents instead of an image has nothing to encode
TEXT_ENDING = TEXT_OUTPUTS_SUFFIX.removesuffix(".npz")
EMPTY_NAME = tuple(EMPTY_FILE.removesuffix(TEXT_OUTPUTS_SUFFIX).split("/"))  # folder and stem
IMAGES_PER_TASK = 256  # one task for each image would cost more than the check of its file


@dataclass(frozen=True)
class EncodingSettings:
    """Settings for encoding the latents of images that have none."""

    rules: tuple[tuple[str, BucketRule], ...]  # (prefix of the keys, rule) of each resolution
    beside: bool  # write latents beside the images instead of into the cache folder
    flip: bool  # encode the mirrored image too


@dataclass(frozen=True)
class PlannedLatents:
    """Latents to encode for one image at one resolution."""

    row: int  # of the image's record
    prefix: str  # of the resolution
    file: str  # file that they will be written to: relative to the cache folder, or absolute
    size: Size  # (width, height) px of the image
    placement: Placement


class BadImage(NamedTuple):
    """An image that cannot be encoded."""

    key: str
    reason: str
    is_unread: bool = False  # the storage did not give the image, which may be whole


def choose_output_file(key: str, image_path: str, beside: bool) -> str:
    """Return the npz file to write a sample's latents to: absolute beside the image, or relative to the cache folder.

    Latents of each resolution below the largest lie in a subfolder named by the key's prefix. No key leads out of the
    cache folder, or to a file of the cache itself, and no two keys lead to one file.
    """
    prefix, name = split_key(key)
    if beside:
        image = Path(image_path)
        return str(image.parent / prefix / f"{_escape_stem(image.stem, image.parent.name)}.npz")
    path = Path(f"{name}.npz")
    folder, _, stem = name.rpartition("/")
    if path.is_absolute() or ".." in path.parts or str(path) != f"{name}.npz" or ESCAPED.search(name):
        return f"{prefix}{_escape_stem(encode_key(name), '')}.npz"
    return f"{prefix}{folder}{'/' * bool(folder)}{_escape_stem(stem, folder)}.npz"


def get_key_folder(key: str) -> str:
    """Return the folder below the cache folder that holds the latents of a key: that of its resolution and folders."""
    prefix, name = split_key(key)
    return os.path.dirname(choose_output_file(key, "", beside=False)) if "/" in name else prefix.rstrip("/")


def _escape_stem(stem: str, folder: str) -> str:
    """Return a file's stem that neither `<stem of an image>_te_outputs` nor the empty caption's outputs have."""
    if stem.endswith(TEXT_ENDING):
        return stem.removesuffix(TEXT_ENDING) + TEXT_ENDING.replace("_", "%5F", 1)
    return "%65mpty" if (folder, stem) == EMPTY_NAME else stem


def find_shared_files(records: pa.Table, with_text: bool = False) -> dict[int, str]:
    """Find images beside which the latents of an earlier record lie: row → the reason why it cannot have its own.

    Two records may share an image, and then its latents, but not its text encoder outputs.

    Args:
        records: table with the column `image_path`.
        with_text: text encoder outputs are stored too.
    """
    paths = records.column("image_path")
    stems = [hash_texts([os.path.splitext(path)[0] for path in chunk.to_pylist()]) for chunk in paths.chunks]
    hashes = np.concatenate(stems) if stems else np.empty(0, np.int64)
    order = np.argsort(hashes, kind="stable")
    hashes, shared = hashes[order], dict[int, str]()
    for place in (np.flatnonzero(hashes[1:] == hashes[:-1]) + 1).tolist():
        first = order[np.searchsorted(hashes, hashes[place])]
        row, (path, other) = int(order[place]), (paths[int(at)].as_py() for at in (order[place], first))
        if not path.endswith(GIVEN_SUFFIXES) and (with_text or path != other):
            shared[row] = f"{path}: its latents would replace those of {other}; rename it, or set cache.dir"
    return shared


def plan_missing_latents(
    records: pa.Table, rows: np.ndarray, prefix: str, encoding: EncodingSettings
) -> Iterator[PlannedLatents | BadImage]:
    """Yield the latents to encode for the given rows of the records, at one resolution.

    An image that exists is not opened if the metadata hold its size: training detects a wrong size.
    """
    # Imported here, because the module takes megabytes of memory that programs without missing latents do not need.
    from sdxl_trainer.data.images.transforms import BadImageError, read_image_size, verify_aspect_ratio

    rule = dict(encoding.rules)[prefix]
    buckets = list_buckets(rule)
    place = lru_cache(maxsize=MAX_CACHED_SIZES)(lambda size: place_image(size, rule, buckets))

    shared = find_shared_files(records) if encoding.beside else {}

    def plan(row: int, key: str, image: str, width: int, height: int) -> PlannedLatents | BadImage:
        if row in shared:
            return BadImage(prefix + key, shared[row])
        size = Size(width, height)
        if width <= 0 or not os.path.isfile(image):
            try:
                size = read_image_size(Path(image))
            except BadImageError as error:
                cause = error.__context__
                is_unread = isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT)
                return BadImage(prefix + key, str(error), is_unread)
        try:
            verify_aspect_ratio(size, rule)
        except BadImageError as error:
            return BadImage(prefix + key, f"{image}: {error}")
        placement = place(size)
        if not fits_columns(size, placement):
            return BadImage(prefix + key, f"{image}: the size {size} px in its metadata is out of range")
        file = choose_output_file(prefix + key, image, encoding.beside)
        return PlannedLatents(row=row, prefix=prefix, file=file, size=size, placement=placement)

    columns = [records.column(name) for name in ("key", "image_path", "width", "height")]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for start in range(0, len(rows), IMAGES_AT_ONCE):
            chunk = rows[start : start + IMAGES_AT_ONCE]
            values = [column.take(pa.array(chunk)).to_pylist() for column in columns]
            images = list(zip(chunk.tolist(), *values, strict=True))
            tasks = [images[first : first + IMAGES_PER_TASK] for first in range(0, len(images), IMAGES_PER_TASK)]
            yield from chain.from_iterable(pool.map(lambda task: list(starmap(plan, task)), tasks))
