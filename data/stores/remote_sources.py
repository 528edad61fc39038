"""Local files for metadata sources on stores: a catalogue for each shard, and a copy of any other file.

They lie beside the index. Their names hold the object's version, so that only changed objects are read again.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from loguru import logger

from sdxl_trainer.data.files import open_temporary, remove_leftovers
from sdxl_trainer.data.formats.latent_header import LatentHeader
from sdxl_trainer.data.formats.latents import BadLatentError
from sdxl_trainer.data.formats.shard_samples import (
    CATALOGUE_SUFFIX,
    WINDOW_AFTER,
    WINDOW_BEFORE,
    ShardSample,
    list_shard_samples,
    load_catalogue,
    save_catalogue,
)
from sdxl_trainer.data.stores.remote import (
    NoRangesError,
    RemoteFile,
    StoredObject,
    copy_object,
    describe_objects,
    download,
    is_remote,
    is_remote_shard,
)
from sdxl_trainer.data.stores.streams import UNKNOWN_BYTES, is_streamed

FOLDER = "remote"
NUM_THREADS = 16


@dataclass(frozen=True)
class LocalSources:
    """The local files of a source."""

    files: list[Path]
    urls: dict[str, str]  # local file → URL


def fetch_sources(names: Sequence[Path | str], folder: Path) -> LocalSources:
    """Return the local file of each source: a path itself, or the catalogue or copy of a URL. Fetch missing files.

    Args:
        folder: folder of the indexes. The files lie in its subfolder `remote/`.

    Raises:
        FileNotFoundError: an object does not exist.
        StoreError: a store cannot be read.
        BadShardError: a shard is torn, or not a tar.
    """
    urls = [str(name) for name in names if is_remote(name)]
    items = describe_objects(urls)
    for item in items:
        if isinstance(item, FileNotFoundError):
            raise item
    described = [item for item in items if isinstance(item, StoredObject)]
    targets = {item.url: folder / FOLDER / _build_file_name(item) for item in described}
    if described:
        _remove_outdated(folder / FOLDER, targets)
    missing = [item for item in described if not _is_whole(targets[item.url], item)]
    if missing:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        logger.info("reading {} of {} remote files for the index", len(missing), len(urls))
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for done, _ in enumerate(pool.map(lambda item: _fetch_source(item, targets[item.url]), missing), 1):
                if done % 100 == 0:
                    logger.info("read {} of {} remote files", done, len(missing))
        find_catalogue.cache_clear()
        _load_headers.cache_clear()
    return LocalSources(
        [targets.get(str(name)) or Path(name) for name in names], {str(target): url for url, target in targets.items()}
    )


@contextmanager
def show_urls_in_errors(sources: Sequence[LocalSources]) -> Iterator[None]:
    """Replace local files by their URLs in the messages of errors raised in the block.

    Raises:
        ValueError: the error, with URLs in its message.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        for local, url in (pair for source in sources for pair in source.urls.items()):
            message = message.replace(local, url)
        error.args = (message,)  # keeps the class, by which a cure is chosen
        if str(error) == message:
            raise
        raise ValueError(message) from None


def find_latent_header(folder: Path, url: str, offset: int) -> LatentHeader:
    """Return the header of the npz at an offset of a remote shard, from the shard's catalogue.

    Raises:
        BadLatentError: the latents are bad, or the shard has no catalogue.
    """
    header = _load_headers(folder, url).get(offset, "is not in the catalogue of its shard")
    if isinstance(header, str):
        raise BadLatentError(header)
    return header


@lru_cache(maxsize=100_000)
def find_catalogue(folder: Path, url: str) -> Path | None:
    """Find the catalogue of a remote shard. Its name contains the shard's version; `fetch_sources` keeps only one.

    Args:
        folder: folder of the indexes.
    """
    files = (folder / FOLDER).glob(f"{_hash(url)}-*{CATALOGUE_SUFFIX}")
    return min(files, default=None)


def name_shard_version(folder: Path, url: str) -> str:
    """Return a file stem that identifies the version of a remote shard that the index was built from."""
    file = find_catalogue(folder, url)
    return file.stem if file else _hash(url)


@lru_cache(maxsize=64)
def _load_headers(folder: Path, url: str) -> dict[int, LatentHeader | str]:
    """Return the header of each npz of a shard by its offset, or the reason why it is bad."""
    file = find_catalogue(folder, url)
    _, samples = load_catalogue(file) if file else ("", [])
    found = ((sample.offset, sample.header or sample.bad or "has no header") for sample in samples)
    return {offset: header for offset, header in found if offset is not None}


def _fetch_source(item: StoredObject, target: Path) -> None:
    if target.suffix == CATALOGUE_SUFFIX:
        _write_catalogue(item, target)
    else:
        download(item.url, target)


def _is_whole(target: Path, item: StoredObject) -> bool:
    """Return whether the local file of an object exists; a copy also has the object's size."""
    has_size = target.suffix != CATALOGUE_SUFFIX and item.size != UNKNOWN_BYTES
    return target.is_file() and (not has_size or target.stat().st_size == item.size)


def _remove_outdated(folder: Path, targets: Mapping[str, Path]) -> None:
    """Delete leftovers of killed jobs and the files of earlier versions of objects, so that each has one file."""
    remove_leftovers(folder)
    current = {target.name for target in targets.values()}
    urls = {name.partition("-")[0] for name in current}
    for file in folder.glob("*-*"):
        if file.name not in current and file.name.partition("-")[0] in urls:
            file.unlink(missing_ok=True)


def _write_catalogue(item: StoredObject, target: Path) -> None:
    try:
        samples = _list_from_copy(item.url, target) if is_streamed(item.url) else _list_by_ranges(item)
    except NoRangesError:
        samples = _list_from_copy(item.url, target)
    save_catalogue(target, item.url, samples)


def _list_by_ranges(item: StoredObject) -> list[ShardSample]:
    with RemoteFile(item, WINDOW_BEFORE, WINDOW_AFTER) as stream:
        return list_shard_samples(item.url, stream, with_headers=True)  # pyright: ignore[reportArgumentType]


def _list_from_copy(url: str, target: Path) -> list[ShardSample]:
    """List the samples of a shard from a copy beside `target`, which is deleted afterwards."""
    with open_temporary(target) as whole:
        copy_object(url, Path(whole.name))
        with open(whole.name, "rb") as stream:
            return list_shard_samples(url, stream, with_headers=True)


def _build_file_name(item: StoredObject) -> str:
    suffix = Path(item.url.partition("?")[0]).suffix.lower()
    suffix = CATALOGUE_SUFFIX if is_remote_shard(item.url) else suffix
    return f"{_hash(item.url)}-{_hash(item.version)}{suffix}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
