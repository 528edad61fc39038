"""Settings that have no effect with the data or the model they are given, or with settings of other sections."""

from collections.abc import Iterator
from pathlib import Path

from loguru import logger

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.latent_files import has_masks
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.train.report.wandb_log import check_wandb
from sdxl_trainer.train.sampling.job import read_prediction


def check_consistency(config: Config, index: Index | None) -> Iterator[Problem]:
    """What the settings of one section make useless in another, or the data do; and what they need that is missing."""
    yield from check_wandb(config)
    if config.lora.rank and config.checkpoint.export_format != "single":
        rule = "is not for adapters, which are one file"
        yield Problem("checkpoint.export_format", config.checkpoint.export_format, rule, "leave it out")
    if config.objective.masked_loss and index is not None and has_masks(index, get_cache_folder(config)) is False:
        rule = "has no effect: the latents hold no masks"
        cure = "set data.masks, or cache.alpha_mask: true, and run bash launch/cache.sh, or leave it out"
        yield Problem("objective.masked_loss", True, rule, cure)
    if config.data.masks is not None and not config.objective.masked_loss:
        logger.warning("the masks of data.masks are not used, because objective.masked_loss is false")


def warn_of_prediction(config: Config) -> None:
    """Say so if the model says of itself that it predicts something else: meant when it is converted, else a slip."""
    told, ours = read_prediction(Path(config.model.path)), f"objective.prediction={config.objective.prediction}"
    if told and told[0] != ours:
        logger.warning("the model was trained with {} and will be with {}", told[0], ours)


def check_regularisation_use(config: Config, num_regular: int) -> Iterator[Problem]:
    """Settings of regularisation samples where there are none."""
    for section, key in (("objective", "prior_loss_weight"), ("data", "regularisation_repeats")):
        settings = getattr(config, section)
        value = getattr(settings, key)
        if not num_regular and value != type(settings).model_fields[key].default:
            rule = "has no effect: there are no regularisation samples"
            cure = "give data.regularisation_dirs, or records with is_reg: true, or leave it out"
            yield Problem(f"{section}.{key}", value, rule, cure)
