"""Derive and open the validation set: a share of the training data, or a separate set with its own metadata."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.configs.validation import ValidationConfig
from sdxl_trainer.data.checks.records import OpenedIndex, open_checked_records
from sdxl_trainer.data.index.index import Index, open_sample_index
from sdxl_trainer.data.index.selection import build_latent_selection, get_cache_folder
from sdxl_trainer.data.order.split import find_matching_rows, hash_keys, select_by_hash

# Caption settings that switch off randomness and dependence on the step.
DETERMINISTIC_CAPTIONS = {
    "dropout_rate": 0.0,
    "dropout_every_epochs": 0,
    "token_warmup_steps": 0,
    "shuffle": False,
    "tag_dropout_rate": 0.0,
}
# Cached text holds captions as training shapes them; only dropout can be switched off, because it is drawn on reading.
DETERMINISTIC_CACHED_CAPTIONS = {"dropout_rate": 0.0, "dropout_every_epochs": 0}


def derive_validation_config(config: Config) -> Config:
    """Return the validation set's settings: its sources, cache and seed, and no caption dropout, shuffle or flip."""
    settings = config.validation
    captions = DETERMINISTIC_CACHED_CAPTIONS if config.cache.text else DETERMINISTIC_CAPTIONS
    data = {"caption": config.data.caption.model_copy(update=captions), "flip_rate": 0.0}
    cache = {}
    if settings.has_own_set:
        data |= {
            "metadata": settings.metadata,
            "image_dirs": settings.image_dirs,
            "source_weights": [],
            "kohya_folders": config.data.kohya_folders and not settings.metadata,
        }
        cache = {"dir": settings.cache_dir or config.cache.dir or get_cache_folder(config)}
    changes = {"run": {"seed": settings.seed}, "data": data, "cache": cache}
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=update) for section, update in changes.items()}
    )


def open_validation_set(config: Config) -> OpenedIndex:
    """Open and check the index of a separate validation set; without one, there is no index and no problem."""
    settings = config.validation
    if not settings.has_own_set:
        return OpenedIndex(None, [])
    if settings.share:
        cure = "set it to 0, or leave validation.metadata and validation.image_dirs out"
        problem = Problem("validation.share", settings.share, "cannot be combined with a separate set", cure)
        return OpenedIndex(None, [problem])
    derived = derive_validation_config(config)
    records, problems = open_checked_records(derived, is_validation=True)
    problems = [replace(problem, key=_rename_key(problem.key, settings)) for problem in problems]
    if records is None or problems:
        return OpenedIndex(None, problems)
    folder = get_cache_folder(derived)
    index = open_sample_index(folder, records, replace(build_latent_selection(derived), encoding=None))
    if len(index) == 0:
        cure = "run bash launch/cache.sh with data.metadata (or data.image_dirs) and cache.dir of the validation set"
        rule = "holds the latents of none of its records"
        problem = Problem("validation.cache_dir", folder, rule, cure, is_next_step=True)
        return OpenedIndex(None, [problem])
    return OpenedIndex(index, [])


def _rename_key(key: str, settings: ValidationConfig) -> str:
    """Return the setting of the validation set that took the place of one of the training set."""
    return "validation.cache_dir" if key == "cache.dir" and settings.cache_dir else key.replace("data", "validation", 1)


def find_held_out_rows(settings: ValidationConfig, index: Index, validation_index: Index | None) -> np.ndarray:
    """Return the rows of the training index that are held out for validation, [K] int64.

    With `validation.share`, they are in the order in which validation uses them.

    Args:
        validation_index: index of a separate validation set; None without such a set.
    """
    if validation_index is not None:
        return find_matching_rows(index.arrow_column("key"), validation_index.arrow_column("key"))
    if not settings.share:
        return np.empty(0, np.int64)
    return select_by_hash(hash_keys(index.arrow_column("key"), settings.seed), settings.share)


def check_held_out(settings: ValidationConfig, index: Index, validation_index: Index | None) -> Iterator[Problem]:
    """Yield a problem if validation holds out all of the training samples.

    Args:
        validation_index: index of a separate validation set; None without such a set.
    """
    if validation_index is None and (settings.has_own_set or not settings.share):
        return
    if len(find_held_out_rows(settings, index, validation_index)) == len(index):
        is_share = validation_index is None
        key, value = ("validation.share", settings.share) if is_share else ("validation.metadata", settings.metadata)
        yield Problem(key, value, f"leaves none of {len(index)} samples to train on", "hold out fewer samples")
