"""Settings that change the execution of the U-Net but not its results."""

from pathlib import Path

import torch

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.train.networks.trained_networks import load_unet


def test_checkpointing_and_channels_last_do_not_change_results(tiny_folder: Path) -> None:
    source, generator = ModelSource(tiny_folder / "model"), torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 4, 8, 8, generator=generator)
    results, layouts = [], []
    for settings in ({}, {"gradient_checkpointing": True}, {"channels_last": True}):
        unet = load_unet(source, EngineConfig(**settings))
        config = unet.config
        hidden = torch.randn(2, 7, config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
        pooled = torch.ones(2, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
        seen = []
        conv = unet.down_blocks[1].resnets[1].conv2
        conv.register_forward_pre_hook(lambda layer, inputs, seen=seen: seen.append(inputs[0]))
        conditions = {"text_embeds": pooled, "time_ids": torch.ones(2, 6)}
        prediction = unet(x_t, torch.tensor([3, 700]), hidden, added_cond_kwargs=conditions).sample
        prediction.square().mean().backward()
        layouts.append((len(seen), seen[0].is_contiguous(memory_format=torch.channels_last)))
        gradients = (parameter.grad.flatten() for parameter in unet.parameters())
        results.append(torch.cat([prediction.flatten(), *gradients]))
    assert layouts == [(1, False), (2, False), (1, True)]  # checkpointing repeats the forward pass in the backward pass
    for values in results[1:]:
        torch.testing.assert_close(values, results[0], rtol=1e-4, atol=1e-6)
