"""The cache job's list of images that it could not use, read again where their latents are missed."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_trainer.data.images.bucket import split_key
from sdxl_trainer.data.index.index import Index


class UnusableImage(NamedTuple):
    """An image that the cache job could not use, and that has not changed since."""

    key: str  # of its sample, with the prefix of the resolution
    reason: str  # begins with the file's path


def get_bad_images_file(folder: Path) -> Path:
    """Return the file of a cache folder that lists the images which could not be used."""
    return folder / "logs" / "bad_samples.jsonl"


def list_unusable_images(folder: Path, records: Index, samples: Index) -> list[UnusableImage]:
    """List the images of records that have no latents because the last cache job could not use them.

    Args:
        folder: the cache folder.
    """
    listed = {image.key: image for image in _read_list(get_bad_images_file(folder))}
    if not listed:
        return []
    keys = list(listed)
    is_wanted = _is_in([split_key(key)[1] for key in keys], records)
    has_latents = _is_in(keys, samples)
    chosen = zip(keys, is_wanted, has_latents, strict=True)
    return [listed[key] for key, wanted, found in chosen if wanted and not found]


def _is_in(keys: list[str], index: Index) -> list[bool]:
    """Return for each key whether it is one of an index."""
    options = pc.SetLookupOptions(index.arrow_column("key").combine_chunks())
    return pc.call_function("is_in", [pa.array(keys, pa.string())], options).to_pylist()


def _read_list(file: Path) -> Iterator[UnusableImage]:
    """Yield the lines of images that are as they were. A line that cannot be read is left out."""
    try:
        content = file.read_bytes()
    except OSError:
        return
    for text in content.splitlines():
        try:
            line = orjson.loads(text)
            if _is_unchanged(line):
                yield UnusableImage(str(line["key"]), str(line["reason"]))
        except (ValueError, LookupError, TypeError):
            continue


def _is_unchanged(line: dict[str, Any]) -> bool:
    """Return whether an image's file has its size and time of the list; True for one whose storage had failed."""
    if line.get("source") is None:
        return True
    try:
        status = os.stat(line["file"])
    except OSError:
        return True  # still missing
    return [status.st_size, status.st_mtime_ns] == line["source"][:2]
