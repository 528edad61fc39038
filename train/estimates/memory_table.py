"""A table of a rank's memory: components with their bytes on the device and on the host, and the limits of both.

Memory has peaks in several phases. During the backward pass activations make room for gradients, so a table sums each
phase by itself.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sdxl_trainer.configs.problems import format_count

Phase = Literal[
    "forward pass", "backward pass", "weight update", "validation", "encoding of prompts", "image generation"
]
PHASES: tuple[Phase, ...] = get_args(Phase)
# Share of a device's memory that an estimate must leave free: for kernels' workspaces and fragments of the allocator,
# which are not counted.
HEADROOM = 0.08
MAX_MICRO_BATCH = 256  # no run needs a larger one on a rank, though tiny models would fit thousands


@dataclass(frozen=True, kw_only=True)
class MemoryLine:
    """Bytes of one component of a rank, on the device and on the host."""

    component: str
    device: float = 0
    host: float = 0
    phases: tuple[Phase, ...] = PHASES  # in which it exists
    grows: bool = False  # in proportion to the micro batch
    only_rank_0: bool = False  # other ranks do not have it; a rank's memory counts it anyway


@dataclass(frozen=True, kw_only=True)
class MemoryLimits:
    """Memory of the smallest device and the smallest host of all ranks, in bytes."""

    device: int | None  # of the GPU; None without GPUs
    host: int | None  # None if unknown
    ranks_per_host: int = 1

    @property
    def has_gpu(self) -> bool:
        """Return whether device and host are different memories."""
        return self.device is not None

    @property
    def host_share(self) -> float | None:
        """Bytes of the host for each of its ranks."""
        return None if self.host is None else self.host / self.ranks_per_host

    @property
    def rank(self) -> float | None:
        """Bytes of a rank's device: of its GPU, or of its share of the host without GPUs."""
        return self.device if self.has_gpu else self.host_share


@dataclass(frozen=True, kw_only=True)
class MemoryTable:
    """The memory of a rank by components, and its limits."""

    lines: tuple[MemoryLine, ...]
    limits: MemoryLimits
    micro_batch_size: int

    def sum_device(self, phase: Phase, micro_batch_size: int | None = None) -> float:
        """Return the bytes on the device in a phase. Without a GPU, components of the host count as well.

        Args:
            micro_batch_size: instead of the table's.
        """
        factor = 1.0 if micro_batch_size is None else micro_batch_size / self.micro_batch_size
        return sum(
            (line.device + (0 if self.limits.has_gpu else line.host)) * (factor if line.grows else 1.0)
            for line in self.lines
            if phase in line.phases
        )

    @property
    def peak_phase(self) -> Phase:
        """The phase with the largest sum on the device."""
        return max(PHASES, key=self.sum_device)

    @property
    def device_peak(self) -> float:
        """The largest sum of all phases on the device, in bytes."""
        return self.sum_device(self.peak_phase)

    @property
    def device_without_activations(self) -> float:
        """The largest sum of all phases on the device without images, in bytes."""
        return max(self.sum_device(phase, micro_batch_size=0) for phase in PHASES)

    @property
    def host_peak(self) -> float:
        """The largest sum of all phases on a host, of all its ranks, in bytes."""
        number = self.limits.ranks_per_host
        sums = dict.fromkeys(PHASES, 0.0)
        for line in self.lines:
            for phase in line.phases:
                sums[phase] += line.host * (1 if line.only_rank_0 else number)
        return max(sums.values())

    @property
    def fits_device(self) -> bool:
        """Return whether the peak leaves `HEADROOM` of the device free; True if its size is not known."""
        limit = self.limits.rank
        return limit is None or self.device_peak <= limit * (1 - HEADROOM)

    @property
    def fits_host(self) -> bool:
        """Return whether a host has what its ranks keep there besides GPUs; True if its size is not known."""
        host = self.limits.host
        return host is None or not self.limits.has_gpu or self.host_peak <= host

    def find_largest_micro_batch(self) -> int | None:
        """Return the largest micro batch that fits the device, 0 if none does; None if its size is not known."""
        if self.limits.rank is None:
            return None
        limit, largest = self.limits.rank * (1 - HEADROOM), []
        for phase in PHASES:
            empty = self.sum_device(phase, micro_batch_size=0)
            image = self.sum_device(phase, micro_batch_size=1) - empty
            if empty > limit:
                return 0
            largest += [math.floor((limit - empty) / image)] if image else []
        return min(largest, default=None)

    def describe(self) -> dict[str, str]:
        """Return a row of text for each component, for the sums, and for the largest micro batch that fits."""
        rows = {line.component: describe_line(line, self.limits.has_gpu) for line in self.lines}
        largest = self.find_largest_micro_batch()
        peak, limit = format_gb(self.device_peak), self.limits.rank
        rows[f"{'GPU' if self.limits.has_gpu else 'memory'}, peak"] = (
            f"{peak}{'' if limit is None else f' of {format_gb(limit)}'}, in the {self.peak_phase}"
        )
        if self.limits.has_gpu:
            peak, total = format_gb(self.host_peak), self.limits.host
            ranks = format_count(self.limits.ranks_per_host, "rank")
            rows["host, peak"] = f"{peak}{'' if total is None else f' of {format_gb(total)}'}, for {ranks} on a host"
        if largest is not None:
            shown = describe_micro_batch(largest)
            rows["largest micro batch"] = f"{shown} (train.micro_batch_size is {self.micro_batch_size})"
        return rows


def describe_line(line: MemoryLine, has_gpu: bool) -> str:
    """Return the bytes of a line as text, with the phases in which it exists if these are not all."""
    places = [(line.device, " GPU"), (line.host, " host")] if has_gpu else [(line.device + line.host, "")]
    parts = [f"{format_gb(number)}{place}" for number, place in places if number]
    when = "" if line.phases == PHASES else f", {', '.join(line.phases)}"
    return " and ".join(parts) + when


def describe_micro_batch(largest: int | None) -> str:
    """Return the largest micro batch that fits as text. Beyond a sensible size it is only said to be larger."""
    return f"more than {MAX_MICRO_BATCH}" if largest is not None and largest > MAX_MICRO_BATCH else str(largest)


def format_gb(num_bytes: float) -> str:
    """Return bytes as text in GB, MB or kB, with three digits."""
    unit, factor = ("GB", 1e9) if num_bytes >= 1e9 else ("MB", 1e6) if num_bytes >= 1e6 else ("kB", 1e3)
    return f"{num_bytes / factor:.3g} {unit}"
