"""Settings that change nothing beside the other settings.

A setting that nearly always is a mistake then is refused where it is declared. Those here are accepted with a warning:
presets, converted settings and settings of earlier runs have them.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any, NamedTuple

from loguru import logger

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import Config


class Need(NamedTuple):
    """Settings without which another setting changes nothing.

    Args:
        text: them, as a user writes them.
        is_met: returns whether the other setting has an effect.
        is_of_cache: the other setting changes files of the cache or the choice of images, and training alone ignores
            it. Without it, latents would be encoded again, or masks trained as images.
    """

    text: str
    is_met: Callable[[Config], Any]
    is_of_cache: bool = False


TAG_CHANGES = Need(
    "data.caption.shuffle, tag_dropout_rate or token_warmup_steps",
    lambda config: (
        config.data.caption.shuffle or config.data.caption.tag_dropout_rate or config.data.caption.token_warmup_steps
    ),
)
MASKED = Need("objective.masked_loss: true", lambda config: config.objective.masked_loss, is_of_cache=True)
STORE = Need("cache.dir: s3://...", lambda config: isinstance(config.cache.dir, str))
COPIES = Need(
    "data.remote_shards.copies_dir or shuffle_shards",
    lambda config: config.data.remote_shards.copies_dir or config.data.remote_shards.shuffle_shards,
)
LENGTHS = Need("ema.lengths", lambda config: config.ema.lengths)
HELD_OUT = Need(
    "validation.share, metadata or image_dirs", lambda config: config.validation.share or config.validation.has_own_set
)
NEEDS = {
    "data.caption.description_rate": Need(
        "data.caption.source: pick", lambda config: config.data.caption.source == "pick"
    ),
    "data.caption.keep_tokens": TAG_CHANGES,
    "data.caption.protected_tags": TAG_CHANGES,
    "data.caption.protected_tags_file": TAG_CHANGES,
    "data.caption.token_warmup_min": Need(
        "data.caption.token_warmup_steps", lambda config: config.data.caption.token_warmup_steps
    ),
    "data.remote_shards.copies_gb": COPIES,
    "data.masks": MASKED,
    "cache.alpha_mask": MASKED,
    "cache.flip": Need("data.flip_rate", lambda config: config.data.flip_rate, is_of_cache=True),
    "cache.spool": STORE,
    "cache.spool_gb": STORE,
    "cache.text_variants": Need("cache.text: true", lambda config: config.cache.text),
    "ema.on_host": Need("ema.decays or ema.lengths", lambda config: config.ema.num_averages),
    "ema.snapshot_every_steps": LENGTHS,
    "ema.snapshot_dtype": LENGTHS,
    "train.max_non_finite_steps": Need(
        "train.on_non_finite: skip", lambda config: config.train.on_non_finite == "skip"
    ),
    "validation.cache_dir": Need("validation.metadata or image_dirs", lambda config: config.validation.has_own_set),
    "validation.max_samples": HELD_OUT,
    "validation.timesteps_per_sample": HELD_OUT,
    "validation.num_bins": HELD_OUT,
    "validation.seed": HELD_OUT,
}


def check_unused(config: Config, sections: tuple[str, ...] = ("",)) -> Iterator[Problem]:
    """Yield a problem for each setting that differs from its default and changes nothing.

    Args:
        sections: beginnings of the names of the settings to check.
    """
    default = Config.model_construct()
    for key, need in NEEDS.items():
        value = get_setting(config, key)
        if key.startswith(sections) and value != get_setting(default, key) and not need.is_met(config):
            if need.is_of_cache:
                cure = f"set {need.text}, or leave it as it is, because the cache depends on it"
                yield Problem(key, value, f"has no effect on training without {need.text}", cure)
            else:
                cure = f"set {need.text}, or leave it out"
                yield Problem(key, value, f"has no effect without {need.text}", cure)


def log_doubts(problems: Iterable[Problem]) -> None:
    """Log problems that may be meant as warnings."""
    for problem in problems:
        value = "" if problem.value is None else f"={problem.value}"
        logger.warning("{}{}: {}; {}", problem.key, value, problem.rule, problem.cure)


def get_setting(config: Config, key: str) -> Any:
    """Return the value of a setting by its name, such as `ema.lengths`."""
    return reduce(getattr, key.split("."), config)
