"""A training run from settings to exported model: set up, build, fit, finish."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

from loguru import logger

from sdxl_trainer.configs.load import dump_config
from sdxl_trainer.configs.problems import Problem, raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.files import remove_leftovers, write_atomic
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.loading.micro_batch import MicroBatch
from sdxl_trainer.launch.activity import ACTIVITY, Watchdog
from sdxl_trainer.launch.distributed import (
    COLLECTIVE_MARGIN,
    Ranks,
    broadcast_object,
    close_ranks,
    init_ranks,
    read_environment,
    wait_for_ranks,
)
from sdxl_trainer.launch.folder_lock import lock_folder
from sdxl_trainer.launch.kernels import search_convolutions, set_tf32, use_attention
from sdxl_trainer.launch.logger import init_logger, warn_once
from sdxl_trainer.launch.signals import BrokenOff, Interrupted
from sdxl_trainer.train.checkpoint.emergency import EmergencySaver
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.engine.averages import name_average
from sdxl_trainer.train.engine.deepspeed_config import resolve_zero_stage
from sdxl_trainer.train.export.export import build_export_settings, export_local_model, export_model, get_model_path
from sdxl_trainer.train.run.build import build_run
from sdxl_trainer.train.run.checks import verify_run, warn_of_doubts
from sdxl_trainer.train.run.finished import find_finished_step, warn_of_unused_changes
from sdxl_trainer.train.run.interruption import obey_stop_file
from sdxl_trainer.train.run.loop import copy_state_at, fit, stop
from sdxl_trainer.train.run.run import Run
from sdxl_trainer.train.run.status_writer import StatusWriter
from sdxl_trainer.train.run.summary import show_end, show_start

# NCCL would end a process whose peer is gone, or whose collective timed out, before its state is saved: at once by the
# first variable, and minutes later by the second, which leaves a mark for restarted ranks too. The watchdog ends it.
NCCL_VARIABLES = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_DUMP_ON_TIMEOUT")


class AlreadyTrained(Exception):  # noqa: N818 (not an error)
    """The run has made all its steps, and its model is written."""


class Setup(NamedTuple):
    """A run that has been checked: its settings, complete for these ranks, and the index of its training data."""

    config: Config
    index: Index
    ranks: Ranks


def run_training(config: Config, problems: list[Problem], dry_run: bool = False) -> None:
    """Train from settings to exported model; with `dry_run`, do everything up to the first step.

    The run folder is locked meanwhile. A finished run is left as it is.

    Args:
        problems: those found when the settings were loaded; they are reported alone.

    Raises:
        UserInputError: the settings or the data are wrong; it lists all problems. Or another job uses the run folder.
        Interrupted: the job was asked to stop; the state is saved.
    """
    rank = read_environment().rank
    init_logger(rank, config.log.level)
    with lock_folder(config.run.folder, "run.name", "set another run.name") if rank == 0 else nullcontext():
        try:
            config, index, ranks = set_up(config, problems, dry_run)
            # A lost rank would keep the others in a collective of the engine's start.
            limit_seconds = 60 * config.engine.timeout_minutes + COLLECTIVE_MARGIN.total_seconds()
            ACTIVITY.enter("opening the model")  # each phase has that much time, so a download too
            with Watchdog(limit_seconds) if ranks.world_size > 1 else nullcontext():
                run, batches = build_run(config, index, ranks, publish=not dry_run)
            show_start(run)
            wait_for_ranks("the networks and the newest checkpoint")
            if dry_run:
                logger.info("dry run: everything up to the first step works; nothing was trained")
            else:
                write_settings(config, ranks)
                train(run, batches)
        except AlreadyTrained as done:
            warn_once("done: {}", done)
        close_ranks()


def set_up(config: Config, problems: list[Problem], dry_run: bool = False) -> Setup:
    """Check everything that can be checked without a network, open the index, and join the ranks.

    Rank 0 checks while the others wait for it in `init_ranks`, so storage is read once and a mistake reported once. A
    finished run is checked by a dry run alone.

    Raises:
        UserInputError: the settings or the data are wrong.
        AlreadyTrained: nothing is left to do; raised on all ranks, and nothing is written.
    """
    rank, _, world_size = read_environment()
    init_logger(rank, config.log.level)
    config, chosen = resolve_zero_stage(config, world_size)
    path = finished_step = None
    if rank == 0:
        raise_if_any(problems)  # the defaults in place of wrong settings would contradict data and cache
        finished_step = find_finished_step(config)
        if finished_step is not None and not dry_run:
            warn_of_unused_changes(config)
    if rank == 0 and (finished_step is None or dry_run):
        obey_stop_file(config.run.folder)
        logger.info("checking the settings and the data")
        index, found = verify_run(config, world_size)
        raise_if_any(found)
        if chosen:
            logger.info("engine.zero_stage: {}", chosen)
        assert index is not None, "a run without problems has an index"
        warn_of_doubts(config, index)
        path = index.path
    keep_processes_of_failed_ranks()
    ranks = init_ranks(config.engine.timeout_minutes)
    path, finished_step = broadcast_object((path, finished_step))
    if finished_step is not None:
        length = config.train.length
        raise AlreadyTrained(f"{config.run.folder} is at step {finished_step} and {length}; raise {length.split()[0]}")
    set_tf32(config.engine.tf32)
    init_logger(rank, config.log.level, config.run.folder / "logs")
    if ranks.is_main and ranks.device.type == "cpu":
        logger.info("no GPU: the work runs on the CPU, which is only good for trials")
    return Setup(config, Index(path), ranks)


def keep_processes_of_failed_ranks() -> None:
    """Set the variables by which NCCL leaves a process alone, unless the user has set them.

    torchrun sets the first to 1 where the user has not. The two cannot be told apart, so 1 counts as torchrun's.
    """
    by_torchrun = "1" if "TORCHELASTIC_RUN_ID" in os.environ else None
    for name in NCCL_VARIABLES:
        if os.environ.get(name) in (None, by_torchrun):
            os.environ[name] = "0"


def write_settings(config: Config, ranks: Ranks) -> None:
    """Write the resolved settings to `config.yaml` in the run folder. Called when nothing can refuse the start.

    Temporary files that killed jobs left in the run folder are deleted.
    """
    file = config.run.folder / "config.yaml"
    if ranks.is_main:
        for folder, _, _ in os.walk(config.run.folder):
            remove_leftovers(Path(folder))
        try:
            write_atomic(file, dump_config(config))
        except OSError as error:
            logger.warning("{} cannot be written: {}", file, error.strerror)


def train(run: Run, batches: Iterator[MicroBatch]) -> None:
    """Fit and finish with the live display on, and log a summary at the end, also when the run was asked to stop."""
    saver = build_emergency_saver(run)
    watchdog = Watchdog(
        60 * run.config.engine.timeout_minutes,
        on_stall=lambda: saver.save("no progress"),
        stall_seconds=COLLECTIVE_MARGIN.total_seconds(),
        first_extra_seconds=COLLECTIVE_MARGIN.total_seconds() / 2,
    )
    kernels = use_attention(run.config.engine.attention)
    search = search_convolutions(run.config.engine.cudnn_benchmark, len(run.plan.buckets))
    try:
        with StatusWriter(run), watchdog, saver, ACTIVITY.during("training"), kernels, search, run.progress.show():
            fit(run, batches)
            finish(run)
    except Interrupted:
        show_end(run, was_stopped=True)
        raise
    finally:
        close_files(run)
    show_end(run)


def finish(run: Run) -> None:
    """Export the model and its exponential averages, wait for the last checkpoint, and write the report.

    Raises:
        Interrupted: a rank was asked to stop; the state is saved, and the next start exports the model.
    """
    settings = build_export_settings(run.config, run.source)
    with run.progress.activity("writing the model"):
        break_off_if_stopped = partial(run.requests.break_off_if_stopped, in_lockstep=True)
        for average in (None, *map(name_average, run.config.ema.decays)):
            path = get_model_path(run.config, run.state.step, average)
            try:
                export_model(path, run.engine, settings, run.ranks, average, break_off_if_stopped)
            except BrokenOff:
                stop(run)
        run.checkpoints.save_whole(run.engine, run.state)
        run.checkpoints.prune()
    if run.metrics is not None:
        run.metrics.close()
    if run.report is not None:
        with run.progress.activity("writing the report"):
            run.report.finish()
    wait_for_ranks("the last checkpoint and the report")


def close_files(run: Run) -> None:
    """Close the files that are written in each step, and log how much a full disk has cost."""
    run.bad_samples.close()
    run.lost_images.end("is closed")
    run.snapshots.close()
    if run.metrics is not None:
        run.metrics.close_files()


def build_emergency_saver(run: Run) -> EmergencySaver:
    """Build the context that saves this rank's shard if the loop raises or hangs."""
    first_step = run.state.step

    def read_state(completed: int) -> TrainState:
        return copy_state_at(run, first_step + completed)

    def export(path: Path) -> None:
        export_local_model(path, run.engine, build_export_settings(run.config, run.source))

    whole = run.engine.zero_stage < 3
    return EmergencySaver(run.engine, run.checkpoints, read_state, export if whole else None, run.folder / "models")
