"""Looking at latents before training: are they there, of the right size, unchanged. On many threads."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from sdxl_trainer.data.formats.latent_header import LatentHeader, read_latent_header
from sdxl_trainer.data.formats.latents import BadLatentError, parse_latents
from sdxl_trainer.data.formats.shards import locate_shard
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.stores.remote import is_remote, read_spans

NUM_THREADS = 16
ROWS_A_TASK = 512
MASKS_LOOKED_AT = 10_000
COLUMNS = ("file", "offset", "bytes", "bucket_width", "bucket_height", "sha256")


@dataclass(frozen=True)
class Latents:
    """What an index says of one sample's latents."""

    path: Path | str  # a URL is text
    offset: int | None
    num_bytes: int | None  # None: there are none yet
    bucket: tuple[int, int]
    sha256: bytes | None


def find_bad_latents(
    index: Index, folder: Path, level: str, starts: Sequence[int] | None = None
) -> list[tuple[int, str]]:
    """(row, reason) of each sample whose latents fail the check, in order.

    Args:
        folder: the cache's.
        level: a key of CHECKS, each of which includes those before it.
        starts: where the blocks of ROWS_A_TASK samples begin that are looked at; None: everywhere.
    """
    check = CHECKS[level]
    if check is None:
        return []

    def look(start: int) -> list[tuple[int, str]]:
        bad, sizes = [], {}
        for row, latents in enumerate(_list_latents(index, folder, start), start):
            if latents.num_bytes is None:  # not made yet
                continue
            try:
                check_size(latents, sizes)
                check(latents)
            except BadLatentError as error:
                bad.append((row, f"{latents.path}: {error}"))
        return bad

    starts = range(0, len(index), ROWS_A_TASK) if starts is None else starts
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return [item for bad in pool.map(look, starts) for item in bad]


def count_unflipped(index: Index, folder: Path) -> int:
    """Samples without latents of the mirrored image. Headers tell where the manifest does not."""
    flipped = index.arrow_column("flipped")
    known = pc.call_function("sum", [flipped]).as_py() or 0
    unknown = pc.call_function("indices_nonzero", [flipped.is_null()]).to_pylist()

    def look(row: int) -> bool:
        header = _read_local_header(index.row(row), folder)
        return header is not None and header.flipped

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return len(index) - known - sum(pool.map(look, unknown))


def find_mask(index: Index, folder: Path) -> bool | None:
    """Whether some of a spread of samples have an `alpha_mask`, by their headers; None if none could be looked at, as
    with shards on stores."""
    rows = sorted({place * len(index) // MASKS_LOOKED_AT for place in range(MASKS_LOOKED_AT)})
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        headers = [
            header for header in pool.map(lambda row: _read_local_header(index.row(row), folder), rows) if header
        ]
    return any(header.masked for header in headers) if headers else None


def check_size(latents: Latents, sizes: dict[Path | str, int]) -> None:
    """Raises BadLatentError if the file is missing or has another size; `sizes` are those of files seen before.

    Remote shards were looked at when the index was opened: it is of the version that is there.
    """
    assert latents.num_bytes is not None, "latents that are not made yet are not looked at"
    if isinstance(latents.path, str):
        return
    if latents.path not in sizes:
        try:
            sizes[latents.path] = os.stat(latents.path).st_size
        except OSError as error:
            raise BadLatentError(f"cannot be read: {error.strerror}") from None
    size, end = sizes[latents.path], (latents.offset or 0) + latents.num_bytes
    if size < end or (latents.offset is None and size != end):
        raise BadLatentError(f"has {size} bytes, not {end}")


def check_header(latents: Latents) -> None:
    """Raises BadLatentError if the header names no latents of SDXL's, or another bucket."""
    if isinstance(latents.path, str):  # its header made the index
        return
    header = read_latent_header(str(latents.path), latents.offset or 0, latents.num_bytes)
    if header.bucket != latents.bucket:
        found, bucket = ("x".join(map(str, size)) for size in (header.bucket, latents.bucket))
        raise BadLatentError(f"was encoded at {found} px, not at its bucket's {bucket} px")


def check_content(latents: Latents) -> None:
    """Raises BadLatentError if the bytes are not those that the manifest vouches for, or, without one, no latents."""
    content = _read_content(latents)
    if latents.sha256 and hashlib.sha256(content).digest() != latents.sha256:
        raise BadLatentError("has another SHA-256 than the manifest says")
    parse_latents(content, latents.bucket, check_crc=not latents.sha256)


def _read_content(latents: Latents) -> bytes:
    assert latents.num_bytes is not None, "latents that are not made yet are not looked at"
    try:
        if isinstance(latents.path, Path):
            with open(latents.path, "rb") as stream:
                stream.seek(latents.offset or 0)
                return stream.read(latents.num_bytes)
        [content] = read_spans([(latents.path, latents.offset or 0, latents.num_bytes)])
    except OSError as error:
        raise BadLatentError(f"cannot be read: {error.strerror}") from None
    if isinstance(content, FileNotFoundError):
        raise BadLatentError(f"cannot be read: {content}")
    return content


CHECKS: dict[str, Callable[[Latents], None] | None] = {
    "none": None,
    "stat": lambda latents: None,
    "header": check_header,
    "full": check_content,
}


def _read_local_header(row: dict[str, Any], folder: Path) -> LatentHeader | None:
    """The header of local latents, None of others and of bad ones."""
    path = folder / row["file"]
    try:
        span = (0, None) if row["offset"] is None else (row["offset"], row["bytes"])
        return read_latent_header(str(path if row["offset"] is None else locate_shard(path)), *span)
    except BadLatentError:
        return None


def _list_latents(index: Index, folder: Path, start: int) -> Iterator[Latents]:
    columns = [index.arrow_column(name).slice(start, ROWS_A_TASK).to_pylist() for name in COLUMNS]
    paths: dict[str, Path | str] = {}
    for file, offset, size, width, height, digest in zip(*columns, strict=True):
        path = paths.get(file)
        if path is None:
            path = file if is_remote(file) else folder / file if offset is None else locate_shard(folder / file)
            paths[file] = path
        yield Latents(path, offset, size, (width, height), digest)
