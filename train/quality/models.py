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
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.files import describe_file
from sdxl_trainer.train.checkpoint.folder import MANIFEST
from sdxl_trainer.train.checkpoint.model_argument import find_model_checkpoint, load_model_config, name_option
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

    name: str  # as the command line gives it
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

    Models that lead nowhere, or to a damaged checkpoint, are left out with a problem.

    Raises:
        UserInputError: `cfg` cannot be read.
    """
    checkpoints, problems = find_checkpoints(names)
    first = next((checkpoint for checkpoint in checkpoints.values() if checkpoint is not None), None)
    frame, of_frame = load_config(cfg, words) if cfg else load_model_config(first, None, words)
    if cfg is None and first is None:
        rule = "is needed: no model is a run, whose settings name a validation set"
        cure = "give the file with the settings of the validation set"
        of_frame = [] if problems else [Problem("--cfg", None, rule, cure)]
    problems += of_frame
    labels, models = dict(zip(names, choose_labels(names), strict=True)), []
    for name, checkpoint in checkpoints.items():
        if checkpoint is not None:
            config, found = load_model_config(checkpoint, None, words)
        else:
            of_model = [*list_model_overrides(name, has_cfg=True), *words]
            config, found = build_config(frame.model_dump(mode="json"), of_model)
        problems += [problem for problem in found if problem not in problems]
        models.append(
            MeasuredModel(
                name=name,
                label=labels[name],
                config=config.model_copy(update={"sample": frame.sample}),
                checkpoint=checkpoint,
                average=average if checkpoint is not None else None,
                step=TrainState.load(checkpoint).step if checkpoint is not None else None,
            )
        )
    return Frame(config=frame, models=models, problems=problems)


def find_checkpoints(names: Sequence[str]) -> tuple[dict[str, Path | None], list[Problem]]:
    """Return the checkpoint of each model, None for a model that is no run, and the problems of the others."""
    found: dict[str, Path | None] = {}
    problems = [*check_once(OPTION, names)]
    for name in names:
        try:
            found[name] = find_model_checkpoint(Path(name), OPTION)
        except UserInputError as error:
            problems += error.problems
    checkpoints = [checkpoint for checkpoint in found.values() if checkpoint is not None]
    for name, checkpoint in found.items():
        if (
            not problems and checkpoint is not None and checkpoints.count(checkpoint) > 1
        ):  # a run, and its newest checkpoint by name
            problems.append(Problem(OPTION, name, f"is {checkpoint}, which is named twice", "name each model once"))
    return found, problems


def check_once(option: str, names: Sequence[str | Path]) -> Iterator[Problem]:
    """Yield a problem if a path is named twice, which would count it as two."""
    paths = [Path(name).resolve() for name in names]
    for number, (name, path) in enumerate(zip(names, paths, strict=True)):
        if path in paths[:number]:
            yield Problem(option, name, "is named twice", "name each one once")


def check_models(frame: Frame, average: str | None) -> Iterator[Problem]:
    """Yield the problems of models, and of those that cannot be compared on the frame's validation set."""
    if average is not None and all(model.checkpoint is None for model in frame.models):
        yield from check_average(None, average)
    for model in frame.models:
        of_model = list(check_model(model.config.model)) or list(check_pair(model.config))
        yield from of_model if model.checkpoint is not None else name_option(of_model, OPTION, model.name)
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
                yield Problem(OPTION, model.name, rule, cure)
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
