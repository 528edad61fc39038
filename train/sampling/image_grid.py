"""Images side by side: the grid of one step, the strip over all steps, and the contact sheet with its prompts."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from sdxl_trainer.data.files import open_atomic

GAP_PX = 4
LABEL_PX = 14  # height of a line of text
LABEL_LINES = 3
STRIP_SIDE_PX = 256  # longest side of an image in a strip
MAX_COLUMNS = 16


def build_image_grid(images: Sequence[Image.Image], columns: int = 0, labels: Sequence[str] = ()) -> Image.Image:
    """Images in rows, each in the middle of a cell that the largest fills; about square without `columns`.

    Args:
        labels: a text under each image, cut after three lines.
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


def draw_label(sheet: Image.Image, text: str, place: tuple[int, int], width_px: int) -> None:
    """Write a text into a sheet, from the top left corner on, over as many lines as a label has."""
    lines = textwrap.wrap(text, max(8, width_px // 6))
    if len(lines) > LABEL_LINES:
        lines = [*lines[: LABEL_LINES - 1], lines[LABEL_LINES - 1] + " ..."]
    # Letters that the font lacks would be boxes, or an error.
    shown = "\n".join(lines).encode("latin-1", "replace").decode("latin-1")
    font = ImageFont.load_default()
    ImageDraw.Draw(sheet).multiline_text(place, shown, fill="black", font=font, spacing=2)


def build_progress_strip(folder: Path) -> Image.Image | None:
    """Training over time: a row for each prompt, a column for each step whose images are in `folder`; None without.

    Of more than 16 steps an even choice, the first and the last among them.
    """
    steps = select_step_folders(folder, MAX_COLUMNS)
    names = sorted({path.name for step in steps for path in step.glob("*.png")})
    cells, labels = [], []
    for name in names:
        for step in steps:
            cells.append(load_thumbnail(step / name))
            labels.append(f"step {int(step.name.removeprefix('step-'))}" if name == names[-1] else "")
    return build_image_grid(cells, len(steps), labels) if cells else None


def select_step_folders(folder: Path, most: int) -> list[Path]:
    """Folders of the steps whose images are in `folder`: at most so many, evenly, the first and the last of them."""
    steps = [path for path in sorted(folder.glob("step-*")) if path.is_dir()]
    if len(steps) <= most:
        return steps
    return [steps[round(number * (len(steps) - 1) / (most - 1))] for number in range(most)]


def load_thumbnail(path: Path) -> Image.Image:
    """A small copy of an image; of one that is not there, a white spot."""
    if not path.is_file():
        return Image.new("RGB", (1, 1), "white")
    with Image.open(path) as image:
        image.thumbnail((STRIP_SIDE_PX, STRIP_SIDE_PX))
        return image.convert("RGB")


def write_image(path: Path, image: Image.Image, description: str = "") -> None:
    """Write a PNG, whole or not at all. A description goes into it as `parameters`, where viewers look for it."""
    notes = PngImagePlugin.PngInfo()
    if description:
        notes.add_text("parameters", description)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file:
        image.save(file, "PNG", pnginfo=notes)
