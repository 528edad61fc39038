"""Choose the preset that suits a GPU, by the memory estimate."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import sdxl_trainer.configs as configs_package
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.engine.deepspeed_config import resolve_zero_stage
from sdxl_trainer.train.estimates.memory_choice import plan_memory, replace_settings
from sdxl_trainer.train.estimates.memory_table import PHASES, MemoryLimits, MemoryTable, format_gb
from sdxl_trainer.train.estimates.networks import NetworkSizes, measure_networks

CONFIGS = Path(configs_package.__file__).parent
# All weights of the U-Net, the most exact first, then adapters.
WHOLE, ADAPTERS = ("sdxl_full", "sdxl_24gb", "sdxl_12gb"), "sdxl_lora"
USABLE = 0.98  # share of a GPU's memory by name that the driver reports
SDXL_BUCKET = Size(1024, 1024)


class PresetChoice(NamedTuple):
    """The first preset that fits a GPU."""

    name: str
    micro_batch_size: int  # the preset's own, or the largest that fits
    peak_bytes: float
    too_large: tuple[tuple[str, float], ...]  # the presets before it, and the bytes that they need

    def describe(self) -> str:
        """Return the choice and its reason in a line."""
        needed, number = format_gb(self.peak_bytes), self.micro_batch_size
        if not self.too_large:
            return f"{self.name}, {needed}, micro batch {number}"
        larger, more = self.too_large[-1]
        return f"{self.name}, {needed}, micro batch {number}, because {larger} needs {format_gb(more)}"


def compute_usable_bytes(gigabytes: float) -> int:
    """Return the bytes that a driver reports of a GPU of so many GB by name."""
    return math.floor(gigabytes * 2**30 * USABLE)


def choose_preset(
    limits: MemoryLimits, world_size: int, source: ModelSource | None = None, bucket: Size = SDXL_BUCKET
) -> PresetChoice | None:
    """Choose the first preset that fits the smallest GPU, with fewer images at a time if necessary; None if none does.

    Args:
        source: of the model; SDXL if it is None.
        bucket: the largest of the training data.
    """
    source, too_large = source or ModelSource(CONFIGS / "sdxl"), []
    for name, config, sizes in iterate_presets(world_size, source, bucket):
        table = plan_memory(config, sizes, world_size, limits).table
        smallest = table.find_largest_micro_batch()
        if not table.fits_device and smallest:
            config = set_micro_batch(config, smallest, world_size)
            table = plan_memory(config, sizes, world_size, limits).table
        if table.fits_device:
            return PresetChoice(name, config.train.micro_batch_size, table.device_peak, tuple(too_large))
        too_large.append((name, find_least(table)))
    return None


def iterate_presets(world_size: int, source: ModelSource, bucket: Size) -> Iterator[tuple[str, Config, NetworkSizes]]:
    """Yield name and settings of each preset, with the sizes of its networks."""
    for name in (*WHOLE, ADAPTERS):
        config = load_preset(name)
        config = set_micro_batch(config, config.train.micro_batch_size, world_size)
        config, _ = resolve_zero_stage(config, world_size)
        # The presets that train the whole U-Net differ in what they generate only.
        sizes = measure_preset(ADAPTERS if name == ADAPTERS else WHOLE[0], source, bucket)
        yield name, config, sizes if config.sample.prompts else replace(sizes, generation=0)


def load_preset(name: str) -> Config:
    """Load the settings of a preset."""
    return load_config(CONFIGS / f"{name}.yaml", [])[0]


@cache
def measure_preset(name: str, source: ModelSource, bucket: Size) -> NetworkSizes:
    """Measure the networks that a preset trains, once: this takes seconds."""
    return measure_networks(load_preset(name), source, bucket)


def set_micro_batch(config: Config, size: int, world_size: int) -> Config:
    """Return the settings with a micro batch, and with a global batch that suits gradient release."""
    whole = size * world_size if config.engine.gradient_release else config.train.global_batch_size
    return replace_settings(config, "train", micro_batch_size=size, global_batch_size=whole)


def find_least(table: MemoryTable) -> float:
    """Return the bytes that a preset needs with one image at a time."""
    return max(table.sum_device(phase, micro_batch_size=1) for phase in PHASES)


def add_preset(cure: str, limits: MemoryLimits, world_size: int, source: ModelSource, bucket: Size) -> str:
    """Return a cure for too little memory with the preset that fits; unchanged without a GPU, or if none fits."""
    choice = choose_preset(limits, world_size, source, bucket) if limits.has_gpu else None
    if choice is None:
        return cure
    needed, number = format_gb(choice.peak_bytes), choice.micro_batch_size
    return f"{cure}; or begin with configs/{choice.name}.yaml, which takes {needed} with micro batch {number}"
