"""Noise drawn on the CPU by a thread, before the training step asks for it."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sdxl_trainer.train.objective.noise import draw_noise


class DrawnNoise:
    """Noise of coming micro batches, drawn in the order of the requests.

    The noise is that of `draw_noise` on the CPU, so it is the same beside every kind of GPU.

    Args:
        pin_memory: keep the noise in page-locked memory, from which a GPU copies it beside its work.
    """

    def __init__(self, pin_memory: bool = False):
        self._pin_memory = pin_memory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self._drawn: dict[tuple[int, ...], Future[torch.Tensor]] = {}

    def request(self, shape: Sequence[int], seeds: Sequence[int]) -> None:
        """Draw the noise of a micro batch, [B, *shape], in the background."""
        self._drawn[(*shape, *seeds)] = self._thread.submit(self._draw, shape, seeds)

    def take(self, shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> torch.Tensor | None:
        """Return requested noise, [B, *shape], on a device, and forget it; None if it was not requested."""
        future = self._drawn.pop((*shape, *seeds), None)
        return None if future is None else future.result().to(device, non_blocking=True)

    def _draw(self, shape: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        noise = draw_noise(shape, seeds)
        return noise.pin_memory() if self._pin_memory else noise
