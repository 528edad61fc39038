"""A training run from settings to model: set up, build, fit, finish."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger

from sdxl_trainer.cache.encode.on_the_fly import build_missing_encoder, fill_missing
from sdxl_trainer.cache.encode.text_caching import check_cached_text
from sdxl_trainer.cache.models.encoders import TextEncoders, check_vocabulary, load_text_encoders, load_tokenizers
from sdxl_trainer.cache.models.source import ModelSource, check_model, resolve_model
from sdxl_trainer.configs.load import save_config
from sdxl_trainer.configs.problems import Problem, UserInputError, raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.left_out import leave_out_bad_latents, load_left_out_rows
from sdxl_trainer.data.checks.training_set import open_training_set
from sdxl_trainer.data.checks.validation_set import (
    check_held_out,
    derive_validation_config,
    find_held_out_rows,
    open_validation_set,
)
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.loading.dataset import LatentDataset, MicroBatch
from sdxl_trainer.data.loading.loader import build_dataset, build_plan, iterate_batches, iterate_specs
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.data.order.plan import Plan, Position
from sdxl_trainer.data.order.regularisation import balance_regularisation, find_regularisation_rows
from sdxl_trainer.data.order.source_weights import apply_source_weights
from sdxl_trainer.data.order.split import exclude_rows
from sdxl_trainer.data.text.strategy import (
    Strategy,
    compute_repeats,
    load_repeats,
    load_strategy,
    save_repeats,
    try_strategy,
)
from sdxl_trainer.data.text.tokens import Tokenizers
from sdxl_trainer.launch.distributed import Ranks, broadcast_object, close_ranks, init_ranks, read_environment
from sdxl_trainer.launch.logger import init_logger
from sdxl_trainer.launch.signals import Interrupted
from sdxl_trainer.train.checkpoint.emergency import EmergencySaver
from sdxl_trainer.train.checkpoint.folder import list_checkpoints
from sdxl_trainer.train.checkpoint.resume import build_initial_state, open_checkpoints, restore_engine, restore_progress
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.engine.deepspeed_config import DTYPES, BatchSizes, check_engine, resolve_zero_stage
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.estimates.flops import build_mfu_reference
from sdxl_trainer.train.estimates.memory import log_memory_estimate
from sdxl_trainer.train.export.export import export_local_model
from sdxl_trainer.train.networks.adapters import add_adapters, check_adapters
from sdxl_trainer.train.networks.conditioning import LazyTextConditioner, TextConditioner
from sdxl_trainer.train.networks.parameter_groups import build_parameter_groups
from sdxl_trainer.train.networks.trained_networks import (
    ENCODERS,
    TrainedNetworks,
    list_trained_encoders,
    load_unet,
    unfreeze_text_encoder,
)
from sdxl_trainer.train.objective.objective import Objective, resolve_latent_statistics
from sdxl_trainer.train.optim.optimizers import build_optimizer, check_optimizer
from sdxl_trainer.train.report.metrics import MetricsLog
from sdxl_trainer.train.report.reporter import open_reporter
from sdxl_trainer.train.report.wandb_log import open_wandb
from sdxl_trainer.train.run.consistency import check_consistency, check_regularisation_use, warn_of_prediction
from sdxl_trainer.train.run.console import Progress
from sdxl_trainer.train.run.interruption import Requests, obey_stop_file
from sdxl_trainer.train.run.loop import finish, fit, state_at
from sdxl_trainer.train.run.run import Run
from sdxl_trainer.train.run.summary import show_end, show_start
from sdxl_trainer.train.run.trained import check_trained
from sdxl_trainer.train.run.validation_set import ValidationSet, build_validation_set
from sdxl_trainer.train.sampling.prompts import load_prompts


def run_training(config: Config, problems: list[Problem], dry_run: bool = False) -> None:
    """Train from settings to exported model; with `dry_run`, do all up to the first step.

    Raises:
        UserInputError: anything wrong with the user's settings or data, all of it at once.
        Interrupted: the job was asked to stop; the state is saved.
    """
    config, index, ranks = set_up(config, problems)
    wandb_log = open_wandb(config) if ranks.is_main and not dry_run else None
    run, batches = build(config, index, ranks)
    if not dry_run:
        if run.metrics is not None:
            run.metrics.wandb_log = wandb_log
            run.reporter = open_reporter(config, run.index, run.plan, run.tokenizers)
        train(run, batches)
    close_ranks()
    if dry_run:
        logger.info("dry run: all is well up to the first step; nothing was trained")


def train(run: Run, batches: Iterator[MicroBatch]) -> None:
    """Fit and export under the console's display, and say in the end what was done, also when asked to stop."""
    try:
        with guard(run), run.progress.show():
            fit(run, batches)
            finish(run)
    except Interrupted:
        show_end(run, was_stopped=True)
        raise
    show_end(run)


def guard(run: Run) -> EmergencySaver:
    """What saves this rank's shard when the loop ends in an error, or cannot end."""
    first_step = run.state.step

    def read_state(completed: int) -> TrainState:
        return state_at(run, first_step + completed)

    def export(path: Path) -> None:
        export_local_model(path, run.engine, run.conditioner, run.source, run.config)

    whole = run.engine.zero_stage < 3
    return EmergencySaver(run.engine, run.checkpoints, read_state, export if whole else None, run.folder / "models")


def set_up(config: Config, problems: list[Problem]) -> tuple[Config, Index, Ranks]:
    """Check everything that can be checked without a network, open the index, and join the ranks. Returns the settings
    with what was chosen for so many ranks.

    Rank 0 checks while the others wait for it in `init_ranks`, so storage is asked once and a mistake reported once.
    """
    rank, _, world_size = read_environment()
    init_logger(rank, config.log.level)
    config, chosen = resolve_zero_stage(config, world_size)
    path = None
    if rank == 0:
        obey_stop_file(config.run.folder)
        index, found = check_run(config, world_size)
        raise_if_any([*problems, *found])
        if chosen:
            logger.info("engine.zero_stage: {}", chosen)
        warn_of_prediction(config)
        log_memory_estimate(config, world_size)
        assert index is not None, "a run without problems has an index"
        path = index.path
        config.run.folder.mkdir(parents=True, exist_ok=True)
        save_config(config, config.run.folder / "config.yaml")
    ranks = init_ranks(config.engine.timeout_minutes)
    init_logger(rank, config.log.level, config.run.folder / "logs")
    return config, Index(broadcast_object(path)), ranks


def check_run(config: Config, world_size: int) -> tuple[Index | None, list[Problem]]:
    """The index of what will be trained on, and every problem that can be told before a network is loaded."""
    problems = [
        *check_model(config.model),
        *check_vocabulary(config.model),
        *check_engine(config.engine),
        *check_optimizer(config.optim, config.engine),
        *check_encoders(config),
        *load_prompts(config.sample, config.objective)[1],
        *check_adapters(config.lora),
    ]
    problems = problems or check_trained(config)
    train = config.train
    if train.global_batch_size % (train.micro_batch_size * world_size):
        problems.append(
            Problem(
                "train.global_batch_size",
                train.global_batch_size,
                f"is not a multiple of micro_batch_size {train.micro_batch_size} x {world_size} ranks",
                f"set it to a multiple of {train.micro_batch_size * world_size}",
            )
        )
    if config.run.resume == "never" and list_checkpoints(config.run.folder / "checkpoints"):
        problems.append(
            Problem(
                "run.resume",
                "never",
                f"but {config.run.folder} holds checkpoints",
                "give another run.name, or remove the folder",
            )
        )
    index, found = open_training_set(config)
    own, validation_problems = open_validation_set(config)
    problems += found + validation_problems
    if index is not None:
        leave_out_bad_latents(config, index, resuming=bool(list_checkpoints(config.run.folder / "checkpoints")))
        problems += check_held_out(config, index, own)
    problems += check_strategy(config, index)
    problems += check_consistency(config, index)
    if config.cache.text and not problems:
        problems = [*check_cached_text(config, index)]
        problems += check_cached_text(derive_validation_config(config), own) if own else []
    return index, problems


def check_encoders(config: Config) -> list[Problem]:
    """An encoder cannot learn from text that was encoded beforehand."""
    rates = {f"optim.{name}_lr": getattr(config.optim, f"{name}_lr") for name in list_trained_encoders(config.optim)}
    rule, cure = "trains an encoder, and with cache.text it is not run", "set it to 0, or cache.text: false"
    return [Problem(key, rate, rule, cure) for key, rate in rates.items() if config.cache.text]


def check_strategy(config: Config, index: Index | None) -> list[Problem]:
    """Load and try the user's class; write what its `repeats` are into the run folder, where all ranks read them."""
    if config.data.strategy is None:
        return []
    try:
        strategy = load_strategy(config.data.strategy)
        problems = try_strategy(strategy, index) if index else []
        if index and strategy.has("repeats"):
            repeats = compute_repeats(strategy, index)
            config.run.folder.mkdir(parents=True, exist_ok=True)
            save_repeats(get_repeats_file(config), repeats)
            logger.info("{:g} samples an epoch, by the repeats of {}", repeats.sum(), config.data.strategy)
        return problems
    except UserInputError as error:
        return error.problems


def get_repeats_file(config: Config) -> Path:
    """How often each row of the index is used in an epoch, as the user's strategy said when the run was started."""
    return config.run.folder / "repeats.npy"


def build(config: Config, index: Index, ranks: Ranks) -> tuple[Run, Iterator[MicroBatch]]:
    """Load the networks, resume if there is something to resume, and start reading data."""
    source = resolve_model(config.model)
    tokenizers = load_tokenizers(source, config.model)
    strategy = load_strategy(config.data.strategy) if config.data.strategy else None
    own = open_validation_set(config).index if ranks.is_main else None
    own = Index(path) if (path := broadcast_object(own and own.path)) else None
    held_out = find_held_out_rows(config, index, own)
    repeats = count_repeats(config, index, held_out, strategy, ranks)
    shuffle_shards = config.data.remote_shards.shuffle_shards
    plan = build_plan(index, config.train.global_batch_size, config.run.seed, repeats, shuffle_shards)
    checkpoint, checkpoints = open_checkpoints(config.run.folder / "checkpoints", config.checkpoint, ranks)
    state = build_initial_state(config, index, plan, ranks, repeats)
    if checkpoint:
        state = restore_progress(TrainState.load(checkpoint), state, plan, config.run.on_data_change)
    # Workers start and read ahead while the networks are loaded.
    dataset = build_dataset(config, index, tokenizers, strategy)
    batches = start_reading(config, dataset, plan, state, ranks)
    missing = build_missing_encoder(config, source, dataset, ranks) if index.summary.num_uncached else None
    if missing is not None:
        batches = fill_missing(batches, missing)
    engine, conditioner = build_networks(config, source, ranks)
    if checkpoint:
        restore_engine(engine, checkpoint)
    statistics = resolve_latent_statistics(config.model, source.read_config("vae"))
    objective = Objective(config.objective, statistics, config.train.global_batch_size, ranks.device)
    requests = Requests(config.run.folder, ranks, config.checkpoint.every_minutes)
    unet_config = source.read_config("unet")
    mfu_reference = build_mfu_reference(engine.model.unet, unet_config, config, ranks) if ranks.is_main else None
    metrics = MetricsLog(config.run.folder / "logs", state.step) if ranks.is_main else None
    run = Run(
        config,
        ranks,
        source,
        index,
        plan,
        tokenizers,
        engine,
        conditioner,
        objective,
        state,
        checkpoints,
        requests,
        Progress(config, ranks, state, checkpoints, requests, mfu_reference),
        metrics,
        build_validation(config, own or index, None if own else held_out, tokenizers, strategy),
    )
    if run.validation is not None and missing is not None:
        run.validation.fill = missing.fill
    show_start(run)
    return run, batches


def count_repeats(
    config: Config, index: Index, held_out: np.ndarray, strategy: Strategy | None, ranks: Ranks
) -> np.ndarray | None:
    """How often each row comes in an epoch, None for once each: by the strategy and its source's weight, without rows
    that are bad or held out, and regularisation samples as often as is wanted."""
    repeats = load_repeats(get_repeats_file(config)) if strategy and strategy.has("repeats") else None
    if len(held_out):
        logger.info("{} of {} samples are held out of training", len(held_out), len(index))
    repeats = exclude_rows(load_left_out_rows(config.run.folder, index), len(index), repeats)
    repeats = exclude_rows(held_out, len(index), repeats)
    repeats = apply_source_weights(index, repeats, config.data.source_weights)
    regular = broadcast_object(find_regularisation_rows(index) if ranks.is_main else None)
    raise_if_any(check_regularisation_use(config, len(regular)))
    return balance_regularisation(regular, len(index), repeats, config.data.regularisation_repeats)


def build_networks(config: Config, source: ModelSource, ranks: Ranks) -> tuple[Engine, TextConditioner]:
    """What is trained, under DeepSpeed, and the text encoders, which may be part of that, on this rank's device."""
    train, dtype = config.train, DTYPES[config.engine.precision]

    def load_frozen() -> TextEncoders:
        encoder, encoder_2 = load_text_encoders(source, config.model)
        return TextEncoders(encoder.to(ranks.device, dtype), encoder_2.to(ranks.device, dtype))

    loaded = None if config.cache.text else load_text_encoders(source, config.model)
    encoders: dict[str, Any] = dict(zip(ENCODERS, loaded, strict=True)) if loaded else {}
    trained = list_trained_encoders(config.optim)
    for name, encoder in encoders.items():
        if name in trained:
            unfreeze_text_encoder(encoder, config.engine.gradient_checkpointing)
        else:
            encoder.to(ranks.device, dtype)
    networks = TrainedNetworks(
        load_unet(source, config.engine, ranks.device), **{name: encoders[name] for name in trained}
    )
    if config.lora.rank:
        add_adapters(dict(networks.named_children()), config.lora, derive_seed(config.run.seed, RandomStream.ADAPTER))
    networks.to(ranks.device)
    accumulation_steps = train.global_batch_size // (train.micro_batch_size * ranks.world_size)
    groups = build_parameter_groups(networks, config.optim, source.read_config("unet"))
    seed = derive_seed(config.run.seed, RandomStream.ROUNDING, ranks.rank)
    engine = Engine(
        networks,
        build_optimizer(groups, config.optim, config.engine, seed),
        config.engine,
        BatchSizes(train.global_batch_size, train.micro_batch_size, accumulation_steps),
        config.optim.max_grad_norm,
        config.ema,
    )
    return engine, TextConditioner(loaded, trained) if loaded else LazyTextConditioner(load_frozen)


def build_validation(
    config: Config,
    index: Index,
    rows: np.ndarray | None,
    tokenizers: Tokenizers,
    strategy: Strategy | None,
) -> ValidationSet | None:
    """What is validated on: `rows` of an index, or all of it; None if that is nothing."""
    if rows is not None and len(rows) == 0:
        return None
    dataset = build_dataset(derive_validation_config(config), index, tokenizers, strategy)
    return build_validation_set(dataset, rows, config.validation, config.train.micro_batch_size)


def start_reading(
    config: Config, dataset: LatentDataset, plan: Plan, state: TrainState, ranks: Ranks
) -> Iterator[MicroBatch]:
    """This rank's micro batches from the state's position on."""
    specs = iterate_specs(
        plan,
        Position(state.epoch, state.index),
        ranks.rank,
        ranks.world_size,
        config.train.micro_batch_size,
        state.step,
    )
    return iterate_batches(dataset, specs, config.data.num_workers, pin_memory=ranks.device.type == "cuda")
