"""Latents that no manifest lists: made by other programs, or ours without the manifest.

They are found by name, as `find_latent_file` of data/formats/latents.py does it, but each folder is listed once. Where
and at what size each was encoded is read from the headers of the npz files, on many threads, because storage may be far
away.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from sdxl_trainer.data.formats.latent_header import LatentHeader, read_latent_header
from sdxl_trainer.data.formats.latents import BadLatentError
from sdxl_trainer.data.images.bucket import BucketRule, Placement, Size, place_image
from sdxl_trainer.data.images.image_files import LATENT_SUFFIX, choose_latents, strip_suffix
from sdxl_trainer.data.stores.remote import is_remote
from sdxl_trainer.data.stores.remote_sources import find_latent_header

NUM_THREADS = 16
AT_ONCE = 4096
ANY_RULE = BucketRule(1024, 64, 2048, 64)  # place_image asks the rule for nothing when there is but one bucket


@dataclass(frozen=True)
class LatentLocation:
    """Where a record's latents lie."""

    row: int  # of the record
    file: str  # absolute
    offset: int | None  # of the npz in a shard; None: a file of its own
    bytes: int | None
    prefix: str = ""  # of the resolution


def find_unlisted_latents(
    records: pa.Table, rows: np.ndarray, folder: Path, watched: set[str], prefix: str = ""
) -> Iterator[LatentLocation]:
    """Latents of the given rows of the records: in the shard that the record came from, in place of its image, beside
    that, or in the cache folder.

    Args:
        watched: gets the folders whose files decided it.
        prefix: of a further resolution, whose latents lie in a folder of that name.
    """
    list_latents = lru_cache(maxsize=64)(_list_latents)
    cache = os.path.abspath(folder)
    columns = [records.column(name) for name in ("image_path", "offset", "bytes")]
    for start in range(0, len(rows), AT_ONCE):
        some = rows[start : start + AT_ONCE]
        values = (column.take(pa.array(some)).to_pylist() for column in columns)
        for row, path, offset, size in zip(some.tolist(), *values, strict=True):
            if offset is not None:
                yield LatentLocation(row, path, offset, size)
                continue
            if path.endswith(LATENT_SUFFIX) and os.path.isfile(path):
                watched.add(os.path.dirname(path))
                yield LatentLocation(row, path, None, None)
                continue
            where, name = os.path.split(path)
            for place in dict.fromkeys(base + "/" * bool(prefix) + prefix.rstrip("/") for base in (where, cache)):
                watched.add(place)
                found = list_latents(place).get(strip_suffix(name))
                if found is not None:
                    yield LatentLocation(row, os.path.join(place, found), None, None, prefix)
                    break


def read_latent_headers(
    places: Iterator[LatentLocation], folder: Path
) -> Iterator[tuple[LatentLocation, LatentHeader | BadLatentError]]:
    """The header of each, or why it has none, in order.

    Args:
        folder: of the indexes, where the headers of remote shards are kept.
    """
    read = partial(_read_part, folder)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        while some := list(islice(places, AT_ONCE)):
            parts = [
                some[start : start + AT_ONCE // NUM_THREADS] for start in range(0, len(some), AT_ONCE // NUM_THREADS)
            ]
            for part, headers in zip(parts, pool.map(read, parts), strict=True):
                yield from zip(part, headers, strict=True)


def infer_placement(header: LatentHeader, original_size: Size) -> Placement:
    """How an image was brought into its bucket, as far as a file of whatever program tells.

    Our crop is in the resized image and as large as the bucket. kohya's scripts note the letterbox of the image in
    the bucket, though they resize to cover and cut the middle out. Zeros are of the first sdxl-trainer, which stretched
    the image to the bucket.
    """
    crop, bucket = header.crop_ltrb, header.bucket
    if crop and not any(crop):
        return Placement(bucket, bucket, 0, 0)
    return place_image(original_size, ANY_RULE, [bucket])


def _read_part(folder: Path, places: list[LatentLocation]) -> list[LatentHeader | BadLatentError]:
    headers: list[LatentHeader | BadLatentError] = []
    for place in places:
        try:
            if is_remote(place.file):
                headers.append(find_latent_header(folder, place.file, place.offset or 0))
            else:
                headers.append(read_latent_header(place.file, place.offset or 0, place.bytes))
        except BadLatentError as error:
            headers.append(error)
    return headers


def _list_latents(folder: str) -> dict[str, str]:
    """Stem of the image → name of the latent file in a folder."""
    try:
        return choose_latents(sorted(os.listdir(folder)))
    except OSError:
        return {}
