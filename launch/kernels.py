"""Choices among PyTorch's CUDA kernels for a whole process: TF32, attention, and cuDNN's search for convolutions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from loguru import logger
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdxl_trainer.configs.problems import format_count

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
HOPPER = (9, 0)  # compute capability
# A search tries several algorithms for each of SDXL's kinds of convolution, in both passes, and again for each size.
MAX_SEARCHED_SIZES = 20


def set_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 in this process: fp32 convolutions and matrix products round their inputs to 10 bits.

    PyTorch by itself allows it for convolutions, not for matrix products.
    """
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


@contextmanager
def use_tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 within the block."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    set_tf32(allowed)
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def list_attention_backends(choice: str, capability: tuple[int, int]) -> list[SDPBackend]:
    """List the back ends of PyTorch's attention in the order in which they are tried.

    A back end that does not support a call, such as flash attention in fp32, leaves it to the next one.

    Args:
        choice: `engine.attention`. Empty result: PyTorch's own order, or another package's attention.
        capability: compute capability of the GPU.
    """
    if choice == "auto":
        choice = "cudnn" if capability >= HOPPER else "flash"
    if choice not in BACKENDS:
        return []
    return [BACKENDS[choice], *(backend for name, backend in BACKENDS.items() if name != choice)]


@contextmanager
def use_attention(choice: str) -> Iterator[None]:
    """Let attention on GPUs try the back ends in the order of `engine.attention` within the block, in all threads."""
    backends = list_attention_backends(choice, torch.cuda.get_device_capability()) if torch.cuda.is_available() else []
    if not backends:
        yield
        return
    with sdpa_kernel(backends, set_priority=True):
        yield


@contextmanager
def search_convolutions(wanted: bool, num_sizes: int) -> Iterator[None]:
    """Let cuDNN measure its algorithms for each new convolution within the block, if there are few image sizes.

    Args:
        num_sizes: number of buckets of the training set.
    """
    if wanted and num_sizes > MAX_SEARCHED_SIZES:
        logger.warning(
            "engine.cudnn_benchmark: off, because the training set has {}, and each needs a search of its own; "
            "the limit is {}",
            format_count(num_sizes, "bucket"),
            MAX_SEARCHED_SIZES,
        )
        wanted = False
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
