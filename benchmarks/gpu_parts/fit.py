"""Whether a training step at full size fits the device, by the estimate that every run makes (train/estimates)."""

from functools import cache
from typing import Any, NamedTuple

import torch

from gpu_parts.devices import Place
from gpu_parts.full_size import build_settings, get_side_px
from gpu_parts.report import Case, SkippedCase


class StepSizes(NamedTuple):
    """Sizes of a training step."""

    micro_batch_size: int
    checkpointing: bool = False
    accumulation_steps: int = 1

    @property
    def name(self) -> str:
        """Name of the case."""
        checkpointing = "_checkpointing" if self.checkpointing else ""
        accumulation = f"_accumulation_{self.accumulation_steps}" if self.accumulation_steps > 1 else ""
        return f"micro_batch_{self.micro_batch_size}{checkpointing}{accumulation}"

    @property
    def num_images(self) -> int:
        """Images of one step."""
        return self.micro_batch_size * self.accumulation_steps

    def list_words(self) -> list[str]:
        """List the settings of a run with these sizes."""
        return [
            f"train.micro_batch_size={self.micro_batch_size}",
            f"train.global_batch_size={self.num_images}",
            f"engine.gradient_checkpointing={'full' if self.checkpointing else 'off'}",
        ]


@cache  # counting the activations of SDXL takes seconds
def count_networks(place: Place) -> Any:
    """Count weights and activations of the networks, which do not depend on the micro batch."""
    from sdxl_trainer.cache.models.source import resolve_model
    from sdxl_trainer.data.images.bucket import Size
    from sdxl_trainer.train.estimates.networks import measure_networks

    config, side = build_settings(place, "fit", StepSizes(1).list_words()), get_side_px(place)
    return measure_networks(config, resolve_model(config.model), Size(side, side))


def estimate_step(place: Place, sizes: StepSizes) -> Any:
    """Estimate the memory of a step, and return its table."""
    from sdxl_trainer.train.estimates.memory import estimate_memory
    from sdxl_trainer.train.estimates.memory_table import MemoryLimits

    config = build_settings(place, "fit", sizes.list_words())
    total = torch.cuda.get_device_properties(0).total_memory if place.is_cuda else None
    return estimate_memory(config, count_networks(place), 1, MemoryLimits(device=total, host=None))


def require_room(place: Place, sizes: StepSizes, case: Case) -> None:
    """Note the estimated peaks of a step's phases, and skip the case if they do not fit the device.

    Raises:
        SkippedCase: the estimate is above the device's memory.
    """
    table = estimate_step(place, sizes)
    phases = ("forward pass", "backward pass", "update")
    case.note(estimated_peak_gb={phase: table.sum_device(phase) / 1e9 for phase in phases})
    if not table.fits_device:
        needed, total = table.device_peak / 1e9, table.limits.device / 1e9
        raise SkippedCase(f"needs {needed:.1f} GB by the estimate; the device has {total:.1f} GB")


def choose_first_sizes(place: Place) -> StepSizes:
    """Return micro batch 4, with gradient checkpointing if it does not fit without."""
    sizes = StepSizes(4)
    return sizes if estimate_step(place, sizes).fits_device else sizes._replace(checkpointing=True)
