"""From an image file to the pixels of its bucket."""

import hashlib
import io
import os
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, ImageCms, ImageOps

from sdxl_trainer.data.bucket import BucketRule, Placement, Size, place_image

cv2.setNumThreads(1)  # pictures are spread over threads already

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
    alpha: np.ndarray | None = None  # [H, W] uint8, cut like the pixels; None: opaque, or not asked for


@dataclass(frozen=True)
class Decoded:
    """A picture as a person sees it, but for what brings its colours to sRGB: that takes less time on the cut."""

    image: Image.Image  # RGB
    transform: ImageCms.ImageCmsTransform | None
    alpha: Image.Image | None = None  # 8-bit grey; None: a picture that cannot be transparent


def prepare_image(path: Path, rule: BucketRule, buckets: list[Size], with_alpha: bool = False) -> PreparedImage:
    """Read, decode, orient, resize and cut one picture.

    Args:
        with_alpha: keep the opacity, too.

    Raises:
        BadImageError: missing, unreadable, truncated, or larger than Pillow's decompression-bomb limit.
    """
    try:
        with open(path, "rb") as file:
            mtime_ns = os.fstat(file.fileno()).st_mtime_ns  # before reading: a change meanwhile is noticed next time
            content = file.read()
    except OSError as error:
        raise BadImageError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        decoded = _decode(content)
    except DECODE_ERRORS as error:
        raise BadImageError(f"{path}: cannot be decoded: {error}") from None
    size, digest = decoded.image.size, hashlib.sha256(content).hexdigest()
    placement = place_image(size, rule, buckets)
    pixels = cut_image(decoded.image, placement)
    if decoded.transform is not None:
        pixels = np.array(decoded.transform.apply(Image.fromarray(pixels)))
    mask = None
    if with_alpha and decoded.alpha is not None:
        mask = np.ascontiguousarray(_resize_and_cut(np.asarray(decoded.alpha), placement))
    return PreparedImage(pixels, size, placement, len(content), mtime_ns, digest, mask)


def decode_image(content: bytes) -> Image.Image:
    """Decode to RGB as a person expects to see it: EXIF rotation applied, transparency on white, first frame, sRGB."""
    decoded = _decode(content)
    return decoded.image if decoded.transform is None else decoded.transform.apply(decoded.image)


def _decode(content: bytes) -> Decoded:
    image = Image.open(io.BytesIO(content))
    # Pillow only warns of pictures up to twice its limit, and filters of warnings are not safe on threads.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS} (a bomb?)")
    image.load()
    profile = image.info.get("icc_profile")
    image, alpha = _reduce_depth(ImageOps.exif_transpose(image)), None
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        alpha, image = image.getchannel("A"), Image.alpha_composite(white, image)
    if image.mode == "CMYK" and (transform := _build_transform(profile, "CMYK")):
        return Decoded(transform.apply(image), None)
    is_coloured = image.mode not in ("1", "L", "CMYK")
    return Decoded(image.convert("RGB"), _build_transform(profile, "RGB") if is_coloured else None, alpha)


@lru_cache(maxsize=64)
def _build_transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None if there is none, or it is sRGB, of another colour model, or damaged.

    Threads may share it, because it has no cache.
    """
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        told: Any = source.profile
        if told.xcolor_space.strip() != mode or "sRGB" in (told.profile_description or ""):
            return None
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        flags = ImageCms.Flags.NOCACHE | ImageCms.Flags.BLACKPOINTCOMPENSATION
        return ImageCms.ImageCmsTransform(source, target, mode, "RGB", intent, flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def cut_image(image: Image.Image, placement: Placement) -> np.ndarray:
    """Resize, then cut the bucket out. Returns [H, W, 3] uint8.

    OpenCV resizes with SIMD, in a third of torch's time and an eighth of Pillow's: by area averaging when shrinking,
    which keeps fine patterns from turning into false ones, and bicubic when enlarging.
    """
    pixels = _resize_and_cut(view_pixels(image), placement)
    return np.ascontiguousarray(pixels) if pixels.shape[2] == 3 else cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB)


def _resize_and_cut(pixels: np.ndarray, placement: Placement) -> np.ndarray:
    """[H, W] or [H, W, C] uint8 in, the bucket's part of it out."""
    left, top, right, bottom = placement.crop_ltrb
    size = (pixels.shape[1], pixels.shape[0])
    if placement.resized != size:
        shrinking = placement.resized[0] < size[0]
        pixels = cv2.resize(pixels, placement.resized, interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)
    return pixels[top:bottom, left:right]


def view_pixels(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image, [H, W, 4] with an unused last channel as Pillow keeps them, or a copy [H, W, 3].

    Pillow's Arrow export saves a copy, which is a fifth of the work on a JPEG; large images lie in several blocks and
    cannot be exported.
    """
    if hasattr(image, "__arrow_c_array__"):
        try:
            return pa.array(image).flatten().to_numpy(zero_copy_only=True).reshape(image.height, image.width, 4)
        except ValueError:  # several blocks
            pass
    return np.asarray(image)


def read_image_size(path: Path) -> Size:
    """(width, height) of a picture as a person sees it, from its header alone.

    Raises:
        BadImageError: missing, or no picture.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except DECODE_ERRORS as error:
        raise BadImageError(f"{path}: cannot be read: {error}") from None


def _reduce_depth(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey: Pillow's own conversion clips, and all but the darkest pictures turn white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit grey has no known range; save it with 8 or 16 bits")
    return image
