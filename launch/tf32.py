"""TensorFloat-32: whether fp32 convolutions and matrix products on NVIDIA GPUs round their inputs to 10 bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def set_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 in this process. PyTorch by itself allows it for convolutions, not for matrix products."""
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
