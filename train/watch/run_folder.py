"""Files of a run folder, read safely: nothing outside the folder, no links that lead out of it, no special files."""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sdxl_trainer.configs.problems import escape_controls
from sdxl_trainer.data.files import open_stream

STEP_FOLDER, IMAGE_FILE = re.compile(r"step-(\d{1,12})"), re.compile(r"(\d{1,6})\.png")
MAX_IMAGE_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 1 << 26
MAX_TEXT = 4000  # characters of a prompt or a message
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Files or folders of which a run folder has at least one.
RUN_FILES = ("config.yaml", "logs", ".lock")


class GeneratedImages(NamedTuple):
    """The generated images of a run: numbers of images by step, and the newest image's prompt by number."""

    images: dict[int, list[int]]
    prompts: dict[int, str]


def is_run_folder(folder: Path) -> bool:
    """Return whether a folder looks like that of a run."""
    return any((folder / name).exists() for name in RUN_FILES)


def locate(folder: Path, *parts: str) -> Path:
    """Return the path of a file in a folder.

    Args:
        folder: without symbolic links.
        parts: names below it, none of which may be `..`.

    Raises:
        OSError: a symbolic link leads out of the folder.
    """
    path = folder.joinpath(*parts)
    places = [folder.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
    if any(map(os.path.islink, places)) and not path.resolve().is_relative_to(folder):
        raise OSError(errno.ELOOP, "leads out of the run folder", str(path))
    return path


def list_images(folder: Path) -> dict[int, list[int]]:
    """List the numbers of the generated images of each step."""
    steps: dict[int, list[int]] = {}
    for name, step in _match_names(folder, STEP_FOLDER, "samples"):
        numbers = [number for _, number in _match_names(folder, IMAGE_FILE, "samples", name)]
        if numbers:
            steps[step] = sorted(numbers)
    return dict(sorted(steps.items()))


def locate_image(folder: Path, step: int, number: int) -> Path:
    """Return the path of a generated image.

    Raises:
        OSError: it leads out of the run folder.
    """
    return locate(folder, "samples", f"step-{step:08d}", f"{number:03d}.png")


def read_image(path: Path) -> bytes:
    """Return the content of a PNG file.

    Raises:
        OSError: the file is missing, too large, or no PNG.
    """
    with open_stream(path, MAX_IMAGE_BYTES) as file:
        content = file.read(MAX_IMAGE_BYTES)
    if not content.startswith(PNG_SIGNATURE):
        raise OSError(errno.EINVAL, "is no PNG file", str(path))
    return content


def read_prompt(path: Path) -> str:
    """Return the text that a generated image stores with its prompt and settings; "" if it has none."""
    try:
        with open_stream(path, MAX_IMAGE_BYTES) as file, Image.open(file, formats=["PNG"]) as image:
            return clean_text(str(image.info.get("parameters", "")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""


def clean_text(text: str) -> str:
    """Return a text from a file without control characters, and not longer than a reader would read."""
    shown = escape_controls(text, keep_lines=True)
    return shown if len(shown) <= MAX_TEXT else f"{shown[:MAX_TEXT]}…"


def _match_names(folder: Path, pattern: re.Pattern[str], *parts: str) -> Iterator[tuple[str, int]]:
    """Yield name and number of each entry of a folder whose name fits a pattern."""
    try:
        with os.scandir(locate(folder, *parts)) as entries:
            names = [entry.name for entry in entries]
    except OSError:
        return
    for name in names:
        if found := pattern.fullmatch(name):
            yield name, int(found[1])


def describe_file(path: Path) -> tuple[int, int, int] | None:
    """Return inode, size and modification time of a file; None if it is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def split_parameters(text: str) -> dict[str, Any]:
    """Split the text stored with a generated image into prompt, negative prompt and settings."""
    prompt, _, rest = text.partition("\nNegative prompt: ")
    negative, _, settings = rest.rpartition("\nSteps: ")
    return {"prompt": prompt, "negative": negative, "settings": f"Steps: {settings}" if settings else ""}
