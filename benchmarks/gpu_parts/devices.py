"""Where a part measures, and how it measures time and memory there."""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_parts.report import SkippedCase

MOST_LEFT_BYTES = 1_000_000_000  # on the device after a case; with more, the next case needs another process


@dataclass(frozen=True)
class Place:
    """Device and folder of a part.

    Args:
        work: folder for input and output that is not kept.
        device: `cuda` or `cpu`.
        tiny: measure small networks, which shows that the part works.
    """

    work: Path
    device: str
    tiny: bool

    @property
    def is_cuda(self) -> bool:
        """Return whether the device is a GPU."""
        return self.device == "cuda"

    def require_cuda(self, purpose: str) -> None:
        """Skip the case on a CPU.

        Raises:
            SkippedCase: the device is a CPU.
        """
        if not self.is_cuda:
            raise SkippedCase(f"{purpose} needs CUDA")

    def synchronize(self) -> None:
        """Wait for the work of the device."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def time_call(self, call: Callable[[], object]) -> float:
        """Return the seconds of a call, with the work that it starts on the device."""
        self.synchronize()
        started = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - started

    def time_calls(self, call: Callable[[], object], times: int, warm_up: int = 2) -> float:
        """Return the median seconds of some calls, after others that are not counted."""
        for _ in range(warm_up):
            call()
        return statistics.median(self.time_call(call) for _ in range(times))

    def reset_peak(self) -> None:
        """Restart the measurement of the peak of memory."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def read_peak(self) -> int:
        """Return the peak of memory that tensors have held on the GPU, in bytes; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() if self.is_cuda else 0

    def read_held(self) -> int:
        """Return the memory that tensors hold on the GPU, in bytes; 0 on a CPU."""
        return torch.cuda.memory_allocated() if self.is_cuda else 0

    def free_memory(self) -> None:
        """Free the memory of a case that has ended. If it cannot be freed, end the process; the driver starts another.

        An error of a kernel makes every later call fail, so it ends the process too.
        """
        # A tensor with attributes of its own survives the first collection.
        for _ in range(3):
            gc.collect()
        # What is left are modules and caches. Without them the next collections take milliseconds instead of a second.
        gc.freeze()
        if not self.is_cuda:
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(f"the device cannot be used any more: {error}", flush=True)
            sys.exit(1)
        if self.read_held() > MOST_LEFT_BYTES:
            print(f"{self.read_held() / 1e9:.1f} GB stay on the device", flush=True)
            sys.exit(1)
