"""Validation of a model file on the validation set of a run, for comparisons (train/evidence/).

The result is a folder that `sdxl-trainer compare` takes as a run: the run's settings with a mark, and the errors of
each sample as the run itself stores them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from loguru import logger

from sdxl_trainer.cache.models.single_file_check import NotSafetensorsError, read_safetensors_header
from sdxl_trainer.cache.models.source import check_model, resolve_model
from sdxl_trainer.configs.load import build_config, load_config
from sdxl_trainer.configs.problems import Problem, UserInputError, raise_if_any
from sdxl_trainer.configs.schema import Config, ModelConfig
from sdxl_trainer.configs.yaml_file import dump_yaml
from sdxl_trainer.data.checks.folders import check_writable
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import close_ranks
from sdxl_trainer.train.checkpoint.folder import MANIFEST
from sdxl_trainer.train.checkpoint.model_argument import read_declared_prediction
from sdxl_trainer.train.held_out.history import read_histories
from sdxl_trainer.train.held_out.sample_errors import (
    WEIGHTS,
    Facts,
    SampleError,
    get_file,
    list_files,
    write_sample_errors,
)
from sdxl_trainer.train.report.settings import read_settings
from sdxl_trainer.train.run.job import set_up
from sdxl_trainer.train.run.networks import load_frozen_networks
from sdxl_trainer.train.run.validation import Measured, average_losses, compute_validation_errors
from sdxl_trainer.train.scoring.validation_set import open_validation

MARK = "validated"  # section of the result's config.yaml that no run has
# Settings of training that a model file needs no more.
DROPPED = ("lora", "optim", "ema", "sample", "checkpoint")
KEPT_OF_ENGINE = ("precision", "attention", "tf32", "channels_last", "timeout_minutes")


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of a result: its folder, its step, and whether it replaces one that is there."""

    folder: Path
    step: int | None = None
    overwrite: bool = False


def validate_model(model: str, run_folder: Path, place: Place, overrides: Sequence[str]) -> None:
    """Validate a model on the validation set of a run, with the same noise at the same timesteps.

    Args:
        model: a single file, a diffusers folder or a hub id.
        place: of the result. Its step is by default that of the file's metadata, else the run's last validation.
        overrides: `key.sub=value` words that override the run's settings.

    Raises:
        UserInputError: the settings, the data or the model are wrong, or do not fit each other.
    """
    out = place.folder
    raise_if_any([*check_folders(run_folder, out, place.overwrite), *check_file(model)])
    config, problems = load_config(run_folder / "config.yaml", overrides)
    metadata = read_metadata(Path(model))
    step = resolve_step(place.step, metadata, run_folder)
    label = f"EMA {length}" if (length := metadata.get("sdxl_trainer.ema_length")) else Path(model).stem
    plain, more = build_plain_config(config, out)
    measured = fit_model_config(config.model, model)
    raise_if_any([*problems, *more, *check_fitting(config, model, measured)])
    plain, index, ranks = set_up(plain, [])
    held_out, objective = open_validation(plain, index, ranks)
    if held_out is None:
        rule, cure = "holds no samples out of training", "name a run with validation.share or a set of its own"
        raise UserInputError([Problem("--run", run_folder, rule, cure)])
    networks, conditioner = load_frozen_networks(plain, resolve_model(measured), ranks)
    with torch.no_grad(), ACTIVITY.during("validating"):
        errors = compute_validation_errors(
            Measured(
                model=networks,
                dtype=next(networks.parameters()).dtype,
                conditioner=conditioner,
                objective=objective,
                ranks=ranks,
                in_lockstep=False,
                break_off_if_stopped=lambda _: None,
            ),
            held_out,
        )
    if ranks.is_main:
        facts = Facts(
            step=step,
            samples_seen=step * plain.train.global_batch_size,
            seed=plain.validation.seed,
            timesteps_per_sample=plain.validation.timesteps_per_sample,
            prediction=plain.objective.prediction,
        )
        write_result(out, config, label, {WEIGHTS: errors}, facts)
        loss = average_losses(errors, plain.validation.num_bins)["loss"]
        logger.info("step {}: validation loss {:.5f} of {}; written to {}", step, loss, model, out)
        for history in read_histories({step: get_file(out, step)}).by_average.values():
            logger.info("step {}: x0 error {:.5f}", step, history.means[-1])
    close_ranks()


def check_file(model: str) -> Iterator[Problem]:
    """Yield a problem if a model is a run or a checkpoint, whose weights are no model file."""
    path = Path(model)
    if (path / MANIFEST).is_file() or (path / "checkpoints").is_dir():
        rule = "is a run or a checkpoint, and no model file"
        yield Problem("MODEL", model, rule, f"convert it first: python train/convert.py {model} NAME.safetensors")


def check_folders(run_folder: Path, out: Path, overwrite: bool) -> Iterator[Problem]:
    """Yield a problem if the run has no settings, or if the result's folder is in use.

    Args:
        overwrite: replace an earlier result.
    """
    if not (run_folder / "config.yaml").is_file():
        yield Problem("--run", run_folder, "is not a run folder: it contains no config.yaml", "name a run's folder")
    is_result = any(key.startswith(f"{MARK}.") for key in read_settings(out / "config.yaml"))
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not is_result):
        yield Problem("--out", out, "exists already, and is no result of a validation", "name a new folder")
    elif is_result and not overwrite:
        yield Problem("--out", out, "holds a result already", "name a new folder, or add --overwrite to replace it")
    else:
        yield from check_writable("--out", out)


def read_metadata(model: Path) -> dict[str, str]:
    """Return the metadata of a single file; {} for anything else."""
    try:
        return read_safetensors_header(model).metadata if model.is_file() else {}
    except (OSError, NotSafetensorsError):  # check_model reports that
        return {}


def resolve_step(step: int | None, metadata: Mapping[str, str], run_folder: Path) -> int:
    """Return the step to which the result belongs."""
    if step is not None:
        return step
    declared = metadata.get("sdxl_trainer.step", "")
    return int(declared) if declared.isdecimal() else max(list_files(run_folder), default=0)


def build_plain_config(config: Config, out: Path) -> tuple[Config, list[Problem]]:
    """Return a run's settings without those of its training, for a folder of their own."""
    raw = {name: value for name, value in config.model_dump(mode="json").items() if name not in DROPPED}
    raw["engine"] = {name: raw["engine"][name] for name in KEPT_OF_ENGINE}
    raw["run"] |= {"dir": str(out.absolute().parent), "name": out.absolute().name}
    return build_config(raw)


def fit_model_config(config: ModelConfig, model: str) -> ModelConfig:
    """Return the `model` section for another model. A single file takes its configs from the run's model folder."""
    changed = {"path": model}
    if Path(model).is_file() and Path(config.path).is_dir():
        changed |= {"config": config.config or Path(config.path)}
    return config.model_copy(update=changed)


def check_fitting(config: Config, model: str, measured: ModelConfig) -> Iterator[Problem]:
    """Yield the problems of the model, or that it predicts something else than the run."""
    found = [replace(problem, key="MODEL") for problem in check_model(measured)]
    yield from found
    declared = None if found else read_declared_prediction(Path(model))
    if declared is not None and declared.prediction != config.objective.prediction:
        rule = f"predicts {declared.prediction}, and the run {config.objective.prediction}"
        yield Problem("MODEL", model, rule, "name a model of that run, or set objective.prediction")


def write_result(
    out: Path, config: Config, label: str, errors: Mapping[str, Sequence[SampleError]], facts: Facts
) -> None:
    """Write the errors, and the run's settings with a mark, by which runs of one arm differ from those of another."""
    write_sample_errors(out, errors, facts)
    write_atomic(out / "config.yaml", dump_yaml({**config.model_dump(mode="json"), MARK: {"model": label}}))
