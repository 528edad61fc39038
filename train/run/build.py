"""Build a run from its settings: networks, data, state, metrics, console and report."""

from collections.abc import Iterator
from pathlib import Path

from loguru import logger

from sdxl_trainer.cache.encode.on_the_fly import build_missing_latent_encoder, fill_missing_latents
from sdxl_trainer.cache.models.encoders import load_tokenizers
from sdxl_trainer.cache.models.model_pair import resolve_pair
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.loading.loader import build_dataset
from sdxl_trainer.data.loading.micro_batch import MicroBatch
from sdxl_trainer.data.order.plan import Plan
from sdxl_trainer.data.text.strategy import load_strategy
from sdxl_trainer.launch.distributed import Ranks, share_problems
from sdxl_trainer.train.checkpoint.resume import (
    build_initial_state,
    describe_changes,
    open_checkpoints,
    restore_progress,
)
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.engine.deepspeed_config import compute_batch_sizes
from sdxl_trainer.train.estimates.flops import build_mfu_reference
from sdxl_trainer.train.objective.builder import build_objective
from sdxl_trainer.train.report.metrics import MetricsLog, WandbLog, open_wandb
from sdxl_trainer.train.report.report_process import open_report
from sdxl_trainer.train.run.bad_samples import BadSamples
from sdxl_trainer.train.run.checks import read_checked_vae_config
from sdxl_trainer.train.run.console import Progress
from sdxl_trainer.train.run.interruption import Requests
from sdxl_trainer.train.run.memory_plan import plan_run_memory
from sdxl_trainer.train.run.networks import load_engine
from sdxl_trainer.train.run.run import Run
from sdxl_trainer.train.run.training_data import (
    build_validation_set,
    count_run_steps,
    split_data,
    start_loader,
)


def build_run(config: Config, index: Index, ranks: Ranks, publish: bool = False) -> tuple[Run, Iterator[MicroBatch]]:
    """Load the networks, restore the newest checkpoint if there is one, and start reading data.

    Args:
        publish: send metrics to wandb if `log.wandb` is set, and keep the report page up to date.

    Returns:
        The run, and its micro batches from the restored position on.

    Raises:
        UserInputError: the settings contradict the data, the checkpoint or wandb.
    """
    publish, logs = publish and ranks.is_main, config.run.folder / "logs"
    wandb_log = open_wandb_for_ranks(config, publish)
    source = resolve_pair(config)
    tokenizers = load_tokenizers(source, config.model)
    strategy = load_strategy(config.data.strategy) if config.data.strategy else None
    split = split_data(config, index, strategy, ranks)
    checkpoint, checkpoints = open_checkpoints(config.run.folder / "checkpoints", config.checkpoint, ranks)
    fresh = build_initial_state(config, index, split.plan, ranks, split.repeats)
    state, changes = restore_state(checkpoint, fresh, split.plan, config.run.on_data_change)
    num_steps = count_run_steps(config.train, split.plan, state)
    # Workers start and read ahead while the networks are loaded.
    vae_config = read_checked_vae_config(config, source, index, ranks)
    dataset = build_dataset(config, index, tokenizers, strategy, vae_config["latent_channels"])
    objective = build_objective(config, vae_config, ranks, state.feedback)
    batches = start_loader(config, dataset, split.plan, state, ranks, objective)
    missing = build_missing_latent_encoder(config, source, dataset, ranks) if index.summary.num_uncached else None
    if missing is not None:
        batches = fill_missing_latents(batches, missing)
    config, memory, _ = plan_run_memory(config, source, split.plan, ranks, state.gradient_checkpointing)
    state.gradient_checkpointing = config.engine.gradient_checkpointing
    engine, conditioner = load_engine(config, source, state, ranks, checkpoint)
    unet, unet_config, num_text_tokens = engine.model.unet, source.read_config("unet"), config.data.max_tokens + 2
    mfu_reference = build_mfu_reference(unet, unet_config, num_text_tokens, config.engine.precision, ranks)
    requests = Requests(config.run.folder, ranks, config.checkpoint.every_minutes)
    run = Run(
        config=config,
        ranks=ranks,
        source=source,
        index=index,
        plan=split.plan,
        tokenizers=tokenizers,
        batch_sizes=compute_batch_sizes(config.train, ranks.world_size),
        engine=engine,
        conditioner=conditioner,
        objective=objective,
        state=state,
        num_steps=num_steps,
        checkpoints=checkpoints,
        requests=requests,
        progress=Progress(config, ranks, state, num_steps, checkpoints, requests, mfu_reference),
        metrics=MetricsLog(logs, state.step, wandb_log, changes) if ranks.is_main else None,
        validation=build_validation_set(config, split, dataset, missing.fill if missing else None),
        report=open_report(config, index, split.plan, tokenizers, objective) if publish else None,
        memory=memory,
        bad_samples=BadSamples(logs, ranks, len(index), config.data.max_bad_fraction),
    )
    return run, batches


def restore_state(
    checkpoint: Path | None, fresh: TrainState, plan: Plan, on_data_change: str
) -> tuple[TrainState, list[str]]:
    """Return the state to continue from, and the changes of settings and data since the checkpoint.

    Raises:
        UserInputError: the data have changed, and `run.on_data_change` is `stop`.
    """
    if checkpoint is None:
        return fresh, []
    saved = TrainState.load(checkpoint)
    logger.info("step {} is done: resuming from {}", saved.step, checkpoint)
    return restore_progress(saved, fresh, plan, on_data_change), describe_changes(saved, fresh)


def open_wandb_for_ranks(config: Config, publish: bool) -> WandbLog | None:
    """Open the run at wandb on the rank that publishes. All ranks call this together.

    wandb may refuse the run, so it is asked before the networks are loaded.
    """
    with share_problems():
        if publish and config.log.wandb is not None:
            folder, settings = config.run.folder / "logs", config.model_dump(mode="json")
            return open_wandb(config.log.wandb, config.run.name, folder, settings)
