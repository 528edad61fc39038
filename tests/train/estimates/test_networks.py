"""Activations that are counted without values are those that a real forward pass saves, to the byte."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdxl_trainer.cache.models.adaptation import ChannelAdaptation
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.engine import CHECKPOINTING, Checkpointing
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.estimates.flops import count_training_flops
from sdxl_trainer.train.estimates.networks import (
    FlashAttention,
    LiveBytes,
    SavedBytes,
    build_inputs,
    checkpoint_networks,
    count_activations,
    list_held_storages,
    measure_networks,
)
from sdxl_trainer.train.networks.empty_networks import build_empty_run_networks
from sdxl_trainer.train.tiny.build import load_wide_vae

CONFIGS = Path(__file__).parents[3] / "configs"
TINY, SDXL = ModelSource(CONFIGS / "tiny"), ModelSource(CONFIGS / "sdxl")
BUCKET = Size(128, 96)
NETWORKS = {
    "U-Net": "",
    "adapters": "lora.rank=4 optim.text_encoder_2_lr=1e-3",
    "LoHa": "lora.rank=4 lora.kind=loha lora.conv_rank=2",
    "encoders, long captions": "optim.text_encoder_lr=1e-3 optim.text_encoder_2_lr=1e-3 data.max_tokens=150",
    "frozen parts, channels last": 'optim.groups=[{"match":"down_blocks","lr":0}] engine.channels_last=true',
}


def build(words: str) -> Config:
    config, problems = build_config({}, words.split())
    assert problems == []
    return config


@pytest.mark.parametrize("policy", CHECKPOINTING)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("words", NETWORKS.values(), ids=NETWORKS.keys())
def test_the_count_is_that_of_a_real_pass(words: str, precision: str, policy: Checkpointing) -> None:
    """The micro batch of the real pass is 2, because activations grow with it, but not weights that LoHa computes."""
    config, dtype = build(words), torch.float32 if precision == "fp32" else torch.bfloat16
    counted = count_activations(build_empty_run_networks(TINY, config, dtype), config, BUCKET, policy)
    networks = build_empty_run_networks(TINY, config, dtype).to_empty(device="cpu")
    for buffer in networks.buffers():  # such as the numbers of positions
        buffer.zero_()
    checkpoint_networks(networks, policy)
    saved = SavedBytes(list_held_storages(networks))
    with saved.hooks():
        networks(**build_inputs(networks, config, BUCKET, batch_size=2))
    # In bf16 the statistics of layer norms are in bf16 on a CPU, and in fp32 on a GPU and on the meta device.
    tolerance = 0 if precision == "fp32" else 0.005
    assert 0 < saved.total == pytest.approx(2 * counted.kept + counted.fixed_kept, rel=tolerance, abs=0)
    assert (counted.recomputed > 0) == (policy != "off")
    assert (counted.fixed_kept > 0) == ("loha" in words)


def test_sdxl() -> None:
    """Peaks of whole steps on the meta device are those that the phases of the estimate come to, within 3 %."""
    config = build("sample.prompts=[x]")
    sizes = measure_networks(config, SDXL, Size(1024, 1024))
    assert (sizes.num_trained, sizes.frozen, len(sizes.trained)) == (2_567_463_684, 0, 1680)
    assert (sizes.frozen_encoders, sizes.vae) == (123_060_480 + 694_659_840, 83_653_863)
    kept = {policy: counted.kept / 1e9 for policy, counted in sizes.activations.items()}
    assert kept == pytest.approx({"off": 6.889, "selective": 4.697, "full": 0.588}, rel=0.001)
    again = {policy: counted.recomputed / 1e9 for policy, counted in sizes.activations.items()}
    assert again == pytest.approx({"off": 0, "selective": 0.0944, "full": 0.148}, rel=0.01)
    totals = [block.trained for block in sizes.blocks]
    assert len(totals) == 86 and totals[0] == 49_164_800 and sum(totals) == 2_482_161_920
    assert sizes.generation == pytest.approx(3.22e9, rel=0.01)  # of the VAE in fp32; the U-Net needs 0.33 GB


def test_the_estimates_follow_the_channels_of_an_adapted_unet(tmp_path: Path) -> None:
    load_wide_vae(32).save_pretrained(tmp_path)
    config = build(f"model.vae={tmp_path} model.adapt_channels=true sample.prompts=[x] sample.width_px=128")
    adapted = replace(TINY, adaptation=ChannelAdaptation(channels=32, seed=0))
    sizes, plain = measure_networks(config, adapted, BUCKET), measure_networks(build(""), TINY, BUCKET)
    width, more = TINY.read_config("unet")["block_out_channels"][0], 32 - 4
    num_weights = more * (2 * 9 * width + 1)  # conv_in, conv_out, and the bias of conv_out
    assert sizes.num_trained == plain.num_trained + num_weights
    assert sizes.vae == sum(weight.numel() for weight in load_wide_vae(32).parameters()) > plain.vae
    # The input of conv_in is saved in bf16 for the gradient of its weight; the prediction is not saved.
    more_kept = [sizes.activations[name].kept - plain.activations[name].kept for name in CHECKPOINTING]
    assert more_kept == [2 * more * (BUCKET.width // 8) * (BUCKET.height // 8)] * len(CHECKPOINTING)
    assert sizes.generation > 0
    flops, plain_flops = (count_training_flops(source.read_config("unet"), 77) for source in (adapted, TINY))
    added = flops.compute(256) - plain_flops.compute(256)
    assert added == pytest.approx(3 * 2 * more * 2 * 9 * width * 256)


def test_live_bytes_are_counted_until_the_last_view_is_gone() -> None:
    kept = torch.zeros(10, device="meta")
    with LiveBytes([kept.untyped_storage()]) as live:
        first = torch.zeros(100, device="meta")
        view = first[50:]
        del first
        second = torch.zeros(100, device="meta") + 1  # 2 x 400 bytes besides the view's 400
        del view, second
        kept.add_(1)
        torch.zeros(200, device="meta")
    assert live.peak == 1200


def test_attention_of_the_flash_kernel_saves_no_matrix() -> None:
    inputs = [torch.zeros(1, 2, 64, 8, device="meta", requires_grad=True) for _ in range(3)]
    saved = SavedBytes([])
    with saved.hooks(), FlashAttention():
        torch.nn.functional.scaled_dot_product_attention(*inputs)
    assert saved.total == 4 * (4 * 2 * 64 * 8 + 2 * 64)  # queries, keys, values, results, and a number for each query
