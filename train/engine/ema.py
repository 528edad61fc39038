"""Exponential moving averages of the weights: each rank averages just the master weights that are its own."""

from collections.abc import Sequence

import torch


class Ema:
    """Averages of flat tensors, one set for each decay.

    Args:
        decays: of the averages; each is known by its decay as text, `"0.999"`.
        warmup: see `compute_decay`.
        masters: what is averaged, any shapes; the averages are flat, in fp32, and begin as copies.
    """

    def __init__(self, decays: Sequence[float], warmup: bool, masters: Sequence[torch.Tensor]):
        self.warmup = warmup
        self.num_updates = 0
        self.averages = {f"{decay:g}": [flatten(master).clone() for master in masters] for decay in decays}
        self._decays = dict(zip(self.averages, decays, strict=True))

    @torch.no_grad()
    def update(self, masters: Sequence[torch.Tensor]) -> None:
        """Move every average towards the weights after an update of theirs."""
        self.num_updates += 1
        values = [flatten(master) for master in masters]
        for key, averages in self.averages.items():
            decay = compute_decay(self.num_updates, self._decays[key], self.warmup)
            torch._foreach_lerp_(averages, values, 1 - decay)


def compute_decay(num_updates: int, decay: float, warmup: bool) -> float:
    """Decay of an average at its update number `num_updates` (from 1)."""
    return min(decay, (1 + num_updates) / (10 + num_updates)) if warmup else decay


def flatten(master: torch.Tensor) -> torch.Tensor:
    """[N] fp32, in the order of the tensor's elements whatever its strides; shares memory where it can."""
    return master.detach().float().reshape(-1)
