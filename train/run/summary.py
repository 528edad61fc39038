"""Tables that a run logs: its data, model and batch at the start, its results at the end."""

import time
from collections import Counter
from collections.abc import Mapping
from itertools import islice

import torch
from rich.box import ROUNDED
from rich.table import Table
from rich.text import Text

from sdxl_trainer.configs.language.translate import translate
from sdxl_trainer.configs.lora import LoraConfig
from sdxl_trainer.configs.problems import format_count, format_rate
from sdxl_trainer.data.formats.latents import VAE_FACTOR
from sdxl_trainer.data.loading.counts import count_buckets
from sdxl_trainer.launch.distributed import count_ranks_here
from sdxl_trainer.launch.logger import log_table
from sdxl_trainer.train.estimates.checkpoint_size import compute_snapshot_sizes
from sdxl_trainer.train.estimates.gpus import find_gpu_of
from sdxl_trainer.train.estimates.memory_table import format_gb
from sdxl_trainer.train.estimates.step_time import estimate_step
from sdxl_trainer.train.estimates.text_encoders import describe_text_encoders
from sdxl_trainer.train.run.console import describe_peak_memory, describe_skipped, format_seconds, translate_rows
from sdxl_trainer.train.run.run import Run

MAX_BUCKETS = 6
NETWORK_NAMES = {"unet": "U-Net", "text_encoder": "text encoder 1", "text_encoder_2": "text encoder 2"}


def show_start(run: Run) -> None:
    """Log a table of the run's data, model and settings on all ranks; the console shows that of rank 0."""
    config, state, sizes = run.config, run.state, run.batch_sizes
    trained = [f"{name}: {count:,} weights" for name, count in count_trained_weights(run.engine.model).items()]
    held_out = f", {sum(len(spec.rows) for spec in run.validation.batches)} for validation" if run.validation else ""
    resumed = f", resumed at step {state.step}" if state.step else ""
    text_cost = describe_text_encoders(config, run.source, run.memory)
    snapshots = compute_snapshot_sizes(config, list(run.engine.weights.layout.shapes.values()), run.num_steps)
    rows = {
        "data": f"{format_count(len(run.index), 'sample')} in the index{held_out}; "
        f"{format_count(run.plan.num_batches(state.epoch), 'global batch', 'global batches')} in epoch {state.epoch}, "
        f"{format_count(run.plan.num_carried(state.epoch), 'sample')} carried over to the next",
        "buckets": describe_buckets(run),
        "model": f"{config.model.path}, {config.objective.prediction} prediction",
        "trained": "; ".join(trained),
        "optimizer": f"{config.optim.name}, lr {config.optim.lr:g}, {config.optim.schedule}; "
        f"{config.engine.precision}, ZeRO-{run.engine.zero_stage}",
        **({"adapters": describe_adapters(config.lora)} if config.lora.rank else {}),
        **({"text encoders": text_cost} if text_cost else {}),
        "memory": f"{describe_peak_memory(run.ranks.device)} on rank 0 before the first step; a rank needs "
        f"{format_gb(run.memory.device_peak)}",
        "batch": f"{sizes.micro_batch_size} micro x {sizes.accumulation_steps} accumulation x "
        f"{format_count(sizes.world_size, 'rank')} = {sizes.global_batch_size} global",
        "steps": describe_length(run) + resumed,
        **({"snapshots": snapshots.describe()} if snapshots.number else {}),
        "folder": str(run.folder),
    }
    log_summary(f"Training {config.run.name}", rows)
    log_summary("Memory of a rank, estimated", run.memory.describe())


def describe_adapters(lora: LoraConfig) -> str:
    """Return kind, rank and alpha of the adapters, and the factor by which alpha scales them."""
    alpha = lora.rank if lora.alpha is None else lora.alpha
    described = f"{lora.kind} of rank {lora.rank}, alpha {alpha:g}: scaled by {alpha / lora.rank:.3g}"
    if not lora.conv_rank:
        return described
    alpha = lora.conv_rank if lora.conv_alpha is None else lora.conv_alpha
    scale = alpha / lora.conv_rank
    return f"{described}; convolutions of rank {lora.conv_rank}, alpha {alpha:g}: scaled by {scale:.3g}"


def show_end(run: Run, was_stopped: bool = False) -> None:
    """Log a table of steps, loss, speed and results. Only rank 0 has the numbers and logs them."""
    if not run.ranks.is_main:
        return
    progress, state = run.progress, run.state
    averages, seconds = progress.averages, max(time.monotonic() - progress.started, 1e-9)
    num_steps, train_seconds = state.step - progress.first_step, progress.train_seconds or 1e-9
    images_per_second = num_steps * run.batch_sizes.global_batch_size / train_seconds
    mfu = f", MFU {progress.describe_mfu(averages)}" if progress.has_mfu else ""
    models = sorted(path.name for path in (run.folder / "models").glob(f"step-{state.step:08d}*"))
    estimate = describe_step_time(run)
    rows = {
        "steps": f"{state.step:,} of {run.num_steps:,}, {num_steps:,} of them in this job; epoch {state.epoch}",
        "loss": f"{averages.loss:.4f}, average of the last {format_count(averages.num_steps, 'step')}"
        if num_steps
        else "none: no step was made",
        "time": f"{format_seconds(seconds)}: {train_seconds / seconds:.0%} in steps, the rest in validation, generated "
        "images, checkpoints and export",
        "speed": f"{format_rate(images_per_second)}, data wait {progress.data_wait_seconds / train_seconds:.1%}{mfu}",
        **({"time of a step": estimate} if estimate else {}),
        "memory": f"peak of rank 0: {describe_peak_memory(run.ranks.device)}",
        "skipped": describe_skipped(state),
        "checkpoint": f"step {run.checkpoints.last_step}" if run.checkpoints.last_step >= 0 else "none in this job",
        "models": ", ".join(models) or "none: training is not finished",
        "folder": str(run.folder),
    }
    name = run.config.run.name
    log_summary(f"Training {name} was stopped" if was_stopped else f"Trained {name}", rows)


def describe_step_time(run: Run) -> str:
    """Compare the measured time of a step with its estimate; "" without an estimate or steps."""
    averages, gpu = run.progress.averages, find_gpu_of(run.ranks.device)
    if gpu is None or not averages.num_steps:
        return ""
    areas: Counter[int] = Counter()
    for bucket, count in run.plan.count_samples_by_bucket(0).items():
        areas[(bucket >> 16) * (bucket & 0xFFFF) // VAE_FACTOR**2] += count
    estimate = estimate_step(run.config, run.source, run.ranks.world_size, gpu, areas, count_ranks_here())
    if estimate is None:
        return ""
    num_steps = format_count(averages.num_steps, "step")
    return (
        f"{averages.step_seconds:.3g} s on average of the last {num_steps}; the estimate was {estimate.seconds:.3g} s, "
        f"{estimate.largest_share:.0%} of it {estimate.largest}"
    )


def log_summary(title: str, rows: Mapping[str, str]) -> None:
    """Log a table of names and values; the console shows it in the user's language."""
    log_table(build_summary_table(title, rows), build_summary_table(translate(title), translate_rows(rows)))


def describe_length(run: Run) -> str:
    """Return the number of steps, epochs if they decide it, and samples of the whole run."""
    epochs, samples = run.config.train.max_epochs, run.num_steps * run.config.train.global_batch_size
    counted = f" in {format_count(epochs, 'epoch')}" if epochs else ""
    return f"{run.num_steps:,}{counted}: {format_count(samples, 'sample')}"


def build_summary_table(title: str, rows: Mapping[str, str]) -> Table:
    """Build a table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=ROUNDED, border_style="cyan")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def count_trained_weights(networks: torch.nn.Module) -> dict[str, int]:
    """Count the trained weights of each network that has any."""
    # Under ZeRO-3 `numel` counts only what this rank holds, and `ds_numel` the whole.
    counts = {
        name: sum(getattr(p, "ds_numel", p.numel()) for p in network.parameters() if p.requires_grad)
        for name, network in networks.named_children()
    }
    return {NETWORK_NAMES.get(name, name): count for name, count in counts.items() if count}


def describe_buckets(run: Run) -> str:
    """Return the number of buckets, and the largest ones with their samples in this epoch."""
    counts = count_buckets(run.plan, run.state.epoch)
    shown = ", ".join(f"{bucket}: {count:,}" for bucket, count in islice(counts.items(), MAX_BUCKETS))
    return f"{len(counts)}: {shown}" if len(counts) <= MAX_BUCKETS else f"{len(counts)}; the largest are {shown}"
