"""Going on from a checkpoint: which one, what has changed since, and where the order of batches is taken up."""

import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger

from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.order.plan import Plan, Position
from sdxl_trainer.data.text.strategy import hash_repeats
from sdxl_trainer.launch.distributed import Ranks, broadcast_object
from sdxl_trainer.launch.logger import warn_once
from sdxl_trainer.train.checkpoint.folder import find_checkpoint, set_aside_damaged, settle_partials
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.engine.resharding import ReshardingError

# Settings that leave the weights as they would have been, but for rounding. What the data are is told by their
# fingerprint, whatever settings name them. Any other change of a setting is reported.
HARMLESS_SECTIONS = ("checkpoint", "log", "sample", "validation")
HARMLESS_KEYS = frozenset(
    {"run.name", "run.dir", "run.resume", "run.on_data_change"}
    | {"data.metadata", "data.image_dirs", "data.on_missing_caption", "data.verify_latents"}
    | {"data.num_workers", "data.max_bad_fraction"}
    | {"cache.dir", "cache.format", "cache.shard_mb", "cache.batch_size", "cache.num_workers", "cache.on_missing"}
    | {"engine.zero_stage", "engine.gradient_checkpointing", "train.micro_batch_size"}
    | {"engine.offload_optimizer", "engine.offload_param", "engine.attention", "engine.compile"}
    | {"engine.channels_last", "engine.timeout_minutes", "ema.sample"}
)


def open_checkpoints(config: Config, ranks: Ranks) -> tuple[Path | None, CheckpointWriter]:
    """The checkpoint to go on from, if there is one, and the writer of further ones; the same on all ranks."""
    settings, folder = config.checkpoint, config.run.folder / "checkpoints"
    newest, token = None, ""
    if ranks.is_main:
        settle_partials(folder)
        newest, token = find_checkpoint(folder), uuid.uuid4().hex[:8]
        set_aside_damaged(folder, newest)
    newest, token = broadcast_object((newest, token))
    writer = CheckpointWriter(
        folder,
        ranks.rank,
        ranks.world_size,
        token,
        settings.keep_last,
        settings.keep_every_steps,
        wait_for_space_seconds=60 * settings.wait_for_space_minutes,
    )
    return newest, writer


def build_state(config: Config, index: Index, plan: Plan, ranks: Ranks, repeats: np.ndarray | None) -> TrainState:
    """The state of a run that has not begun. Other repeats make another order, as another index does."""
    assert config.engine.zero_stage is not None, "settle_engine chooses a stage"
    return TrainState(
        epoch_batches=plan.num_batches(0),
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        world_size=ranks.world_size,
        zero_stage=config.engine.zero_stage,
        index_fingerprint="-".join(
            filter(None, [index.hash_rows(), "" if repeats is None else hash_repeats(repeats), plan.order_name])
        ),
        config=config.model_dump(mode="json"),
    )


def take_up(saved: TrainState, fresh: TrainState, plan: Plan, on_data_change: str) -> TrainState:
    """The state to go on with: the saved one's progress, under the settings, data and ranks of now.

    What has changed and alters training is reported, key by key.

    Args:
        saved: as the checkpoint has it.
        fresh: as it would be at the beginning of a run with the settings of now.

    Raises:
        UserInputError: the data have changed, and `run.on_data_change` says to stop.
    """
    changes = list_changes(saved.config, fresh.config)
    if changes:
        shown = "".join(f"\n  {key}: {old!r} -> {new!r}" for key, old, new in changes)
        warn_once("settings that alter training have changed since step {}:{}", saved.step, shown)
    new_data = saved.index_fingerprint != fresh.index_fingerprint
    if new_data and on_data_change == "stop":
        cure = "set run.on_data_change: continue, or give another run.name, or put the data back"
        rule = f"the data have changed since step {saved.step}, and with them the order of batches"
        raise UserInputError([Problem("run.on_data_change", on_data_change, rule, cure)])
    epoch, index = saved.epoch, saved.index
    if new_data or saved.global_batch_size != fresh.global_batch_size:
        share = saved.index / max(1, saved.epoch_batches)
        epoch, index = plan.skip_empty_epochs(Position(epoch, round(share * plan.num_batches(epoch))))
        warn_once(
            "{} changed: step {} goes on at batch {} of {} in epoch {} instead of {} of {}",
            "the data have" if new_data else "train.global_batch_size has",
            saved.step,
            index,
            plan.num_batches(epoch),
            epoch,
            saved.index,
            saved.epoch_batches,
        )
    now = {name: getattr(fresh, name) for name in TrainState.MADE_WITH}
    return replace(saved, epoch=epoch, index=index, epoch_batches=plan.num_batches(epoch), **now)


def list_changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings that alter training and differ: (dotted key, then, now). One that did not exist then had its default."""
    defaults = dict(iterate_settings(Config().model_dump(mode="json")))
    before, now = {**defaults, **dict(iterate_settings(old))}, dict(iterate_settings(new))
    keys = [*now, *(key for key in before if key not in now)]
    differing = [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]
    held = "constant" == before.get("optim.schedule") == now.get("optim.schedule")
    return [
        change for change in differing if not is_harmless(change[0]) and not (held and change[0] == "train.max_steps")
    ]


def is_harmless(key: str) -> bool:
    """Whether a change of this setting leaves the weights as they would have been."""
    return key.split(".")[0] in HARMLESS_SECTIONS or key in HARMLESS_KEYS or key.startswith("engine.deepspeed")


def iterate_settings(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested dicts."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from iterate_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def load_engine(engine: Engine, checkpoint: Path) -> None:
    """Give the engine a checkpoint's weights and optimizer state.

    Raises:
        UserInputError: these ranks cannot take it up.
    """
    try:
        engine.load(checkpoint)
    except ReshardingError as error:
        cure = "start it as it was saved, or give another run.name"
        raise UserInputError([Problem("run.resume", checkpoint, f"cannot be taken up: {error}", cure)]) from None
    logger.info("resuming from {}", checkpoint)
