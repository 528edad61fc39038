"""CPU threads for updates in host memory."""

import ctypes
import os
import re
from pathlib import Path

import torch

from sdxl_trainer.launch.distributed import count_ranks_here

OPENMP_LIBRARY = re.compile(r"(/\S*lib(?:g|i|)omp\S*)$", re.MULTILINE)


def choose_num_threads() -> int:
    """Return the number of threads for a rank's updates: its share of the cores, or what `OMP_NUM_THREADS` says.

    1 means that nobody has chosen: the launch scripts and torchrun set it, because threads do not help on a GPU.
    """
    chosen = os.environ.get("OMP_NUM_THREADS", "1")
    if chosen.isdigit() and int(chosen) > 1:
        return int(chosen)
    return max(1, len(os.sched_getaffinity(0)) // count_ranks_here())


def use_threads(num: int) -> None:
    """Let OpenMP regions that this thread starts run on `num` threads, in PyTorch and in compiled optimizers.

    PyTorch's packages bring an OpenMP library of their own, and an extension that is compiled here uses the system's.
    So the number is set in each library that is loaded.
    """
    torch.set_num_threads(num)
    for path in set(OPENMP_LIBRARY.findall(Path("/proc/self/maps").read_text(encoding="utf-8"))):
        ctypes.CDLL(path).omp_set_num_threads(num)
