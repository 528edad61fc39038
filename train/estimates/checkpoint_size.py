"""Sizes of checkpoints and of snapshots of averages on disk, estimated before a run."""

import math
import shutil
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sdxl_trainer.configs.problems import Problem, format_count
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.estimates.memory import AVERAGE_BYTES, WEIGHT_BYTES
from sdxl_trainer.train.estimates.memory_table import format_gb
from sdxl_trainer.train.estimates.optimizer_state import count_master_bytes, count_moments


def compute_checkpoint_bytes(config: Config, shapes: Sequence[Sequence[int]]) -> int:
    """Return the approximate size of a checkpoint in bytes.

    A checkpoint holds the trained weights in the precision of training, their masters, the optimizer's moments and the
    moving averages. It holds no frozen weights.

    Args:
        shapes: of the trained weights, those of adapters if adapters are trained (`list_trained_shapes`).
    """
    num_trained = sum(math.prod(shape) for shape in shapes)
    bytes_per_weight = WEIGHT_BYTES[config.engine.precision] + count_master_bytes(config.engine)
    bytes_per_weight += AVERAGE_BYTES * config.ema.num_averages
    return num_trained * bytes_per_weight + count_moments(config.engine, config.optim, shapes)


def count_checkpoints(config: Config) -> int:
    """Return how many checkpoints a run has at a time at most: those it keeps, and one that is being written."""
    return config.checkpoint.keep_last + config.checkpoint.keep_best + 1


def check_checkpoint_space(config: Config, shapes: Sequence[Sequence[int]]) -> Iterator[Problem]:
    """Yield a problem if the disk of the run folder has no space for its checkpoints besides those that are there.

    Args:
        shapes: of the trained weights, as for `compute_checkpoint_bytes`.
    """
    folder, number = config.run.folder, count_checkpoints(config)
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    needed, free = number * compute_checkpoint_bytes(config, shapes), shutil.disk_usage(place).free
    kept = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    if needed > free + kept:
        rule = f"has {format_gb(free)} free, and {number} checkpoints need about {format_gb(needed)}"
        yield Problem("run.dir", folder, rule, "free some space, or choose another run.dir")


class SnapshotSizes(NamedTuple):
    """Number and size of the files of power-function averages that a run leaves."""

    number: int
    file_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return self.number * self.file_bytes

    def describe(self) -> str:
        """Describe the files and the space that they take."""
        files, each = format_count(self.number, "file"), f"{self.file_bytes / 1e9:.2g} GB"
        return f"{files} of averages in snapshots/, {each} each, {self.total_bytes / 1e9:.2g} GB at the end of the run"


def compute_snapshot_sizes(config: Config, shapes: Sequence[Sequence[int]], num_steps: int) -> SnapshotSizes:
    """Return the approximate sizes of the snapshots of `ema.lengths`.

    Args:
        shapes: of the trained weights, those of adapters if adapters are trained.
    """
    times = -(-num_steps // config.ema.snapshot_every_steps)
    num_trained = sum(math.prod(shape) for shape in shapes)
    return SnapshotSizes(times * len(config.ema.lengths), num_trained * WEIGHT_BYTES[config.ema.snapshot_dtype])
