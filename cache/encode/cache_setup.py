"""Set up a cache folder: check settings and data, build the identities of the latents, and lock the folder."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import orjson
from loguru import logger

from sdxl_trainer.cache.encode.cache_vae import CacheVae
from sdxl_trainer.cache.encode.caption_lengths import check_caption_lengths
from sdxl_trainer.cache.encode.text_caching import check_captioning
from sdxl_trainer.cache.models.model_pair import check_pair
from sdxl_trainer.cache.models.source import check_model
from sdxl_trainer.configs.problems import Problem, raise_if_any
from sdxl_trainer.configs.schema import CacheConfig, Config, DataConfig
from sdxl_trainer.data.checks.folders import check_folder, check_writable
from sdxl_trainer.data.checks.records import open_checked_records
from sdxl_trainer.data.checks.unused import check_unused, log_doubts
from sdxl_trainer.data.formats.manifest import Identity, read_identity, write_identity
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import build_bucket_rules, get_cache_folder
from sdxl_trainer.data.packages import list_missing_packages
from sdxl_trainer.launch.distributed import Ranks, share_problems
from sdxl_trainer.launch.folder_lock import lock_folder
from sdxl_trainer.launch.logger import init_logger

# Masks and mirrored latents have no effect on a training without their settings, but on the cache.
UNUSED_IN_A_JOB = ("cache.spool", "cache.text_variants")


def open_checked_index(config: Config, problems: list[Problem]) -> Index:
    """Check the settings and the data, and open the index of all records.

    Logs settings of the cache that change nothing, and packages that training will need.

    Args:
        problems: problems found so far, which are reported together with new ones.

    Raises:
        UserInputError: there are problems; the error lists all of them.
    """
    logger.info("checking the settings and the data")
    folder = get_cache_folder(config)
    # A file among the image folders is a problem of its own, of which the check of the records knows more.
    unwritable = [] if config.cache.dir is None and folder.is_file() else list(check_writable("cache.dir", folder))
    if config.cache.dir is None and config.cache.format == "npz":  # latents lie beside the images
        for number, images in enumerate(config.data.image_dirs):
            unwritable += [] if images.is_file() else check_writable(f"data.image_dirs.{number}", images)
    raise_if_any([*problems, *unwritable] if unwritable else [])  # the index would be written there, too
    index, found = open_checked_records(config, need_captions=config.cache.text)
    caption_problems = check_captioning(config.data, config.cache, index)
    of_model = list(check_model(config.model)) or list(check_pair(config))
    raise_if_any([*problems, *found, *of_model, *caption_problems])
    assert index is not None, "records without problems have an index"
    log_doubts(check_unused(config, UNUSED_IN_A_JOB))
    log_doubts(check_caption_lengths(config, index) if config.cache.text else ())
    for setting, package in list_missing_packages(config).items():
        logger.warning("training with {} needs the package {}: pip install {}", setting, package, package)
    return index


def start_log(config: Config, rank: int) -> Path:
    """Start the log in the cache folder, and return that folder.

    Raises:
        UserInputError: `cache.dir` is a file, which would be reported as a log that cannot be written.
    """
    folder = get_cache_folder(config)
    raise_if_any(check_folder("cache.dir", folder) if rank == 0 and config.cache.dir is not None else ())
    init_logger(rank, config.log.level, None if folder.is_file() else folder / "logs", "cache")
    return folder


def build_identities(cache: CacheConfig, data: DataConfig, vae: CacheVae) -> dict[str, Identity]:
    """Build the identity of each resolution's latents, by the prefix of their keys."""
    return {
        prefix: Identity(
            vae_sha256=vae.sha256,
            vae_precision=cache.vae_precision,
            dtype=cache.dtype,
            posterior=cache.posterior,
            flip=cache.flip,
            resolution_px=rule.resolution_px,
            min_bucket_px=rule.min_px,
            max_bucket_px=rule.max_px,
            bucket_step_px=rule.step_px,
            no_upscale=rule.no_upscale,
            buckets=rule.fixed,
            alpha_mask=cache.alpha_mask,
            vae_padding=vae.padding,
            latent_channels=vae.channels,
        )
        for prefix, rule in build_bucket_rules(data).items()
    }


def write_identities(folder: Path, identities: Mapping[str, Identity], vae: CacheVae) -> None:
    """Write the identities of all resolutions, and the files of the VAE, to the cache's `cache.json`."""
    further = {prefix: other for prefix, other in identities.items() if prefix}
    write_identity(folder, identities[""], further, vae.record)


def check_identities(folder: Path, identities: Mapping[str, Identity]) -> Iterator[Problem]:
    """Yield a problem if the cache holds latents of another identity than new latents would have."""
    wanted = identities[""]
    try:
        known = read_identity(folder)
    except ValueError as error:
        cure = "run bash launch/cache.sh with the same settings, which writes it anew"
        yield Problem("cache.dir", folder, f"holds a damaged cache.json: {error}", cure)
        return
    if known is None or known.get("name") == wanted.name:
        return
    fields = orjson.loads(orjson.dumps(wanted.list_fields(), default=tuple))
    differences = ", ".join(f"{name}: {known.get(name)}" for name, value in fields.items() if known.get(name) != value)
    rule = f"holds latents made with other settings ({differences}), which cannot be mixed with new ones"
    cure = "run bash launch/cache.sh with these settings, or use the cache's settings; another cache.dir keeps both"
    yield Problem("cache.dir", folder, rule, cure)


def lock_cache_for_ranks(folder: Path, ranks: Ranks) -> AbstractContextManager:
    """Lock the cache on rank 0, like `lock_cache`, for all ranks of a job. All ranks call this together."""
    lock = ExitStack()
    with share_problems():
        if ranks.is_main:
            lock.enter_context(lock_cache(folder))
    return lock


def lock_cache(folder: Path) -> AbstractContextManager:
    """Return a context that locks the cache. Two jobs in one cache would finish and delete each other's shards.

    Raises:
        UserInputError: another job holds the lock, or the folder cannot be written; raised when the context is entered.
    """
    return lock_folder(folder, "cache.dir", "set another cache.dir")
