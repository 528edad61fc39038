"""Image grids: images of one step, a strip over all steps, first and last step compared, and contact sheets."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, PngImagePlugin

from sdxl_trainer.data.files import open_atomic
from sdxl_trainer.data.images.fonts import Lettering, translate_drawable

GAP_PX = 4
MIN_FONT_PX, MAX_FONT_PX = 12, 24  # of labels; in between, they are sized by the images
CELLS_A_FONT = 40  # font sizes in the width of an image
LABEL_LINES, PROMPT_LINES = 3, 2
STRIP_SIDE_PX = 256  # widest image in a strip or comparison
PANEL_GAP_PX = 32  # between the two steps of a comparison
MAX_COLUMNS = 16
GREY = (225, 225, 225)  # of cells of a strip without an image


class GeneratedImage(NamedTuple):
    """A thumbnail of a generated image, and its prompt, "" if the file holds none."""

    image: Image.Image
    prompt: str


def build_image_grid(images: Sequence[Image.Image], columns: int = 0, labels: Sequence[str] = ()) -> Image.Image:
    """Place images in rows, each centred in a cell of the largest image's size.

    Args:
        columns: images per row; 0 makes the grid about square.
        labels: text under each image, truncated after three lines.
    """
    columns = columns or -(-len(images) // max(1, int(len(images) ** 0.5)))
    width = max(image.width for image in images)
    tallest = max(image.height for image in images)
    lettering = choose_lettering(width)
    height = tallest + (LABEL_LINES * lettering.line_px if labels else 0)
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + GAP_PX) - GAP_PX, rows * (height + GAP_PX) - GAP_PX), "white")
    for number, image in enumerate(images):
        left, top = number % columns * (width + GAP_PX), number // columns * (height + GAP_PX)
        grid.paste(image, (left + (width - image.width) // 2, top + (tallest - image.height) // 2))
        for line_number, line in enumerate(lettering.wrap(labels[number], width, LABEL_LINES) if labels else ()):
            lettering.draw(grid, (left, top + tallest + line_number * lettering.line_px), line)
    return grid


def choose_lettering(width_px: int) -> Lettering:
    """Choose the size of the labels of images of a width."""
    return Lettering(min(MAX_FONT_PX, max(MIN_FONT_PX, width_px // CELLS_A_FONT)))


def build_progress_strip(folder: Path) -> Image.Image | None:
    """Build the strip of a samples folder: a row for each prompt, below its text, and a column for each step.

    Images touch each other. At most 16 steps are shown, evenly spaced, the first and the last included. Returns None
    if there are no images.
    """
    steps = select_step_folders(folder, MAX_COLUMNS)
    names = sorted({path.name for step in steps for path in step.glob("*.png")})
    rows = {name: [load_generated_image(step / name) for step in steps] for name in names}
    rows = {name: row for name, row in rows.items() if any(row)}
    if not rows:
        return None
    width = min(STRIP_SIDE_PX, max(cell.image.width for row in rows.values() for cell in row if cell is not None))
    bands = [_draw_steps(steps, width)]
    for name, row in rows.items():
        prompt = next((cell.prompt for cell in reversed(row) if cell is not None and cell.prompt), name)
        bands += [_draw_prompt(prompt, width * len(steps)), _join_row([cell and cell.image for cell in row], width)]
    strip = Image.new("RGB", (width * len(steps), sum(band.height for band in bands)), "white")
    top = 0
    for band in bands:
        strip.paste(band, (0, top))
        top += band.height
    return strip


def _draw_steps(steps: Sequence[Path], width_px: int) -> Image.Image:
    """Draw the numbers of the steps, each above the middle of its column."""
    lettering = choose_lettering(width_px)
    band = Image.new("RGB", (width_px * len(steps), lettering.line_px), "white")
    for number, step in enumerate(steps):
        label = translate_drawable(f"step {int(step.name.removeprefix('step-'))}")
        if lettering.measure(label) > width_px:
            label = str(int(step.name.removeprefix("step-")))
        lettering.draw(band, ((number + 0.5) * width_px - lettering.measure(label) / 2, 0), label)
    return band


def _draw_prompt(prompt: str, width_px: int) -> Image.Image:
    """Draw a prompt in at most two lines across the strip."""
    lettering = choose_lettering(STRIP_SIDE_PX)
    lines = lettering.wrap(prompt, width_px, PROMPT_LINES)
    band = Image.new("RGB", (width_px, len(lines) * lettering.line_px + GAP_PX), "white")
    for number, line in enumerate(lines):
        lettering.draw(band, (0, number * lettering.line_px), line)
    return band


def _join_row(images: Sequence[Image.Image | None], width_px: int) -> Image.Image:
    """Place images side by side, each scaled to a width; None leaves a grey cell."""
    scaled = [image and image.resize((width_px, -(-image.height * width_px // image.width))) for image in images]
    height = max(image.height for image in scaled if image is not None)
    row = Image.new("RGB", (width_px * len(images), height), GREY)
    for number, image in enumerate(scaled):
        if image is not None:
            row.paste(image, (number * width_px, (height - image.height) // 2))
    return row


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
    blank = Image.new("RGB", (1, 1), "white")  # in place of an image that is missing
    loaded = [[load_generated_image(step / name) for name in names] for step in steps]
    panels = [build_image_grid([cell.image if cell else blank for cell in row], labels=prompts) for row in loaded]
    width, height = max(panel.width for panel in panels), max(panel.height for panel in panels)
    lettering = choose_lettering(width)
    title_px = 2 * lettering.line_px
    comparison = Image.new("RGB", (2 * width + PANEL_GAP_PX, height + title_px), "white")
    first, last = (int(step.name.removeprefix("step-")) for step in steps)
    titles = (f"before: step {first}", f"after: step {last}")
    for number, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        left = number * (width + PANEL_GAP_PX)
        lettering.draw(comparison, (left, 0), translate_drawable(title))
        comparison.paste(panel, (left, title_px))
    line = width + PANEL_GAP_PX // 2
    ImageDraw.Draw(comparison).line((line, 0, line, comparison.height), fill="grey", width=2)
    return comparison


def select_step_folders(folder: Path, max_count: int) -> list[Path]:
    """Return at most `max_count` of a samples folder's `step-…` folders, evenly spaced, first and last included."""
    steps = [path for path in sorted(folder.glob("step-*")) if path.is_dir()]
    if len(steps) <= max_count:
        return steps
    return [steps[round(number * (len(steps) - 1) / (max_count - 1))] for number in range(max_count)]


def load_generated_image(path: Path) -> GeneratedImage | None:
    """Load a thumbnail of a generated image and its prompt; None if the file is missing or cannot be read."""
    try:
        with Image.open(path) as image:
            prompt = read_prompt(image)
            image.thumbnail((STRIP_SIDE_PX, 4 * STRIP_SIDE_PX))
            return GeneratedImage(image.convert("RGB"), prompt)
    except OSError:
        return None


def read_prompt(image: Image.Image) -> str:
    """Return the prompt in the description that `write_image` stored; "" if there is none."""
    return str(image.info.get("parameters", "")).partition("\nNegative prompt: ")[0]


def write_image(path: Path, image: Image.Image, description: str = "") -> None:
    """Write a PNG atomically, with the description under the key `parameters`, where image viewers look for it."""
    metadata = PngImagePlugin.PngInfo()
    if description:
        metadata.add_text("parameters", description)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file:
        image.save(file, "PNG", pnginfo=metadata)
