"""The run that a model comes from, found by the model's place or by the source of a conversion."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.checkpoint.folder import MANIFEST, find_newest_checkpoint, get_step
from sdxl_trainer.train.checkpoint.model_argument import load_model_config

EXPORTED_NAME = re.compile(r"step-(\d{8})(?:-lora)?(?:-ema-(.+?))?(?:\.safetensors)?")
METRICS = Path("logs", "metrics.jsonl")


@dataclass(frozen=True, kw_only=True)
class ModelRun:
    """The run that a model comes from."""

    folder: Path
    step: int | None = None  # of the model
    average: str | None = None  # name of the moving average whose weights it has
    checkpoint: Path | None = None  # that it was converted from


def find_model_run(source: Path, average: str | None = None, step: int | None = None) -> ModelRun | None:
    """Return the run of a checkpoint, of a run folder, or of a model in a run's `models/`; None for any other model.

    Args:
        average: that a conversion writes instead of the weights.
        step: at which that average ends, if it is not the checkpoint's.
    """
    source = source.absolute()
    exported = EXPORTED_NAME.fullmatch(source.name)
    if exported and source.parent.name == "models" and is_run(source.parent.parent):
        return ModelRun(folder=source.parent.parent, step=int(exported[1]), average=exported[2])
    if (source / MANIFEST).is_file():
        folder = source.parent.parent
        return (
            ModelRun(folder=folder, step=get_step(source), average=average, checkpoint=source)
            if is_run(folder)
            else None
        )
    if not is_run(source):
        return None
    newest = find_newest_checkpoint(source / "checkpoints")
    newest_step = get_step(newest) if newest else None
    return ModelRun(folder=source, step=step or newest_step, average=average, checkpoint=newest)


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run."""
    return (folder / METRICS).is_file()


def load_run_config(run: ModelRun | None, cfg: Path | None, words: Sequence[str]) -> Config | None:
    """Return the settings of a model's run, changed as the command line says; None without a run and a file.

    Settings that this version refuses are none of a card's concern: the defaults then stand in for all.
    """
    if cfg is None and run is not None and run.checkpoint is None and (run.folder / "config.yaml").is_file():
        cfg = run.folder / "config.yaml"
    if cfg is None and run is None:
        return None
    config, problems = load_model_config(run.checkpoint if run else None, cfg, words)
    return None if problems else config
