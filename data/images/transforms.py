"""Image files: read, decode, turn upright, convert to sRGB, resize and cut to a bucket."""

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

# Pillow's pixels are only read; a filter set for each read would not be safe on threads.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")

# A JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8, but to no less than this many times its new sides: the
# result is indistinguishable from a full decode (Pillow's documentation of `reducing_gap`).
REDUCING_GAP = 2

# Pillow's decoders raise all of these on damaged bytes.
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
    """An image cut to its bucket, and the file that it was read from."""

    pixels: np.ndarray  # [H, W, 3] uint8
    original_size: Size  # upright, after EXIF rotation
    placement: Placement
    source_bytes: int
    source_mtime_ns: int
    source_sha256: str
    mask: np.ndarray | None = None  # [H, W] uint8, cut like the pixels: weight of the loss; None: 1 everywhere
    mask_file: HashedFile | None = None  # None: no mask, or the image's own opacity


@dataclass(frozen=True)
class DecodedImage:
    """An upright RGB image. Its conversion to sRGB is left to do, because the cut has fewer pixels."""

    pixels: np.ndarray  # [H, W, 3] uint8
    size: Size  # of the image, which may be larger than `pixels`: see REDUCING_GAP
    to_srgb: ImageCms.ImageCmsTransform | None = None  # None: sRGB already
    alpha: np.ndarray | None = None  # [H, W] uint8; None: opaque


def prepare_image(
    path: Path, rule: BucketRule, buckets: list[Size], with_alpha: bool = False, out: np.ndarray | None = None
) -> PreparedImage:
    """Read, decode, turn upright, resize and cut one image.

    Args:
        buckets: `list_buckets(rule)`.
        with_alpha: keep the opacity as a mask.
        out: [H, W, 3] uint8 buffer for the pixels, used if its shape is that of the bucket.

    Raises:
        BadImageError: missing, unreadable, truncated, or larger than Pillow's decompression-bomb limit.
    """
    content, mtime_ns = read_content(path)
    try:
        decoded = decode_content(content, lambda size: place_image(size, rule, buckets).resized)
    except DECODE_ERRORS as error:
        raise BadImageError(f"{path}: cannot be decoded: {error}") from None
    placement = place_image(decoded.size, rule, buckets)
    pixels = cut_image(decoded.pixels, placement)
    if decoded.to_srgb is not None:
        pixels = np.asarray(decoded.to_srgb.apply(Image.fromarray(pixels)))
    if out is not None and out.shape == pixels.shape:
        out[...] = pixels
        pixels = out
    mask = None
    if with_alpha and decoded.alpha is not None:
        mask = np.ascontiguousarray(cut_image(decoded.alpha, placement))
    return PreparedImage(
        pixels=np.ascontiguousarray(pixels),
        original_size=decoded.size,
        placement=placement,
        source_bytes=len(content),
        source_mtime_ns=mtime_ns,
        source_sha256=hashlib.sha256(content).hexdigest(),
        mask=mask,
    )


def read_content(path: Path) -> tuple[bytes, int]:
    """Return the content of a file and its time of change in nanoseconds.

    Raises:
        BadImageError: missing, or unreadable.
    """
    try:
        with open(path, "rb") as file:
            # Before the read, so that a change during it is noticed next time.
            mtime_ns = os.fstat(file.fileno()).st_mtime_ns
            return file.read(), mtime_ns
    except OSError as error:
        raise BadImageError(f"{path}: cannot be read: {error.strerror}") from None


def decode_image(content: bytes) -> Image.Image:
    """Decode the first frame to upright sRGB, with transparency laid on white.

    Raises:
        one of DECODE_ERRORS: it cannot be decoded.
    """
    decoded = decode_content(content)
    image = Image.fromarray(decoded.pixels)
    return image if decoded.to_srgb is None else decoded.to_srgb.apply(image)


def decode_content(content: bytes, choose_size: Callable[[Size], Size] | None = None) -> DecodedImage:
    """Decode the first frame to upright RGB, with transparency laid on white.

    Args:
        choose_size: maps the image's size to the one that it will be resized to; a large JPEG is then decoded smaller.

    Raises:
        one of DECODE_ERRORS: it cannot be decoded.
    """
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:  # Pillow's own message names the buffer by its address
        raise UnidentifiedImageError("not an image in a format that Pillow knows") from None
    size = Size(*image.size)
    # Pillow only warns of images up to twice its limit, and warning filters are not safe on threads.
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
        return DecodedImage(np.asarray(transform.apply(image)), size)
    is_coloured = image.mode not in ("1", "L", "CMYK")
    to_srgb = _build_transform(profile, "RGB") if is_coloured else None
    return DecodedImage(np.asarray(image if image.mode == "RGB" else image.convert("RGB")), size, to_srgb, alpha)


def _swap_if_turned(size: Size, image: Image.Image, exact: bool = True) -> Size:
    """Return the upright size for the stored one, or the reverse. `exact` as in `read_image_size`."""
    exif = image.getexif() if exact else Image.Image.getexif(image)
    is_turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return Size(size.height, size.width) if is_turned else size


@lru_cache(maxsize=64)
def _build_transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion of a colour profile to sRGB.

    Threads may share it, because it has no cache.

    Args:
        mode: RGB or CMYK.

    Returns:
        None if there is no profile, or it is sRGB, of another colour model, or damaged.
    """
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        fields: Any = source.profile
        if fields.xcolor_space.strip() != mode or "sRGB" in (fields.profile_description or ""):
            return None
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        flags = ImageCms.Flags.NOCACHE | ImageCms.Flags.BLACKPOINTCOMPENSATION
        return ImageCms.ImageCmsTransform(source, target, mode, "RGB", intent, flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def cut_image(pixels: np.ndarray, placement: Placement, mode: str = "bicubic") -> np.ndarray:
    """Resize an image and cut its bucket out.

    The result is Pillow's, in a fifth of its time: the filter widens with the step when it shrinks, so that fine
    patterns do not alias. OpenCV's area averaging takes twice as long and is less true.

    Args:
        pixels: [H, W] or [H, W, C] uint8.
        mode: the filter, `bicubic` or `bilinear`.

    Returns:
        [h, w] or [h, w, C] uint8, of the bucket's size.
    """
    if placement.resized != (pixels.shape[1], pixels.shape[0]):
        # [1, C, H, W], channels last in memory: the layout that has a fast kernel
        images = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None])[None].permute(0, 3, 1, 2)
        size = (placement.resized[1], placement.resized[0])
        resized = torch.nn.functional.interpolate(images, size=size, mode=mode, antialias=True)
        pixels = resized[0].permute(1, 2, 0).numpy().reshape(*size, *pixels.shape[2:])
    left, top, (width, height) = placement.left, placement.top, placement.bucket
    return pixels[top : top + height, left : left + width]


def read_image_size(path: Path, exact: bool = True) -> Size:
    """Read the upright size of an image from its header.

    Args:
        exact: decode PNGs, because their EXIF rotation may stand after the pixels; False ignores such a rotation and
            takes a twentieth of the time.

    Raises:
        BadImageError: missing, or no image.
    """
    try:
        with Image.open(path) as image:
            return _swap_if_turned(Size(*image.size), image, exact)
    except DECODE_ERRORS as error:
        raise BadImageError(f"{path}: cannot be read: {error}") from None


def _reduce_depth(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to 8-bit grey by scaling; Pillow's own conversion clips, which turns most images white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit grey has no known range; save it with 8 or 16 bits")
    return image
