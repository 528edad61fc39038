"""Checks of a run's settings that need neither its data nor a network's weights."""

from collections.abc import Iterator

from sdxl_trainer.cache.models.encoders import check_vocabulary
from sdxl_trainer.cache.models.model_pair import check_pair
from sdxl_trainer.cache.models.source import check_model
from sdxl_trainer.configs.problems import Problem, format_count
from sdxl_trainer.configs.schema import Config, OptimConfig, TrainConfig
from sdxl_trainer.train.engine.block_offload import check_block_offload
from sdxl_trainer.train.engine.deepspeed_config import check_engine, compute_batch_sizes
from sdxl_trainer.train.engine.gradient_release import check_gradient_release
from sdxl_trainer.train.export.about import check_about
from sdxl_trainer.train.networks.adapters import check_adapters
from sdxl_trainer.train.networks.fp8_linears import check_fp8
from sdxl_trainer.train.networks.quantised_base import check_quantised_base
from sdxl_trainer.train.networks.trained_networks import list_trained_encoders
from sdxl_trainer.train.objective.own_formulas import check_own_formulas
from sdxl_trainer.train.optim.optimizers import check_optimizer
from sdxl_trainer.train.optim.schedules import check_own_schedule
from sdxl_trainer.train.report.metrics import check_wandb
from sdxl_trainer.train.sampling.prompts import load_prompts


def check_model_settings(config: Config) -> Iterator[Problem]:
    """Yield problems of the model, the optimizer, the engine, the objective, the adapters and the prompts."""
    of_model = list(check_model(config.model)) or list(check_pair(config))
    yield from of_model
    if not of_model:  # the right model may bring a vocabulary
        yield from check_vocabulary(config.model)
    yield from check_engine(config.engine, config.optim)
    yield from check_block_offload(config.engine, uses_adapters=config.lora.rank > 0)
    yield from check_fp8(config.engine, uses_adapters=config.lora.rank > 0)
    yield from check_optimizer(config.optim, config.engine, config.ema)
    yield from check_own_schedule(config.optim)
    yield from check_own_formulas(config.objective)
    if config.cache.text:
        yield from check_frozen_encoders(config.optim)
    yield from load_prompts(config.sample, config.objective, config.data.caption.fix_text)[1]
    yield from check_adapters(config.lora)
    yield from check_quantised_base(config.lora, config.engine)


def check_frozen_encoders(optim: OptimConfig) -> Iterator[Problem]:
    """Yield a problem for each text encoder with a learning rate: with cached text the encoders do not run."""
    for name in list_trained_encoders(optim):
        rule, cure = "trains a text encoder, which does not run with cache.text", "set it to 0, or cache.text: false"
        yield Problem(f"optim.{name}_lr", getattr(optim, f"{name}_lr"), rule, cure)


def check_rank_settings(config: Config, world_size: int) -> Iterator[Problem]:
    """Yield problems of settings that depend on the number of ranks."""
    of_batches = list(check_batch_sizes(config.train, world_size))
    yield from of_batches
    if not of_batches:
        steps = compute_batch_sizes(config.train, world_size).accumulation_steps
        yield from check_gradient_release(config.engine, config.optim, steps)


def check_batch_sizes(train: TrainConfig, world_size: int) -> Iterator[Problem]:
    """Yield a problem if the ranks' micro batches do not divide the global batch."""
    divisor = train.micro_batch_size * world_size
    if train.global_batch_size % divisor:
        rule = (
            f"is not a multiple of train.micro_batch_size {train.micro_batch_size} x {format_count(world_size, 'rank')}"
        )
        cure = f"set it to a multiple of {divisor}"
        if micro := find_micro_batch(train, world_size):
            cure = (
                f"set train.micro_batch_size: {micro}, which keeps this batch; or set the global batch to a multiple "
                f"of {divisor}"
            )
        yield Problem("train.global_batch_size", train.global_batch_size, rule, cure)


def find_micro_batch(train: TrainConfig, world_size: int) -> int | None:
    """Return the largest micro batch, up to the present one, with which ranks divide the global batch; None without."""
    share, rest = divmod(train.global_batch_size, world_size)
    sizes = range(min(share, train.micro_batch_size), 0, -1)
    return None if rest else next((size for size in sizes if share % size == 0), None)


def check_run_settings(config: Config) -> Iterator[Problem]:
    """Yield problems of the settings of logs, exported models, kept checkpoints, contrastive loss and thumbnail."""
    yield from check_wandb(config.log.wandb)
    yield from check_export_format(config)
    yield from check_keep_best(config)
    yield from check_contrast(config)
    yield from check_about(config.about)


def check_contrast(config: Config) -> Iterator[Problem]:
    """Yield a problem if the contrastive loss finds no other sample in the micro batch."""
    if config.objective.contrastive_weight and config.train.micro_batch_size < 2:
        rule = "needs another sample in each micro batch, but train.micro_batch_size is 1"
        cure = "set train.micro_batch_size to 2 or more, or this to 0"
        yield Problem("objective.contrastive_weight", config.objective.contrastive_weight, rule, cure)


def check_export_format(config: Config) -> Iterator[Problem]:
    """Yield a problem if `checkpoint.export_format` names another format for adapters than one file."""
    if config.lora.rank and config.checkpoint.export_format != "single":
        rule = "does not apply to adapters, which are always exported as one file"
        yield Problem("checkpoint.export_format", config.checkpoint.export_format, rule, "leave it out")


def check_keep_best(config: Config) -> Iterator[Problem]:
    """Yield a problem if `checkpoint.keep_best` is set and no validation ranks the checkpoints."""
    keep_best, saved = config.checkpoint.keep_best, config.checkpoint.every_steps
    validated = config.validation.every_steps
    if not keep_best:
        return
    if not config.validation.share and not config.validation.has_own_set:
        rule = "needs a validation, which ranks the checkpoints"
        cure = "set validation.share and validation.every_steps, or leave it out"
        yield Problem("checkpoint.keep_best", keep_best, rule, cure)
    elif not validated:
        rule = "needs validations on the way, but validation.every_steps is 0"
        cure = f"set validation.every_steps: {saved or 1000}, or leave it out"
        yield Problem("checkpoint.keep_best", keep_best, rule, cure)
    elif not saved:
        rule = "needs checkpoints at the steps of validations, but checkpoint.every_steps is 0"
        cure = f"set checkpoint.every_steps: {validated}, or leave it out"
        yield Problem("checkpoint.keep_best", keep_best, rule, cure)
    elif saved % validated and validated % saved:
        rule = (
            f"finds few checkpoints that are validated: checkpoint.every_steps {saved} and validation.every_steps "
            f"{validated} seldom fall on one step"
        )
        cure = f"set checkpoint.every_steps: {validated}, or a multiple of it"
        yield Problem("checkpoint.keep_best", keep_best, rule, cure)
