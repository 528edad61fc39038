"""Contact sheet: one image of several samples with their captions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.cache.models.vae import load_vae
from sdxl_trainer.configs.schema import ModelConfig
from sdxl_trainer.data.files import open_atomic
from sdxl_trainer.data.images.fonts import Lettering, translate_drawable
from sdxl_trainer.data.index.schema import BadSample
from sdxl_trainer.data.loading.dataset import LatentDataset
from sdxl_trainer.data.loading.loader import iterate_specs
from sdxl_trainer.data.order.plan import Plan, Position

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
    latents: torch.Tensor | None  # [C, h, w] float32; None: not cached yet
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
            assert sample.latents is not None, "a sample has latents or pixels"
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
        text = (
            translate_drawable(f"bad: {sample.bad}") if sample.bad else sample.caption or translate_drawable("(empty)")
        )
        lines = lettering.wrap(f"{place}: {translate_drawable(sample.note)}", CELL_PX, 2)
        lines += lettering.wrap(text, CELL_PX, NUM_LINES + 1 - len(lines))
        for number, line in enumerate(lines):
            lettering.draw(sheet, (left, top + CELL_PX + number * lettering.line_px), line)
    return sheet


def write_sheet(file: Path, decoded: Sequence[tuple[PreviewSample, np.ndarray]]) -> None:
    """Write the contact sheet as a PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(file) as stream:
        draw_sheet(decoded).save(stream, "PNG")


def iterate_samples(dataset: LatentDataset, plan: Plan) -> Iterator[PreviewSample]:
    """Yield the training samples in the order in which the run uses them."""
    for spec in iterate_specs(plan, Position(0, 0), 0, 1, 1):
        batch, row = dataset[spec], dataset.index.row(int(spec.rows[0]))
        caption = dataset.draw_caption(row, spec.step, int(spec.epochs[0]), int(spec.rows[0]))
        left = int(batch.time_ids[0, 3])
        pixels = batch.pending[0].pixels.numpy() if batch.pending else None
        size = f"{row['original_width']}x{row['original_height']} to {spec.bucket[0]}x{spec.bucket[1]}"
        note = f"{size}, crop left {left} top {row['crop_top']}" + (", no latents yet" if batch.pending else "")
        yield PreviewSample(
            key=row["key"],
            caption="" if isinstance(caption, BadSample) else caption.text,
            note=note,
            latents=batch.latents[0],
            pixels=pixels,
            bad=batch.bad[0].reason if batch.bad else None,
        )
