"""Set up a cache on a store for writing: lock, spool, and what killed jobs have left."""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

from loguru import logger

from sdxl_trainer.cache.encode.spool import (
    OBJECT_PREFIX,
    PENDING_FOLDER,
    CacheStore,
    ShardUploads,
    SpoolStorage,
    name_part,
    name_record,
    recover_spool,
)
from sdxl_trainer.cache.encode.storage import SHARD_NAME
from sdxl_trainer.configs.problems import FailedError, Problem, UserInputError, raise_if_any
from sdxl_trainer.configs.schema import CacheConfig, Config
from sdxl_trainer.data.checks.cache_store import build_store_problem
from sdxl_trainer.data.checks.folders import check_writable
from sdxl_trainer.data.formats.manifest import find_last_number, read_entries
from sdxl_trainer.data.formats.refused_files import get_refused_file
from sdxl_trainer.data.formats.text_cache import EMPTY_FILE, STATE_FILE
from sdxl_trainer.data.index.selection import get_cache_folder, get_store_url
from sdxl_trainer.data.metadata.shard_list import ShardListError, expand_shard_list
from sdxl_trainer.data.stores.cache_mirror import MANIFEST_FOLDER, SHARD_FOLDER, lock_mirror, pull_cache, push_files
from sdxl_trainer.data.stores.remote import NoRangesError, RemoteSpan, StoreError, read_spans
from sdxl_trainer.data.stores.store_lock import HeldError, LockTicket, StoreLock
from sdxl_trainer.launch.distributed import (
    Ranks,
    broadcast_object,
    count_ranks_here,
    gather_objects,
    share_problems,
    wait_for_ranks,
)

SPOOL_FOLDER = "spool"
RECORD_FILE = re.compile(rf"{MANIFEST_FOLDER}/{OBJECT_PREFIX}({SHARD_NAME.pattern})\.json")
SHARDS_IN_SPOOL = 2  # of each rank at least: one that is filled, one that is uploaded


@contextmanager
def open_store_for_ranks(config: Config, ranks: Ranks) -> Iterator[CacheStore | None]:
    """Lock the cache of the settings, if it is on a store, and bring it into order; None for a cache on disk.

    All ranks enter together.

    Raises:
        UserInputError: the store, the spool or another job rules the work out.
        FailedError: the store failed.
    """
    url = get_store_url(config)
    if url is None:
        yield None
        return
    with ExitStack() as stack, name_store_errors(url):
        ticket = None
        with share_problems():
            if ranks.is_main:
                ticket = stack.enter_context(lock_store(url))
                pull_cache(url, get_cache_folder(config))
        store = CacheStore(url, choose_spool(config), broadcast_object(ticket), list_sources(config))
        found = gather_objects(list(check_spool(config.cache, store.spool, count_ranks_here())))
        raise_if_any(dict.fromkeys(chain.from_iterable(found)))
        if ranks.local_rank == 0:
            recover_spool(store, get_cache_folder(config))
        wait_for_ranks("the shards that an interrupted job left")
        if ranks.is_main:
            tidy_store(store, get_cache_folder(config))
        wait_for_ranks("the manifest of the cache")
        yield store


@contextmanager
def open_store(config: Config) -> Iterator[CacheStore | None]:
    """Like `open_store_for_ranks`, for a command that runs on one rank."""
    url = get_store_url(config)
    if url is None:
        yield None
        return
    with name_store_errors(url), lock_store(url) as ticket:
        store = CacheStore(url, choose_spool(config), ticket, list_sources(config))
        raise_if_any(check_spool(config.cache, store.spool, 1))
        pull_cache(url, get_cache_folder(config))
        recover_spool(store, get_cache_folder(config))
        tidy_store(store, get_cache_folder(config))
        yield store


@contextmanager
def name_store_errors(url: str) -> Iterator[None]:
    """Raise a FailedError that names a store's failure and the cure."""
    try:
        yield
    except StoreError as error:
        raise FailedError(
            f"{error}. Everything that the manifest of {url} lists is whole; solve this and run the same command again"
        ) from error


@contextmanager
def lock_store(url: str) -> Iterator[LockTicket]:
    """Lock a cache on a store within the context. The lock is also a trial of writing and of reading a range.

    Raises:
        UserInputError: another job holds the lock, or the store cannot be used.
    """
    with hold_lock(url, "cache.dir") as ticket:
        _try_range(url, ticket)
        yield ticket


@contextmanager
def hold_lock(url: str, setting: str) -> Iterator[LockTicket]:
    """Lock a cache on a store within the context, without the trial of reading a range.

    Args:
        setting: that names the store, for the problem.

    Raises:
        UserInputError: another job holds the lock, or the store cannot be used.
    """
    try:
        lock = StoreLock(url)
    except HeldError as error:
        holder = f" ({error})" if str(error) else ""
        cure = "wait for that job or stop it; a lock without a heartbeat for 10 minutes is taken over"
        raise UserInputError([Problem(setting, url, f"is being written by another job{holder}", cure)]) from None
    except (FileNotFoundError, StoreError) as error:
        raise UserInputError([replace(build_store_problem(url, error), key=setting)]) from None
    try:
        yield lock.ticket
    finally:
        lock.release()


def _try_range(url: str, ticket: LockTicket) -> None:
    try:
        [content] = read_spans([RemoteSpan(ticket.name, 1, 4)])
    except NoRangesError:
        content = b""
    except StoreError as error:
        raise UserInputError([build_store_problem(url, error)]) from None
    if len(content if isinstance(content, bytes) else b"") != 4:
        rule = "cannot be used: the store does not read ranges of bytes, by which training reads latents"
        raise UserInputError([Problem("cache.dir", url, rule, "choose another store, or a folder")])


def list_sources(config: Config) -> tuple[str, ...]:
    """Return the URLs of the settings' metadata, without a look-up of their `*` and `?`.

    Raises:
        UserInputError: a list of shards cannot be expanded.
    """
    names: list[str] = []
    for pattern in map(str, config.data.metadata):
        try:
            names += expand_shard_list(pattern)
        except ShardListError as error:
            raise UserInputError([Problem("data.metadata", pattern, str(error), error.cure)]) from None
    return tuple(names)


def choose_spool(config: Config) -> Path:
    """Return the folder in which this node builds the shards of the cache."""
    mirror = get_cache_folder(config)
    return mirror / SPOOL_FOLDER if config.cache.spool is None else config.cache.spool / mirror.name


def check_spool(cache: CacheConfig, spool: Path, num_ranks: int) -> Iterator[Problem]:
    """Yield a problem if the spool cannot be written or is too small for the ranks of this node."""
    unwritable = list(check_writable("cache.spool", spool))
    yield from unwritable
    needed_gb = num_ranks * SHARDS_IN_SPOOL * cache.shard_mb / 1000
    if needed_gb > cache.spool_gb:
        rule = f"is less than the {needed_gb:g} GB of {SHARDS_IN_SPOOL} shards for each of {num_ranks} ranks of a node"
        yield Problem("cache.spool_gb", cache.spool_gb, rule, "raise it, or lower cache.shard_mb")
    if unwritable:
        return
    spool.mkdir(parents=True, exist_ok=True)
    disk = os.statvfs(spool)
    free_gb = disk.f_bavail * disk.f_frsize / 1e9
    if free_gb < needed_gb:
        rule = f"has {free_gb:.3g} GB free, and needs {needed_gb:g} GB for {SHARDS_IN_SPOOL} shards of each rank"
        yield Problem("cache.spool", spool, rule, "free some space, choose another disk, or lower cache.shard_mb")


def tidy_store(store: CacheStore, folder: Path) -> None:
    """List what killed jobs have uploaded, delete what they have left, and bring the mirror up to date."""
    objects = pull_cache(store.url, folder)
    if any(item.url.startswith(f"{store.url}/{PENDING_FOLDER}/") for item in objects):
        store.finish_pending(objects)
        objects = pull_cache(store.url, folder)
    names = {item.url[len(store.url) + 1 :] for item in objects}
    shards = find_leftover_shards(store, names, folder)
    records = find_leftover_records(names - shards)
    if not shards and not records:
        return
    # A record goes after its shard: without it, the next job would not know the shard as this project's.
    store.delete(sorted(shards))
    store.delete(sorted(records))
    for name in sorted(shards | records):
        logger.info("deleted {}/{}, left by an interrupted job", store.url, name)
    pull_cache(store.url, folder)


def find_leftover_shards(store: CacheStore, names: set[str], folder: Path) -> set[str]:
    """Return the shards of interrupted jobs: they have a record, and no part of the manifest lists them.

    A shard without a record may be the user's own, and stays.

    Args:
        names: of all objects.
        folder: the mirror, which is up to date.
    """
    own = {name for name in names if store.may_delete(name) and name_record(_get_file(name)) in names}
    unlisted = {shard for shard in own if _name_part(shard) not in names}
    if unlisted:  # a cache that was copied has parts of other names
        unlisted -= {entry.file for entry in read_entries(folder)}
    return unlisted


def find_leftover_records(names: set[str]) -> set[str]:
    """Return the records of shards that are neither up nor listed.

    A part of the manifest stays when its shard is gone: its items count as missing then.
    """
    records = {match[0]: f"{SHARD_FOLDER}/{match[1]}" for match in map(RECORD_FILE.fullmatch, names) if match}
    return {record for record, shard in records.items() if shard not in names and _name_part(shard) not in names}


def _name_part(shard: str) -> str:
    return f"{MANIFEST_FOLDER}/{name_part(_get_file(shard))}"


def _get_file(shard: str) -> str:
    return shard.rpartition("/")[2]


@contextmanager
def push_written_state(config: Config) -> Iterator[None]:
    """Push the files that describe the cache at the end of the context, which writes them. Do nothing on disk.

    Until they are on the store, a pull by another program would delete them.
    """
    url, folder = get_store_url(config), get_cache_folder(config)
    if url is None:
        yield
        return
    with lock_mirror(folder):
        yield
        push_state(url, folder)


def push_state(url: str, folder: Path) -> None:
    """Write the files that describe the cache to the store, if they have changed.

    Raises:
        FailedError: `cache.json` is missing. Without it, the store holds no cache.
        StoreError: the store denies access, or does not answer.
    """
    if not (folder / "cache.json").is_file():
        raise FailedError(f"{folder / 'cache.json'} was deleted meanwhile; run the same command again")
    refused = get_refused_file(folder).relative_to(folder).as_posix()
    names = (EMPTY_FILE, STATE_FILE, refused, "cache.json")
    push_files(url, folder, [name for name in names if (folder / name).is_file()])


def build_store_storage(
    store: CacheStore, cache: CacheConfig, folder: Path, rank: int, num_ranks: int
) -> tuple[SpoolStorage, ShardUploads]:
    """Build the storage and the manifest of a rank."""
    uploads = ShardUploads(store, rank, find_last_number(folder))
    shard_bytes = cache.shard_mb * 1_000_000
    limit_bytes = int(cache.spool_gb * 1e9 / num_ranks)
    return SpoolStorage(uploads, cache.dtype, rank, shard_bytes, limit_bytes), uploads
