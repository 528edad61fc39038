"""Pixels to latents on the device: uint8 in, arrays out, one batch computing while the last one travels back."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from sdxl_trainer.data.plan import mix_keys

Posterior = Literal["sample", "mean", "moments"]


@dataclass(frozen=True)
class Encoded:
    """What is stored of a batch. `std` only for moments, `flipped` and `flipped_std` only with flip."""

    latents: np.ndarray  # [B, 4, h, w] float32, not multiplied by the scaling factor
    std: np.ndarray | None = None
    flipped: np.ndarray | None = None
    flipped_std: np.ndarray | None = None


class PendingBatch(Protocol):
    """A batch on its way through the device."""

    def wait(self) -> Encoded:
        """Wait for it and return it on the host."""
        ...


class Encoder(Protocol):
    """A device that encodes. `launch` returns at once where the device can work by itself."""

    def launch(self, pixels: np.ndarray, keys: list[str]) -> PendingBatch:
        """Start on pixels [B, H, W, 3] uint8; `keys` name the pictures."""
        ...


class VaeEncoder:
    """The VAE.

    Args:
        vae: diffusers' AutoencoderKL on its device, frozen.
        posterior: what to keep of the latent distribution.
        flip: also encode the mirrored pixels (a mirrored latent is not the latent of the mirrored picture).
    """

    def __init__(self, vae: Any, posterior: Posterior, flip: bool):
        self._vae = vae
        self._posterior: Posterior = posterior
        self._flip = flip
        weight = next(vae.parameters())
        self._device, self._dtype = weight.device, weight.dtype

    @torch.inference_mode()
    def launch(self, pixels: np.ndarray, keys: list[str]) -> "_Transfer":
        images = torch.from_numpy(pixels)
        if self._device.type == "cuda":
            images = images.pin_memory()
        images = images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)  # channels last, as decoded
        images = (images.float() / 127.5 - 1).to(self._dtype)
        parts = self._encode(images, keys, 0)
        if self._flip:
            parts += self._encode(images.flip(3), keys, 1)
        return _Transfer(torch.stack(parts), self._posterior == "moments", self._flip)

    def _encode(self, images: torch.Tensor, keys: list[str], mirrored: int) -> list[torch.Tensor]:
        # A batch of one takes other kernels, which round differently: two give the bits that any batch gives.
        padded = images if len(images) > 1 else torch.cat([images, images])
        distribution = self._vae.encode(padded).latent_dist
        mean, std = distribution.mean[: len(images)].float(), distribution.std[: len(images)].float()
        if self._posterior == "mean":
            return [mean]
        if self._posterior == "moments":
            return [mean, std]
        # Keyed to the picture, so encoding again gives the same latents whatever the batch or the number of ranks.
        noise = [_draw_noise(tuple(mean.shape[1:]), mix_keys(mirrored, *key.encode())) for key in keys]
        return [mean + std * torch.stack(noise).to(mean.device, non_blocking=True)]


class _Transfer:
    """Latents on their way to the host."""

    def __init__(self, stacked: torch.Tensor, moments: bool, flip: bool):
        self._moments, self._flip = moments, flip
        self._event: torch.cuda.Event | None = None
        self._host = stacked  # [parts, B, 4, h, w]
        if stacked.is_cuda:
            self._host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            self._host.copy_(stacked, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Encoded:
        if self._event is not None:
            self._event.synchronize()
        parts = iter(self._host.numpy())
        latents = next(parts)
        std = next(parts) if self._moments else None
        flipped = next(parts) if self._flip else None
        flipped_std = next(parts) if self._flip and self._moments else None
        return Encoded(latents, std, flipped, flipped_std)


def _draw_noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
