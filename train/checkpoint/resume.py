"""Resume from a checkpoint: choose it, report what has changed since, and restore progress and engine."""

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from loguru import logger

from sdxl_trainer.configs.checkpoint import CheckpointConfig
from sdxl_trainer.configs.problems import Problem, UserInputError, format_value, raise_if_any
from sdxl_trainer.configs.schema import Config, ModelConfig
from sdxl_trainer.configs.section import is_own_code
from sdxl_trainer.data.files import hash_file
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.order.plan import Plan, Position
from sdxl_trainer.data.own_code import hash_own_code
from sdxl_trainer.data.text.strategy import hash_repeats
from sdxl_trainer.data.text.tag_rules import FILES
from sdxl_trainer.launch.distributed import Ranks, broadcast_object, share_problems
from sdxl_trainer.launch.logger import warn_once
from sdxl_trainer.train.checkpoint.folder import (
    DAMAGED,
    find_checkpoints,
    get_step,
    recover_partial_checkpoints,
    tidy_checkpoints,
)
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.engine.saved_state import ReshardingError
from sdxl_trainer.train.objective.loss_feedback import build_feedback_state

# Settings that leave the weights unchanged except for rounding. A change of any other setting is reported. Settings
# that name the data are harmless, because the fingerprint of the index identifies the data.
HARMLESS_SECTIONS = ("about", "checkpoint", "log", "sample", "validation")
HARMLESS_KEYS = frozenset(
    {"run.name", "run.dir", "run.resume", "run.on_data_change"}
    | {"data.metadata", "data.image_dirs", "data.on_missing_caption", "data.verify_latents"}
    | {"data.num_workers", "data.max_bad_fraction"}
    | {"data.remote_shards.copies_dir", "data.remote_shards.copies_gb"}
    | {"cache.dir", "cache.format", "cache.shard_mb", "cache.batch_size", "cache.num_workers", "cache.on_missing"}
    | {"cache.spool", "cache.spool_gb"}
    | {"engine.zero_stage", "engine.gradient_checkpointing", "train.micro_batch_size"}
    | {"engine.offload_optimizer", "engine.offload_param", "engine.attention", "engine.compile"}
    | {"engine.channels_last", "engine.cudnn_benchmark", "engine.timeout_minutes", "ema.sample"}
    | {"ema.snapshot_every_steps", "ema.snapshot_dtype"}
)
# Settings that may name the user's own code or a file of tags, which is compared too.
TAG_FILE_KEYS = tuple(f"data.caption.{name}" for name in FILES)
OWN_CODE_KEYS = ("data.strategy", "optim.name", "optim.schedule", "objective.loss", "objective.weighting")

# Settings of `lora` that decide which tensors adapters have.
ADAPTER_SHAPES = ("kind", "rank", "conv_rank", "rank_pattern", "targets", "factor", "decompose_both")
LENGTH_KEYS = ("train.max_steps", "train.max_epochs")


class SettingChange(NamedTuple):
    """A setting by its dotted key, with its value in the checkpoint and its present value."""

    key: str
    old: Any
    new: Any

    @property
    def is_length(self) -> bool:
        """True if the setting only says how long the run is."""
        return self.key in LENGTH_KEYS

    def __str__(self) -> str:
        old, new = (value if isinstance(value, str) else format_value(value) for value in (self.old, self.new))
        return f"{self.key}: {old} -> {new}"


def open_checkpoints(folder: Path, settings: CheckpointConfig, ranks: Ranks) -> tuple[Path | None, CheckpointWriter]:
    """Return the checkpoint to resume from, if there is one, and the writer of further ones; equal on all ranks.

    Rank 0 first seals, renames or deletes what earlier jobs left in the folder.

    Raises:
        UserInputError: no checkpoint is intact, and there are damaged ones.
    """
    newest, token = None, ""
    with share_problems():
        if ranks.is_main:
            recover_partial_checkpoints(folder)
            newest, token = choose_checkpoint(folder), uuid.uuid4().hex[:8]
    newest, token = broadcast_object((newest, token))
    writer = CheckpointWriter(
        folder=folder,
        rank=ranks.rank,
        world_size=ranks.world_size,
        token=token,
        keep_last=settings.keep_last,
        keep_every_steps=settings.keep_every_steps,
        keep_best=settings.keep_best,
        wait_for_space_seconds=60 * settings.wait_for_space_minutes,
    )
    if newest is not None:
        writer.last_step = get_step(newest)
    return newest, writer


def choose_checkpoint(folder: Path) -> Path | None:
    """Return the newest intact checkpoint, and rename or delete the damaged ones; None if the folder holds none at all.

    Raises:
        UserInputError: no checkpoint is intact, and there are damaged ones. They are left as they are.
    """
    newest, damages = find_checkpoints(folder)
    if newest is not None:
        for name, damage in damages.items():
            logger.warning("{} is damaged and skipped: {}", folder / name, damage)
        tidy_checkpoints(folder, newest)
        return newest
    renamed = [f"{path.name}: was damaged at an earlier start" for path in sorted(folder.glob(f"{DAMAGED}step-*"))]
    if damages or renamed:
        found = "; ".join([*(f"{name}: {damage}" for name, damage in damages.items()), *renamed])
        rule = f"finds no intact checkpoint to resume from: {found}"
        cure = "restore one of them from a copy; or start from step 0: set another run.name, or delete this folder"
        raise UserInputError([Problem("run.resume", folder, rule, cure)])
    return None


def build_initial_state(
    config: Config, index: Index, plan: Plan, ranks: Ranks, repeats: np.ndarray | None
) -> TrainState:
    """Build the state of a run that has not started. Its fingerprint covers the index, the repeats and the order."""
    assert config.engine.zero_stage is not None, "resolve_zero_stage chooses a stage"
    settings = config.model_dump(mode="json")
    return TrainState(
        epoch_batches=plan.num_batches(0),
        feedback=build_feedback_state(config.objective),
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        world_size=ranks.world_size,
        zero_stage=config.engine.zero_stage,
        index_fingerprint="-".join(
            filter(None, [index.hash_rows(), "" if repeats is None else hash_repeats(repeats), plan.order_name])
        ),
        config=settings,
        own_code=hash_code_of_settings(settings),
    )


def hash_code_of_settings(settings: dict[str, Any]) -> dict[str, str]:
    """Return the hash of each file that the settings name as own code or as a list of tags, by dotted key."""
    values = dict(iterate_settings(settings))
    names = {key: str(values[key]) for key in OWN_CODE_KEYS if is_own_code(values.get(key))}
    lists = {key: hash_file(Path(values[key]))[:16] for key in TAG_FILE_KEYS if values.get(key)}
    return {key: digest for key, name in names.items() if (digest := hash_own_code(name))} | lists


def restore_progress(saved: TrainState, fresh: TrainState, plan: Plan, on_data_change: str) -> TrainState:
    """Return the saved progress under the present settings, data and ranks.

    Changes that alter training are reported, key by key. If the number of batches in an epoch has changed, the run
    continues at the same share of the epoch.

    Args:
        saved: state of the checkpoint.
        fresh: state of a run that starts with the present settings.

    Raises:
        UserInputError: `check_progress` finds a problem.
    """
    changes = list_changes(saved.config, fresh.config)
    if changes:
        shown = "".join(f"\n  {change}" for change in changes)
        warn_once("settings that alter training have changed since step {}:{}", saved.step, shown)
    if edited := list_edited_code(saved, fresh):
        warn_once("the file of {} has changed since step {}", " and ".join(edited), saved.step)
    raise_if_any(check_progress(saved, fresh, on_data_change))
    new_data = saved.index_fingerprint != fresh.index_fingerprint
    epoch, index = saved.epoch, saved.index
    if new_data or saved.global_batch_size != fresh.global_batch_size:
        share = saved.index / max(1, saved.epoch_batches)
        epoch, index = plan.skip_empty_epochs(Position(epoch, round(share * plan.num_batches(epoch))))
        warn_once(
            "{} changed: step {} continues at batch {} of {} in epoch {} instead of {} of {}",
            "the data have" if new_data else "train.global_batch_size has",
            saved.step,
            index,
            plan.num_batches(epoch),
            epoch,
            saved.index,
            saved.epoch_batches,
        )
    now = {name: getattr(fresh, name) for name in TrainState.MADE_WITH}
    # Each part that the present settings ask for begins anew if the checkpoint has another.
    before, present = saved.config.get("objective", {}), fresh.config["objective"]
    changed = {key for key, value in present.items() if before.get(key, value) != value}
    now["feedback"] = saved.feedback.fit_to(fresh.feedback, changed)
    return replace(saved, epoch=epoch, index=index, epoch_batches=plan.num_batches(epoch), **now)


def check_progress(saved: TrainState, fresh: TrainState, on_data_change: str) -> Iterator[Problem]:
    """Yield a problem for each reason why a run cannot continue from a checkpoint.

    Args:
        saved: state of the checkpoint.
        fresh: state of a run that starts with the present settings.
    """
    if saved.index_fingerprint != fresh.index_fingerprint and on_data_change == "stop":
        cure = "set run.on_data_change: continue, or another run.name, or restore the data"
        rule = f"the data have changed since step {saved.step}, and with them the order of batches"
        yield Problem("run.on_data_change", on_data_change, rule, cure)
    yield from check_adapter_shapes(saved, fresh)


def check_adapter_shapes(saved: TrainState, fresh: TrainState) -> Iterator[Problem]:
    """Yield a problem for each setting by which adapters have other tensors than those of the checkpoint."""
    default = Config().lora.model_dump(mode="json")
    before, now = ({**default, **state.config.get("lora", {})} for state in (saved, fresh))
    if bool(before["rank"]) != bool(now["rank"]):
        trained = f"adapters of rank {before['rank']}" if before["rank"] else "the networks, not adapters"
        rule = f"does not fit step {saved.step}, which trained {trained}"
        cure = f"set it to {before['rank']}, or export that step and name it in model.path of another run.name"
        yield Problem("lora.rank", now["rank"], rule, cure)
        return
    for key in ADAPTER_SHAPES:
        if before[key] != now[key]:
            rule = f"does not fit the adapters of step {saved.step}, which have {key} {before[key]}"
            yield Problem(f"lora.{key}", now[key], rule, f"set it to {before[key]}, or set another run.name")


def describe_changes(saved: TrainState, fresh: TrainState) -> list[str]:
    """Describe the changes that alter training between the state of a checkpoint and that of the present start."""
    changes = map(str, list_changes(saved.config, fresh.config))
    data = ["the data"] if saved.index_fingerprint != fresh.index_fingerprint else []
    return [*data, *changes, *(f"the file of {key}" for key in list_edited_code(saved, fresh))]


def list_edited_code(saved: TrainState, fresh: TrainState) -> list[str]:
    """List the settings that name a changed file of code or tags. Older checkpoints hold no hashes of files."""
    return [key for key, digest in fresh.own_code.items() if saved.own_code.get(key, digest) != digest]


def list_changes(old: dict[str, Any], new: dict[str, Any]) -> list[SettingChange]:
    """List the settings that alter training and differ. A setting that is missing in `old` had its default."""
    defaults = dict(iterate_settings(Config().model_dump(mode="json")))
    before, now = {**defaults, **dict(iterate_settings(old))}, dict(iterate_settings(new))
    keys = [*now, *(key for key in before if key not in now)]
    changes = [SettingChange(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]
    # The number of steps has no effect on a constant learning rate.
    is_constant = "constant" == before.get("optim.schedule") == now.get("optim.schedule")
    return [change for change in changes if not is_harmless(change.key) and not (is_constant and change.is_length)]


def is_harmless(key: str) -> bool:
    """Return whether a change of this setting leaves the weights unchanged except for rounding."""
    return key.split(".")[0] in HARMLESS_SECTIONS or key in HARMLESS_KEYS or key.startswith("engine.deepspeed")


def iterate_settings(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested dicts."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from iterate_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_base_model(model: ModelConfig, hashes: Mapping[str, str], saved: TrainState) -> Iterator[Problem]:
    """Yield a problem if frozen weights, which checkpoints do not hold, are not those that the checkpoint goes with.

    Args:
        hashes: hash of each network with frozen weights.
        saved: state of the checkpoint. Older ones do not identify their base model, and hold its weights.
    """
    wrong = [name for name, found in hashes.items() if saved.base_model.get(name, found) != found]
    if wrong:
        path = dict(iterate_settings(saved.config)).get("model.path")
        rule = f"is not the base model of the checkpoint: the weights of {' and '.join(wrong)} differ"
        cure = f"restore the model that step {saved.step} was trained on ({path}), or set another run.name"
        yield Problem("model.path", model.path, rule, cure)


def restore_engine(engine: Engine, checkpoint: Path) -> None:
    """Load a checkpoint's weights and optimizer state into the engine.

    Raises:
        UserInputError: these ranks cannot load it.
    """
    try:
        engine.load_state(checkpoint)
    except ReshardingError as error:
        cure = "start with the settings, the number of ranks and the ZeRO stage that saved it, or set another run.name"
        raise UserInputError([Problem("run.resume", checkpoint, f"cannot be loaded: {error}", cure)]) from None
    logger.info("weights and optimizer state loaded from {}", checkpoint)
