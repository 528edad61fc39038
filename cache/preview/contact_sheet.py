"""Contact sheet: one image of several samples with their captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdxl_trainer.cache.models.encoders import load_vae
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.schema import ModelConfig
from sdxl_trainer.data.images.fonts import Lettering

CELL_PX = 320
GAP_PX = 8
FONT_PX = 12
NUM_LINES = 5  # lines of a caption
COLUMNS = 4


@dataclass(frozen=True)
class PreviewSample:
    """One sample of the contact sheet: its latents or, if they are not cached yet, its pixels; and its texts."""

    key: str
    caption: str
    note: str  # sizes and crop
    latents: torch.Tensor  # [4, h, w] float32
    pixels: np.ndarray | None  # [H, W, 3] uint8 of an image without cached latents
    bad: str | None  # reason why training skips the sample


def decode_samples(
    samples: Sequence[PreviewSample], source: ModelSource, model: ModelConfig
) -> list[tuple[PreviewSample, np.ndarray]]:
    """Return each sample with its pixels [H, W, 3] uint8. The VAE is loaded only if there are latents to decode."""
    vae: Any = None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoded = []
    for sample in samples:
        pixels = sample.pixels
        if sample.bad:
            pixels = np.full((CELL_PX, CELL_PX, 3), 160, np.uint8)
        elif pixels is None:
            vae = vae or load_vae(source, model).to(device)
            with torch.inference_mode():
                image = vae.decode(sample.latents[None].to(device)).sample[0]  # [3, H, W], -1 to 1
            pixels = ((image.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        decoded.append((sample, pixels))
    return decoded


def draw_sheet(decoded: Sequence[tuple[PreviewSample, np.ndarray]]) -> Image.Image:
    """Draw the samples in rows, each scaled into a square cell with its number, sizes and caption below."""
    lettering = Lettering(FONT_PX)
    height = CELL_PX + (NUM_LINES + 1) * lettering.line_px
    columns = min(COLUMNS, len(decoded))
    rows = -(-len(decoded) // columns)
    sheet = Image.new("RGB", (columns * (CELL_PX + GAP_PX) + GAP_PX, rows * (height + GAP_PX) + GAP_PX), "white")
    for place, (sample, pixels) in enumerate(decoded):
        left = GAP_PX + place % columns * (CELL_PX + GAP_PX)
        top = GAP_PX + place // columns * (height + GAP_PX)
        image = Image.fromarray(pixels)
        scale = CELL_PX / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        sheet.paste(image, (left + (CELL_PX - image.width) // 2, top + (CELL_PX - image.height) // 2))
        text = f"bad: {sample.bad}" if sample.bad else sample.caption or "(empty)"
        lines = lettering.wrap(f"{place}: {sample.note}", CELL_PX, 1) + lettering.wrap(text, CELL_PX, NUM_LINES)
        for number, line in enumerate(lines):
            lettering.draw(sheet, (left, top + CELL_PX + number * lettering.line_px), line)
    return sheet
