"""Image files: read, decode, rotate by EXIF, convert to sRGB, resize and crop to a bucket."""

import hashlib
import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps

from sdxl_trainer.data.files import FileContent, HashedFile, open_stream, read_regular
from sdxl_trainer.data.images.bucket import BucketRule, Placement, Size, is_too_narrow, place_image
from sdxl_trainer.data.images.image_opening import drop_png_texts, open_image, open_image_stream

# Arrays of Pillow's pixels are only read. The filter is global, because setting one for each read is not thread-safe.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")

# A JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8, with sides of at least this many times the new sides.
# The result is indistinguishable from a full decode (Pillow's documentation of `reducing_gap`).
REDUCING_GAP = 2

MAX_IMAGE_BYTES = 1 << 30  # of a file; the largest image that Pillow accepts takes 0.7 GB, uncompressed with 64 bits
MAX_CUT_OFF = 8  # an image of more times its bucket's pixels, once it is resized, is cut before it is resized

# Pillow's decoders raise all of these on damaged bytes.
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,  # PyTorch's too, when memory is too small
    MemoryError,
    EOFError,
    LookupError,
    AttributeError,
    AssertionError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BadImageError(ValueError):
    """An image that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class PreparedImage:
    """An image cropped to its bucket, and the size, time and checksum of its file."""

    pixels: np.ndarray  # [H, W, 3] uint8
    original_size: Size  # upright, after EXIF rotation
    placement: Placement
    source_bytes: int
    source_mtime_ns: int
    source_sha256: str
    mask: np.ndarray | None = None  # [H, W] uint8, cropped like the pixels: weight of the loss; None: 1 everywhere
    mask_file: HashedFile | None = None  # None: no mask, or the image's own opacity


class Thumbnail(NamedTuple):
    """A small RGB image, and the upright size of the image that it shows."""

    image: Image.Image
    size: Size


@dataclass(frozen=True)
class DecodedImage:
    """An upright RGB image. The caller converts it to sRGB after the crop, which has fewer pixels."""

    pixels: np.ndarray  # [H, W, 3] uint8
    size: Size  # of the image, which may be larger than `pixels`: see REDUCING_GAP
    to_srgb: ImageCms.ImageCmsTransform | None = None  # None: sRGB already
    alpha: np.ndarray | None = None  # [H, W] uint8; None: opaque


def prepare_image(
    path: Path, rule: BucketRule, buckets: list[Size], with_alpha: bool = False, out: np.ndarray | None = None
) -> PreparedImage:
    """Read one image file, rotate it by EXIF, resize and crop it to its bucket, and convert it to sRGB.

    Args:
        buckets: `list_buckets(rule)`.
        with_alpha: keep the opacity as a mask.
        out: [H, W, 3] uint8 buffer for the pixels, used if it has the bucket's shape.

    Raises:
        BadImageError: the file is missing, unreadable, truncated, larger than Pillow's decompression-bomb limit or than
            the memory, or narrower than the rule allows.
    """
    content, mtime_ns = read_content(path)
    mask = None
    try:
        decoded = decode_rgb(content, lambda size: place_image(size, rule, buckets).resized)
        verify_aspect_ratio(decoded.size, rule)
        placement = place_image(decoded.size, rule, buckets)
        pixels = resize_and_crop(decoded.pixels, placement)
        if decoded.to_srgb is not None:
            pixels = np.asarray(decoded.to_srgb.apply(Image.fromarray(pixels)))
        if with_alpha and decoded.alpha is not None:
            mask = np.ascontiguousarray(resize_and_crop(decoded.alpha, placement))
    except BadImageError as error:
        raise BadImageError(f"{path}: {error}") from None
    except DECODE_ERRORS as error:
        raise BadImageError(f"{path}: cannot be decoded: {describe_error(error)}") from None
    if out is not None and out.shape == pixels.shape:
        out[...] = pixels
        pixels = out
    return PreparedImage(
        pixels=np.ascontiguousarray(pixels),
        original_size=decoded.size,
        placement=placement,
        source_bytes=len(content),
        source_mtime_ns=mtime_ns,
        source_sha256=hashlib.sha256(content).hexdigest(),
        mask=mask,
    )


def open_thumbnail(path: Path, side_px: int) -> Thumbnail:
    """Decode an image file as `prepare_image` does, to an image whose longer side is at most `side_px`.

    Raises:
        BadImageError: the file is missing, unreadable, truncated or too large.
    """
    content, _ = read_content(path)
    try:
        decoded = decode_rgb(content, lambda size: Size(*(max(1, side_px * side // max(size)) for side in size)))
        image = Image.fromarray(decoded.pixels)
        image.thumbnail((side_px, side_px))
        return Thumbnail(image if decoded.to_srgb is None else decoded.to_srgb.apply(image) or image, decoded.size)
    except DECODE_ERRORS as error:
        raise BadImageError(f"{path}: cannot be decoded: {describe_error(error)}") from None


def read_content(path: Path) -> FileContent:
    """Return the content of a file and its modification time in nanoseconds.

    Raises:
        BadImageError: the file is missing, unreadable, not a regular file, or larger than MAX_IMAGE_BYTES.
    """
    try:
        return read_regular(path, MAX_IMAGE_BYTES)
    except OSError as error:
        raise BadImageError(f"{path}: cannot be read: {error.strerror}") from None
    except MemoryError as error:
        raise BadImageError(f"{path}: cannot be read: {describe_error(error)}") from None


def verify_aspect_ratio(size: Size, rule: BucketRule) -> None:
    """Verify that an image is not narrower than the rule allows. Its bucket would show little of it.

    Raises:
        BadImageError: the image is narrower.
    """
    if is_too_narrow(size, rule):
        limit = f"data.max_aspect_ratio = {rule.max_aspect_ratio:g}"
        raise BadImageError(f"{size} px is narrower than {limit} allows; cut it into parts, or raise the limit")


def describe_error(error: Exception) -> str:
    """Return the reason of one of DECODE_ERRORS as text."""
    return "there is too little memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__


def decode_image(content: bytes) -> Image.Image:
    """Decode the first frame of an image file to an upright sRGB image. Transparent areas become white.

    Raises:
        one of DECODE_ERRORS: the content cannot be decoded.
    """
    decoded = decode_rgb(content)
    image = Image.fromarray(decoded.pixels)
    return image if decoded.to_srgb is None else decoded.to_srgb.apply(image)


def decode_rgb(content: bytes, choose_size: Callable[[Size], Size] | None = None) -> DecodedImage:
    """Decode the first frame of an image file to upright RGB. Transparent areas become white.

    Args:
        choose_size: returns the size that an image of a given size will be resized to. With it, a large JPEG is
            decoded smaller.

    Raises:
        one of DECODE_ERRORS: the content cannot be decoded.
    """
    image = open_image(content)
    size = Size(*image.size)
    # Up to twice its limit Pillow only warns, and turning the warning into an error is not thread-safe.
    if Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{size} pixels are more than {Image.MAX_IMAGE_PIXELS} (a decompression bomb?)")
    if choose_size is not None and image.format == "JPEG":
        stored_size = _swap_if_rotated(choose_size(_swap_if_rotated(size, image)), image)
        image.draft(None, (REDUCING_GAP * stored_size.width, REDUCING_GAP * stored_size.height))
    image.load()
    size = _swap_if_rotated(size, image)
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


def _swap_if_rotated(size: Size, image: Image.Image, exact: bool = True) -> Size:
    """Swap width and height if the image's EXIF orientation is a quarter turn. `exact` as in `read_image_size`."""
    exif = image.getexif() if exact else Image.Image.getexif(image)
    is_rotated = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return Size(size.height, size.width) if is_rotated else size


@lru_cache(maxsize=64)
def _build_transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion of a colour profile to sRGB.

    Threads may share the conversion, because it has no cache.

    Args:
        mode: RGB or CMYK.

    Returns:
        None if the profile is missing, sRGB, of another colour model, or damaged.
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


def resize_and_crop(pixels: np.ndarray, placement: Placement, mode: str = "bicubic") -> np.ndarray:
    """Resize an image and crop it to its bucket.

    The result equals Pillow's, in a fifth of the time. The filter is widened when it shrinks an image, so that fine
    patterns do not alias. OpenCV's area averaging takes twice as long and is less accurate.

    Args:
        pixels: [H, W] or [H, W, C] uint8.
        mode: the filter, `bicubic` or `bilinear`.

    Returns:
        [h, w] or [h, w, C] uint8, of the bucket's size.
    """
    if placement.resized != (pixels.shape[1], pixels.shape[0]):
        if math.prod(placement.resized) > MAX_CUT_OFF * math.prod(placement.bucket):
            return _cut_and_resize(pixels, placement, mode)
        # [1, C, H, W] in channels-last memory, the layout with a fast kernel.
        images = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None])[None].permute(0, 3, 1, 2)
        size = (placement.resized[1], placement.resized[0])
        resized = torch.nn.functional.interpolate(images, size=size, mode=mode, antialias=True)
        pixels = resized[0].permute(1, 2, 0).numpy().reshape(*size, *pixels.shape[2:])
    left, top, (width, height) = placement.left, placement.top, placement.bucket
    return pixels[top : top + height, left : left + width]


def _cut_and_resize(pixels: np.ndarray, placement: Placement, mode: str) -> np.ndarray:
    """Like `resize_and_crop`, but compute only the bucket's pixels. Pillow resizes a box to a fraction of a pixel."""
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    height, width = pixels.shape[:2]
    scale_x, scale_y = width / placement.resized[0], height / placement.resized[1]
    left, top = placement.left * scale_x, placement.top * scale_y
    right, bottom = left + placement.bucket[0] * scale_x, top + placement.bucket[1] * scale_y
    box = (left, top, min(right, width), min(bottom, height))
    return np.asarray(Image.fromarray(pixels).resize(placement.bucket, filters[mode], box))


def read_image_size(path: Path, exact: bool = True) -> Size:
    """Read the upright size of an image from its header.

    Args:
        exact: decode PNGs too, because their EXIF rotation may follow the pixels. False ignores such a rotation and
            takes a twentieth of the time.

    Raises:
        BadImageError: the file is missing, or is not an image.
    """
    try:
        with open_stream(path, MAX_IMAGE_BYTES) as file:
            try:
                image = open_image_stream(file)
                return _swap_if_rotated(Size(*image.size), image, exact)
            except ValueError:  # perhaps large texts in a PNG
                file.seek(0)
                image = open_image_stream(io.BytesIO(drop_png_texts(file.read())))
                return _swap_if_rotated(Size(*image.size), image, exact)
    except DECODE_ERRORS as error:
        raise BadImageError(f"{path}: cannot be read: {describe_error(error)}") from None


def _reduce_depth(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to 8-bit grey by scaling. Pillow's own conversion clips, which turns most images white.

    A transparent shade becomes an alpha channel.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = Image.fromarray((values >> 8).astype(np.uint8))
        shade = image.info.get("transparency")
        if not isinstance(shade, int):
            return grey
        return Image.merge("LA", (grey, Image.fromarray(np.where(values == shade, 0, 255).astype(np.uint8))))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit grey has no known range; save it with 8 or 16 bits")
    return image
