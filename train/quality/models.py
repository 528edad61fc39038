"""The models that are measured: their settings, and what decides on the images that they draw."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_trainer.cache.models.model_pair import check_pair, resolve_pair
from sdxl_trainer.cache.models.source import check_model
from sdxl_trainer.cache.models.vae import list_vae_files, locate_vae
from sdxl_trainer.configs.load import build_config, load_config
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.files import describe_file
from sdxl_trainer.train.checkpoint.folder import MANIFEST
from sdxl_trainer.train.checkpoint.model_argument import find_model_checkpoint, load_model_config
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.engine.saved_state import check_average
from sdxl_trainer.train.sampling.job import list_model_overrides
from sdxl_trainer.train.sampling.prompts import load_prompts

OPTION = "--model"
FORMAT = 1  # of drawn images; a change of how they are drawn raises it
# Settings that decide on the samples of the validation set. If a run has others, they may be in its training set.
SET_SETTINGS = {"validation": ("share", "metadata", "image_dirs", "seed"), "data": ("metadata", "image_dirs")}


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """A model with its settings. Its sampler is that of the frame."""

    label: str
    config: Config
    checkpoint: Path | None
    average: str | None
    step: int | None  # of the checkpoint

    @property
    def run_folder(self) -> Path | None:
        """The folder of its run, if the model is one of its checkpoints."""
        is_in_run = self.checkpoint is not None and self.checkpoint.parent.name == "checkpoints"
        return self.checkpoint.parent.parent if self.checkpoint is not None and is_in_run else None


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The models that are measured, and the settings that hold for all: validation set and sampler."""

    config: Config
    models: list[MeasuredModel]
    problems: list[Problem]


def open_models(names: Sequence[str], average: str | None, cfg: Path | None, words: Sequence[str]) -> Frame:
    """Find the models and their settings.

    The validation set and the sampler are those of `cfg`, else of the first run or checkpoint. Each run keeps its other
    settings. A model that is no run has the settings of the frame, and the prediction that it declares.

    Args:
        words: `key.sub=value` words that override the settings of all.

    Raises:
        UserInputError: a path leads nowhere, or to a damaged checkpoint.
    """
    checkpoints = [find_model_checkpoint(Path(name), OPTION) for name in names]
    first = next((checkpoint for checkpoint in checkpoints if checkpoint is not None), None)
    frame, problems = load_config(cfg, words) if cfg else load_model_config(first, None, words)
    if cfg is None and first is None:
        rule = "is needed: no model is a run, whose settings name a validation set"
        problems = [Problem("--cfg", None, rule, "give the file with the settings of the validation set")]
    models = []
    for name, checkpoint, label in zip(names, checkpoints, choose_labels(names), strict=True):
        if checkpoint is not None:
            config, found = load_model_config(checkpoint, None, words)
        else:
            of_model = [*list_model_overrides(name, has_cfg=True), *words]
            config, found = build_config(frame.model_dump(mode="json"), of_model)
        problems += [problem for problem in found if problem not in problems]
        models.append(
            MeasuredModel(
                label=label,
                config=config.model_copy(update={"sample": frame.sample}),
                checkpoint=checkpoint,
                average=average if checkpoint is not None else None,
                step=TrainState.load(checkpoint).step if checkpoint is not None else None,
            )
        )
    return Frame(config=frame, models=models, problems=problems)


def check_models(frame: Frame, average: str | None) -> Iterator[Problem]:
    """Yield the problems of models, and of those that cannot be compared on the frame's validation set."""
    if average is not None and all(model.checkpoint is None for model in frame.models):
        yield from check_average(None, average)
    for model in frame.models:
        yield from list(check_model(model.config.model)) or list(check_pair(model.config))
        yield from check_average(model.checkpoint, model.average)
        yield from _check_set(frame, model)
        sampler = model.config.sample.model_copy(update={"prompts": [], "prompt_file": None})
        yield from load_prompts(sampler, model.config.objective)[1]


def _check_set(frame: Frame, model: MeasuredModel) -> Iterator[Problem]:
    if model.checkpoint is None:
        return
    for section, names in SET_SETTINGS.items():
        for name in names:
            own, asked = (getattr(getattr(config, section), name) for config in (model.config, frame.config))
            if own != asked:
                rule = f"was trained with another {section}.{name}: it may have seen the validation set"
                cure = "measure runs with one validation set, or give one that none has seen: validation.metadata=[…]"
                yield Problem(OPTION, model.label, rule, cure)
                return


def identify_drawing(model: MeasuredModel) -> str:
    """Return the SHA-256 of what decides on a model's images besides their prompts: weights, VAE and settings."""
    config, source = model.config, resolve_pair(model.config)
    files = [source.file] if source.file is not None else sorted(source.folder.glob("*/*.safetensors"))
    weights = [describe_file(file) for file in files]
    if model.checkpoint is not None:
        weights.append([hashlib.sha256((model.checkpoint / MANIFEST).read_bytes()).hexdigest(), model.average])
    settings = {
        "model": config.model.model_dump(mode="json"),
        "objective": config.objective.model_dump(mode="json"),
        "precision": config.engine.precision,
        "max_tokens": config.data.max_tokens,
        "weighted": config.data.caption.weighted,
    }
    return _hash([FORMAT, weights, identify_vae_files(config), settings])


def identify_vae_files(config: Config) -> str:
    """Return a hash of the VAE of the settings: its files, and what the settings change of it."""
    location = locate_vae(resolve_pair(config), config.model)
    return _hash([FORMAT, list_vae_files(location), config.model.model_dump(mode="json")])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def choose_labels(names: Sequence[str | Path]) -> list[str]:
    """Return the last part of each path, and whole paths where these are not enough."""
    short = [Path(name).resolve().name or str(name) for name in names]
    return [label if short.count(label) == 1 else str(name) for label, name in zip(short, names, strict=True)]
