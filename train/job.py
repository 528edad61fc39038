"""A training run from settings to model: set up, build, fit, finish."""

from collections.abc import Iterator

from loguru import logger

from sdxl_trainer.cache.encoders import load_text_encoders, load_tokenizers
from sdxl_trainer.cache.model_source import ModelSource, check_model, resolve_model
from sdxl_trainer.configs.load import save_config
from sdxl_trainer.configs.problems import Problem, raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.check import check_records, get_cache_folder
from sdxl_trainer.data.dataset import LatentDataset, MicroBatch
from sdxl_trainer.data.index import Index, open_latent_index
from sdxl_trainer.data.loader import build_plan, iterate_batches, iterate_specs
from sdxl_trainer.data.manifest import read_identity
from sdxl_trainer.data.plan import Plan
from sdxl_trainer.data.tokens import CaptionTokenizer
from sdxl_trainer.launch.distributed import Ranks, broadcast_object, close_ranks, init_ranks, read_environment
from sdxl_trainer.launch.logger import init_logger
from sdxl_trainer.train.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint
from sdxl_trainer.train.conditioning import TextConditioner
from sdxl_trainer.train.diffusion import compute_alphas_cumprod
from sdxl_trainer.train.engine import Engine
from sdxl_trainer.train.loop import Run, finish, fit
from sdxl_trainer.train.metrics import MetricsLog
from sdxl_trainer.train.model import load_unet
from sdxl_trainer.train.optim import build_optimizer
from sdxl_trainer.train.state import TrainState


def run_training(config: Config, problems: list[Problem], dry_run: bool = False) -> None:
    """Train from settings to exported model; with `dry_run`, do all up to the first step.

    Raises:
        UserInputError: anything wrong with the user's settings or data, all of it at once.
    """
    index, ranks = set_up(config, problems)
    run, batches = build(config, index, ranks)
    if not dry_run:
        fit(run, batches)
        finish(run)
    close_ranks()


def set_up(config: Config, problems: list[Problem]) -> tuple[Index, Ranks]:
    """Check everything that can be checked without a network, open the index, and join the ranks.

    Rank 0 checks while the others wait for it in `init_ranks`, so storage is asked once and a mistake reported once.
    """
    rank, _, world_size = read_environment()
    init_logger(rank, config.log.level)
    path = None
    if rank == 0:
        index, found = check_run(config, world_size)
        raise_if_any([*problems, *found])
        assert index is not None, "a run without problems has an index"
        path = index.path
        config.run.folder.mkdir(parents=True, exist_ok=True)
        save_config(config, config.run.folder / "config.yaml")
    ranks = init_ranks()
    init_logger(rank, config.log.level, config.run.folder / "logs")
    return Index(broadcast_object(path)), ranks


def check_run(config: Config, world_size: int) -> tuple[Index | None, list[Problem]]:
    """The index of what will be trained on, and every problem that can be told before a network is loaded."""
    problems = check_model(config.model)
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
    records, found = check_records(config)
    problems += found
    folder = get_cache_folder(config)
    if read_identity(folder) is None:
        problems.append(
            Problem("cache.dir", folder, "holds no latent cache", "run bash launch/cache.sh --cfg ... first")
        )
    if records is None or read_identity(folder) is None:
        return None, problems
    index = open_latent_index(folder, records)
    if len(index) == 0:
        problems.append(
            Problem(
                "cache.dir",
                folder,
                "holds the latents of none of the records",
                "run bash launch/cache.sh with the same settings first",
            )
        )
    elif len(index) < len(records):
        logger.warning("{} of {} records have no latents and are left out", len(records) - len(index), len(records))
    return index, problems


def build(config: Config, index: Index, ranks: Ranks) -> tuple[Run, Iterator[MicroBatch]]:
    """Load the networks, resume if there is something to resume, and start reading data."""
    source = resolve_model(config.model)
    tokenizers = load_tokenizers(source, config.model)
    plan = build_plan(index, config.train.global_batch_size, config.run.seed)
    checkpoint = find_checkpoint(config.run.folder / "checkpoints", ranks)
    state = TrainState.load(checkpoint) if checkpoint else build_state(config, index, ranks)
    check_resume(state, build_state(config, index, ranks))
    # Workers start and read ahead while the networks are loaded.
    batches = start_reading(config, index, plan, tokenizers, state, ranks)
    engine, conditioner = build_networks(config, source, ranks)
    if checkpoint:
        load_checkpoint(checkpoint, engine)
        logger.info("resuming from {}", checkpoint)
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
        compute_alphas_cumprod().to(ranks.device),
        source.read_config("vae").get("scaling_factor", 0.13025),
        state,
        metrics,
    )
    describe_run(run)
    return run, batches


def build_networks(config: Config, source: ModelSource, ranks: Ranks) -> tuple[Engine, TextConditioner]:
    """The U-Net under DeepSpeed, and the frozen text encoders, on this rank's device."""
    unet = load_unet(source, config.engine.gradient_checkpointing).to(ranks.device)
    train = config.train
    accumulation_steps = train.global_batch_size // (train.micro_batch_size * ranks.world_size)
    engine = Engine(
        unet,
        build_optimizer(unet, config.optim),
        config.engine,
        (train.global_batch_size, train.micro_batch_size, accumulation_steps),
        config.optim.max_grad_norm,
    )
    encoders = [encoder.to(ranks.device, engine.dtype) for encoder in load_text_encoders(source, config.model)]
    return engine, TextConditioner(*encoders)


def start_reading(
    config: Config,
    index: Index,
    plan: Plan,
    tokenizers: tuple[CaptionTokenizer, CaptionTokenizer],
    state: TrainState,
    ranks: Ranks,
) -> Iterator[MicroBatch]:
    """This rank's micro batches from the state's position on."""
    dataset = LatentDataset(
        index,
        get_cache_folder(config),
        tokenizers,
        seed=config.run.seed,
        max_tokens=config.data.max_tokens,
        caption_dropout_rate=config.data.caption_dropout_rate,
    )
    specs = iterate_specs(plan, (state.epoch, state.index), ranks.rank, ranks.world_size, config.train.micro_batch_size)
    return iterate_batches(dataset, specs, config.data.num_workers, pin_memory=ranks.device.type == "cuda")


def build_state(config: Config, index: Index, ranks: Ranks) -> TrainState:
    """The state of a run that has not begun."""
    return TrainState(
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        world_size=ranks.world_size,
        zero_stage=config.engine.zero_stage,
        index_fingerprint=index.fingerprint,
    )


def check_resume(state: TrainState, fresh: TrainState) -> None:
    """Refuse to go on from a state whose order of batches or sharding differs from what the settings say now."""
    keys = {
        "seed": "run.seed",
        "global_batch_size": "train.global_batch_size",
        "zero_stage": "engine.zero_stage",
        "world_size": "number of ranks",
        "index_fingerprint": "data",
    }
    raise_if_any(
        Problem(
            key,
            getattr(fresh, name),
            f"was {getattr(state, name)} when the checkpoint was saved",
            "set it back, or give another run.name",
        )
        for name, key in keys.items()
        if getattr(state, name) != getattr(fresh, name)
    )


def describe_run(run: Run) -> None:
    """Say what is about to be trained, with the batch arithmetic."""
    train, parameters = run.config.train, sum(p.numel() for p in run.engine.model.parameters())
    logger.info(
        "{} samples in {} buckets, {} batches in epoch {} ({} samples carried on)",
        len(run.index),
        len(run.plan.buckets),
        run.plan.num_batches(run.state.epoch),
        run.state.epoch,
        run.plan.num_carried(run.state.epoch),
    )
    logger.info(
        "batch: {} micro x {} accumulated x {} ranks = {} global; U-Net {:,} weights in {}, ZeRO-{}",
        train.micro_batch_size,
        run.accumulation_steps,
        run.ranks.world_size,
        train.global_batch_size,
        parameters,
        run.config.engine.precision,
        run.engine.zero_stage,
    )
