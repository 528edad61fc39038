"""Guidance, the noise that an image starts from, and the precision between the steps."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from programs import TINY

from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.networks.conditioning import TextEmbeddings
from sdxl_trainer.train.sampling.guidance import GuidedPrediction, guide
from sdxl_trainer.train.sampling.pipeline import ImageGenerator
from sdxl_trainer.train.sampling.prompts import Prompt

SHAPE = (1, 4, 8, 12)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guidance_is_that_of_diffusers(rescale: float) -> None:
    negative, positive = draw(1), draw(2)
    guided = negative + 6 * (positive - negative)
    expected = rescale_noise_cfg(guided, positive, rescale)
    torch.testing.assert_close(guide(negative, positive, 6.0, rescale), expected, rtol=1e-6, atol=1e-6)
    assert guide(negative, positive, 6.0, 1.0).std().item() == pytest.approx(positive.std().item(), rel=1e-5)


@torch.no_grad()
def test_a_unet_in_bf16_is_combined_in_fp32_with_the_sizes_of_an_uncropped_image() -> None:
    unet: Any = UNet2DConditionModel.from_config(json.loads((TINY / "unet" / "config.json").read_text()))
    unet.to(torch.bfloat16)
    width = unet.config.cross_attention_dim
    pooled = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
    texts = [TextEmbeddings(draw(n, 1, 77, width).bfloat16(), draw(n, 1, pooled).bfloat16()) for n in (1, 2)]
    calls: list[int] = []

    def predict(negative: TextEmbeddings | None) -> torch.Tensor:
        guided = GuidedPrediction(
            unet=unet,
            dtype=torch.bfloat16,
            positive=texts[0],
            negative=negative,
            size=Size(96, 64),
            scale=6.0,
            rescale=0.0,
            break_off_if_stopped=lambda: calls.append(1),
        )
        return guided(draw(3), torch.tensor([500.0]))

    time_ids = torch.tensor([[64.0, 96.0, 0.0, 0.0, 64.0, 96.0]])
    alone = [
        unet(
            draw(3).bfloat16(),
            500,
            text.hidden,
            added_cond_kwargs={"text_embeds": text.pooled, "time_ids": time_ids},
        ).sample.float()
        for text in texts
    ]
    assert predict(None).dtype == predict(texts[1]).dtype == torch.float32 and calls == [1, 1]
    torch.testing.assert_close(predict(None), alone[0], rtol=0, atol=1e-2)
    torch.testing.assert_close(predict(texts[1]), alone[1] + 6 * (alone[0] - alone[1]), rtol=0, atol=8e-2)


@pytest.mark.parametrize("sampler", ["euler", "euler_a"])
def test_noise_is_drawn_on_the_cpu_in_fp32_from_the_seed(sampler: str) -> None:
    """ComfyUI's noise: torch.randn of [1, C, h, w] in fp32 from a CPU generator with the seed."""
    from sdxl_trainer.cache.models.source import ModelSource

    absent: Any = None
    generator = ImageGenerator(
        unet=SimpleNamespace(device=torch.device("cpu")),
        vae=absent,
        conditioner=absent,
        tokenizers=absent,
        source=ModelSource(TINY.parent / "sdxl"),
        objective=ObjectiveConfig(),
        latent_statistics=absent,
        max_tokens=75,
        weighted=False,
        dtype=torch.bfloat16,
    )
    prompt = Prompt(
        text="",
        negative="",
        width_px=96,
        height_px=64,
        num_inference_steps=4,
        guidance_scale=1.0,
        seed=7,
        sampler=sampler,
        schedule_type="normal",
    )
    inputs: list[torch.Tensor] = []

    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        inputs.append(x)
        return torch.zeros_like(x)

    x0 = generator.sample(predict, SHAPE, prompt)
    assert {values.dtype for values in (*inputs, x0)} == {torch.float32} and len(inputs) == 4
    torch.testing.assert_close(inputs[0], draw(7), rtol=0, atol=1e-5)
    assert torch.equal(generator.sample(predict, SHAPE, prompt), x0)  # a sampler's own noise has the seed too
