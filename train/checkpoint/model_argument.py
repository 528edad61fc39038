"""The model that a command line names: a checkpoint, a run folder, or a model file or folder; and its settings."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from loguru import logger
from safetensors import SafetensorError, safe_open

from sdxl_trainer.cache.models.single_file import FLOW_SHIFT_KEY
from sdxl_trainer.cache.models.source import may_be_hub_id
from sdxl_trainer.configs.load import build_config, load_config
from sdxl_trainer.configs.problems import FailedError, Problem, UserInputError
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.checkpoint.folder import MANIFEST, find_newest_checkpoint, verify_manifest
from sdxl_trainer.train.checkpoint.state import TrainState

# Prediction types by the names in diffusers' scheduler_config.json and in modelspec metadata.
PREDICTIONS = {"epsilon": "epsilon", "v": "v", "v_prediction": "v", "flow": "flow", "flow_prediction": "flow"}


class DeclaredPrediction(NamedTuple):
    """The prediction type that a model declares."""

    prediction: str
    zero_terminal_snr: bool
    timestep_shift: float = 1.0  # of a rectified flow

    def list_overrides(self) -> list[str]:
        """Return the settings that match the model, as `key.sub=value` words."""
        words = [f"objective.prediction={self.prediction}"]
        if self.timestep_shift != 1:
            words.append(f"objective.timestep_shift={self.timestep_shift:g}")
        return [*words, "objective.zero_terminal_snr=true"] if self.zero_terminal_snr else words


def find_model_checkpoint(path: Path, option: str) -> Path | None:
    """Return the checkpoint that a path names: the path itself, or the newest one of a run folder.

    Returns None if the path names a model file, a diffusers folder or a hub id.

    Args:
        option: the command line's option or argument, for error messages.

    Raises:
        UserInputError: nothing is at the path, the checkpoint is damaged, or the run folder holds no complete one.
    """
    if not path.exists() and not may_be_hub_id(str(path)):
        raise UserInputError([Problem(option, path, "does not exist", "check the path")])
    if (path / MANIFEST).is_file():
        damage = verify_manifest(path)
        if damage:
            raise UserInputError([Problem(option, path, f"is damaged: {damage}", "give another checkpoint")])
        return path
    if not (path / "checkpoints").is_dir():
        return None
    newest = find_newest_checkpoint(path / "checkpoints")
    if newest is None:
        rule = "is a run folder without a complete checkpoint"
        raise UserInputError([Problem(option, path, rule, "give another run folder or a model file")])
    return newest


def name_option(problems: Iterable[Problem], option: str, model: str) -> list[Problem]:
    """Return the problems of a model that an option names, with the option in place of `model.path`."""
    return [
        replace(problem, key=option) if problem.key == "model.path" and problem.value in (model, None) else problem
        for problem in problems
    ]


@contextmanager
def explain_removal(checkpoint: Path | None) -> Iterator[None]:
    """Name the cause if a checkpoint vanishes while it is read, because its run continues.

    Raises:
        FailedError: an error came, and the checkpoint is not there any more.
    """
    try:
        yield
    except Exception as error:
        if checkpoint is None or (checkpoint / MANIFEST).is_file():
            raise
        raise FailedError(
            f"{checkpoint} was removed while it was read, because its run continues and keeps its newest checkpoints; "
            "run the same command again"
        ) from error


def load_model_config(checkpoint: Path | None, cfg: Path | None, words: Sequence[str]) -> tuple[Config, list[Problem]]:
    """Load the settings for using a model: from `cfg`, else those that the checkpoint was trained with, else defaults.

    Settings of the checkpoint that this version does not know are dropped with a warning.

    Args:
        words: `key.sub=value` words that override the other settings.
    """
    if cfg is not None:
        return load_config(cfg, words)
    if checkpoint is None:
        return build_config({}, words)
    settings, outdated = build_config(TrainState.load(checkpoint).config)
    for problem in outdated:
        logger.warning("{} of the checkpoint is ignored: {}", problem.key, problem.rule)
    return build_config(settings.model_dump(mode="json"), words)


def read_declared_prediction(model: Path) -> DeclaredPrediction | None:
    """Read which prediction type a model declares: in a folder's scheduler config, or in a file's marks and metadata.

    A single file without either predicts epsilon, as SDXL base does. Returns None for a model that is not on disk, for
    a type that this program does not train, and for a file that is not readable (`check_model` reports that).

    Raises:
        UserInputError: `scheduler_config.json` is not a JSON object.
    """
    config_file = model / "scheduler" / "scheduler_config.json"
    if config_file.is_file():
        settings = _read_object(config_file)
        is_flow = str(settings.get("_class_name", "")).startswith("FlowMatch")
        declared = "flow" if is_flow else settings.get("prediction_type")
        has_zero_snr = bool(settings.get("rescale_betas_zero_snr"))
        shift = settings.get("shift" if is_flow else "flow_shift")
    elif model.suffix == ".safetensors" and model.is_file():
        try:
            with safe_open(model, "pt") as tensors:
                names, metadata = set(tensors.keys()), tensors.metadata() or {}
        except SafetensorError:
            return None
        declared = "v" if "v_pred" in names else metadata.get("modelspec.prediction_type", "epsilon")
        has_zero_snr, shift = "ztsnr" in names, metadata.get(FLOW_SHIFT_KEY)
    else:
        return None
    prediction = PREDICTIONS.get(str(declared))
    if prediction is None:
        return None
    return DeclaredPrediction(
        prediction=prediction,
        zero_terminal_snr=has_zero_snr and prediction == "v",
        timestep_shift=_parse_shift(shift) if prediction == "flow" else 1.0,
    )


def _parse_shift(value: object) -> float:
    """Return a positive number as it is, and 1, no shift, for anything else."""
    try:
        shift = float(str(value))
    except ValueError:
        return 1.0
    return shift if 0 < shift < math.inf else 1.0


def read_declared_size(model: Path) -> Size | None:
    """Read the size in pixels that a single file was trained at, from its modelspec metadata; None if it has none."""
    if model.suffix != ".safetensors" or not model.is_file():
        return None
    try:
        with safe_open(model, "pt") as tensors:
            metadata = tensors.metadata() or {}
    except SafetensorError:
        return None
    sides = re.fullmatch(r"(\d{2,4})x(\d{2,4})", metadata.get("modelspec.resolution", ""))
    return Size(int(sides[1]), int(sides[2])) if sides else None


def _read_object(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserInputError([Problem("model.path", file, f"cannot be read: {error}", "check the file")]) from None
    if not isinstance(content, dict):
        raise UserInputError([Problem("model.path", file, "is not a JSON object", "check the file")])
    return content
