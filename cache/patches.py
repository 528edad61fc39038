"""Every use of a library's undocumented parts in the cache folder, each with its version and reason."""

from typing import Any

from sdxl_trainer.data.formats.latents import VAE_FACTOR

TILING_ATTRIBUTES = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")


def enable_tiling(vae: Any, tile_px: int) -> None:
    """Let diffusers' VAE encode images with a side above `tile_px` in overlapping, blended tiles of that side.

    Written for diffusers 0.42.1, whose `AutoencoderKL.enable_tiling` takes no arguments: the tile size is always the
    config's `sample_size`. The two attributes set here hold that size in pixels and in latents. Overriding
    `sample_size` when the VAE is loaded would be public, but it also changes the config that exports write.

    Raises:
        AttributeError: the installed diffusers keeps the tile size elsewhere.
    """
    missing = [name for name in TILING_ATTRIBUTES if not hasattr(vae, name)]
    if missing:
        raise AttributeError(f"{type(vae).__name__} has no {', '.join(missing)}; install diffusers 0.42.1")
    vae.tile_sample_min_size = tile_px
    vae.tile_latent_min_size = tile_px // VAE_FACTOR
    vae.enable_tiling()
