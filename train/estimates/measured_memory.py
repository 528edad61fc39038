"""Memory of a run as it is measured: in its first steps, and of the machine."""

from pathlib import Path
from typing import NamedTuple

import torch
from loguru import logger


def list_gpu_memory_bytes() -> list[int]:
    """Return the memory of each GPU in bytes."""
    return [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]


class StepMemoryLogger:
    """Logs once, after the second step of a job, how much memory a step needs beyond what is held between steps.

    The first step is left out, because the optimizer allocates its state in it. Without a GPU the memory of the process
    is measured.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._num_steps = self._held = 0

    def note_step(self) -> None:
        """Count a finished step, and log after the second."""
        self._num_steps += 1
        if self._num_steps == 1:
            reset_peak_memory(self._device)
            self._held = measure_memory(self._device).held
        elif self._num_steps == 2:
            held_gb, peak_gb = self._held / 1e9, measure_memory(self._device).peak / 1e9
            logger.info(
                "memory: {:.3g} GB between steps and {:.3g} GB more during a step, for activations and gradients",
                held_gb,
                peak_gb - held_gb,
            )


class MemoryUse(NamedTuple):
    """Measured memory in bytes: of tensors on a GPU, or of this process without one."""

    held: int  # now
    peak: int  # since `reset_peak_memory`


def measure_memory(device: torch.device) -> MemoryUse:
    """Measure the memory in use."""
    if device.type == "cuda":
        return MemoryUse(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    kilobytes = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines) if rest.strip()}
    return MemoryUse(int(kilobytes["VmRSS"]) * 1024, int(kilobytes["VmHWM"]) * 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Restart the measurement of the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc(5): resets the peak of the resident set
