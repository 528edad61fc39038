"""Mask files (`data.masks`): find the mask of an image, and crop it like the image.

A mask is a grey image. Its values weight the loss: white counts in full, black not at all.
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
from sdxl_trainer.data.images.image_files import UnreadableFolderError, get_image_stem, is_name_ending
from sdxl_trainer.data.images.image_lookup import FileChecker, ImageTable
from sdxl_trainer.data.images.image_opening import open_image
from sdxl_trainer.data.images.transforms import (
    DECODE_ERRORS,
    BadImageError,
    PreparedImage,
    decode_rgb,
    describe_error,
    read_content,
    resize_and_crop,
)

CHUNK_SIZE = 8192  # images, mostly of few folders


class MaskFinder:
    """Finds the masks of images.

    Args:
        masks: as in `data.masks`: the ending of file names of masks beside their images, or the folder of the masks.
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

    def find_duplicate_stem(self) -> tuple[str, str] | None:
        """Return the paths of two masks with the same stem, or None."""
        return self._table.find_duplicate_stem()

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
    """Yield a problem unless `data.masks` is an ending of file names, or a folder with one mask for each stem."""
    if masks is None:
        return
    if not is_name_ending(masks) and not os.path.isdir(masks):
        cure = "give a folder, or an ending of file names such as -masklabel.png"
        yield Problem("data.masks", masks, "is not a folder", cure)
        return
    try:
        finder = MaskFinder(masks)
    except UnreadableFolderError as error:
        yield Problem("data.masks", masks, str(error), "correct the permissions")
        return
    if finder.is_empty:
        yield Problem("data.masks", masks, "holds no images", "check the path and the file types")
    elif pair := finder.find_duplicate_stem():
        rule = f"holds two masks with the same stem: {pair[0]} and {pair[1]}"
        yield Problem("data.masks", masks, rule, "remove one of them")


class BadMaskError(BadImageError):
    """A mask that cannot be used. Its image is bad too, because training would ignore the mask."""


def add_mask(image: PreparedImage, image_file: Path, mask: Path) -> PreparedImage:
    """Return the image with the mask from a file, resized and cropped like the pixels.

    The mask replaces the image's opacity, as in kohya's scripts. A triangle filter resizes the mask: it averages when
    it shrinks, and keeps black at 0 and white at 1. A bicubic filter would overshoot.

    Args:
        image_file: the file that the image was read from.
        mask: the mask file.

    Raises:
        BadMaskError: the mask is missing, unreadable, transparent, or of another aspect ratio than the image.
    """
    try:
        content, mtime_ns = read_content(mask)
        grey = _decode_grey(content)
        if not _has_aspect_ratio(grey, image.original_size):
            grey = _rotate_like(grey, image_file)
    except BadImageError as error:
        raise BadMaskError(f"mask {error}") from None
    except DECODE_ERRORS as error:
        raise BadMaskError(f"mask {mask}: cannot be decoded: {describe_error(error)}") from None
    if not _has_aspect_ratio(grey, image.original_size):
        size, image_size = Size(grey.shape[1], grey.shape[0]), image.original_size
        raise BadMaskError(f"mask {mask}: {size} px is not the aspect ratio of its image, {image_size} px")
    try:
        cropped = np.ascontiguousarray(resize_and_crop(grey, image.placement, "bilinear"))
    except (MemoryError, RuntimeError) as error:
        raise BadMaskError(f"mask {mask}: cannot be resized: {describe_error(error)}") from None
    digest = hashlib.sha256(content).hexdigest()
    file = HashedFile(path=str(mask), bytes=len(content), mtime_ns=mtime_ns, sha256=digest)
    return replace(image, mask=cropped, mask_file=file)


def _decode_grey(content: bytes) -> np.ndarray:
    """Return the red channel, [H, W] uint8, as kohya's scripts do. All channels of a grey image are equal."""
    decoded = decode_rgb(content)
    if decoded.alpha is not None and decoded.alpha.min() < 255:
        raise ValueError("the mask is transparent in places; save it as opaque grey, white where the loss counts")
    return np.ascontiguousarray(decoded.pixels[..., 0])


def _has_aspect_ratio(mask: np.ndarray, size: Size) -> bool:
    """Return whether a mask [H, W] has the aspect ratio of an image's size, to less than a pixel of each side."""
    return abs(mask.shape[1] * size.height - mask.shape[0] * size.width) < size.width + size.height


def _rotate_like(mask: np.ndarray, image_file: Path) -> np.ndarray:
    """Apply the image's EXIF rotation to a mask [H, W] that was drawn on the pixels as they are stored."""
    rotated = Image.fromarray(mask)
    exif = open_image(read_content(image_file).content).getexif()
    rotated.getexif()[ExifTags.Base.Orientation] = exif.get(ExifTags.Base.Orientation, 1)
    return np.asarray(ImageOps.exif_transpose(rotated))
