"""Draws pictures from fixed prompts with the live model, through diffusers' own SDXL pipeline."""

from pathlib import Path
from typing import Any

import torch
from loguru import logger
from PIL import Image

from sdxl_trainer.cache.encoders import load_vae
from sdxl_trainer.cache.model_source import ModelSource
from sdxl_trainer.configs.schema import Config, SampleConfig
from sdxl_trainer.data.files import open_atomic
from sdxl_trainer.data.tokens import WINDOW, CaptionTokenizer
from sdxl_trainer.launch.distributed import Ranks, gather_objects
from sdxl_trainer.train.conditioning import TextConditioner
from sdxl_trainer.train.engine import Engine


def draw_samples(
    folder: Path,
    engine: Engine,
    conditioner: TextConditioner,
    tokenizers: tuple[CaptionTokenizer, CaptionTokenizer],
    source: ModelSource,
    config: Config,
    ranks: Ranks,
    step: int,
) -> Path:
    """Draw every prompt once, the prompts spread over the ranks, and write each picture and their grid.

    All ranks call it together: under ZeRO-3 each forward pass is a collective, so every rank draws equally many
    pictures, some of them twice when the prompts do not divide evenly. No global random state is touched.

    Returns:
        The grid's path.
    """
    settings = config.sample
    engine.model.eval()
    pipeline = build_pipeline(engine.model.unet, load_vae(source, config.model).to(ranks.device), source, config)
    rounds = -(-len(settings.prompts) // ranks.world_size)
    mine = [(ranks.rank + number * ranks.world_size) % len(settings.prompts) for number in range(rounds)]
    drawn = {number: draw_picture(pipeline, conditioner, tokenizers, settings, number, engine.dtype) for number in mine}
    engine.model.train()
    pictures: dict[int, Image.Image] = {}
    for part in gather_objects(drawn):
        pictures |= part
    grid = folder / f"step-{step:08d}.png"
    if ranks.is_main:
        for number, picture in sorted(pictures.items()):
            write_picture(folder / f"step-{step:08d}" / f"{number:03d}.png", picture)
        write_picture(grid, make_grid([pictures[number] for number in range(len(settings.prompts))]))
        logger.info("samples {}", grid)
    return grid


def build_pipeline(unet: Any, vae: Any, source: ModelSource, config: Config) -> Any:
    """diffusers' SDXL pipeline around networks that are loaded already, without text encoders."""
    from diffusers import StableDiffusionXLPipeline

    from sdxl_trainer.train.samplers import build_scheduler, set_latent_statistics

    absent: Any = None  # text comes encoded
    set_latent_statistics(vae, config.model)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        scheduler=build_scheduler(source, config.objective),
        text_encoder=absent,
        text_encoder_2=absent,
        tokenizer=absent,
        tokenizer_2=absent,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_picture(
    pipeline: Any,
    conditioner: TextConditioner,
    tokenizers: tuple[CaptionTokenizer, CaptionTokenizer],
    settings: SampleConfig,
    number: int,
    dtype: torch.dtype,
) -> Image.Image:
    """Draw prompt `number`, its noise seeded with `sample.seed + number` on the CPU and so the same on any device."""
    hidden, pooled = encode_prompt(conditioner, tokenizers, settings.prompts[number], dtype)
    negative_hidden, negative_pooled = encode_prompt(conditioner, tokenizers, settings.negative_prompt, dtype)
    generator = torch.Generator().manual_seed(settings.seed + number)
    return pipeline(
        prompt_embeds=hidden,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative_hidden,
        negative_pooled_prompt_embeds=negative_pooled,
        width=settings.width_px,
        height=settings.height_px,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=generator,
    ).images[0]


def encode_prompt(
    conditioner: TextConditioner, tokenizers: tuple[CaptionTokenizer, CaptionTokenizer], prompt: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden [1, 77, C], pooled [1, P]) of one prompt."""
    device = next(conditioner.encoder.parameters()).device
    ids, ids_2 = (torch.from_numpy(tokenizer.encode(prompt, WINDOW))[None].to(device) for tokenizer in tokenizers)
    hidden, pooled = conditioner.encode(ids, ids_2)
    return hidden.to(dtype), pooled.to(dtype)


def make_grid(pictures: list[Image.Image], gap_px: int = 4) -> Image.Image:
    """Pictures of one size side by side, about as many columns as rows."""
    columns = -(-len(pictures) // max(1, int(len(pictures) ** 0.5)))
    rows = -(-len(pictures) // columns)
    width, height = pictures[0].size
    grid = Image.new("RGB", (columns * (width + gap_px) - gap_px, rows * (height + gap_px) - gap_px), "white")
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % columns * (width + gap_px), number // columns * (height + gap_px)))
    return grid


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file:
        picture.save(file, "PNG")
