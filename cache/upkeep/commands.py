"""Commands that maintain a cache: verify, pack, unpack, compact, and adopt. They run only on rank 0."""

from collections.abc import Callable
from pathlib import Path

import torch
from loguru import logger

from sdxl_trainer.cache.encode.cache_setup import (
    build_identities,
    lock_cache,
    open_checked_index,
    start_log,
    write_identities,
)
from sdxl_trainer.cache.encode.cache_vae import check_cache_vae, identify_vae
from sdxl_trainer.cache.encode.storage import (
    NpzStorage,
    ShardStorage,
    Storage,
    read_item,
    read_remote_item,
    read_remote_text_item,
    read_text_item,
    recover_shards,
)
from sdxl_trainer.cache.encode.store_setup import push_written_state
from sdxl_trainer.cache.encode.text_caching import (
    build_text_requirement,
    compute_text_identity,
    compute_text_shapes,
    is_text_state_valid,
    load_text_job,
    save_text_state,
)
from sdxl_trainer.cache.models.source import resolve_model
from sdxl_trainer.cache.models.vae import load_vae
from sdxl_trainer.cache.upkeep.adopt import TextAdopter, adopt_files, list_refused
from sdxl_trainer.cache.upkeep.repack import build_record_reader, remove_replaced, repack
from sdxl_trainer.cache.upkeep.target import join_small_shards, open_target, verify_unlocked
from sdxl_trainer.cache.upkeep.verify import warn_of_bad_items
from sdxl_trainer.configs.problems import FailedError, Problem, UserInputError, raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.cache_store import open_mirror
from sdxl_trainer.data.counted_warnings import CountedWarnings
from sdxl_trainer.data.formats.manifest import (
    ManifestEntry,
    ManifestWriter,
    list_manifest_parts,
    read_latest,
    verify_identity,
)
from sdxl_trainer.data.formats.manifest_compaction import compact_parts
from sdxl_trainer.data.formats.text_cache import verify_text_state
from sdxl_trainer.data.images.image_files import TEXT_OUTPUTS_SUFFIX
from sdxl_trainer.data.index.missing_latents import choose_output_file
from sdxl_trainer.data.index.moved_keys import rename_entries
from sdxl_trainer.data.index.selection import build_bucket_rules, get_cache_folder, get_store_url
from sdxl_trainer.launch.distributed import read_environment
from sdxl_trainer.launch.logger import init_logger

# File names of latents and of text encoder outputs, as kohya's scripts and this project write them.
ADOPTED_NAMES = ("<stem>.npz", "<stem>_<width>x<height>_sdxl.npz", f"<stem>{TEXT_OUTPUTS_SUFFIX}")


class BadCacheError(FailedError):
    """Items of a cache are bad. The log names each of them."""


def verify_cache(config: Config, problems: list[Problem], every_byte: bool = False) -> None:
    """Check every byte against the manifest and log each bad item; on a store, sizes and the store's checksums.

    Args:
        every_byte: also on a store, each shard of which is copied for it.

    Raises:
        BadCacheError: at least one item is bad.
    """
    folder = open_existing(config, problems)
    if folder is None:
        return
    damaged: list[str] = []
    result = verify_unlocked(config, read_latest(folder, damaged), every_byte)
    other_faults = [f"{place}: damaged line of the manifest" for place in damaged]
    states = (verify_identity(folder), verify_text_state(folder), *result.bad_shards.values())
    other_faults += [reason for reason in states if reason is not None]
    warn_of_bad_items("bad", [*result.reasons, *other_faults], folder)
    num_bad = len(result.bad.keys() | result.bad_text.keys())
    logger.info("{} items, {:.1f} MB read, {} bad", result.num_items, result.bytes_read / 1e6, num_bad)
    if num_bad or other_faults:
        also = f", and {len(other_faults)} other parts of the cache" if other_faults else ""
        raise BadCacheError(
            f"{num_bad} of {result.num_items} items are bad{also}; run with --repair to encode them again"
        )


def pack_cache(config: Config, problems: list[Problem]) -> None:
    """Move npz files into shards. Raises like `_repack_cache`."""
    _repack_cache(config, problems, to_shards=True)


def unpack_cache(config: Config, problems: list[Problem]) -> None:
    """Move items of shards into npz files. Raises like `_repack_cache`."""
    _repack_cache(config, problems, to_shards=False)


def compact_cache(config: Config, problems: list[Problem]) -> None:
    """Store the lines of the manifest as columns.

    Raises:
        BadCacheError: a part of the manifest has damaged lines and stays as it is.
        UserInputError: the cache is on a store, where each shard has lines of its own.
    """
    folder = open_existing(config, problems)
    if folder is None:
        return
    if get_store_url(config) is not None:
        rule = "cannot be compacted: on a store, each shard has lines of its own"
        cure = "copy the cache to a folder, and compact the copy"
        raise UserInputError([Problem("cache.dir", config.cache.dir, rule, cure)])
    with lock_cache(folder):
        before = _measure_manifest(folder)
        kept = compact_parts(folder)
        after = _measure_manifest(folder)
    logger.info("the manifest takes {:.1f} MB instead of {:.1f}", after / 1e6, before / 1e6)
    if kept:
        raise BadCacheError(f"{len(kept)} parts of the manifest are damaged and stay as lines; run with --repair")


def _measure_manifest(folder: Path) -> int:
    return sum(part.stat().st_size for part in list_manifest_parts(folder))


def adopt_cache(config: Config, problems: list[Problem]) -> None:
    """Check and hash latent files and text encoder outputs of other programs, and list them in the manifest.

    Raises:
        BadCacheError: some files do not fit the settings. The log names them; the other files are listed.
    """
    if read_environment().rank != 0:
        return
    raise_if_any(problems)
    folder = start_log(config, 0)
    index = open_checked_index(config, [])
    source = resolve_model(config.model)
    vae = identify_vae(source, config.model, load_vae(source, config.model))
    identities = build_identities(config.cache, config.data, vae)
    raise_if_any(check_cache_vae(folder, config.model, vae))
    rule = build_bucket_rules(config.data)[""]
    with open_target(config) as target:
        with push_written_state(config):
            write_identities(folder, identities, vae)
            text = build_text_adopter(config, folder) if config.cache.text else None
        storage, manifest = target.build_writers(config.cache, 0)
        url, get_record = get_store_url(config), build_record_reader(index)
        known = rename_entries(read_latest(folder), index.table)
        adopted, refusals, refused = 0, [], CountedWarnings("file of another program", folder / "logs" / "cache.log")
        for key, found in adopt_files(folder, index, known, identities[""], rule, text):
            if isinstance(found, ManifestEntry):
                manifest.append(found if url is None else copy_to_shard(folder, url, storage, found, get_record))
                adopted += 1
            else:
                refused.add(f"{key} is not adopted: {found.reason}")
                refusals.append(found)
        storage.close()
        manifest.close()
        with push_written_state(config):
            list_refused(folder, refusals)
        target.finish()
    refused.close()
    logger.info(
        "adopted the files of {} images; {} do not fit, {} were listed before", adopted, refused.count, len(known)
    )
    if not (adopted or refused.count or known):
        names = ADOPTED_NAMES if config.cache.text else ADOPTED_NAMES[:2]
        logger.warning("found no files to adopt: expected {} beside each image or in {}", " or ".join(names), folder)
    if refused.count:
        raise BadCacheError(f"{refused.count} files do not fit the settings and were not adopted")


def copy_to_shard(
    folder: Path, url: str, storage: Storage, entry: ManifestEntry, get_record: Callable[[str], bytes]
) -> ManifestEntry:
    """Copy adopted files into a shard, because only shards lie on a store. Return the entry of the copy.

    Latents or text that are in a shard on the store already are read from there.
    """
    _, content = read_item(folder, entry) if entry.offset is None else read_remote_item(url, entry)
    is_text_stored = entry.text is not None and entry.text.offset is not None
    text = read_remote_text_item(url, entry) if is_text_stored else read_text_item(folder, entry)
    return storage.write_packed(entry, bytes(content), get_record(entry.key), None if text is None else bytes(text))


def build_text_adopter(config: Config, folder: Path) -> TextAdopter:
    """Build the adopter of text encoder outputs, and write `text.json` if it is missing or out of date."""
    model, data, cache = config.model, config.data, config.cache
    identity = compute_text_identity(model, data, cache.dtype, folder)
    if not is_text_state_valid(folder, identity):
        job = load_text_job(model, data, cache, identity, torch.device("cpu"))
        save_text_state(folder, identity, job, model)
    requirement = build_text_requirement(model, data, cache, identity)
    return TextAdopter(requirement, compute_text_shapes(model, data.max_tokens), folder)


def _repack_cache(config: Config, problems: list[Problem], to_shards: bool) -> None:
    """Copy all items to shards or to npz files, and delete the files that they replace.

    Raises:
        BadCacheError: at least one item is bad. Bad items stay where they are.
    """
    folder = open_existing(config, problems)
    if folder is None:
        return
    if get_store_url(config) is not None:
        _join_stored_shards(config, to_shards)
        return
    with lock_cache(folder):
        listed = read_latest(folder)
        recover_shards(folder, listed.values())
        index = open_checked_index(config, [])
        entries = rename_entries(listed, index.table)
        dtype = config.cache.dtype  # without effect, because bytes are copied unchanged
        storage = (
            ShardStorage(folder, dtype, 0, config.cache.shard_mb * 1_000_000)
            if to_shards
            else NpzStorage(folder, dtype)
        )
        get_record = build_record_reader(index)
        manifest = ManifestWriter(folder, 0)
        result = repack(
            folder,
            entries,
            storage,
            manifest,
            lambda entry: choose_output_file(entry.key, entry.source_path, beside=config.cache.dir is None),
            get_record,
        )
        manifest.close()
        removed = remove_replaced(folder, entries, rename_entries(read_latest(folder), index.table))
    # Two sentences, because a word in a field is not translated.
    done = "{} items packed, {} files replaced" if to_shards else "{} items unpacked, {} files replaced"
    logger.info(done, result.num_copied, removed)
    if result.bad:
        shown = "; ".join(list(result.bad.values())[:5])
        raise BadCacheError(f"{len(result.bad)} items are bad and stay where they are: {shown}")


def _join_stored_shards(config: Config, to_shards: bool) -> None:
    """Join the small shards of a cache on a store into full ones.

    Raises:
        UserInputError: `to_shards` is false: npz files do not lie on a store.
    """
    if not to_shards:
        rule = "cannot be unpacked: a cache on a store holds shards only"
        cure = "copy the cache to a folder, and unpack the copy"
        raise UserInputError([Problem("cache.dir", config.cache.dir, rule, cure)])
    replaced = join_small_shards(config)
    logger.info("{} small or outdated shards joined", replaced)


def open_existing(config: Config, problems: list[Problem], logs: Path | None = None) -> Path | None:
    """Return the cache folder on rank 0, None on other ranks.

    Args:
        logs: folder of the log; that of the cache by default.

    Raises:
        UserInputError: the settings are wrong, or there is no cache.
    """
    if read_environment().rank != 0:
        return None
    raise_if_any(problems)
    folder = get_cache_folder(config)
    raise_if_any(open_mirror(config))
    if not (folder / "cache.json").is_file():
        cure = "run bash launch/cache.sh first, with --adopt for latents of other programs"
        raise UserInputError([Problem("cache.dir", folder, "holds no latent cache", cure)])
    init_logger(0, config.log.level, logs or folder / "logs", "cache")
    return folder


COMMANDS: dict[str, Callable[..., None]] = {
    "verify": verify_cache,
    "pack": pack_cache,
    "unpack": unpack_cache,
    "compact": compact_cache,
    "adopt": adopt_cache,
}
