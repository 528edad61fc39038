"""What is validated on, as the settings say: a share of the data, or a set with its own metadata."""

from dataclasses import replace

import numpy as np

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.data import check_records
from sdxl_trainer.data.index.index import Index, open_sample_index
from sdxl_trainer.data.index.selection import build_latent_selection, get_cache_folder
from sdxl_trainer.data.order.split import find_matching_rows, hash_keys, select_by_hash

# Nothing of a caption is left to chance that could be left out.
QUIET = {
    "dropout_rate": 0.0,
    "dropout_every_epochs": 0,
    "token_warmup_steps": 0,
    "shuffle": False,
    "tag_dropout_rate": 0.0,
}


def derive_validation_config(config: Config) -> Config:
    """The settings as the validation set sees them: its sources, cache and seed, captions and images as they are."""
    own = config.validation
    # Text that is cached is of captions as training has them; all but dropout stays, which is drawn at reading.
    quiet = {name: value for name, value in QUIET.items() if name.startswith("dropout")} if config.cache.text else QUIET
    data = {"caption": config.data.caption.model_copy(update=quiet), "flip_rate": 0.0}
    cache = {}
    if own.has_own_set:
        data |= {"metadata": own.metadata, "image_dirs": own.image_dirs, "source_weights": []}
        cache = {"dir": own.cache_dir or get_cache_folder(config)}
    changes = {"run": {"seed": own.seed}, "data": data, "cache": cache}
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=update) for section, update in changes.items()}
    )


def open_validation_index(config: Config) -> tuple[Index | None, list[Problem]]:
    """The index of a set of its own, None if there is none, and what is wrong with it."""
    own = config.validation
    if not own.has_own_set:
        return None, []
    if own.share:
        cure = "set it to 0, or leave validation.metadata and validation.image_dirs out"
        return None, [Problem("validation.share", own.share, "cannot go with a validation set of its own", cure)]
    derived = derive_validation_config(config)
    records, problems = check_records(derived)
    problems = [replace(problem, key=problem.key.replace("data", "validation", 1)) for problem in problems]
    if records is None or problems:
        return None, problems
    folder = get_cache_folder(derived)
    index = open_sample_index(folder, records, replace(build_latent_selection(derived), encoding=None))
    if len(index) == 0:
        cure = "fill it: bash launch/cache.sh with data.metadata (or data.image_dirs) and cache.dir set to these"
        return None, [Problem("validation.cache_dir", folder, "holds the latents of none of its records", cure)]
    return index, []


def find_held_out(config: Config, index: Index, own: Index | None) -> np.ndarray:
    """Rows of the training index that must not be trained on, those to validate on first coming first."""
    if own is not None:
        return find_matching_rows(index.arrow_column("key"), own.arrow_column("key"))
    if not config.validation.share:
        return np.empty(0, np.int64)
    return select_by_hash(hash_keys(index.arrow_column("key"), config.validation.seed), config.validation.share)


def check_validation(config: Config, index: Index | None) -> list[Problem]:
    """What is wrong with the validation settings for this training index."""
    own, problems = open_validation_index(config)
    if problems or index is None or not (own or config.validation.share):
        return problems
    num_held, key = len(find_held_out(config, index, own)), "validation.share" if own is None else "validation.metadata"
    value = config.validation.share if own is None else config.validation.metadata
    if num_held == 0 and own is None:
        problems.append(Problem(key, value, f"holds out none of {len(index)} samples", "raise it"))
    if num_held == len(index):
        problems.append(Problem(key, value, f"leaves none of {len(index)} samples to train on", "hold out fewer"))
    return problems
