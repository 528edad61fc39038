"""Examine the machine, the settings and the data before a run: `bash launch/doctor.sh --cfg x.yaml`.

Each finding starts with `ok`, with `note`, with `WARN` or `WRONG` and gives a cure, or with `TO DO` and names the next
step: the latent cache is filled after the doctor has found nothing wrong. A run starts in spite of a `WARN`. Without
settings only the machine is examined (launch/machine.py). The program is part of train/ because it runs the checks of
training.
"""

import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from loguru import logger

from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.problems import FailedError, UserInputError, format_count
from sdxl_trainer.configs.schema import Config, TrainConfig
from sdxl_trainer.data.checks.folders import check_writable
from sdxl_trainer.data.checks.left_out import TooManyBadError
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.data.order.plan import Plan
from sdxl_trainer.data.stores.remote import StoreError
from sdxl_trainer.data.text.strategy import Strategy, load_strategy
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.launch.machine import Finding, announce_stage, convert_problem, examine_disk, examine_machine
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.doctor.memory import examine_memory, examine_presets
from sdxl_trainer.train.doctor.scratch import leave_no_index, open_scratch_run
from sdxl_trainer.train.engine.deepspeed_config import resolve_zero_stage
from sdxl_trainer.train.estimates.checkpoint_size import (
    compute_checkpoint_bytes,
    compute_snapshot_sizes,
    count_checkpoints,
)
from sdxl_trainer.train.estimates.duration import describe_duration
from sdxl_trainer.train.estimates.measured_memory import list_gpu_memory_bytes
from sdxl_trainer.train.estimates.preset_choice import compute_usable_bytes

if TYPE_CHECKING:
    from loguru import Message

ONE_RANK = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def examine_all(
    cfg: Path | None, overrides: Sequence[str], num_ranks: int | None, gpu_gb: float | None = None
) -> Iterator[Finding]:
    """Yield findings about the machine, then about the settings and the memory, time and disk space of the run.

    Args:
        gpu_gb: memory of a GPU by name, of which each rank is to have one, instead of this machine's.
    """
    yield from examine_machine(num_ranks)
    world_size = num_ranks or max(1, torch.cuda.device_count())
    gpu_bytes = list_gpu_memory_bytes() if gpu_gb is None else [compute_usable_bytes(gpu_gb)] * world_size
    if cfg is None:
        yield from examine_presets(world_size, gpu_bytes)
        yield examine_disk("run.dir", Path("runs"))
        return
    try:
        config, problems = load_config(cfg, overrides)
    except UserInputError as error:
        yield from map(convert_problem, error.problems)
        return
    if problems:  # the defaults in place of wrong settings would contradict data and cache
        yield from map(convert_problem, problems)
        return
    config, stage_choice = resolve_zero_stage(config, world_size)
    if stage_choice:
        yield Finding("engine.zero_stage", stage_choice)
    num_steps = yield from examine_settings(config, world_size)
    config = yield from examine_memory(config, world_size, gpu_bytes)
    gpu_names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield Finding("time", describe_duration(config, num_steps, world_size, gpu_names))
    shapes = list_shapes(config)
    checkpoint_bytes = compute_checkpoint_bytes(config, shapes) * count_checkpoints(config)
    snapshots = compute_snapshot_sizes(config, shapes, num_steps or 0)
    if snapshots.number:
        yield Finding("ema.lengths", snapshots.describe())
    yield examine_disk("run.dir", config.run.folder, checkpoint_bytes + snapshots.total_bytes)
    yield examine_disk("cache.dir", get_cache_folder(config))


def examine_settings(config: Config, world_size: int) -> Generator[Finding, None, int | None]:
    """Run the checks that training runs before it loads a network, with a run folder of their own.

    Returns the number of steps of the run; None if the data that decide it cannot be opened.
    """
    # Imported here because the import takes seconds, and findings about the machine should appear first.
    from sdxl_trainer.train.doctor.checkpoint import check_newest_checkpoint
    from sdxl_trainer.train.doctor.images import examine_images
    from sdxl_trainer.train.doctor.model import examine_hub_model, examine_prediction
    from sdxl_trainer.train.run.checks import check_resume, list_doubts, verify_run
    from sdxl_trainer.train.run.training_data import split_data

    yield from examine_hub_model(config.model)
    announce_stage("checking the settings and the data")
    # The scratch folder hides these problems.
    real_run = config.run
    hidden = [*check_writable("run.dir", real_run.folder), *check_resume(real_run)]
    split, steps, doubts = None, None, []
    with leave_no_index(config):
        with open_scratch_run(config.run) as run, collect_warnings() as warnings:
            try:
                config = config.model_copy(update={"run": run})
                index, found = verify_run(config, world_size)
                if index is not None and not found:
                    split = split_data(config, index, open_strategy(config), ONE_RANK)
                    hidden += check_newest_checkpoint(config, index, split, real_run, ONE_RANK)
                    doubts += list_doubts(config, index)
                steps = count_steps(config.train, split and split.plan)
            except UserInputError as error:
                index, found = None, error.problems
            except (TooManyBadError, StoreError) as error:
                yield convert_failure(error)
                return None
        everything = [*found, *(problem for problem in hidden if problem not in found)]
        yield from map(convert_problem, everything)
        if all(problem.is_next_step for problem in everything):
            yield Finding("settings", f"no contradictions on {format_count(world_size, 'rank')}")
        yield from (Finding("data", warning, is_note=True) for warning in warnings)
        yield from (replace(convert_problem(problem), is_note=True) for problem in doubts)
        yield from examine_prediction(config)
        yield from examine_images(config, can_train=index is not None)
        if index is not None:
            yield Finding("data", describe_samples(len(index), split and split.repeats))
    return steps


def describe_samples(num_samples: int, repeats: np.ndarray | None) -> str:
    """Return the number of samples, and how many an epoch has if some are repeated or held out.

    Args:
        repeats: of each sample, [num_samples]; None for once each.
    """
    count = format_count(num_samples, "sample")
    if repeats is None or (repeats == 1).all():
        return f"{count} to train on"
    return f"{count} to train on; {repeats.sum():,.6g} an epoch, with repeats and without those held out"


def convert_failure(error: TooManyBadError | StoreError) -> Finding:
    """Convert what has ended the checks of the data to a finding."""
    if isinstance(error, StoreError):
        return Finding("data", str(error), "check the URL, the credentials and the network")
    detail = f"{error.rule}; {error.log} lists all" if error.log.is_file() else error.rule
    return Finding("data", detail, error.cure)


def open_strategy(config: Config) -> Strategy | None:
    """Load the user's strategy, or return None without one."""
    return load_strategy(config.data.strategy) if config.data.strategy else None


def count_steps(train: TrainConfig, plan: Plan | None) -> int | None:
    """Count the steps of a run; None if its epochs decide them, and its data cannot be opened.

    Raises:
        UserInputError: the epochs do not complete one global batch.
    """
    from sdxl_trainer.train.run.training_data import count_run_steps

    if train.max_epochs is None:
        return train.num_steps
    return None if plan is None else count_run_steps(train, plan, TrainState())


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Yield a list of the warnings that are logged in the context. The console shows a store's silence at once."""
    warnings: list[str] = []

    def take(message: "Message") -> None:
        if message.record["extra"].get("is_wait"):
            announce_stage(message.record["message"])
        else:
            warnings.append(message.record["message"])

    logger.remove()
    logger.add(take, level="WARNING", format="{message}")
    try:
        yield warnings
    finally:
        logger.remove()


def list_shapes(config: Config) -> list[torch.Size]:
    """List the shapes of the weights that these settings train; none if settings or model do not decide them."""
    from sdxl_trainer.train.run.networks import list_trained_shapes

    try:
        return list_trained_shapes(config)
    except (OSError, ValueError, KeyError):
        return []  # examine_settings has reported the problem


def print_findings(findings: Iterable[Finding]) -> None:
    """Print each finding as soon as it is yielded.

    Raises:
        FailedError: a finding is a fault.
    """
    total = wrong = 0
    for finding in findings:
        total, wrong = total + 1, wrong + (not finding.is_ok)
        sys.stdout.write(f"{finding}\n")
        sys.stdout.flush()
    if wrong:
        raise FailedError(f"{wrong} of {total} examinations found a fault")
