"""How long the steps will take that are still to do: as the run's own log tells, or by arithmetic before it has one."""

import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from sdxl_trainer.cache.encode.estimate import describe_seconds
from sdxl_trainer.cache.models.source import is_local, resolve_model
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.formats.latents import VAE_FACTOR
from sdxl_trainer.train.estimates.flops import count_training_flops, get_peak_flops
from sdxl_trainer.train.report.metrics import read_metrics

MEASURED_STEPS = 100
# Of the peak, as the console tells MFU. An assumption: it depends on the GPU, the batch and gradient checkpointing.
ASSUMED_MFU = 0.3


def describe_duration(config: Config, world_size: int, gpu_names: Sequence[str]) -> str:
    """How many steps are to do, and how long they take or why that is not known.

    Samples, validation and checkpoints come on top. A rank's GPU is taken to be like the first of `gpu_names`.
    """
    done, images_per_second = read_throughput(config.run.folder / "logs" / "metrics.jsonl")
    steps = max(0, config.train.max_steps - done)
    images = steps * config.train.global_batch_size
    to_do = f"{steps:,} steps to do, {images:,} images"
    if not steps:
        return f"all {config.train.max_steps:,} steps are done"
    if images_per_second:
        pace = f"{images_per_second:.3g} images/s, as this run's last steps had it on the ranks it had"
        return f"{to_do}: {describe_seconds(images / images_per_second)} at {pace}"
    unknown = f"{to_do}; how long they take is not known before this run has made some"
    peak_flops = get_peak_flops(gpu_names[0]) if gpu_names else None
    flops = count_flops_per_image(config)
    if peak_flops is None or flops is None or config.engine.precision == "fp32":
        return unknown
    seconds = images * flops / (ASSUMED_MFU * peak_flops * world_size)
    gpus = f"{world_size} x {gpu_names[0]}"
    return f"{to_do}: about {describe_seconds(seconds)} on {gpus}, if {ASSUMED_MFU:.0%} of their peak is made use of"


def read_throughput(metrics_file: Path) -> tuple[int, float]:
    """(the last step, the median of the last steps' images a second) of a run; zeros of one that has not begun."""
    if not metrics_file.is_file():
        return 0, 0.0
    last = deque(read_metrics(metrics_file), maxlen=MEASURED_STEPS)
    if not last:
        return 0, 0.0
    return last[-1]["step"], statistics.median(line["samples_per_second"] for line in last)


def count_flops_per_image(config: Config) -> float | None:
    """FLOPs of training on an image of the resolutions' mean; None for a model that is not here, and where a part of
    the U-Net is trained, whose backward pass is a part of the whole."""
    optim = config.optim
    partial = config.lora.rank or 0 in (optim.block_lrs or ()) or any(group.lr == 0 for group in optim.groups)
    if partial or not is_local(config.model):
        return None
    try:
        unet_config = resolve_model(config.model).read_config("unet")
        count = count_training_flops(unet_config, config.data.max_tokens + 2)
    except (OSError, ValueError, KeyError):
        return None  # the settings' part has said what is wrong
    sides = [side // VAE_FACTOR for side in config.data.resolution_px]
    return statistics.mean(count.compute((side, side)) for side in sides)
