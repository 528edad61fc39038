"""Image grids: images of one step, a strip over all steps, first and last step compared, and contact sheets."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from sdxl_trainer.data.files import open_atomic

GAP_PX = 4
LABEL_PX = 14  # height of a line of text
LABEL_LINES = 3
STRIP_SIDE_PX = 256  # longest side of an image in a strip or comparison
PANEL_GAP_PX = 32  # between the two steps of a comparison
MAX_COLUMNS = 16


def build_image_grid(images: Sequence[Image.Image], columns: int = 0, labels: Sequence[str] = ()) -> Image.Image:
    """Place images in rows, each centred in a cell of the largest image's size.

    Args:
        columns: images per row; 0 makes the grid about square.
        labels: text under each image, truncated after three lines.
    """
    columns = columns or -(-len(images) // max(1, int(len(images) ** 0.5)))
    width = max(image.width for image in images)
    tallest = max(image.height for image in images)
    height = tallest + (LABEL_LINES * LABEL_PX if labels else 0)
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + GAP_PX) - GAP_PX, rows * (height + GAP_PX) - GAP_PX), "white")
    for number, image in enumerate(images):
        left, top = number % columns * (width + GAP_PX), number // columns * (height + GAP_PX)
        grid.paste(image, (left + (width - image.width) // 2, top + (tallest - image.height) // 2))
        if labels:
            draw_label(grid, labels[number], (left, top + tallest), width)
    return grid


def draw_label(grid: Image.Image, text: str, top_left: tuple[int, int], width_px: int) -> None:
    """Draw a label on a grid, wrapped to a width and truncated after three lines."""
    lines = textwrap.wrap(text, max(8, width_px // 6))
    if len(lines) > LABEL_LINES:
        lines = [*lines[: LABEL_LINES - 1], lines[LABEL_LINES - 1] + " ..."]
    # The default font has no letters beyond Latin-1; Pillow would draw boxes for them or raise.
    latin_text = "\n".join(lines).encode("latin-1", "replace").decode("latin-1")
    font = ImageFont.load_default()
    ImageDraw.Draw(grid).multiline_text(top_left, latin_text, fill="black", font=font, spacing=2)


def build_progress_strip(folder: Path) -> Image.Image | None:
    """Build the strip of a samples folder: a row for each prompt and a column for each step.

    At most 16 steps are shown, evenly spaced, the first and the last included. Returns None if there are no images.
    """
    steps = select_step_folders(folder, MAX_COLUMNS)
    names = sorted({path.name for step in steps for path in step.glob("*.png")})
    cells, labels = [], []
    for name in names:
        for step in steps:
            cells.append(load_thumbnail(step / name))
            labels.append(f"step {int(step.name.removeprefix('step-'))}" if name == names[-1] else "")
    return build_image_grid(cells, len(steps), labels) if cells else None


def build_before_and_after(folder: Path, prompts: Sequence[str]) -> Image.Image | None:
    """Build the comparison of a samples folder: the images of its first step on the left, of its last on the right.

    Args:
        prompts: text under each image.

    Returns:
        The comparison, or None if the folder does not hold images of two steps.
    """
    steps = select_step_folders(folder, 2)
    names = [f"{number:03d}.png" for number in range(len(prompts))]
    if len(steps) < 2 or not names:
        return None
    panels = [build_image_grid([load_thumbnail(step / name) for name in names], labels=prompts) for step in steps]
    width, height = max(panel.width for panel in panels), max(panel.height for panel in panels)
    comparison = Image.new("RGB", (2 * width + PANEL_GAP_PX, height + 2 * LABEL_PX), "white")
    for number, (panel, step, word) in enumerate(zip(panels, steps, ("before", "after"), strict=True)):
        left = number * (width + PANEL_GAP_PX)
        draw_label(comparison, f"{word}: step {int(step.name.removeprefix('step-'))}", (left, 0), width)
        comparison.paste(panel, (left, 2 * LABEL_PX))
    line = width + PANEL_GAP_PX // 2
    ImageDraw.Draw(comparison).line((line, 0, line, comparison.height), fill="grey", width=2)
    return comparison


def select_step_folders(folder: Path, max_count: int) -> list[Path]:
    """Return at most `max_count` of a samples folder's `step-…` folders, evenly spaced, first and last included."""
    steps = [path for path in sorted(folder.glob("step-*")) if path.is_dir()]
    if len(steps) <= max_count:
        return steps
    return [steps[round(number * (len(steps) - 1) / (max_count - 1))] for number in range(max_count)]


def load_thumbnail(path: Path) -> Image.Image:
    """Load a thumbnail of an image, or a white pixel if the file does not exist."""
    if not path.is_file():
        return Image.new("RGB", (1, 1), "white")
    with Image.open(path) as image:
        image.thumbnail((STRIP_SIDE_PX, STRIP_SIDE_PX))
        return image.convert("RGB")


def write_image(path: Path, image: Image.Image, description: str = "") -> None:
    """Write a PNG atomically, with the description under the key `parameters`, where image viewers look for it."""
    metadata = PngImagePlugin.PngInfo()
    if description:
        metadata.add_text("parameters", description)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file:
        image.save(file, "PNG", pnginfo=metadata)
