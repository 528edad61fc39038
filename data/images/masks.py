"""Mask files (`data.masks`): find the mask of an image, and cut it like the image.

A mask is a grey image. Its values weigh the loss: white counts in full, black not at all.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.data.files import HashedFile
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.images.image_files import FileChecker, ImageTable, get_image_stem, is_name_ending
from sdxl_trainer.data.images.transforms import (
    DECODE_ERRORS,
    BadImageError,
    PreparedImage,
    cut_image,
    decode_content,
    read_content,
)

CHUNK_SIZE = 8192  # images, mostly of few folders


class MaskFinder:
    """Finds the masks of images.

    Args:
        masks: as in `data.masks`: the ending of the names of masks beside their images, or the folder of the masks.
    """

    def __init__(self, masks: str):
        self._ending = masks if is_name_ending(masks) else None
        self._checker = FileChecker()
        self._table = ImageTable([Path(masks)] if self._ending is None else [])

    def find(self, images: Iterable[str]) -> Iterator[str | None]:
        """Yield the absolute path of each image's mask, or None if it has none."""
        images = iter(images)
        while chunk := list(islice(images, CHUNK_SIZE)):
            yield from self._find_in_folder(chunk) if self._ending is None else self._find_beside(chunk, self._ending)

    def find_twins(self) -> tuple[str, str] | None:
        """Return two masks of one stem, or None."""
        return self._table.find_twins()

    @property
    def is_empty(self) -> bool:
        """True if the folder of masks holds no images."""
        return self._ending is None and len(self._table) == 0

    def _find_beside(self, images: Sequence[str], ending: str) -> list[str | None]:
        paths = [os.path.splitext(image)[0] + ending for image in images]
        found = self._checker.exist(paths)
        return [path if exists else None for path, exists in zip(paths, found.tolist(), strict=True)]

    def _find_in_folder(self, images: Sequence[str]) -> list[str | None]:
        stems = [get_image_stem(image, has_suffix=True) for image in images]
        return self._table.find(stems, stems)


def check_masks(masks: str | None) -> Iterator[Problem]:
    """Check `data.masks` where masks are read: an ending of file names, or a folder with one image a stem."""
    if masks is None:
        return
    if not is_name_ending(masks) and not os.path.isdir(masks):
        cure = "give a folder, or an ending of file names such as -masklabel.png"
        yield Problem("data.masks", masks, "is not a folder", cure)
        return
    finder = MaskFinder(masks)
    if finder.is_empty:
        yield Problem("data.masks", masks, "holds no images", "check the path and the file types")
    elif twins := finder.find_twins():
        rule = f"holds two masks of one stem: {twins[0]} and {twins[1]}"
        yield Problem("data.masks", masks, rule, "keep one of them")


class BadMaskError(BadImageError):
    """A mask that cannot be used. Its image is bad too, because it would be trained as if it had no mask."""


def add_mask(image: PreparedImage, image_file: Path, mask: Path) -> PreparedImage:
    """Return the image with the mask of a file, cut like the pixels.

    The mask replaces the image's opacity, as in kohya's scripts. It is resized with a triangle filter, which averages
    when it shrinks and keeps black at 0 and white at 1. Bicubic would overshoot.

    Args:
        image_file: the file that the image was read from.
        mask: the file of the mask.

    Raises:
        BadMaskError: the mask is missing, unreadable, transparent, or of another aspect ratio than the image.
    """
    try:
        content, mtime_ns = read_content(mask)
        grey = _decode_grey(content)
        if not _has_shape(grey, image.original_size):
            grey = _turn_like(grey, image_file)
    except BadImageError as error:
        raise BadMaskError(f"mask {error}") from None
    except DECODE_ERRORS as error:
        raise BadMaskError(f"mask {mask}: cannot be decoded: {error}") from None
    if not _has_shape(grey, image.original_size):
        sizes = "{}x{}, which is not the shape of its image of {}x{}".format(*grey.shape[::-1], *image.original_size)
        raise BadMaskError(f"mask {mask}: is of {sizes} px")
    cut = np.ascontiguousarray(cut_image(grey, image.placement, "bilinear"))
    digest = hashlib.sha256(content).hexdigest()
    file = HashedFile(path=str(mask), bytes=len(content), mtime_ns=mtime_ns, sha256=digest)
    return replace(image, mask=cut, mask_file=file)


def _decode_grey(content: bytes) -> np.ndarray:
    """Return the red channel, [H, W] uint8, as kohya's scripts do; in a grey image all channels are equal."""
    decoded = decode_content(content)
    if decoded.alpha is not None and decoded.alpha.min() < 255:
        raise ValueError("it is transparent in places; save it as plain grey, white where the loss counts")
    return np.ascontiguousarray(decoded.pixels[..., 0])


def _has_shape(mask: np.ndarray, size: Size) -> bool:
    """Return whether a mask [H, W] has the aspect ratio of an image's size, each side to less than a pixel."""
    return abs(mask.shape[1] * size.height - mask.shape[0] * size.width) < size.width + size.height


def _turn_like(mask: np.ndarray, image_file: Path) -> np.ndarray:
    """Apply the EXIF rotation of the image to a mask [H, W] that was drawn on the pixels as they are stored."""
    turned = Image.fromarray(mask)
    with Image.open(image_file) as image:
        turned.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
    return np.asarray(ImageOps.exif_transpose(turned))
