"""Duration of the remaining steps: from the run's own log, or before its first step from the FLOPs of its images."""

import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sdxl_trainer.cache.models.source import is_local, resolve_model
from sdxl_trainer.configs.lora import LoraConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import describe_seconds, format_rate
from sdxl_trainer.configs.schema import Config, DataConfig, ModelConfig
from sdxl_trainer.train.estimates.flops import average_training_flops, get_peak_flops
from sdxl_trainer.train.report.metrics import read_metrics

MEASURED_STEPS = 100
# MFU as the console reports it. This is an assumption: MFU depends on the GPU, the batch and gradient checkpointing.
ASSUMED_MFU = 0.3


class Throughput(NamedTuple):
    """Progress and speed of a run, from its log."""

    last_step: int
    images_per_second: float  # median over the last steps; 0 before the first


def describe_duration(config: Config, num_steps: int | None, world_size: int, gpu_names: Sequence[str]) -> str:
    """Describe how many steps remain and how long they take, or why that is not known.

    Generated images, validation and checkpoints take additional time. All ranks are assumed to have the first GPU.

    Args:
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
    peak_flops = get_peak_flops(gpu_names[0]) if gpu_names else None
    is_whole = trains_whole_unet(config.optim, config.lora)
    flops = count_flops_per_image(config.model, config.data) if is_whole else None
    if peak_flops is None or flops is None or config.engine.precision == "fp32":
        return f"{remaining}; the duration is not known before the first steps of this run"
    seconds = images * flops / (ASSUMED_MFU * peak_flops * world_size)
    gpus = f"{world_size} x {gpu_names[0]}"
    return f"{remaining}: about {describe_seconds(seconds)} on {gpus}, at {ASSUMED_MFU:.0%} of their peak"


def read_throughput(metrics_file: Path) -> Throughput:
    """Read the last step and the median speed of a run's last steps; zeros for a run without steps."""
    last = (
        deque(read_metrics(metrics_file, "samples_per_second"), maxlen=MEASURED_STEPS) if metrics_file.is_file() else ()
    )
    if not last:
        return Throughput(0, 0.0)
    return Throughput(last[-1]["step"], statistics.median(line["samples_per_second"] for line in last))


def trains_whole_unet(optim: OptimConfig, lora: LoraConfig) -> bool:
    """Return whether every weight of the U-Net is trained; otherwise the backward pass takes fewer FLOPs."""
    return not (lora.rank or 0 in (optim.block_lrs or ()) or any(group.lr == 0 for group in optim.groups))


def count_flops_per_image(model: ModelConfig, data: DataConfig) -> float | None:
    """Count the FLOPs of training on one square image, averaged over the resolutions.

    Returns None for a model that is not on disk or whose U-Net does not have SDXL's topology.
    """
    if not is_local(model):
        return None
    try:
        return average_training_flops(resolve_model(model).read_config("unet"), data)
    except (OSError, ValueError, KeyError):
        return None  # check_model reports the problem
