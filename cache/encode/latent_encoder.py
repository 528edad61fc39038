"""VAE encoding on the device: uint8 pixels in, latent arrays out, with asynchronous copies to the host."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from loguru import logger

from sdxl_trainer.cache.patches import enable_tiling
from sdxl_trainer.configs.problems import FailedError
from sdxl_trainer.configs.schema import CacheConfig
from sdxl_trainer.data.loading.device_copy import copy_to_device
from sdxl_trainer.data.order.keyed_random import derive_seed
from sdxl_trainer.launch.kernels import use_tf32

Posterior = Literal["sample", "mean", "moments"]


@dataclass(frozen=True)
class EncodedBatch:
    """Arrays of a batch that are stored. `std` is set only for moments, the flipped arrays only with flip."""

    latents: np.ndarray  # [B, C, h, w] float32, not multiplied by the scaling factor
    std: np.ndarray | None = None
    flipped: np.ndarray | None = None
    flipped_std: np.ndarray | None = None


class PendingBatch(Protocol):
    """A batch that the device is encoding."""

    def wait(self) -> EncodedBatch:
        """Wait for the batch and return its arrays on the host."""
        ...


class Encoder(Protocol):
    """A device that encodes images."""

    def launch(self, pixels: np.ndarray, keys: list[str]) -> PendingBatch:
        """Start encoding; returns at once if the device runs asynchronously.

        Args:
            pixels: [B, H, W, 3] uint8.
            keys: [B] keys of the images.
        """
        ...


class VaeEncoder:
    """Encodes images with the VAE.

    Args:
        vae: diffusers' AutoencoderKL on its device, frozen.
        posterior: part of the latent distribution to keep.
        flip: also encode the mirrored pixels (a mirrored latent is not the latent of the mirrored image).
        tf32: allow TF32 in an fp32 VAE.
    """

    def __init__(self, vae: Any, posterior: Posterior, flip: bool, tf32: bool = False):
        self._vae = vae
        self._tf32 = tf32
        self._posterior: Posterior = posterior
        self._flip = flip
        self._max_values: float = math.inf  # batches with as many pixel values exceed the device's memory
        weight = next(vae.parameters())
        self._device, self._dtype = weight.device, weight.dtype

    def launch(self, pixels: np.ndarray, keys: list[str]) -> PendingBatch:
        """Start encoding. A batch that exceeds the device's memory is split in half, as are later ones of its size.

        Raises:
            FailedError: a single image of this size exceeds the device's memory.
        """
        if pixels.size < self._max_values:
            try:
                return self._launch(pixels, keys)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                self._max_values = pixels.size
        if len(keys) == 1:
            raise FailedError(
                f"the device has too little memory for an image of {pixels.shape[2]}x{pixels.shape[1]} "
                f"px: set cache.tile_above_px: {max(pixels.shape[1:3]) // 2}, or cache.vae_precision: bf16"
            )
        logger.info("batch {} exceeds the device's memory and is split in half", pixels.shape[:3])
        half = len(keys) // 2
        return _SplitBatch(self.launch(pixels[:half], keys[:half]), self.launch(pixels[half:], keys[half:]))

    @torch.inference_mode()
    def _launch(self, pixels: np.ndarray, keys: list[str]) -> "_LaunchedBatch":
        # The permuted view is channels last in memory, which is also the layout of the weights on a GPU.
        images = copy_to_device(torch.from_numpy(pixels), self._device).permute(0, 3, 1, 2)
        images = (images.float() / 127.5 - 1).to(self._dtype)
        parts = self._encode(images, keys, 0)
        if self._flip:
            parts += self._encode(images.flip(3), keys, 1)
        return _LaunchedBatch(parts, self._posterior == "moments", self._flip)

    def _encode(self, images: torch.Tensor, keys: list[str], mirrored: int) -> list[torch.Tensor]:
        # On a CPU a batch of one runs other kernels, which round differently. A batch of two rounds like larger ones.
        alone = len(images) == 1 and images.device.type == "cpu"
        padded = torch.cat([images, images]) if alone else images
        with use_tf32(self._tf32):  # training may have chosen otherwise for this process
            distribution = self._vae.encode(padded).latent_dist
        mean, std = distribution.mean[: len(images)].float(), distribution.std[: len(images)].float()
        if self._posterior == "mean":
            return [mean]
        if self._posterior == "moments":
            return [mean, std]
        # The noise is keyed to the image, so that latents do not depend on the batch or on the number of ranks.
        noise = [_draw_noise(tuple(mean.shape[1:]), derive_seed(mirrored, *key.encode())) for key in keys]
        return [mean + std * copy_to_device(torch.stack(noise), mean.device)]


class HostCopy:
    """Asynchronous copies of tensors to the host; tensors of a CPU are not copied."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._event: torch.cuda.Event | None = None
        self._host = [_start_copy(tensor) for tensor in tensors]
        if any(tensor.is_cuda for tensor in tensors):
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[np.ndarray]:
        """Wait for the copies and return them as arrays."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._host]


def _start_copy(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class _LaunchedBatch:
    """A batch that was launched whole."""

    def __init__(self, parts: list[torch.Tensor], moments: bool, flip: bool):
        self._copy = HostCopy(parts)  # [B, C, h, w] each
        self._moments, self._flip = moments, flip

    def wait(self) -> EncodedBatch:
        parts = iter(self._copy.wait())
        latents = next(parts)
        std = next(parts) if self._moments else None
        flipped = next(parts) if self._flip else None
        flipped_std = next(parts) if self._flip and self._moments else None
        return EncodedBatch(latents, std, flipped, flipped_std)


@dataclass(frozen=True)
class _SplitBatch:
    """A batch that was launched in two parts."""

    first: PendingBatch
    second: PendingBatch

    def wait(self) -> EncodedBatch:
        first, second = self.first.wait(), self.second.wait()
        return EncodedBatch(
            np.concatenate([first.latents, second.latents]),
            _concatenate(first.std, second.std),
            _concatenate(first.flipped, second.flipped),
            _concatenate(first.flipped_std, second.flipped_std),
        )


def _concatenate(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else np.concatenate([first, second])


def _draw_noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build_vae_encoder(cache: CacheConfig, vae: torch.nn.Module, device: torch.device) -> VaeEncoder:
    """Move the VAE to its device and set its precision, memory layout and tiling by the settings."""
    vae = vae.bfloat16() if cache.vae_precision == "bf16" else vae.float()
    vae.to(device)
    if device.type == "cuda":
        # Channels last is cuDNN's faster layout, and that of the pixels.
        vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if cache.tile_above_px:
        enable_tiling(vae, cache.tile_above_px)
    return VaeEncoder(vae, cache.posterior, cache.flip, tf32=cache.vae_precision == "tf32")
