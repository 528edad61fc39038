"""From a mask file to the pixels of its picture's bucket."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from sdxl_trainer.data.bucket import Size
from sdxl_trainer.data.manifest import MaskFile
from sdxl_trainer.data.transforms import (
    DECODE_ERRORS,
    BadImageError,
    PreparedImage,
    cut_image,
    decode_content,
    read_content,
)


class BadMaskError(BadImageError):
    """A mask that cannot be used, nor can its picture then: it would be trained as if it had none."""


def add_mask(image: PreparedImage, picture: Path, mask: Path) -> PreparedImage:
    """The same with the mask of a file, cut like the pixels. It takes the place of opacity, as in kohya's scripts.

    Resized with a triangle filter: it averages when it shrinks and never leaves the range of the values around, so that
    black stays 0 and white 1. Bicubic would overshoot.

    Args:
        picture: the file that the image was read from.

    Raises:
        BadMaskError: missing, unreadable, transparent, or of another aspect ratio than the picture.
    """
    try:
        content, mtime_ns = read_content(mask)
        grey = _decode_grey(content)
        if not _fits(grey, image.original_size):
            grey = _turn(grey, picture)
    except BadImageError as error:
        raise BadMaskError(f"mask {error}") from None
    except DECODE_ERRORS as error:
        raise BadMaskError(f"mask {mask}: cannot be decoded: {error}") from None
    if not _fits(grey, image.original_size):
        sizes = "{}x{}, which is not the shape of its picture of {}x{}".format(*grey.shape[::-1], *image.original_size)
        raise BadMaskError(f"mask {mask}: is of {sizes} px")
    cut = np.ascontiguousarray(cut_image(grey, image.placement, "bilinear"))
    file = MaskFile(str(mask), len(content), mtime_ns, hashlib.sha256(content).hexdigest())
    return replace(image, mask=cut, mask_file=file)


def _decode_grey(content: bytes) -> np.ndarray:
    """[H, W] uint8: the red channel as stored, as kohya's scripts take it; of a grey picture any is the same."""
    decoded = decode_content(content)
    if decoded.alpha is not None and decoded.alpha.min() < 255:
        raise ValueError("it is transparent in places; save it as plain grey, white where the loss counts")
    return np.ascontiguousarray(decoded.pixels[..., 0])


def _fits(mask: np.ndarray, size: Size) -> bool:
    """Whether a mask [H, W] has the shape of a picture of (width, height), at any scale: each side of it is less than a
    pixel off."""
    return abs(mask.shape[1] * size[1] - mask.shape[0] * size[0]) < size[0] + size[1]


def _turn(mask: np.ndarray, picture: Path) -> np.ndarray:
    """The mask turned as EXIF says of the picture: it was drawn on the pixels as they are stored."""
    image = Image.fromarray(mask)
    with Image.open(picture) as told:
        image.getexif()[ExifTags.Base.Orientation] = told.getexif().get(ExifTags.Base.Orientation, 1)
    return np.asarray(ImageOps.exif_transpose(image))
