"""Verify latent files before training: their presence, size, header and content. Files are read by many threads."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.data.files import open_stream
from sdxl_trainer.data.formats.latent_header import LatentHeader, read_latent_header
from sdxl_trainer.data.formats.latents import BadLatentError, parse_latents
from sdxl_trainer.data.formats.shards import locate_shard
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.order.even_selection import select_evenly
from sdxl_trainer.data.stores.remote import NoRangesError, RemoteSpan, is_remote, read_spans
from sdxl_trainer.data.stores.remote_sources import find_latent_header

NUM_THREADS = 16
ROWS_A_TASK = 512
NUM_MASKS_SAMPLED = 10_000
NUM_HEADERS = 64  # samples whose number of channels is looked at
NUM_MEASURED = 16  # samples whose latents are read to estimate the standard deviation
COLUMNS = ("file", "offset", "bytes", "bucket_width", "bucket_height", "sha256")


@dataclass(frozen=True)
class IndexedLatents:
    """One sample's latents as the index describes them."""

    path: Path | str  # a URL is a str
    offset: int | None  # in a shard; None: a file of its own
    num_bytes: int | None  # None: not encoded yet
    bucket: Size
    sha256: bytes | None  # None: no manifest lists the latents


class BadRow(NamedTuple):
    """A row of the index whose latents failed verification."""

    row: int
    reason: str  # begins with the file's path


def find_bad_latents(index: Index, folder: Path, level: str, starts: Sequence[int] | None = None) -> list[BadRow]:
    """Return the rows whose latents fail verification, in the order of the index.

    Args:
        folder: the cache folder.
        level: a value of `data.verify_latents`: `none`, `stat`, `header` or `full`; each includes those before it.
        starts: first rows of the blocks of ROWS_A_TASK samples to verify; None verifies all samples.
    """
    verify = VERIFIERS[level]
    if verify is None:
        return []

    def verify_block(start: int) -> list[BadRow]:
        bad, file_sizes = [], {}
        for row, latents in enumerate(_list_latents(index, folder, start), start):
            if latents.num_bytes is None:  # not encoded yet
                continue
            try:
                verify_size(latents, file_sizes)
                verify(latents)
            except BadLatentError as error:
                bad.append(BadRow(row, f"{latents.path}: {error}"))
        return bad

    starts = range(0, len(index), ROWS_A_TASK) if starts is None else starts
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return [item for bad in pool.map(verify_block, starts) for item in bad]


def count_unflipped(index: Index, folder: Path) -> int:
    """Return the number of samples without latents of the mirrored image.

    Where the index does not hold this, the header of the latents is read.
    """
    flipped = index.arrow_column("flipped")
    num_flipped = pc.call_function("sum", [flipped]).as_py() or 0
    unknown_rows = pc.call_function("indices_nonzero", [flipped.is_null()]).to_pylist()

    def has_flipped(row: int) -> bool:
        header = _read_local_header(index.row(row), folder)
        return header is not None and header.flipped

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return len(index) - num_flipped - sum(pool.map(has_flipped, unknown_rows))


def has_masks(index: Index, folder: Path) -> bool | None:
    """Return whether any of NUM_MASKS_SAMPLED evenly spaced samples has an `alpha_mask` by its header.

    None if no header could be read, for example because all latents are on remote stores.
    """
    rows = select_evenly(len(index), NUM_MASKS_SAMPLED).tolist()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        headers = list(filter(None, pool.map(lambda row: _read_local_header(index.row(row), folder), rows)))
    return any(header.masked for header in headers) if headers else None


def check_latent_channels(index: Index, folder: Path, channels: int) -> Iterator[Problem]:
    """Yield a problem if latents have another number of channels than the VAE.

    The headers of NUM_HEADERS evenly spaced samples are read. Others that differ are bad samples when they are read.

    Args:
        folder: the cache folder.
    """
    rows = select_evenly(len(index), NUM_HEADERS).tolist()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        headers = pool.map(lambda row: _read_any_header(index.row(row), folder, index.path.parent), rows)
        others = [(row, header.channels) for row, header in zip(rows, headers, strict=True) if header]
    others = [(row, found) for row, found in others if found != channels]
    if others:
        row, found = others[0]
        rule = (
            f"holds latents of {found} channels, and the VAE of the settings gives {channels} "
            f"(first sample: {index.row(row)['key']}; {len(others)} of {len(rows)} that were looked at)"
        )
        cure = (
            "set model.vae to the VAE that made them; or run bash launch/cache.sh with these settings and another "
            "cache.dir"
        )
        yield Problem("cache.dir", folder, rule, cure)


def measure_latent_std(index: Index, folder: Path) -> float | None:
    """Return the standard deviation of the latents of NUM_MEASURED evenly spaced samples; None if none can be read.

    Args:
        folder: the cache folder.

    Raises:
        StoreError: a store cannot be read.
    """

    def read(row: int) -> np.ndarray | None:
        [latents] = _list_latents(index, folder, row, 1)
        try:
            return None if latents.num_bytes is None else parse_latents(_read_content(latents)).latents.ravel()
        except (BadLatentError, NoRangesError):  # a whole shard for one sample would take too long
            return None

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        rows = select_evenly(len(index), NUM_MEASURED).tolist()
        values = [found for found in pool.map(read, rows) if found is not None]
    return float(np.concatenate(values).std(dtype=np.float64)) if values else None


def verify_size(latents: IndexedLatents, file_sizes: dict[Path | str, int]) -> None:
    """Verify that the latents' file exists and has the size listed in the index.

    Remote shards pass: opening the index compared their size and version with the store's.

    Args:
        file_sizes: known sizes of files in bytes; the function adds this file's size.

    Raises:
        BadLatentError: the file is missing or has another size.
    """
    assert latents.num_bytes is not None, "latents that are not encoded yet have no file"
    if isinstance(latents.path, str):
        return
    if latents.path not in file_sizes:
        try:
            file_sizes[latents.path] = os.stat(latents.path).st_size
        except OSError as error:
            raise BadLatentError(f"cannot be read: {error.strerror}") from None
    size, end = file_sizes[latents.path], (latents.offset or 0) + latents.num_bytes
    if latents.offset is None and size != end:
        raise BadLatentError(f"has {size} bytes instead of {end}")
    if size < end:
        raise BadLatentError(f"has {size} bytes, but the sample ends at byte {end}")


def verify_header(latents: IndexedLatents) -> None:
    """Verify that the latents' header describes latents of the sample's bucket.

    Remote shards pass: the index was built from their headers.

    Raises:
        BadLatentError: the header describes something else, or another bucket.
    """
    if isinstance(latents.path, str):
        return
    header = read_latent_header(str(latents.path), latents.offset or 0, latents.num_bytes)
    if header.bucket != latents.bucket:
        found, bucket = ("x".join(map(str, size)) for size in (header.bucket, latents.bucket))
        raise BadLatentError(f"was encoded at {found} px, not at its bucket's {bucket} px")


def verify_content(latents: IndexedLatents) -> None:
    """Verify the latents' bytes against the manifest's SHA-256, and that they hold latents of the sample's bucket.

    Raises:
        BadLatentError: the hash differs, or the bytes are not valid latents.
    """
    content = _read_content(latents)
    if latents.sha256 and hashlib.sha256(content).digest() != latents.sha256:
        raise BadLatentError("SHA-256 differs from the manifest")
    parse_latents(content, latents.bucket, check_crc=not latents.sha256)


def _read_content(latents: IndexedLatents) -> bytes:
    assert latents.num_bytes is not None, "latents that are not encoded yet have no content"
    try:
        if isinstance(latents.path, Path):
            with open_stream(latents.path) as stream:
                stream.seek(latents.offset or 0)
                return stream.read(latents.num_bytes)
        [content] = read_spans([RemoteSpan(latents.path, latents.offset or 0, latents.num_bytes)])
    except OSError as error:
        raise BadLatentError(f"cannot be read: {error.strerror}") from None
    if isinstance(content, FileNotFoundError):
        raise BadLatentError(f"cannot be read: {content}")
    return content


VERIFIERS: dict[str, Callable[[IndexedLatents], None] | None] = {
    "none": None,
    "stat": lambda latents: None,
    "header": verify_header,
    "full": verify_content,
}


def _read_local_header(row: dict[str, Any], folder: Path) -> LatentHeader | None:
    """Read the header of local latents; None for remote and for bad latents."""
    if is_remote(row["file"]):
        return None
    path = folder / row["file"]
    try:
        span = (0, None) if row["offset"] is None else (row["offset"], row["bytes"])
        return read_latent_header(str(path if row["offset"] is None else locate_shard(path)), *span)
    except BadLatentError:
        return None


def _read_any_header(row: dict[str, Any], folder: Path, index_folder: Path) -> LatentHeader | None:
    """Read the header of latents, of remote ones from their shard's catalogue; None for bad and for missing latents."""
    if row["bytes"] is None or not is_remote(row["file"]):
        return _read_local_header(row, folder)
    try:
        return find_latent_header(index_folder, row["file"], row["offset"] or 0)
    except BadLatentError:
        return None


def _list_latents(index: Index, folder: Path, start: int, number: int = ROWS_A_TASK) -> Iterator[IndexedLatents]:
    """Yield the latents of `number` rows of the index from `start` on."""
    columns = [index.arrow_column(name, start, number).to_pylist() for name in COLUMNS]
    paths: dict[str, Path | str] = {}
    for file, offset, size, width, height, digest in zip(*columns, strict=True):
        path = paths.get(file)
        if path is None:
            path = file if is_remote(file) else folder / file if offset is None else locate_shard(folder / file)
            paths[file] = path
        yield IndexedLatents(path=path, offset=offset, num_bytes=size, bucket=Size(width, height), sha256=digest)
