"""Checks of a run's settings, model and data before any network is loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loguru import logger

from sdxl_trainer.cache.encode.cache_vae import CacheVae, check_cache_vae, describe_vae
from sdxl_trainer.cache.encode.caption_lengths import check_caption_lengths
from sdxl_trainer.cache.encode.text_caching import check_cached_text
from sdxl_trainer.cache.models.source import ModelSource, is_vae_local
from sdxl_trainer.cache.models.vae import read_local_vae_config, read_vae_config, resolve_vae_model
from sdxl_trainer.configs.problems import Problem, UserInputError, raise_if_any
from sdxl_trainer.configs.schema import Config, RunConfig
from sdxl_trainer.data.checks.folders import check_writable
from sdxl_trainer.data.checks.latent_files import check_latent_channels, has_masks, measure_latent_std
from sdxl_trainer.data.checks.left_out import leave_out_bad_latents
from sdxl_trainer.data.checks.training_set import open_training_set
from sdxl_trainer.data.checks.unused import check_unused, log_doubts
from sdxl_trainer.data.checks.validation_set import (
    check_held_out,
    derive_validation_config,
    find_held_out_rows,
    open_validation_set,
)
from sdxl_trainer.data.formats.latents import SDXL_CHANNELS
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.data.text.strategy import check_strategy, compute_repeats, load_strategy, save_repeats
from sdxl_trainer.launch.distributed import Ranks, share_problems
from sdxl_trainer.train.checkpoint.folder import list_checkpoints
from sdxl_trainer.train.checkpoint.model_argument import read_declared_prediction
from sdxl_trainer.train.objective.objective import resolve_latent_statistics
from sdxl_trainer.train.run.memory_plan import check_shared_memory
from sdxl_trainer.train.run.networks import check_trained_parameters
from sdxl_trainer.train.setting_checks import check_model_settings, check_rank_settings, check_run_settings

MIN_TELLING_FACTOR = 2.0  # scaling of a VAE by which latents that were multiplied by it can be told from others


def verify_run(config: Config, world_size: int) -> tuple[Index | None, list[Problem]]:
    """Open the index of the training data, and check everything that does not need a network's weights.

    Stores the strategy's repeats and the rows of bad latents in the run folder, for the other ranks.

    Returns:
        The index, or None if it cannot be opened, and all problems.

    Raises:
        FailedError: more latents are bad than `data.max_bad_fraction` allows.
    """
    problems = list(check_model_settings(config)) or list(check_trained_parameters(config))
    is_known = not problems and is_vae_local(config.model)
    vae = describe_vae(resolve_vae_model(config.model), config.model) if is_known else None
    problems += check_rank_settings(config, world_size)
    problems += check_shared_memory(config, vae.channels if vae else SDXL_CHANNELS)
    problems += check_resume(config.run)
    problems += check_writable("run.dir", config.run.folder)
    index, found = open_training_set(config)
    validation_index, validation_problems = open_validation_set(config)
    problems += found + [problem for problem in validation_problems if problem not in found]
    if index is not None:
        leave_out_bad_latents(config, index, resuming=bool(list_checkpoints(config.run.folder / "checkpoints")))
        problems += check_held_out(config.validation, index, validation_index)
        problems += check_ranking(config, index)
    if vae:
        problems += check_latent_vae(config, index, vae)
        if validation_index is not None:
            problems += check_latent_vae(derive_validation_config(config), validation_index, vae)
    problems += prepare_strategy(config, index)
    problems += check_run_settings(config)
    problems += check_mask_use(config, index)
    if config.cache.text and not problems:
        problems += check_cached_text(config, index)
        if validation_index:
            problems += check_cached_text(derive_validation_config(config), validation_index)
    return index, problems


def check_latent_vae(config: Config, index: Index | None, vae: CacheVae) -> Iterator[Problem]:
    """Yield a problem if the latents of a set are not of the VAE of the settings, as far as the files show it."""
    folder = get_cache_folder(config)
    other = list(check_cache_vae(folder, config.model, vae))
    yield from other
    if index is not None and not other:
        yield from check_latent_channels(index, folder, vae.channels)


def read_checked_vae_config(config: Config, source: ModelSource, index: Index, ranks: Ranks) -> dict[str, Any]:
    """Return the config of the VAE of the settings, which a hub may give only now. All ranks call this together.

    Raises:
        UserInputError: the VAE cannot be used, or the latents are of another one.
    """
    if not is_vae_local(config.model):  # verify_run has compared a local one
        with share_problems():
            if ranks.is_main:
                vae = describe_vae(source, config.model)
                problems = [*check_shared_memory(config, vae.channels), *check_latent_vae(config, index, vae)]
                if config.validation.has_own_set:
                    validation_index, _ = open_validation_set(config)
                    problems += check_latent_vae(derive_validation_config(config), validation_index, vae)
                raise_if_any(problems)
    return read_vae_config(source, config.model)


def check_resume(run: RunConfig) -> Iterator[Problem]:
    """Yield a problem if `run.resume` is `never` and the run folder holds checkpoints."""
    if run.resume == "never" and list_checkpoints(run.folder / "checkpoints"):
        cure = "choose another run.name, or remove the folder"
        yield Problem("run.resume", "never", f"does not allow a run folder with checkpoints: {run.folder}", cure)


def check_ranking(config: Config, index: Index) -> Iterator[Problem]:
    """Yield a problem if `checkpoint.keep_best` is set and so small a set leaves no samples to validate on."""
    settings = config.validation
    if config.checkpoint.keep_best and settings.share and not len(find_held_out_rows(settings, index, None)):
        rule = f"has no effect: validation.share holds out none of {len(index)} samples"
        cure = "add samples, give validation.metadata or image_dirs, or leave it out"
        yield Problem("checkpoint.keep_best", config.checkpoint.keep_best, rule, cure)


def check_mask_use(config: Config, index: Index | None) -> Iterator[Problem]:
    """Yield a problem if `objective.masked_loss` is set and no latent holds a mask."""
    if config.objective.masked_loss and index is not None and has_masks(index, get_cache_folder(config)) is False:
        rule = "has no effect: the latents hold no masks"
        cure = "set data.masks, or cache.alpha_mask: true, and run bash launch/cache.sh; or leave it out"
        yield Problem("objective.masked_loss", True, rule, cure)


def check_regularisation_settings(config: Config, num_regularisation: int) -> Iterator[Problem]:
    """Yield a problem for each setting of regularisation samples if there are none."""
    for section, key in (("objective", "prior_loss_weight"), ("data", "regularisation_repeats")):
        settings = getattr(config, section)
        value = getattr(settings, key)
        if not num_regularisation and value != type(settings).model_fields[key].default:
            rule = "has no effect: there are no regularisation samples"
            cure = "give data.regularisation_dirs, or records with is_reg: true; or leave it out"
            yield Problem(f"{section}.{key}", value, rule, cure)


def prepare_strategy(config: Config, index: Index | None) -> list[Problem]:
    """Load and try the user's strategy, store its repeats in the run folder, and return its problems."""
    if config.data.strategy is None:
        return []
    problems = []
    try:
        strategy = load_strategy(config.data.strategy)
        if index:
            problems += check_strategy(strategy, index)
        if index and strategy.has("repeats"):
            repeats = compute_repeats(strategy, index)
            config.run.folder.mkdir(parents=True, exist_ok=True)
            save_repeats(get_repeats_file(config.run), repeats)
            logger.info("epoch: {:g} samples with the repeats of {}", repeats.sum(), config.data.strategy)
    except UserInputError as error:
        problems += error.problems
    return problems


def get_repeats_file(run: RunConfig) -> Path:
    """Return the file that holds the strategy's repeats of each row, computed when the run was last started."""
    return run.folder / "repeats.npy"


def check_prediction(config: Config) -> Iterator[Problem]:
    """Yield a problem if the model declares another prediction type, or another end of the noise, than the settings.

    Both may be intended, so a run starts nevertheless.

    Raises:
        UserInputError: the model's `scheduler_config.json` cannot be read.
    """
    declared, chosen = read_declared_prediction(Path(config.model.path)), config.objective
    if declared is None:
        return
    words = [word.replace("=", ": ") for word in declared.list_overrides()]
    if declared.prediction != chosen.prediction:
        rule = f"differs from the model, which was trained with {declared.prediction}"
        cure = f"set {' and '.join(words)}, unless you want to change what the model predicts"
        yield Problem("objective.prediction", chosen.prediction, rule, cure)
    elif declared.zero_terminal_snr and not chosen.zero_terminal_snr:
        rule = "differs from the model, which was trained with zero terminal SNR"
        cure = f"set {words[-1]}, unless you want to change the noise of the model"
        yield Problem("objective.zero_terminal_snr", False, rule, cure)


def check_latent_scale(config: Config, index: Index) -> Iterator[Problem]:
    """Yield a problem if the latents seem to be multiplied by the VAE's scaling factor, which training does itself.

    Raises:
        StoreError: a store cannot be read.
    """
    vae_config = read_local_vae_config(config.model)
    factor = resolve_latent_statistics(vae_config).scale.mean().item() if vae_config else 1.0
    if 1 / MIN_TELLING_FACTOR < factor < MIN_TELLING_FACTOR:
        return  # both would have about the same standard deviation
    std = measure_latent_std(index, get_cache_folder(config)) or 0.0
    # Latents times the factor have a standard deviation of about 1. Latents of a single value have none.
    if 0 < std and (std < factor**-0.5) == (factor < 1):
        rule = f"have a standard deviation of {std:.2g}; those that this VAE gives have about {1 / factor:.2g}"
        cure = (
            f"store what the VAE gives, without its scaling factor: if they were multiplied by it, divide them by "
            f"{factor:g}; or run bash launch/cache.sh on the images"
        )
        yield Problem("latents", None, rule, cure)


def check_warmup(config: Config) -> Iterator[Problem]:
    """Yield a problem if the run ends before the learning rate reaches its peak."""
    steps = config.train.max_steps
    if config.train.max_epochs is None and steps is not None and 1 < steps <= config.optim.warmup_steps:
        rule = f"is no shorter than the run of {steps} steps, so the learning rate never reaches its peak"
        yield Problem("optim.warmup_steps", config.optim.warmup_steps, rule, "lower it, unless this is a trial")


def list_doubts(config: Config, index: Index) -> list[Problem]:
    """List what may be a mistake and may be meant, besides `check_prediction`.

    Raises:
        StoreError: a store cannot be read.
    """
    of_captions = check_caption_lengths(config, index)
    return [*check_unused(config), *check_warmup(config), *check_latent_scale(config, index), *of_captions]


def warn_of_doubts(config: Config, index: Index) -> None:
    """Log what may be a mistake and may be meant."""
    log_doubts([*check_prediction(config), *list_doubts(config, index)])
