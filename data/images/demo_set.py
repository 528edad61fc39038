"""The demo set: images of coloured shapes with captions, and a function that measures their colour.

A model learns the set in minutes. `nearest_colour` then shows whether it paints the colour that a prompt names.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from sdxl_trainer.configs.paths import parse_path
from sdxl_trainer.configs.problems import parse_count

T = TypeVar("T")
Colour = tuple[int, int, int]

# Near the six chromatic corners of the RGB cube, so that no two are close in any colour space.
COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (45, 65, 225),
    "yellow": (240, 215, 40),
    "cyan": (40, 205, 225),
    "magenta": (215, 50, 205),
}
BACKGROUNDS: dict[str, Colour] = {"white": (245, 245, 245), "black": (15, 15, 15), "grey": (128, 128, 128)}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star")

# (width, height) in px, near 128² px of area; no multiples of 32, as in real sets. They fall into the buckets 128×128,
# 160×96, 96×160 and 192×64 of kohya's list for 128² in steps of 32.
SIZES_PX: tuple[tuple[int, int], ...] = (
    (128, 128),
    (144, 144),
    (120, 136),
    (160, 96),
    (176, 104),
    (96, 160),
    (104, 168),
    (192, 72),
)
FORMATS: tuple[tuple[str, dict[str, Any]], ...] = (
    (".jpg", {"quality": 95, "subsampling": 0}),
    (".png", {}),
    (".webp", {"quality": 95}),
)
SUPERSAMPLING = 4  # Pillow draws polygons with hard edges; drawing large and shrinking smooths them
CHROMATIC_SHARE = 0.05  # less than the smallest shape's share of its image, so that no background is measured


def demo_caption(colour: str, shape: str, background: str) -> str:
    """Return the caption of one image: "a red circle on a white background"."""
    return f"a {colour} {shape} on a {background} background"


def draw_image(
    colour: Colour, shape: str, background: Colour, size_px: tuple[int, int], rng: random.Random
) -> Image.Image:
    """Draw one shape near the centre of an image of size_px = (width, height). `rng` varies its position and size."""
    width, height = (side * SUPERSAMPLING for side in size_px)
    radius = min(width, height) * rng.uniform(0.30, 0.38)
    centre = (
        width / 2 + min(width, height) * rng.uniform(-0.04, 0.04),
        height / 2 + min(width, height) * rng.uniform(-0.04, 0.04),
    )
    image = Image.new("RGB", (width, height), background)
    ImageDraw.Draw(image).polygon(_outline(shape, centre, radius), fill=colour)
    return image.resize(size_px, Image.Resampling.BOX)


def draw_demo_set(folder: Path, num_images: int = 96, seed: int = 0) -> Path:
    """Write the demo set into folder and return the path of its `metadata.json`.

    The metadata is an object keyed by file stem with `image_path` (relative to folder), `caption` and
    `original_size` (width, height). Equal seeds give equal files.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    sizes_px = _shuffled_cycle(SIZES_PX, num_images, rng)
    formats = _shuffled_cycle(FORMATS, num_images, rng)
    metadata = {}
    for index, (colour, shape, background) in enumerate(_draw_subjects(num_images, rng)):
        image = draw_image(COLOURS[colour], shape, BACKGROUNDS[background], sizes_px[index], rng)
        suffix, options = formats[index]
        stem = f"{index:04d}_{colour}_{shape}"
        image.save(folder / "images" / f"{stem}{suffix}", **options)
        metadata[stem] = {
            "image_path": f"images/{stem}{suffix}",
            "caption": demo_caption(colour, shape, background),
            "original_size": list(sizes_px[index]),
        }
    path = folder / "metadata.json"
    path.write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    return path


def nearest_colour(image: np.ndarray) -> str:
    """Return the name of the colour in COLOURS that an image [H, W, 3] (uint8, or float 0..1) shows.

    The function averages the most chromatic pixels (largest max − min over RGB) and returns the colour nearest to that
    mean in RGB.
    """
    pixels = image.reshape(-1, 3).astype(np.float64)  # [H·W, 3]
    if np.issubdtype(image.dtype, np.floating):
        pixels = pixels * 255
    num_pixels = max(1, round(len(pixels) * CHROMATIC_SHARE))
    chroma = pixels.max(axis=1) - pixels.min(axis=1)  # [H·W]
    mean = pixels[np.argsort(chroma, kind="stable")[-num_pixels:]].mean(axis=0)  # [3]
    return min(COLOURS, key=lambda name: float(np.square(mean - COLOURS[name]).sum()))


def _draw_subjects(num_images: int, rng: random.Random) -> list[tuple[str, str, str]]:
    """Return (colour, shape, background) for each image. Each block of six images has all six colours."""
    subjects: list[tuple[str, str, str]] = []
    scenes = [(shape, background) for shape in SHAPES for background in BACKGROUNDS]
    while len(subjects) < num_images:
        # Within a round of 72 images each colour meets each scene once.
        orders = [rng.sample(scenes, len(scenes)) for _ in COLOURS]
        for scenes_of_block in zip(*orders, strict=True):
            block = [(colour, *scene) for colour, scene in zip(COLOURS, scenes_of_block, strict=True)]
            subjects.extend(rng.sample(block, len(block)))
    return subjects[:num_images]


def _shuffled_cycle(items: Sequence[T], num_items: int, rng: random.Random) -> list[T]:
    """Return num_items items in cycles, each of which holds every item once in random order."""
    cycle: list[T] = []
    while len(cycle) < num_items:
        cycle.extend(rng.sample(items, len(items)))
    return cycle[:num_items]


def _outline(shape: str, centre: tuple[float, float], radius: float) -> list[tuple[float, float]]:
    """Return the corners (x, y) of an upright shape around centre, of about the given radius."""
    if shape == "square":
        return _polygon(centre, [radius * 1.2] * 4, math.pi / 4)
    if shape == "triangle":
        return _polygon((centre[0], centre[1] + radius * 0.2), [radius * 1.15] * 3, 0.0)
    if shape == "star":
        return _polygon(centre, [radius * 1.15, radius * 0.55] * 5, 0.0)
    if shape == "circle":
        return _polygon(centre, [radius] * 96, 0.0)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def _polygon(centre: tuple[float, float], radii: Sequence[float], start: float) -> list[tuple[float, float]]:
    """Return len(radii) corners at equal angles around centre, the first `start` radians clockwise from the top."""
    angles = [start + 2 * math.pi * index / len(radii) for index in range(len(radii))]
    return [
        (centre[0] + radius * math.sin(angle), centre[1] - radius * math.cos(angle))
        for angle, radius in zip(angles, radii, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: draw the demo set into a folder."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_trainer.data.demo", description="Draw the demo set.")
    parser.add_argument("--out", type=parse_path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--num-images", type=parse_count, default=96, metavar="N", help="number of images (96)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="random seed; equal seeds give equal files (0)"
    )
    options = parser.parse_args(arguments)
    path = draw_demo_set(options.out, options.num_images, options.seed)
    sys.stdout.write(f"{options.num_images} images, metadata in {path}\n")
