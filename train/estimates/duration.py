"""Duration of the remaining steps: from the run's own log, or before its first step from the model of a step's time."""

import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sdxl_trainer.cache.models.model_pair import resolve_pair
from sdxl_trainer.cache.models.source import is_local
from sdxl_trainer.configs.problems import describe_seconds, format_rate
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.estimates.gpus import find_gpu
from sdxl_trainer.train.estimates.step_time import StepEstimate, estimate_step
from sdxl_trainer.train.report.metrics import read_metrics

MEASURED_STEPS = 100


class Throughput(NamedTuple):
    """Progress and speed of a run, from its log."""

    last_step: int
    images_per_second: float  # median over the last steps; 0 before the first


def describe_duration(config: Config, num_steps: int | None, world_size: int, gpu_names: Sequence[str]) -> str:
    """Describe how many steps remain and how long they take, or why that is not known.

    Generated images, validation and checkpoints take additional time. All ranks are assumed to have the first GPU.

    Args:
        config: with `engine.zero_stage` and `engine.gradient_checkpointing` chosen.
        num_steps: steps of the whole run; None if the data that decide it cannot be opened.
    """
    done, images_per_second = read_throughput(config.run.folder / "logs" / "metrics.jsonl")
    if num_steps is None:
        return f"the steps of {config.train.length} are not known before the cache is filled"
    steps = max(0, num_steps - done)
    images = steps * config.train.global_batch_size
    remaining = f"{steps:,} steps remain, {images:,} images"
    if not steps:
        return f"all {num_steps:,} steps are done"
    if images_per_second:
        pace = f"{format_rate(images_per_second)}, the speed of this run's last steps"
        return f"{remaining}: {describe_seconds(images / images_per_second)} at {pace}"
    estimate = estimate_first_step(config, world_size, gpu_names[0]) if gpu_names else None
    if estimate is None:
        return f"{remaining}; the duration is not known before the first steps of this run"
    duration, gpus = describe_seconds(steps * estimate.seconds), f"{world_size} x {gpu_names[0]}"
    return (
        f"{remaining}: about {duration} on {gpus}, by an estimate of {estimate.seconds:.3g} s a step, "
        f"{estimate.largest_share:.0%} of it {estimate.largest}"
    )


def estimate_first_step(config: Config, world_size: int, gpu_name: str) -> StepEstimate | None:
    """Estimate the time of a step; None for a GPU that is not in the table and for a model that is not on disk."""
    gpu = find_gpu(gpu_name)
    if gpu is None or not is_local(config.model):
        return None
    try:
        return estimate_step(config, resolve_pair(config), world_size, gpu)
    except (OSError, ValueError, KeyError):
        return None  # check_model reports the problem


def read_throughput(metrics_file: Path) -> Throughput:
    """Read the last step and the median speed of a run's last steps; zeros for a run without steps."""
    last = (
        deque(read_metrics(metrics_file, "samples_per_second"), maxlen=MEASURED_STEPS) if metrics_file.is_file() else ()
    )
    if not last:
        return Throughput(0, 0.0)
    return Throughput(last[-1]["step"], statistics.median(line["samples_per_second"] for line in last))
