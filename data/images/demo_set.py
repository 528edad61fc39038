"""The demo set: images of coloured shapes with captions, and functions that measure their colour and shape.

A model learns the set in minutes. `nearest_colour` and `nearest_shape` then show whether it paints what a prompt names.
"""

import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from sdxl_trainer.configs.language.arguments import TranslatedParser
from sdxl_trainer.configs.language.translate import translate
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
# The pre-trained tiny SDXL has never seen these; the quick start teaches them.
NEW_SHAPES: tuple[str, ...] = ("heart", "moon")

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
MASK_SIDE_PX = 64  # masks that are compared by shape
MASK_AREA_SIDE_PX = 30.0  # square root of a compared shape's area
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


def draw_demo_set(
    folder: Path,
    num_images: int = 96,
    seed: int = 0,
    shapes: Sequence[str] = SHAPES,
    sizes_px: Sequence[tuple[int, int]] = SIZES_PX,
) -> Path:
    """Write the demo set into folder and return the path of its `metadata.json`.

    The metadata is an object keyed by file stem with `image_path` (relative to folder), `caption` and
    `original_size` (width, height). Equal arguments give equal files.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    sizes_of_images = _shuffled_cycle(sizes_px, num_images, rng)
    formats = _shuffled_cycle(FORMATS, num_images, rng)
    metadata = {}
    for index, (colour, shape, background) in enumerate(_draw_subjects(num_images, shapes, rng)):
        size_px = sizes_of_images[index]
        image = draw_image(COLOURS[colour], shape, BACKGROUNDS[background], size_px, rng)
        suffix, options = formats[index]
        stem = f"{index:04d}_{colour}_{shape}"
        image.save(folder / "images" / f"{stem}{suffix}", **options)
        metadata[stem] = {
            "image_path": f"images/{stem}{suffix}",
            "caption": demo_caption(colour, shape, background),
            "original_size": list(size_px),
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


def nearest_shape(image: np.ndarray) -> str:
    """Return the name of the shape in SHAPES or NEW_SHAPES that an image [H, W, 3] (uint8) shows.

    The function separates the shape from the background, which is the median colour of the border. It moves and scales
    the shape to the same centre and area as each drawn shape, and returns the one with the largest overlap.
    """
    pixels = image.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=2)  # [H, W]
    mask = _normalise_mask(distance > distance.max() / 2)
    overlaps = {}
    for shape in (*SHAPES, *NEW_SHAPES):
        canvas = Image.new("1", (256, 256))
        ImageDraw.Draw(canvas).polygon(_outline(shape, (128, 128), 80), fill=1)
        template = _normalise_mask(np.asarray(canvas))
        overlaps[shape] = (mask & template).sum() / (mask | template).sum()
    return max(overlaps, key=lambda shape: overlaps[shape])


def _normalise_mask(mask: np.ndarray) -> np.ndarray:
    """Move and scale a mask [H, W] to the centre and area that all compared masks have; a mask of that size."""
    rows, columns = np.nonzero(mask)
    scale = math.sqrt(max(1, len(rows))) / MASK_AREA_SIDE_PX  # px of the image for each px of the result
    left = (columns.mean() if len(rows) else 0) - scale * MASK_SIDE_PX / 2
    top = (rows.mean() if len(rows) else 0) - scale * MASK_SIDE_PX / 2
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    size = (MASK_SIDE_PX, MASK_SIDE_PX)
    moved = image.transform(size, Image.Transform.AFFINE, (scale, 0, left, 0, scale, top), Image.Resampling.BILINEAR)
    return np.asarray(moved) > 127


def _draw_subjects(num_images: int, shapes: Sequence[str], rng: random.Random) -> list[tuple[str, str, str]]:
    """Return (colour, shape, background) for each image. Each block of six images has all six colours."""
    subjects: list[tuple[str, str, str]] = []
    scenes = [(shape, background) for shape in shapes for background in BACKGROUNDS]
    while len(subjects) < num_images:
        # Within a round (of 72 images for four shapes) each colour meets each scene once.
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
    if shape in NEW_SHAPES:
        points = _heart_points() if shape == "heart" else _moon_points()
        return [(centre[0] + radius * x, centre[1] + radius * y) for x, y in points]
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join((*SHAPES, *NEW_SHAPES))}")


def _heart_points() -> list[tuple[float, float]]:
    """Return the outline (x, y) of a heart of width 2.2 around (0, 0)."""
    angles = [2 * math.pi * index / 96 for index in range(96)]
    return [
        (
            1.1 * math.sin(angle) ** 3,
            -1.1
            / 16
            * (13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)),
        )
        for angle in angles
    ]


def _moon_points() -> list[tuple[float, float]]:
    """Return the outline (x, y) of a crescent, open to the right, of height 2.3 around (0, 0)."""
    inner_radius, shift = 0.8, 0.45  # of the circle that is cut out of one with radius 1
    corner_x = (1 - inner_radius**2 + shift**2) / (2 * shift)
    outer = math.acos(corner_x)
    inner = math.acos((corner_x - shift) / inner_radius)
    shares = [index / 47 for index in range(48)]
    outside = [outer + share * (2 * math.pi - 2 * outer) for share in shares]
    inside = [2 * math.pi - inner - share * (2 * math.pi - 2 * inner) for share in shares]
    points = [(math.cos(angle), math.sin(angle)) for angle in outside]
    points += [(shift + inner_radius * math.cos(angle), inner_radius * math.sin(angle)) for angle in inside]
    return [(1.15 * (x + 0.3), 1.15 * y) for x, y in points]


def _polygon(centre: tuple[float, float], radii: Sequence[float], start: float) -> list[tuple[float, float]]:
    """Return len(radii) corners at equal angles around centre, the first `start` radians clockwise from the top."""
    angles = [start + 2 * math.pi * index / len(radii) for index in range(len(radii))]
    return [
        (centre[0] + radius * math.sin(angle), centre[1] - radius * math.cos(angle))
        for angle, radius in zip(angles, radii, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: draw the demo set into a folder."""
    parser = TranslatedParser(prog="python -m sdxl_trainer.data.demo", description="Draw the demo set.")
    parser.add_argument("--out", type=parse_path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--num-images", type=parse_count, default=96, metavar="N", help="number of images (96)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="random seed; equal seeds give equal files (0)"
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=(*SHAPES, *NEW_SHAPES),
        default=SHAPES,
        metavar="SHAPE",
        help=f"shapes to draw, of {', '.join((*SHAPES, *NEW_SHAPES))} (the first four)",
    )
    options = parser.parse_args(arguments)
    path = draw_demo_set(options.out, options.num_images, options.seed, options.shapes)
    sys.stdout.write(f"{translate(f'{options.num_images} images, metadata in {path}')}\n")
