"""The place that a cache job writes to: a folder, or a store and its local mirror."""

import shutil
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from loguru import logger

from sdxl_trainer.cache.encode.background_writer import Manifest
from sdxl_trainer.cache.encode.cache_setup import lock_cache, lock_cache_for_ranks
from sdxl_trainer.cache.encode.spool import CacheStore
from sdxl_trainer.cache.encode.storage import NpzStorage, ShardStorage, Storage, clear_leftovers
from sdxl_trainer.cache.encode.store_setup import (
    build_store_storage,
    choose_spool,
    name_store_errors,
    open_store,
    open_store_for_ranks,
    push_state,
)
from sdxl_trainer.cache.upkeep.repack import replace_outdated_shards
from sdxl_trainer.cache.upkeep.store_upkeep import (
    SMALL_SHARE,
    WORK_FOLDER,
    list_shard_objects,
    replace_stored_shards,
    verify_store,
)
from sdxl_trainer.cache.upkeep.verify import VerifyResult, verify_entries
from sdxl_trainer.configs.schema import CacheConfig, Config
from sdxl_trainer.data.formats.manifest import ManifestEntry, ManifestWriter, drop_damaged_lines, read_latest
from sdxl_trainer.data.index.selection import get_cache_folder, get_store_url
from sdxl_trainer.data.stores.cache_mirror import pull_cache
from sdxl_trainer.data.stores.uploads import list_objects
from sdxl_trainer.launch.distributed import Ranks, count_ranks_here


class Writers(NamedTuple):
    """The storage of items, and the manifest that lists them."""

    storage: Storage
    manifest: Manifest


class CacheTarget(Protocol):
    """A cache that a job has locked. `folder` holds its manifest, or the mirror of it."""

    folder: Path

    def get_free_bytes(self) -> int | None:
        """Return the free bytes of the disk; None if no disk limits the cache."""
        ...

    def list_stored(self) -> Container[str] | None:
        """Return the files of the cache; None if they lie in its folder."""
        ...

    def clear_leftovers(self) -> None:
        """Finish the shards of a killed job and delete its temporary files."""
        ...

    def verify(self, entries: Mapping[str, ManifestEntry], every_byte: bool) -> VerifyResult:
        """Compare the cache with its manifest."""
        ...

    def drop_damaged_lines(self) -> None:
        """Remove the damaged lines from the manifest."""
        ...

    def build_writers(self, cache: CacheConfig, rank: int) -> Writers:
        """Build the storage and the manifest of a rank."""
        ...

    def replace_shards(self, cache: CacheConfig) -> list[str]:
        """Replace the shards that hold items which were encoded again elsewhere, and return their names."""
        ...

    def finish(self) -> None:
        """Bring the folder and the store into agreement after all ranks have written."""
        ...


class DiskTarget:
    """A cache in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get_free_bytes(self) -> int | None:
        return shutil.disk_usage(self.folder).free

    def list_stored(self) -> Container[str] | None:
        return None

    def clear_leftovers(self) -> None:
        clear_leftovers(self.folder)

    def verify(self, entries: Mapping[str, ManifestEntry], every_byte: bool) -> VerifyResult:
        return verify_entries(self.folder, entries)

    def drop_damaged_lines(self) -> None:
        drop_damaged_lines(self.folder)

    def build_writers(self, cache: CacheConfig, rank: int) -> Writers:
        manifest = ManifestWriter(self.folder, rank)
        if cache.format == "npz":
            return Writers(NpzStorage(self.folder, cache.dtype), manifest)
        return Writers(ShardStorage(self.folder, cache.dtype, rank, cache.shard_mb * 1_000_000), manifest)

    def replace_shards(self, cache: CacheConfig) -> list[str]:
        manifest = ManifestWriter(self.folder, 0)
        storage = ShardStorage(self.folder, cache.dtype, 0, cache.shard_mb * 1_000_000)
        replaced = replace_outdated_shards(self.folder, read_latest(self.folder), storage, manifest)
        for shard in replaced:
            logger.info("replaced {}, which was partly out of date", shard)
        manifest.close()
        return replaced

    def finish(self) -> None:
        pass


class StoreTarget:
    """A cache on a store, and its mirror.

    Args:
        store: the locked cache; None for a dry run, which writes nothing.
    """

    def __init__(self, url: str, folder: Path, store: CacheStore | None):
        self.url, self.folder, self._store = url, folder, store

    @property
    def store(self) -> CacheStore:
        """The locked cache."""
        assert self._store is not None, "a dry run writes nothing"
        return self._store

    def get_free_bytes(self) -> int | None:
        return None

    def list_stored(self) -> Container[str] | None:
        return frozenset(list_shard_objects(self.url, list_objects(f"{self.url}/shards")))

    def clear_leftovers(self) -> None:
        pass  # done when the store was opened

    def verify(self, entries: Mapping[str, ManifestEntry], every_byte: bool) -> VerifyResult:
        work = self.store.spool / WORK_FOLDER if every_byte else None
        return verify_store(self.url, self.folder, entries, work)

    def drop_damaged_lines(self) -> None:
        self.store.rewrite_damaged_parts(self.folder)

    def build_writers(self, cache: CacheConfig, rank: int) -> Writers:
        return Writers(*build_store_storage(self.store, cache, self.folder, rank, count_ranks_here()))

    def replace_shards(self, cache: CacheConfig, small_bytes: int = 0) -> list[str]:
        storage, uploads = build_store_storage(self.store, cache, self.folder, 0, count_ranks_here())
        try:
            return replace_stored_shards(self.store, self.folder, storage, uploads, small_bytes)
        finally:
            uploads.close()

    def finish(self) -> None:
        push_state(self.url, self.folder)
        pull_cache(self.url, self.folder)


@contextmanager
def open_target_for_ranks(config: Config, ranks: Ranks, dry_run: bool) -> Iterator[CacheTarget]:
    """Lock the cache of the settings for all ranks of a job, unless it is a dry run. All ranks enter together."""
    folder, url = get_cache_folder(config), get_store_url(config)
    if dry_run:
        yield DiskTarget(folder) if url is None else StoreTarget(url, folder, None)
        return
    with lock_cache_for_ranks(folder, ranks), open_store_for_ranks(config, ranks) as store:
        yield DiskTarget(folder) if store is None else StoreTarget(store.url, folder, store)


@contextmanager
def open_target(config: Config) -> Iterator[CacheTarget]:
    """Like `open_target_for_ranks`, for a command that runs on one rank."""
    folder = get_cache_folder(config)
    with lock_cache(folder), open_store(config) as store:
        yield DiskTarget(folder) if store is None else StoreTarget(store.url, folder, store)


def verify_unlocked(config: Config, entries: Mapping[str, ManifestEntry], every_byte: bool) -> VerifyResult:
    """Compare the cache of the settings with its manifest, while another job may write it.

    Args:
        every_byte: also of a cache on a store.
    """
    folder, url = get_cache_folder(config), get_store_url(config)
    if url is None:
        return verify_entries(folder, entries)
    with name_store_errors(url):
        return verify_store(url, folder, entries, choose_spool(config) / WORK_FOLDER if every_byte else None)


def join_small_shards(config: Config) -> int:
    """Join the small shards of a cache on a store into full ones, and return how many were replaced."""
    with open_target(config) as target:
        assert isinstance(target, StoreTarget), "the cache is on a store"
        replaced = target.replace_shards(config.cache, int(SMALL_SHARE * config.cache.shard_mb * 1_000_000))
        target.finish()
    return len(replaced)
