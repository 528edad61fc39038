"""Latents that no manifest lists: made by other programs, or by this one and moved without their manifest.

The search accepts the same file names as `find_latent_file` (data/formats/latents.py), but lists each folder only once.
Many threads read bucket and crop from the headers of the npz files, because storage may be slow.
"""

import os
from collections.abc import Iterator, Mapping
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
from sdxl_trainer.data.images.image_files import LATENT_SUFFIX, choose_latent_files, get_image_stem
from sdxl_trainer.data.index.missing_latents import get_key_folder
from sdxl_trainer.data.stores.remote import is_remote
from sdxl_trainer.data.stores.remote_sources import find_latent_header

NUM_THREADS = 16
ROWS_AT_ONCE = 4096
MAX_LISTED_FOLDERS = 64  # folders whose listing is kept
# A placeholder: `place_image` does not use the rule if there is only one bucket.
NOTHING_REFUSED: Mapping[str, tuple[int, int]] = {}
ANY_RULE = BucketRule(resolution_px=1024, min_px=64, max_px=2048, step_px=64)


@dataclass(frozen=True)
class LatentLocation:
    """The npz that holds a record's latents."""

    row: int  # of the record
    file: str  # absolute path of the npz or its shard, or the shard's URL
    offset: int | None  # of the npz in its shard; None: an npz file of its own
    bytes: int | None  # of the npz in its shard
    prefix: str = ""  # of the resolution


def find_unlisted_latents(
    records: pa.Table,
    rows: np.ndarray,
    cache_folder: Path,
    watched: set[str],
    prefix: str = "",
    refused: Mapping[str, tuple[int, int]] = NOTHING_REFUSED,
) -> Iterator[LatentLocation]:
    """Yield the latents of the given rows of the records at one resolution.

    They may lie in the shard that the record came from, in place of the image, beside it, or in the cache folder.

    Args:
        watched: set to which the searched folders are added. The result is valid until one of them changes.
        prefix: prefix of the resolution's keys. Its latents lie in a subfolder of this name.
        refused: files that are not used, as `read_refused` of data/formats/manifest.py returns them.
    """
    list_latents = lru_cache(maxsize=MAX_LISTED_FOLDERS)(_list_latents)
    cache = os.path.abspath(cache_folder)
    columns = [records.column(name) for name in ("key", "image_path", "offset", "bytes")]
    for start in range(0, len(rows), ROWS_AT_ONCE):
        chunk = rows[start : start + ROWS_AT_ONCE]
        values = (column.take(pa.array(chunk)).to_pylist() for column in columns)
        for row, key, path, offset, size in zip(chunk.tolist(), *values, strict=True):
            if offset is not None:
                yield LatentLocation(row=row, file=path, offset=offset, bytes=size)
                continue
            if path.endswith(LATENT_SUFFIX) and os.path.isfile(path):
                watched.add(os.path.dirname(path))
                if not _is_refused(path, refused):
                    yield LatentLocation(row=row, file=path, offset=None, bytes=None)
                continue
            image_folder, name = os.path.split(path)
            cached = os.path.join(cache, get_key_folder(prefix + key))
            for folder in dict.fromkeys((os.path.join(image_folder, prefix).rstrip("/"), cached.rstrip("/"))):
                watched.add(folder)
                found = list_latents(folder).get(get_image_stem(name))
                if found is None:
                    continue
                file = os.path.join(folder, found)
                if not _is_refused(file, refused):
                    yield LatentLocation(row=row, file=file, offset=None, bytes=None, prefix=prefix)
                break


def read_latent_headers(
    locations: Iterator[LatentLocation], index_folder: Path
) -> Iterator[tuple[LatentLocation, LatentHeader | BadLatentError]]:
    """Yield each location with its npz's header, or with the error that the read raised, in order.

    Args:
        index_folder: folder of the indexes, which also holds the headers of remote shards.
    """
    read, rows_per_task = partial(_read_headers, index_folder), ROWS_AT_ONCE // NUM_THREADS
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        while chunk := list(islice(locations, ROWS_AT_ONCE)):
            tasks = [chunk[start : start + rows_per_task] for start in range(0, len(chunk), rows_per_task)]
            for task, headers in zip(tasks, pool.map(read, tasks), strict=True):
                yield from zip(task, headers, strict=True)


def infer_placement(header: LatentHeader, original_size: Size, rule: BucketRule | None = None) -> Placement:
    """Infer how an image was resized and cropped into its bucket, from the header of any program's latents.

    This project's crop is as large as the bucket, in the resized image, and is used as it is. kohya's scripts store the
    letterbox of the image in the bucket instead: they resize the image by their bucket rule and cut out the middle. A
    crop of zeros comes from the first sdxl-trainer, which stretched the image to the bucket.

    Args:
        rule: the bucket rule of the settings. With `no_upscale` it decides how the image was resized.
    """
    crop, bucket = header.crop_ltrb, header.bucket
    if crop and not any(crop):
        return Placement(bucket, bucket, 0, 0)
    placements = [place_image(original_size, ANY_RULE, [bucket])]
    if rule is not None and rule.no_upscale:
        placements.insert(0, place_image(original_size, rule, []))
    placements = [placement for placement in placements if placement.bucket == bucket]
    if crop is None or min(crop) < 0 or (crop[2] - crop[0], crop[3] - crop[1]) != bucket:
        return placements[0]
    left, top = round(crop[0]), round(crop[1])
    for placement in placements:
        if (placement.left, placement.top) == (left, top):
            return placement
    width, height = bucket
    is_unscaled = ((original_size.width - width) // 2, (original_size.height - height) // 2) == (left, top)
    resized = original_size if is_unscaled else Size(2 * left + width, 2 * top + height)
    return Placement(bucket, resized, left, top)


def _is_refused(file: str, refused: Mapping[str, tuple[int, int]]) -> bool:
    """Return whether a file is one that `--adopt` refused and has not changed since."""
    known = refused.get(file)
    if known is None:
        return False
    status = os.stat(file)
    return known == (status.st_size, status.st_mtime_ns)


def _read_headers(index_folder: Path, locations: list[LatentLocation]) -> list[LatentHeader | BadLatentError]:
    headers: list[LatentHeader | BadLatentError] = []
    for location in locations:
        try:
            if is_remote(location.file):
                headers.append(find_latent_header(index_folder, location.file, location.offset or 0))
            else:
                headers.append(read_latent_header(location.file, location.offset or 0, location.bytes))
        except BadLatentError as error:
            headers.append(error)
    return headers


def _list_latents(folder: str) -> dict[str, str]:
    """Return the latent files in a folder: stem of the image → file name."""
    try:
        return choose_latent_files(sorted(os.listdir(folder)))
    except OSError:
        return {}
