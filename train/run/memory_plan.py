"""Estimate and check the memory of a run on its ranks, before any weight is read."""

import math
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from loguru import logger

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.problems import Problem, raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.formats.latents import compute_shape
from sdxl_trainer.data.images.bucket import Size, list_buckets
from sdxl_trainer.data.index.selection import build_bucket_rules
from sdxl_trainer.data.loading.loader import PREFETCH_PER_WORKER
from sdxl_trainer.data.order.plan import Plan
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import Ranks, count_ranks_here, gather_objects
from sdxl_trainer.launch.machine import read_host_memory_bytes
from sdxl_trainer.train.estimates.checkpoint_size import check_checkpoint_space
from sdxl_trainer.train.estimates.memory_choice import MemoryPlan, describe_lack, plan_memory
from sdxl_trainer.train.estimates.memory_table import HEADROOM, MemoryLimits, MemoryTable, format_gb
from sdxl_trainer.train.estimates.networks import get_area, measure_networks
from sdxl_trainer.train.estimates.preset_choice import add_preset

SHARED_MEMORY = Path("/dev/shm")
FP32_BYTES = 4


class RankMemory(NamedTuple):
    """Memory of one rank's machine, in bytes."""

    device: int | None  # of its GPU; None without one
    host: int | None  # None if unknown
    host_name: str


def plan_run_memory(config: Config, source: ModelSource, plan: Plan, ranks: Ranks, kept: str) -> MemoryPlan:
    """Estimate the memory of this run on these ranks, and choose gradient checkpointing if that is `auto`.

    All ranks call it together and get the same result. Rank 0 logs the choice, and warns of too little memory or disk
    space.

    Args:
        kept: the choice in the checkpoint that the run resumes from; "" if there is none.

    Raises:
        UserInputError: a GPU is too small for the run even without activations.
    """
    ACTIVITY.enter("estimating the memory")
    logger.info("estimating the memory of a rank")  # which takes 15 s on two busy cores
    bucket = find_largest_bucket(plan)
    sizes = measure_networks(config, source, bucket)
    limits = find_smallest(gather_objects(read_rank_memory(ranks.device)))
    planned = plan_memory(config, sizes, ranks.world_size, limits, kept)
    cure = "" if planned.table.fits_device else describe_lack(planned.config, sizes, ranks.world_size, limits)
    if list(check_device(planned.table, cure)):
        cure = add_preset(cure, limits, ranks.world_size, source, bucket)
    raise_if_any(list(check_device(planned.table, cure)))
    if ranks.is_main:
        if planned.reason:
            logger.info("engine.gradient_checkpointing: {}", planned.reason)
        for problem in (*check_room(planned.table, cure), *check_checkpoint_space(planned.config, sizes.shapes)):
            logger.warning("{}: {} {}; {}", problem.key, problem.value, problem.rule, problem.cure)
    return planned


def read_rank_memory(device: torch.device) -> RankMemory:
    """Read the memory of this rank's GPU and host."""
    gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return RankMemory(gpu, read_host_memory_bytes(), socket.gethostname())


def find_smallest(memories: list[RankMemory]) -> MemoryLimits:
    """Return the memory of the smallest GPU and of the smallest host of all ranks."""
    gpus = [memory.device for memory in memories if memory.device is not None]
    hosts = [memory.host for memory in memories if memory.host is not None]
    most_ranks = max(Counter(memory.host_name for memory in memories).values())
    return MemoryLimits(device=min(gpus, default=None), host=min(hosts, default=None), ranks_per_host=most_ranks)


def find_largest_bucket(plan: Plan) -> Size:
    """Return the largest bucket of the training data."""
    return max((Size(bucket >> 16, bucket & 0xFFFF) for bucket in plan.buckets), key=get_area)


def list_largest_bucket(config: Config) -> Size | None:
    """Return the largest bucket that the settings allow; None if they allow none."""
    buckets = [bucket for rule in build_bucket_rules(config.data).values() for bucket in list_buckets(rule)]
    # Of equal areas the least elongated, which is the one that people know.
    return max(buckets, key=lambda bucket: (get_area(bucket), min(bucket)), default=None)


def check_device(table: MemoryTable, cure: str) -> Iterator[Problem]:
    """Yield a problem if a GPU is too small even without activations.

    Args:
        cure: what saves memory.
    """
    limit, needed = table.limits.device, table.device_without_activations
    if limit is not None and needed > limit:
        rule = f"of GPU memory are needed without any activation, and the smallest GPU has {format_gb(limit)}"
        yield Problem("engine", format_gb(needed), rule, f"{cure}; or train adapters (lora.rank)")


def check_room(table: MemoryTable, cure: str) -> Iterator[Problem]:
    """Yield a problem for the device and for the host if the estimate leaves too little room.

    Args:
        cure: what saves memory of the device.
    """
    device = "smallest GPU" if table.limits.has_gpu else "smallest host"
    if not table.fits_device:
        assert table.limits.rank is not None, "an unknown size is large enough"
        room = f"{format_gb(table.limits.rank)}, of which {HEADROOM:.0%} should stay free"
        rule = f"are needed in the {table.peak_phase}, and the {device} has {room} for a rank"
        yield Problem("memory", format_gb(table.device_peak), rule, cure)
    if not table.fits_host:
        assert table.limits.host is not None, "an unknown size is large enough"
        rule = f"of host memory are needed by all ranks of a host, which has {format_gb(table.limits.host)}"
        cure = "set engine.zero_stage: 3 on more GPUs, or engine.precision: bf16_stochastic instead of offloading"
        yield Problem("memory", format_gb(table.host_peak), rule, cure)


def check_shared_memory(config: Config, latent_channels: int) -> Iterator[Problem]:
    """Yield a problem if the micro batches that this node's workers read ahead do not fit into shared memory."""
    if not (config.data.num_workers and SHARED_MEMORY.is_dir()):
        return
    latent_bytes = FP32_BYTES * math.prod(compute_shape(Size(*config.data.largest_size), latent_channels))
    batch_bytes = config.train.micro_batch_size * latent_bytes
    needed = count_ranks_here() * config.data.num_workers * PREFETCH_PER_WORKER * batch_bytes
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        rule = f"need about {needed / 1e6:,.0f} MB of shared memory on this node; {SHARED_MEMORY} has {free / 1e6:,.0f}"
        cure = "lower it, or enlarge /dev/shm (docker run --shm-size=8g, or --ipc=host)"
        yield Problem("data.num_workers", config.data.num_workers, rule, cure)
