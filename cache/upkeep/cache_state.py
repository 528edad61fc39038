"""The state of a cache for a job: the newest entries of its manifest, and the files that describe it."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from sdxl_trainer.cache.encode.cache_setup import write_identities
from sdxl_trainer.cache.encode.cache_vae import CacheVae
from sdxl_trainer.cache.encode.encode_plan import TextRequirement
from sdxl_trainer.cache.encode.pipeline import TextJob
from sdxl_trainer.cache.encode.store_setup import push_written_state
from sdxl_trainer.cache.encode.text_caching import is_text_state_valid, save_text_state
from sdxl_trainer.cache.upkeep.target import CacheTarget, StoreTarget
from sdxl_trainer.cache.upkeep.verify import warn_of_bad_items
from sdxl_trainer.configs.schema import CacheConfig, Config
from sdxl_trainer.data.formats.manifest import Identity, ManifestEntry, read_latest
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.data.stores.cache_mirror import pull_cache
from sdxl_trainer.launch.distributed import Ranks, broadcast_object


@dataclass(frozen=True)
class CacheState:
    """Newest manifest entries of a rank's keys, and whether a repair found damaged lines in the manifest."""

    entries: dict[str, ManifestEntry]
    lines_lost: bool
    bad: Container[str]  # keys of items that a repair found to be bad


def open_cache(
    target: CacheTarget,
    ranks: Ranks,
    keys: Container[str],
    repair: CacheConfig | None,
    dry_run: bool,
    every_byte: bool = False,
) -> CacheState:
    """Read the manifest's newest entries of this rank's keys.

    Rank 0 first finishes the shards that a killed job left, and with `repair` verifies the cache. A bad item gets an
    identity that no settings have, so that it counts as stale; bad text is removed from the manifest. A dry run writes
    nothing, because another job may be running.

    Args:
        repair: the settings of the cache for a repair; None repairs nothing.
    """
    folder = target.folder
    bad: dict[str, str] = {}
    damaged: list[str] = []
    if ranks.is_main and not dry_run:
        target.clear_leftovers()
    if ranks.is_main and repair is not None:
        entries = read_latest(folder, damaged)
        result = target.verify(entries, every_byte)
        bad = result.bad
        warn_of_bad_items("bad item is encoded again", result.reasons, folder)
        if not dry_run:
            target.drop_damaged_lines()
            manifest = target.build_writers(repair, 0).manifest
            for key in result.bad_text:
                manifest.append(replace(entries[key], text=None))
            manifest.close()
            if isinstance(target, StoreTarget):
                pull_cache(target.url, folder)
    bad, lines_lost = broadcast_object((bad, bool(damaged)))
    entries = read_latest(folder, keys=keys)
    marked = {key: entry.as_stale() if key in bad else entry for key, entry in entries.items()}
    return CacheState(marked, lines_lost, bad)


def write_state(
    config: Config,
    identities: Mapping[str, Identity],
    vae: CacheVae,
    text: TextRequirement | None,
    text_job: TextJob | None,
) -> None:
    """Write `cache.json`, and `text.json` if it is out of date; on a store, before anything is uploaded."""
    folder = get_cache_folder(config)
    with push_written_state(config):
        write_identities(folder, identities, vae)
        if text is not None and text_job is not None and not is_text_state_valid(folder, text.identity):
            save_text_state(folder, text.identity, text_job, config.model)
