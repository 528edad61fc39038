"""The end of a run: whether a new start finds anything left to do."""

from pathlib import Path

from sdxl_trainer.configs.schema import Config, TrainConfig
from sdxl_trainer.launch.logger import warn_once
from sdxl_trainer.train.checkpoint.folder import get_step, list_checkpoints, verify_manifest
from sdxl_trainer.train.checkpoint.resume import list_changes
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.engine.averages import name_average
from sdxl_trainer.train.export.average_snapshots import get_snapshot_file
from sdxl_trainer.train.export.export import get_model_path


def find_finished_step(config: Config) -> int | None:
    """Return the step of the newest checkpoint if it is the last one of the settings and its files are written.

    Returns None if a start would have anything to do, or to report.
    """
    checkpoints = list_checkpoints(config.run.folder / "checkpoints")
    if not checkpoints or config.run.resume == "never":
        return None
    step = get_step(checkpoints[-1])
    files = [get_model_path(config, step, name) for name in (None, *map(name_average, config.ema.decays))]
    files += [get_snapshot_file(config.run.folder, step, length) for length in config.ema.lengths]
    if not has_reached_end(config.train, checkpoints[-1]) or not all(file.exists() for file in files):
        return None
    return None if verify_manifest(checkpoints[-1]) else step


def warn_of_unused_changes(config: Config) -> None:
    """Warn if the settings of a finished run would train something else: nothing is trained with them."""
    saved = TrainState.load(list_checkpoints(config.run.folder / "checkpoints")[-1])
    changes = [change for change in list_changes(saved.config, config.model_dump(mode="json")) if not change.is_length]
    if changes:
        shown = "".join(f"\n  {change}" for change in changes)
        warn_once("the run is finished, so these changed settings train nothing; set another run.name:{}", shown)


def has_reached_end(train: TrainConfig, checkpoint: Path) -> bool:
    """Return whether a checkpoint is the last one of the run. One whose state cannot be read is not."""
    if train.max_epochs is None:
        return get_step(checkpoint) >= train.num_steps
    try:
        return TrainState.load(checkpoint).epoch >= train.max_epochs
    except (OSError, ValueError, TypeError, KeyError):  # a start reports the damage
        return False
