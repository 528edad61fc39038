"""Gradient checkpointing keeps fewer activations and changes no gradient, not by a bit."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.engine import CHECKPOINTING, EngineConfig
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.launch.distributed import init_ranks
from sdxl_trainer.train.engine.deepspeed_config import DTYPES, BatchSizes
from sdxl_trainer.train.engine.engine import Engine
from sdxl_trainer.train.estimates.networks import build_inputs, checkpoint_networks
from sdxl_trainer.train.networks.checkpointing import set_checkpointing
from sdxl_trainer.train.networks.empty_networks import build_empty_run_networks
from sdxl_trainer.train.networks.trained_networks import TrainedNetworks
from sdxl_trainer.train.optim.optimizers import build_optimizer
from sdxl_trainer.train.tiny.build import build_tiny_unet

TINY = ModelSource(Path(__file__).parents[3] / "configs" / "tiny")
BUCKET = Size(128, 96)
CASES = {
    "U-Net": ["engine.precision=bf16"],
    "adapters": ["lora.rank=4", "optim.text_encoder_2_lr=1e-3"],
    "encoders": ["optim.text_encoder_lr=1e-3", "optim.text_encoder_2_lr=1e-3"],
    "frozen parts, channels last": ['optim.groups=[{"match":"down_blocks","lr":0}]', "engine.channels_last=true"],
}


def build_networks(words: list[str]) -> tuple[TrainedNetworks, dict[str, Any]]:
    """Build the networks of a run on the CPU with random weights, and inputs of a micro batch of 2."""
    config, problems = build_config({}, ["engine.precision=fp32", *words])
    assert problems == []
    networks = build_empty_run_networks(TINY, config, DTYPES[config.engine.precision]).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    for name, weight in networks.named_parameters():
        is_norm = weight.dim() == 1 and name.endswith("weight")
        weight.data.normal_(1.0 if is_norm else 0.0, 0.05, generator=generator)
    for buffer in networks.buffers():
        buffer.zero_()
    inputs = build_inputs(networks, config, BUCKET, batch_size=2)
    inputs["x_t"].normal_(generator=generator)
    return networks, inputs


@pytest.mark.parametrize("words", CASES.values(), ids=CASES.keys())
def test_gradients_are_equal_to_the_bit(words: list[str]) -> None:
    networks, inputs = build_networks(words)
    results = []
    for policy in CHECKPOINTING:
        checkpoint_networks(networks, policy)
        networks.zero_grad()
        prediction = networks(**inputs)
        prediction.float().square().mean().backward()
        gradients = [weight.grad.flatten() for weight in networks.parameters() if weight.grad is not None]
        results.append(torch.cat([prediction.flatten(), *gradients]))
    assert all(torch.equal(values, results[0]) for values in results[1:])
    assert results[0].isfinite().all() and results[0].abs().sum() > 0


def test_selective_repeats_neither_convolutions_nor_matrix_products() -> None:
    unet: Any = build_tiny_unet()
    regions, repeated = [], []

    def run(function: Any, *inputs: torch.Tensor) -> torch.Tensor:
        regions.append(function)
        return checkpoint(function, *inputs, use_reentrant=False)

    set_checkpointing(unet, "selective", run)
    loss = predict(unet).square().mean()
    for layer in unet.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d | torch.nn.GroupNorm):
            layer.register_forward_hook(lambda layer, *_: repeated.append(type(layer).__name__))
    loss.backward()
    blocks = Counter(type(block).__name__ for block in unet.modules())
    assert len(regions) == 2 * blocks["ResnetBlock2D"] + blocks["BasicTransformerBlock"]
    assert repeated == ["GroupNorm"] * 2 * blocks["ResnetBlock2D"]
    set_checkpointing(unet, "off")
    number = len(regions)
    predict(unet)
    assert len(regions) == number


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_update_alike(stage: int) -> None:
    """ZeRO 3 gathers weights by hooks of the layers; a repetition calls these again, and may end within a layer."""
    init_ranks()
    weights = []
    for policy in CHECKPOINTING:
        torch.manual_seed(0)
        config = EngineConfig(zero_stage=stage, gradient_checkpointing=policy)
        net = Loss(torch.nn.Module.to(build_small_unet(), torch.bfloat16))
        set_checkpointing(net.unet, policy)
        optimizer = build_optimizer([{"params": list(net.parameters()), "lr_scale": 1.0}], OptimConfig(), config)
        engine = Engine(net, optimizer, config, BatchSizes(2, 2, 1), 1.0)
        for _ in range(2):
            engine.set_lr(1e-3)
            engine.backward(engine())
            assert engine.step()
        weights.append(torch.cat([engine.weights.gather(name).flatten() for name in engine.weights.trained_names]))
    assert all(torch.equal(values, weights[0]) for values in weights[1:])


def build_small_unet() -> Any:
    """Build a U-Net of two levels with a block each, because ZeRO 3 takes long for many layers."""
    from diffusers import UNet2DConditionModel

    levels = {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [2, 4],
        "transformer_layers_per_block": [1, 1],
        "layers_per_block": 1,
    }
    return UNet2DConditionModel.from_config({**TINY.read_config("unet"), **levels})


class Loss(torch.nn.Module):
    """The mean square of a U-Net's prediction for fixed inputs."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self) -> torch.Tensor:
        return predict(self.unet).float().square().mean()


def predict(unet: Any) -> torch.Tensor:
    """Return the prediction [2, 4, 8, 12] for fixed inputs."""
    config, dtype, generator = unet.config, unet.dtype, torch.Generator().manual_seed(0)
    pooled = torch.ones(2, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
    x_t = torch.randn(2, 4, 8, 12, generator=generator).to(dtype)
    hidden = torch.randn(2, 7, config.cross_attention_dim, generator=generator).to(dtype)
    conditions = {"text_embeds": pooled.to(dtype), "time_ids": torch.ones(2, 6)}
    return unet(x_t, torch.tensor([3, 700]), hidden, added_cond_kwargs=conditions).sample
