"""The command that copies a cache to a folder or a store. It runs only on rank 0."""

import os

from loguru import logger

from sdxl_trainer.cache.upkeep.commands import BadCacheError, open_existing
from sdxl_trainer.cache.upkeep.copy_request import CopyRequest
from sdxl_trainer.cache.upkeep.copying import choose_work_folder, run_copy
from sdxl_trainer.cache.upkeep.verify import warn_of_bad_items
from sdxl_trainer.configs.problems import Problem, format_count
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.index.selection import get_cache_folder


def copy_cache(config: Config, problems: list[Problem], request: CopyRequest) -> None:
    """Copy the cache, or a subset, to a folder or a store.

    Raises:
        BadCacheError: at least one item is bad; the others are copied.
        UserInputError, FailedError: as `run_copy`.
    """
    own = get_cache_folder(config)
    is_read_only = own.is_dir() and not os.access(own, os.W_OK)
    folder = open_existing(config, problems, choose_work_folder(own, request.target) if is_read_only else None)
    if folder is None:
        return
    result = run_copy(config, folder, request)
    logger.info(
        "{} copied to {} ({:.1f} MB)", format_count(result.num_copied, "item"), request.target, result.num_bytes / 1e6
    )
    if result.bad:
        warn_of_bad_items("bad item is not copied", result.bad.values(), folder)
        raise BadCacheError(f"{format_count(len(result.bad), 'item')} bad and not copied; the others are at the target")
