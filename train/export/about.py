"""The description in a model file: the keys of modelspec that a person decides, and the thumbnail."""

import base64
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from loguru import logger
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open

from sdxl_trainer.configs.checkpoint import AboutConfig
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.data.files import open_stream

PREFIX = "modelspec."
THUMBNAIL_PX, JPEG_QUALITY = 256, 80
MAX_THUMBNAIL_BYTES = 100_000_000  # of the image that it is made from
CARRIED = (
    *("title", "author", "description", "license", "trigger_phrase", "usage_hint", "tags", "merged_from"),
    "thumbnail",
)


def check_about(about: AboutConfig) -> Iterator[Problem]:
    """Yield a problem if the thumbnail cannot be read."""
    if about.thumbnail is not None:
        try:
            read_thumbnail(about.thumbnail)
        except (OSError, ValueError) as error:
            cure = "give an image that can be opened, or leave it out"
            yield Problem("about.thumbnail", about.thumbnail, f"cannot be read: {error}", cure)


def read_thumbnail(file: Path) -> str:
    """Return an image as a small JPEG in a data URI, as modelspec asks for.

    Raises:
        OSError, ValueError: the file is missing or no image, or the image is too large.
    """
    buffer = io.BytesIO()
    try:
        with open_stream(file, MAX_THUMBNAIL_BYTES) as stream, Image.open(stream) as image:
            image.thumbnail((2 * THUMBNAIL_PX, 2 * THUMBNAIL_PX))
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            small.save(buffer, "JPEG", quality=JPEG_QUALITY)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def describe_about(about: AboutConfig) -> dict[str, str]:
    """Return what the settings say about the model, by modelspec's keys without their prefix.

    A thumbnail that cannot be read any more is left out with a warning, because the model is worth more.
    """
    thumbnail = None
    if about.thumbnail is not None:
        try:
            thumbnail = read_thumbnail(about.thumbnail)
        except (OSError, ValueError) as error:
            logger.warning("the model gets no thumbnail: about.thumbnail cannot be read: {}", error)
    texts = {
        "title": about.title,
        "author": about.author,
        "description": about.description,
        "license": about.license,
        "trigger_phrase": about.trigger_phrase,
        "usage_hint": about.usage_hint,
        "tags": ", ".join(about.tags),
        "merged_from": ", ".join(about.merged_from),
        "thumbnail": thumbnail,
    }
    return {key: text for key, text in texts.items() if text}


def read_file_metadata(model: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; {} for a folder and for a file that cannot be read."""
    if model.suffix != ".safetensors" or not model.is_file():
        return {}
    try:
        with safe_open(model, "pt") as tensors:
            return tensors.metadata() or {}
    except SafetensorError:
        return {}


def read_about(model: Path) -> dict[str, str]:
    """Return what a model file says about its model, by modelspec's keys without their prefix."""
    metadata = read_file_metadata(model)
    return {key: metadata[PREFIX + key] for key in CARRIED if metadata.get(PREFIX + key)}


def prefix_keys(about: Mapping[str, str]) -> dict[str, str]:
    """Return keys of modelspec with their prefix, as files have them."""
    return {PREFIX + key: text for key, text in about.items()}
