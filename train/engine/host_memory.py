"""Host memory that checkpoints are copied into: allocated once, and page-locked for copies from a GPU."""

import mmap
import weakref
from contextlib import suppress
from typing import Any

import torch
from loguru import logger

# Smaller tensors are copied in microseconds either way.
REGISTERED_BYTES = 2**20
PORTABLE = 1  # cudaHostRegisterPortable


class HostMemory:
    """Host tensors that are reused for copies of the same tensors in the same order.

    A copy into memory that is allocated already is several times faster, and one from a GPU faster again if the pages
    are locked, because the GPU then writes them itself.
    """

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        # Before the pages are given back: memory that gets their addresses later could not be locked.
        weakref.finalize(self, _unlock_all, self._tensors).atexit = False
        self._next = 0
        self._locks_pages = torch.cuda.is_available()

    def rewind(self) -> "HostMemory":
        """Reuse the memory from its first tensor on."""
        self._next = 0
        return self

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor on the host."""
        place, self._next = self._next, self._next + 1
        held = self._tensors[place] if place < len(self._tensors) else None
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            if held is not None:
                unlock_pages(held)
            held = self._allocate(tensor)
            self._tensors[place : place + 1] = [held]
        return held.copy_(tensor)

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        """Allocate a host tensor for copies of a tensor."""
        if not (self._locks_pages and like.device.type != "cpu" and like.nbytes >= REGISTERED_BYTES):
            return torch.empty(like.shape, dtype=like.dtype, device="cpu")
        held = allocate_pages(like)
        code = int(_get_cuda_runtime().cudaHostRegister(held.data_ptr(), held.nbytes, PORTABLE))
        if code != 0:
            logger.warning("CUDA cannot lock host memory (error {}); copies of checkpoints take longer", code)
            self._locks_pages = False
            _clear_cuda_error(like.device)
        return held


def allocate_pages(like: torch.Tensor) -> torch.Tensor:
    """Allocate a host tensor of the shape and type of `like` in pages of its own.

    Pages that two tensors share could not be locked for both. PyTorch's own pinned memory takes powers of two, which
    may be twice the bytes. The pages are huge where the system allows it: locking touches each, which takes 0.09 s of
    CPU a GB instead of 0.58 with small shared ones.
    """
    pages = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    pages.madvise(mmap.MADV_DONTFORK)  # a child process would get copies of locked pages
    return torch.frombuffer(pages, dtype=like.dtype).view(like.shape)


def unlock_pages(held: torch.Tensor) -> None:
    """Unlock the pages of a tensor before they are freed."""
    if torch.cuda.is_available() and held.is_pinned():
        _get_cuda_runtime().cudaHostUnregister(held.data_ptr())


def _unlock_all(held: list[torch.Tensor]) -> None:
    while held:
        unlock_pages(held.pop())


def _get_cuda_runtime() -> Any:
    return torch.cuda.cudart()


def _clear_cuda_error(device: torch.device) -> None:
    """Let a small kernel report the error of the failed call, so that no later kernel does."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device)
