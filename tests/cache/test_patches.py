"""The undocumented parts of libraries that cache/patches.py uses still exist and are still needed."""

import inspect

import pytest
import torch
from diffusers import AutoencoderKL

from sdxl_trainer.cache.patches import TILING_ATTRIBUTES, enable_tiling


@pytest.fixture
def vae() -> AutoencoderKL:
    """Build a VAE with SDXL's factor of 8 and few channels."""
    blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    channels = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "layers_per_block": 1}
    built = AutoencoderKL(down_block_types=blocks[0], up_block_types=blocks[1], sample_size=64, **channels)
    return built.eval().requires_grad_(False)


def test_diffusers_still_keeps_the_tile_size_in_attributes(vae):
    assert {name: getattr(vae, name) for name in TILING_ATTRIBUTES} == dict(
        zip(TILING_ATTRIBUTES, (False, 64, 8), strict=True)
    )
    # Once `enable_tiling` takes the tile size, the patch should pass it instead of setting attributes.
    assert list(inspect.signature(AutoencoderKL.enable_tiling).parameters) == ["self"]


def test_tiles_have_the_wanted_size(vae):
    enable_tiling(vae, 32)
    assert [getattr(vae, name) for name in TILING_ATTRIBUTES] == [True, 32, 4]
    sizes = []
    vae.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    latents = vae.encode(torch.zeros(1, 3, 64, 48)).latent_dist.mean
    assert latents.shape == (1, 4, 8, 6)
    assert len(sizes) == 6 and max(max(size) for size in sizes) == 32
    sizes.clear()
    vae.encode(torch.zeros(1, 3, 32, 32))
    assert sizes == [(32, 32)]


def test_a_vae_without_these_attributes_is_refused():
    with pytest.raises(AttributeError, match="Linear has no use_tiling, tile_sample_min_size, tile_latent_min_size"):
        enable_tiling(torch.nn.Linear(1, 1), 32)
