"""Draws images from prompts, through diffusers' own SDXL pipeline. Touches no global random state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.schema import Config, ModelConfig
from sdxl_trainer.data.text.tokens import Tokenizers
from sdxl_trainer.launch.distributed import Ranks, gather_objects
from sdxl_trainer.train.networks.conditioning import TextConditioner
from sdxl_trainer.train.objective.objective import resolve_latent_statistics
from sdxl_trainer.train.sampling.prompts import Prompt


@dataclass(frozen=True)
class ImageGenerator:
    """The networks that draw images, and what the settings say of them."""

    unet: Any
    vae: Any
    conditioner: TextConditioner
    tokenizers: Tokenizers
    source: ModelSource
    config: Config
    dtype: torch.dtype  # of the U-Net

    def generate(self, prompt: Prompt) -> Image.Image:
        """One image. Its noise is drawn on the CPU, and so is the same on any device."""
        pipeline = build_pipeline(self.unet, self.vae, self.source, self.config, prompt.scheduler)
        hidden, pooled = self._encode(prompt.text)
        negative_hidden, negative_pooled = self._encode(prompt.negative)
        x0 = pipeline(
            prompt_embeds=hidden,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=negative_hidden,
            negative_pooled_prompt_embeds=negative_pooled,
            width=prompt.width_px,
            height=prompt.height_px,
            num_inference_steps=prompt.num_inference_steps,
            guidance_scale=prompt.guidance_scale,
            generator=torch.Generator().manual_seed(prompt.seed),
            output_type="latent",
        ).images
        pixels = decode_latents(self.vae, x0, self.config.model)
        return pipeline.image_processor.postprocess(pixels)[0]

    def _encode(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden [1, 75·windows + 2, C], pooled [1, P]), in as many windows as captions have in training."""
        device, max_tokens = next(self.conditioner.encoders.encoder.parameters()).device, self.config.data.max_tokens
        ids, ids_2 = (
            torch.from_numpy(tokenizer.encode(text, max_tokens))[None].to(device) for tokenizer in self.tokenizers
        )
        hidden, pooled = self.conditioner.encode(ids, ids_2)
        return hidden.to(self.dtype), pooled.to(self.dtype)


def decode_latents(vae: Any, x0: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Pixels [B, 3, H, W], -1 to 1, of what a U-Net has drawn, [B, 4, h, w], by the VAE in its own precision.

    diffusers' pipeline would hand a VAE in fp32, the precision that SDXL's needs, the latents of a U-Net in bf16.
    """
    mean, scale = (values.to(x0.device).view(1, -1, 1, 1) for values in resolve_latent_statistics(model, vae.config))
    return vae.decode(x0.to(vae.dtype) / scale + mean, return_dict=False)[0]


def generate_images(
    generator: ImageGenerator, prompts: Sequence[Prompt], ranks: Ranks, in_step: bool = False
) -> list[Image.Image]:
    """Every prompt's image, drawn by the ranks together; on every rank, in the order of the prompts."""
    mine = assign_prompts(prompts, ranks.rank, ranks.world_size, in_step)
    images: dict[int, Image.Image] = {}
    for part in gather_objects({number: generator.generate(prompts[number]) for number in mine}):
        images |= part
    return [images[number] for number in range(len(prompts))]


def assign_prompts(prompts: Sequence[Prompt], rank: int, world_size: int, in_step: bool) -> list[int]:
    """The numbers of the prompts that a rank draws.

    Args:
        in_step: each forward pass is a collective (ZeRO-3), so all ranks must make equally many at a time. Prompts that
            take as many are shared out together, and where they do not divide evenly some are drawn twice.
    """
    if not in_step:
        return list(range(rank, len(prompts), world_size))
    groups: dict[tuple[int, str], list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault((prompt.num_inference_steps, prompt.scheduler), []).append(number)
    return [
        numbers[(rank + start) % len(numbers)]
        for numbers in groups.values()
        for start in range(0, len(numbers), world_size)
    ]


def build_pipeline(unet: Any, vae: Any, source: ModelSource, config: Config, scheduler: str = "euler") -> Any:
    """diffusers' SDXL pipeline around networks that are loaded already, without text encoders."""
    from diffusers import StableDiffusionXLPipeline

    from sdxl_trainer.train.sampling.samplers import build_scheduler

    absent: Any = None  # text comes encoded
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        scheduler=build_scheduler(source, config.objective, scheduler),
        text_encoder=absent,
        text_encoder_2=absent,
        tokenizer=absent,
        tokenizer_2=absent,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
