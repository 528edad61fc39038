"""Pixels to latents on the device: uint8 in, arrays out, one batch computing while the last one travels back."""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from loguru import logger

from sdxl_trainer.cache.encode.host_copy import HostCopy
from sdxl_trainer.configs.problems import FailedError
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.formats.latents import VAE_FACTOR
from sdxl_trainer.data.order.keyed_random import derive_seed

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
        """Start on pixels [B, H, W, 3] uint8; `keys` name the images."""
        ...


class VaeEncoder:
    """The VAE.

    Args:
        vae: diffusers' AutoencoderKL on its device, frozen.
        posterior: what to keep of the latent distribution.
        flip: also encode the mirrored pixels (a mirrored latent is not the latent of the mirrored image).
    """

    def __init__(self, vae: Any, posterior: Posterior, flip: bool):
        self._vae = vae
        self._posterior: Posterior = posterior
        self._flip = flip
        self._too_much = math.inf  # values of a batch that went beyond the device's memory
        weight = next(vae.parameters())
        self._device, self._dtype = weight.device, weight.dtype

    def launch(self, pixels: np.ndarray, keys: list[str]) -> PendingBatch:
        """A batch that the device has no memory for is encoded in halves, and so are further ones of its size.

        Raises:
            FailedError: not even one image of this size can be encoded.
        """
        if pixels.size < self._too_much:
            try:
                return self._launch(pixels, keys)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                self._too_much = pixels.size
        if len(keys) == 1:
            raise FailedError(
                f"the device has too little memory for an image of {pixels.shape[2]}x{pixels.shape[1]} "
                f"px: set cache.tile_above_px: {max(pixels.shape[1:3]) // 2}, or vae_precision: bf16"
            )
        logger.info("a batch of {} is more than the device's memory holds: it is halved", pixels.shape[:3])
        half = len(keys) // 2
        return _Halves(self.launch(pixels[:half], keys[:half]), self.launch(pixels[half:], keys[half:]))

    @torch.inference_mode()
    def _launch(self, pixels: np.ndarray, keys: list[str]) -> "_Transfer":
        images = torch.from_numpy(pixels)
        if self._device.type == "cuda":
            images = images.pin_memory()
        images = images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)  # channels last, as decoded
        images = (images.float() / 127.5 - 1).to(self._dtype)
        parts = self._encode(images, keys, 0)
        if self._flip:
            parts += self._encode(images.flip(3), keys, 1)
        return _Transfer(parts, self._posterior == "moments", self._flip)

    def _encode(self, images: torch.Tensor, keys: list[str], mirrored: int) -> list[torch.Tensor]:
        # On a CPU a batch of one takes other kernels, which round differently: two give the bits that any batch gives.
        alone = len(images) == 1 and images.device.type == "cpu"
        padded = torch.cat([images, images]) if alone else images
        distribution = self._vae.encode(padded).latent_dist
        mean, std = distribution.mean[: len(images)].float(), distribution.std[: len(images)].float()
        if self._posterior == "mean":
            return [mean]
        if self._posterior == "moments":
            return [mean, std]
        # Keyed to the image, so encoding again gives the same latents whatever the batch or the number of ranks.
        noise = [_draw_noise(tuple(mean.shape[1:]), derive_seed(mirrored, *key.encode())) for key in keys]
        return [mean + std * torch.stack(noise).to(mean.device, non_blocking=True)]


class _Transfer:
    """Latents on their way to the host."""

    def __init__(self, parts: list[torch.Tensor], moments: bool, flip: bool):
        self._copy = HostCopy(parts)  # [B, 4, h, w] each
        self._moments, self._flip = moments, flip

    def wait(self) -> Encoded:
        parts = iter(self._copy.wait())
        latents = next(parts)
        std = next(parts) if self._moments else None
        flipped = next(parts) if self._flip else None
        flipped_std = next(parts) if self._flip and self._moments else None
        return Encoded(latents, std, flipped, flipped_std)


@dataclass(frozen=True)
class _Halves:
    """A batch that was launched in two."""

    first: PendingBatch
    second: PendingBatch

    def wait(self) -> Encoded:
        first, second = self.first.wait(), self.second.wait()
        return Encoded(
            np.concatenate([first.latents, second.latents]),
            _join(first.std, second.std),
            _join(first.flipped, second.flipped),
            _join(first.flipped_std, second.flipped_std),
        )


def _join(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else np.concatenate([first, second])


def _draw_noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_vae_encoder(config: Config, vae: torch.nn.Module, device: torch.device) -> VaeEncoder:
    """The VAE on its device, as the settings want it to work."""
    cache = config.cache
    torch.nn.Module.to(vae, device, PRECISIONS[cache.vae_precision])  # diffusers' own warns of modules it does not have
    if device.type == "cuda":
        # cuDNN's faster layout, and that of the pixels
        vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if cache.tile_above_px:
        enable_tiling(vae, cache.tile_above_px)
    return VaeEncoder(vae, cache.posterior, cache.flip)


def enable_tiling(vae: Any, above_px: int) -> None:
    """Let diffusers' VAE encode what has a longer side than `above_px` in overlapping, blended tiles of that side."""
    vae.tile_sample_min_size = above_px
    vae.tile_latent_min_size = above_px // VAE_FACTOR
    vae.enable_tiling()
