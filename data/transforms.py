"""From an image file to the pixels of its bucket."""

import hashlib
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sdxl_trainer.data.bucket import BucketRule, Placement, Size, place_image

# What Pillow's decoders raise on damaged bytes; found by feeding them such.
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BadImageError(ValueError):
    """A picture that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class PreparedImage:
    """A picture cut to its bucket, and where it came from."""

    pixels: np.ndarray  # [H, W, 3] uint8
    original_size: Size  # (width, height) as a person sees it, after EXIF rotation
    placement: Placement
    source_bytes: int
    source_mtime_ns: int
    source_sha256: str


def prepare_image(path: Path, rule: BucketRule, buckets: list[Size]) -> PreparedImage:
    """Read, decode, orient, resize and cut one picture.

    Raises:
        BadImageError: missing, unreadable, truncated, or larger than Pillow's decompression-bomb limit.
    """
    try:
        content = path.read_bytes()
        mtime_ns = path.stat().st_mtime_ns
    except OSError as error:
        raise BadImageError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        image = decode_image(content)
    except DECODE_ERRORS as error:
        raise BadImageError(f"{path}: cannot be decoded: {error}") from None
    placement = place_image(image.size, rule, buckets)
    return PreparedImage(
        cut_image(image, placement), image.size, placement, len(content), mtime_ns, hashlib.sha256(content).hexdigest()
    )


def decode_image(content: bytes) -> Image.Image:
    """Decode to RGB as a person expects to see it: EXIF rotation applied, transparency on white, first frame."""
    image = Image.open(io.BytesIO(content))
    # Pillow only warns of pictures up to twice its limit, and filters of warnings are not safe on threads.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS} (a bomb?)")
    image.load()
    image = _reduce_depth(ImageOps.exif_transpose(image))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def cut_image(image: Image.Image, placement: Placement) -> np.ndarray:
    """Resize and cut in one pass over the pixels that are kept. Returns [H, W, 3] uint8."""
    shrinking = placement.resized[0] < image.width
    # LANCZOS keeps detail when shrinking; enlarging with it only costs time, BICUBIC looks the same.
    resample = Image.Resampling.LANCZOS if shrinking else Image.Resampling.BICUBIC
    scale_x, scale_y = image.width / placement.resized[0], image.height / placement.resized[1]
    left, top, right, bottom = placement.crop_ltrb
    box = (left * scale_x, top * scale_y, min(image.width, right * scale_x), min(image.height, bottom * scale_y))
    return np.asarray(image.resize(placement.bucket, resample, box=box))


def _reduce_depth(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey: Pillow's own conversion clips, and all but the darkest pictures turn white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit grey has no known range; save it with 8 or 16 bits")
    return image
