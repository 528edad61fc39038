"""Images that have no latents yet: in which bucket each will be trained, and where its latents will lie.

With `cache.on_missing: encode` they are planned like all others, and encoded when training meets them
(cache/encode/on_the_fly.py).
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, starmap
from pathlib import Path

import numpy as np
import pyarrow as pa

from sdxl_trainer.data.formats.shards import encode_key
from sdxl_trainer.data.images.bucket import BucketRule, Placement, Size, list_buckets, place_image, split_key

NUM_THREADS = 16
MAX_SIZES = 65_536  # of images that are kept with their buckets: many have the same
AT_ONCE, A_TASK = 16_384, 256  # images: a task for each would cost more than asking for its file


@dataclass(frozen=True)
class EncodingSettings:
    """How latents will be made of images that have none."""

    rules: tuple[tuple[str, BucketRule], ...]  # with the prefix of the keys
    beside: bool  # latents go beside the images instead of under the cache folder
    flip: bool


@dataclass(frozen=True)
class PlannedLatents:
    """An image without latents at one resolution."""

    row: int  # of the record
    prefix: str
    file: str  # where its latents will be: relative to the cache folder, or absolute
    size: Size
    placement: Placement


def choose_latent_file(key: str, image_path: str, beside: bool) -> str:
    """Where an image's latents go as npz: beside it, or under the cache folder, which no key may lead out of. Those of
    further resolutions go into a folder of their own there."""
    prefix, name = split_key(key)
    if beside:
        image = Path(image_path)
        return str(image.parent / prefix / f"{image.stem}.npz")
    path = Path(f"{name}.npz")
    return prefix + (encode_key(name) + ".npz" if path.is_absolute() or ".." in path.parts else str(path))


def plan_missing_latents(
    records: pa.Table, rows: np.ndarray, prefix: str, encoding: EncodingSettings
) -> Iterator[PlannedLatents | tuple[str, str]]:
    """Where each image of the given rows of the records belongs, or (key, reason) of one that cannot be used.

    The metadata's size is believed as long as the image is there: if it is wrong, training finds out.
    """
    from sdxl_trainer.data.images.transforms import BadImageError, read_image_size  # megabytes that most programs spare

    rule = dict(encoding.rules)[prefix]
    buckets = list_buckets(rule)
    choose = lru_cache(maxsize=MAX_SIZES)(lambda size: place_image(size, rule, buckets))

    def place(row: int, key: str, image: str, width: int, height: int) -> PlannedLatents | tuple[str, str]:
        size = (width, height)
        if width <= 0 or not os.path.isfile(image):
            try:
                size = read_image_size(Path(image))
            except BadImageError as error:
                return prefix + key, str(error)
        file = choose_latent_file(prefix + key, image, encoding.beside)
        return PlannedLatents(row, prefix, file, size, choose(size))

    columns = [records.column(name) for name in ("key", "image_path", "width", "height")]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for start in range(0, len(rows), AT_ONCE):
            some = rows[start : start + AT_ONCE]
            values = [column.take(pa.array(some)).to_pylist() for column in columns]
            images = list(zip(some.tolist(), *values, strict=True))
            tasks = [images[first : first + A_TASK] for first in range(0, len(images), A_TASK)]
            yield from chain.from_iterable(pool.map(lambda task: list(starmap(place, task)), tasks))
