"""Device to host without waiting: the copy is started at once and waited for when it is needed."""

from collections.abc import Sequence

import numpy as np
import torch


class HostCopy:
    """Tensors on their way to the host; on a CPU they are there already."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._event: torch.cuda.Event | None = None
        self._host = [_start(tensor) for tensor in tensors]
        if any(tensor.is_cuda for tensor in tensors):
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[np.ndarray]:
        """Wait for them and return them."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._host]


def _start(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
