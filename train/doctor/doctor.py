"""Examine the machine, the settings and the data before a run: `bash launch/doctor.sh --cfg x.yaml`.

Each finding starts with `ok`, with `note`, with `WARN` or `WRONG` and gives a cure, or with `TO DO` and names the next
step: the latent cache is filled after the doctor has found nothing wrong. A run starts in spite of a `WARN`. Without
settings only the machine is examined (launch/machine.py). The program is part of train/ because it runs the checks of
training.
"""

import shutil
import sys
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from loguru import logger

from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.problems import (
    FailedError,
    Problem,
    UserInputError,
    drop_consequences,
    format_count,
)
from sdxl_trainer.configs.schema import Config, RunConfig
from sdxl_trainer.data.checks.folders import check_writable
from sdxl_trainer.data.checks.left_out import TooManyBadError
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.data.stores.remote import StoreError
from sdxl_trainer.data.text.strategy import load_strategy
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.launch.machine import Finding, announce_stage, convert_problem, examine_disk, examine_machine
from sdxl_trainer.train.checkpoint.folder import list_checkpoints
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.doctor.memory import examine_memory, examine_presets
from sdxl_trainer.train.engine.deepspeed_config import resolve_zero_stage
from sdxl_trainer.train.estimates.checkpoint_size import compute_checkpoint_bytes
from sdxl_trainer.train.estimates.duration import describe_duration
from sdxl_trainer.train.estimates.measured_memory import list_gpu_memory_bytes
from sdxl_trainer.train.estimates.preset_choice import compute_usable_bytes

ONE_RANK = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
SCRATCH_NAME = "doctor"  # of the folder in the run folder in which checks write


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
    config, stage_choice = resolve_zero_stage(config, world_size)
    if stage_choice:
        yield Finding("engine.zero_stage", stage_choice)
    num_steps = yield from examine_settings(config, problems, world_size)
    config = yield from examine_memory(config, world_size, gpu_bytes)
    gpu_names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield Finding("time", describe_duration(config, num_steps, world_size, gpu_names))
    checkpoint_bytes = compute_checkpoint_bytes(config, list_shapes(config)) * (config.checkpoint.keep_last + 1)
    yield examine_disk("run.dir", config.run.folder, checkpoint_bytes)
    yield examine_disk("cache.dir", get_cache_folder(config))


def examine_settings(config: Config, problems: list[Problem], world_size: int) -> Generator[Finding, None, int | None]:
    """Run the checks that training runs before it loads a network, with a run folder of their own.

    Returns the number of steps of the run; None if the data that decide it cannot be opened.
    """
    announce_stage("checking the settings and the data")
    # Imported here because the import takes seconds, and findings about the machine should appear first.
    from sdxl_trainer.train.doctor.images import examine_images
    from sdxl_trainer.train.run.checks import check_resume, verify_run

    # The scratch folder hides these problems.
    real_run = config.run
    hidden = [*check_writable("run.dir", real_run.folder), *check_resume(real_run)]
    with open_scratch_run(config.run) as run, collect_warnings() as warnings:
        try:
            config = config.model_copy(update={"run": run})
            index, found = verify_run(config, world_size)
            steps = count_steps(config, None if problems or found else index)
            if index is not None and not problems and not found:
                hidden += check_newest_checkpoint(config, index, real_run)
        except UserInputError as error:
            index, found, steps = None, error.problems, None
        except (TooManyBadError, StoreError) as error:
            yield from map(convert_problem, problems)
            yield convert_failure(error)
            return None
    everything = [*problems, *found, *(problem for problem in hidden if problem not in found)]
    yield from map(convert_problem, drop_consequences(everything))
    if all(problem.is_next_step for problem in everything):
        yield Finding("settings", f"no contradictions on {format_count(world_size, 'rank')}")
    yield from (Finding("data", warning, is_note=True) for warning in warnings)
    yield from examine_prediction(config)
    yield from examine_images(config, can_train=index is not None)
    if index is not None:
        yield Finding("data", f"{format_count(len(index), 'sample')} to train on")
    return steps


def convert_failure(error: TooManyBadError | StoreError) -> Finding:
    """Convert what has ended the checks of the data to a finding."""
    if isinstance(error, StoreError):
        return Finding("data", str(error), "check the URL, the credentials and the network")
    detail = f"{error.rule}; {error.log} lists all" if error.log.is_file() else error.rule
    return Finding("data", detail, error.cure)


def examine_prediction(config: Config) -> Iterator[Finding]:
    """Yield a warning if the model declares another prediction type than the settings."""
    from sdxl_trainer.train.run.checks import check_prediction

    try:
        yield from (replace(convert_problem(problem), is_note=True) for problem in check_prediction(config))
    except UserInputError as error:
        yield from map(convert_problem, error.problems)


def check_newest_checkpoint(config: Config, index: Index, run: RunConfig) -> Iterator[Problem]:
    """Yield a problem for each reason why the run cannot continue from its newest checkpoint.

    Args:
        config: settings without problems, with a ZeRO stage.
        index: of the training set.
        run: the settings `run` of the run itself.
    """
    from sdxl_trainer.train.checkpoint.resume import build_initial_state, check_progress
    from sdxl_trainer.train.run.training_data import split_data

    newest = next(reversed(list_checkpoints(run.folder / "checkpoints")), None)
    if newest is None:
        return
    try:
        saved = TrainState.load(newest)
    except (OSError, ValueError, TypeError, LookupError):  # the start finds the damage, and takes an older one
        return
    strategy = load_strategy(config.data.strategy) if config.data.strategy else None
    split = split_data(config, index, strategy, ONE_RANK)
    fresh = build_initial_state(config, index, split.plan, ONE_RANK, split.repeats)
    yield from check_progress(saved, fresh, run.on_data_change)


def count_steps(config: Config, index: Index | None) -> int | None:
    """Count the steps of a run; None if its epochs decide them and `index`, that of its training set, is None.

    Raises:
        UserInputError: the epochs do not complete one global batch.
    """
    from sdxl_trainer.train.run.training_data import count_run_steps, split_data

    if config.train.max_epochs is None:
        return config.train.num_steps
    if index is None:
        return None
    strategy = load_strategy(config.data.strategy) if config.data.strategy else None
    return count_run_steps(config.train, split_data(config, index, strategy, ONE_RANK).plan, TrainState())


@contextmanager
def open_scratch_run(run: RunConfig) -> Iterator[RunConfig]:
    """Yield a run in the folder `doctor` of a run's own folder. At the end only its list of bad samples is kept.

    If the folder cannot be created, it lies among the system's temporary files.
    """
    scratch = run.model_copy(update={"dir": run.folder, "name": SCRATCH_NAME})
    new_folders = [folder for folder in (run.folder, *run.folder.parents) if not folder.exists()]
    try:
        shutil.rmtree(scratch.folder, ignore_errors=True)
        scratch.folder.mkdir(parents=True)
    except OSError:
        new_folders = [Path(tempfile.mkdtemp(prefix="doctor-"))]
        scratch = run.model_copy(update={"dir": new_folders[0], "name": SCRATCH_NAME})
    try:
        yield scratch
    finally:
        if not (scratch.folder / "logs" / "bad_samples.jsonl").is_file():
            shutil.rmtree(scratch.folder, ignore_errors=True)
            remove_empty(new_folders)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Yield a list of the warnings that are logged in the context; the console shows none of its lines."""
    warnings: list[str] = []
    logger.remove()
    logger.add(lambda message: warnings.append(message.record["message"]), level="WARNING", format="{message}")
    try:
        yield warnings
    finally:
        logger.remove()


def list_shapes(config: Config) -> list[torch.Size]:
    """List the shapes of the weights that these settings train; none if the settings or the model do not tell."""
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
