"""From an image file to the pixels of its bucket."""

import hashlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from sdxl_trainer.data.files import HashedFile
from sdxl_trainer.data.images.bucket import BucketRule, Placement, Size, place_image

# Pillow's pixels are only read. A filter for each reading would not be safe on threads.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")

# A JPEG many times larger than needed is decoded at 1/2, 1/4 or 1/8, but to no less than this many times its new sides:
# then it cannot be told from one decoded whole (Pillow's documentation of `reducing_gap`).
REDUCING_GAP = 2

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
    """An image that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class PreparedImage:
    """An image cut to its bucket, and where it came from."""

    pixels: np.ndarray  # [H, W, 3] uint8
    original_size: Size  # (width, height) as a person sees it, after EXIF rotation
    placement: Placement
    source_bytes: int
    source_mtime_ns: int
    source_sha256: str
    mask: np.ndarray | None = None  # [H, W] uint8, cut like the pixels: where the loss counts; None: everywhere
    mask_file: HashedFile | None = None  # None: the mask, if there is one, is the image's opacity


@dataclass(frozen=True)
class Decoded:
    """An image as a person sees it, but for what brings its colours to sRGB: that takes less time on the cut."""

    pixels: np.ndarray  # [H, W, 3] uint8
    size: Size  # of the image; a JPEG may have been decoded smaller
    transform: ImageCms.ImageCmsTransform | None = None
    alpha: np.ndarray | None = None  # [H, W] uint8; None: an image that cannot be transparent


def prepare_image(
    path: Path, rule: BucketRule, buckets: list[Size], with_alpha: bool = False, out: np.ndarray | None = None
) -> PreparedImage:
    """Read, decode, orient, resize and cut one image.

    Args:
        with_alpha: keep the opacity as a mask.
        out: [H, W, 3] uint8, where the pixels go if it is of their shape.

    Raises:
        BadImageError: missing, unreadable, truncated, or larger than Pillow's decompression-bomb limit.
    """
    content, mtime_ns = read_content(path)
    try:
        decoded = decode_content(content, lambda size: place_image(size, rule, buckets).resized)
    except DECODE_ERRORS as error:
        raise BadImageError(f"{path}: cannot be decoded: {error}") from None
    digest = hashlib.sha256(content).hexdigest()
    placement = place_image(decoded.size, rule, buckets)
    pixels = cut_image(decoded.pixels, placement)
    if decoded.transform is not None:
        pixels = np.asarray(decoded.transform.apply(Image.fromarray(pixels)))
    if out is not None and out.shape == pixels.shape:
        out[...] = pixels
        pixels = out
    mask = None
    if with_alpha and decoded.alpha is not None:
        mask = np.ascontiguousarray(cut_image(decoded.alpha, placement))
    return PreparedImage(np.ascontiguousarray(pixels), decoded.size, placement, len(content), mtime_ns, digest, mask)


def read_content(path: Path) -> tuple[bytes, int]:
    """(bytes, time of change in nanoseconds) of a file.

    Raises:
        BadImageError: missing, or unreadable.
    """
    try:
        with open(path, "rb") as file:
            mtime_ns = os.fstat(file.fileno()).st_mtime_ns  # before reading: a change meanwhile is noticed next time
            return file.read(), mtime_ns
    except OSError as error:
        raise BadImageError(f"{path}: cannot be read: {error.strerror}") from None


def decode_image(content: bytes) -> Image.Image:
    """Decode to RGB as a person expects to see it: EXIF rotation applied, transparency on white, first frame, sRGB."""
    decoded = decode_content(content)
    image = Image.fromarray(decoded.pixels)
    return image if decoded.transform is None else decoded.transform.apply(image)


def decode_content(content: bytes, choose_size: Callable[[Size], Size] | None = None) -> Decoded:
    """`choose_size` tells of an image's size which one it will be resized to.

    Raises:
        one of DECODE_ERRORS: it cannot be decoded.
    """
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:  # Pillow's words name the buffer, by its address
        raise UnidentifiedImageError("not an image in a format that Pillow knows") from None
    size = image.size
    # Pillow only warns of images up to twice its limit, and filters of warnings are not safe on threads.
    if Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} pixels are more than {Image.MAX_IMAGE_PIXELS} (a bomb?)")
    if choose_size is not None and image.format == "JPEG":
        wanted = _swap_if_turned(choose_size(_swap_if_turned(size, image)), image)
        image.draft(None, (REDUCING_GAP * wanted[0], REDUCING_GAP * wanted[1]))
    image.load()
    size = _swap_if_turned(size, image)
    profile = image.info.get("icc_profile")
    ImageOps.exif_transpose(image, in_place=True)
    image, alpha = _reduce_depth(image), None
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        alpha, image = np.asarray(image.getchannel("A")), Image.alpha_composite(white, image)
    if image.mode == "CMYK" and (transform := _build_transform(profile, "CMYK")):
        return Decoded(np.asarray(transform.apply(image)), size)
    is_coloured = image.mode not in ("1", "L", "CMYK")
    transform = _build_transform(profile, "RGB") if is_coloured else None
    return Decoded(np.asarray(image if image.mode == "RGB" else image.convert("RGB")), size, transform, alpha)


def _swap_if_turned(size: Size, image: Image.Image, exact: bool = True) -> Size:
    """The size as a person sees it, from the stored one, and back. `exact` as for `read_image_size`."""
    exif = image.getexif() if exact else Image.Image.getexif(image)
    turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (size[1], size[0]) if turned else size


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


def cut_image(pixels: np.ndarray, placement: Placement, mode: str = "bicubic") -> np.ndarray:
    """[H, W] or [H, W, C] uint8 in, the bucket's part of it out.

    Bicubic, with Pillow's filter, in a fifth of its time; it widens with the step when shrinking, so that fine patterns
    do not turn into false ones. Beside OpenCV's area averaging this takes half the time and is truer.

    Args:
        mode: or `bilinear`, with Pillow's filter too.
    """
    left, top, right, bottom = placement.crop_ltrb
    if placement.resized != (pixels.shape[1], pixels.shape[0]):
        # [1, C, H, W], channels last in memory: the layout that has a fast way
        images = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None])[None].permute(0, 3, 1, 2)
        size = (placement.resized[1], placement.resized[0])
        resized = torch.nn.functional.interpolate(images, size=size, mode=mode, antialias=True)
        pixels = resized[0].permute(1, 2, 0).numpy().reshape(*size, *pixels.shape[2:])
    return pixels[top:bottom, left:right]


def read_image_size(path: Path, exact: bool = True) -> Size:
    """(width, height) of an image as a person sees it, from its header alone.

    Args:
        exact: a PNG may say behind its pixels that it is to be turned, and is decoded to find out; False takes it as
            not turned, in a twentieth of the time.

    Raises:
        BadImageError: missing, or no image.
    """
    try:
        with Image.open(path) as image:
            return _swap_if_turned(image.size, image, exact)
    except DECODE_ERRORS as error:
        raise BadImageError(f"{path}: cannot be read: {error}") from None


def _reduce_depth(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey: Pillow's own conversion clips, and all but the darkest images turn white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit grey has no known range; save it with 8 or 16 bits")
    return image
