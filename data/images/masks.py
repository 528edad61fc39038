"""Mask files (`data.masks`): grey images that say where the loss counts. Which image has one, and where it is."""

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
from sdxl_trainer.data.images.image_files import FileChecker, ImageTable, is_ending, strip_suffix
from sdxl_trainer.data.images.transforms import (
    DECODE_ERRORS,
    BadImageError,
    PreparedImage,
    cut_image,
    decode_content,
    read_content,
)

AT_ONCE = 8192  # images, of few folders mostly


class MaskFinder:
    """Finds the masks of images.

    Args:
        masks: as in `data.masks`: how the names of masks end beside their images, or the folder that holds them.
    """

    def __init__(self, masks: str):
        self._ending = masks if is_ending(masks) else None
        self._checker = FileChecker()
        self._table = ImageTable([Path(masks)] if self._ending is None else [])

    def find(self, images: Iterable[str]) -> Iterator[str | None]:
        """The absolute path of each image's mask, None where there is none."""
        images = iter(images)
        while some := list(islice(images, AT_ONCE)):
            yield from self._find_in_folder(some) if self._ending is None else self._find_beside(some, self._ending)

    def find_twins(self) -> tuple[str, str] | None:
        """Two masks of one stem, or None."""
        return self._table.find_twins()

    @property
    def is_empty(self) -> bool:
        """Whether there can be no masks: the folder holds no images."""
        return self._ending is None and len(self._table) == 0

    def _find_beside(self, images: Sequence[str], ending: str) -> list[str | None]:
        paths = [os.path.splitext(image)[0] + ending for image in images]
        there = self._checker.exist(paths)
        return [path if exists else None for path, exists in zip(paths, there.tolist(), strict=True)]

    def _find_in_folder(self, images: Sequence[str]) -> list[str | None]:
        stems = [strip_suffix(image, always=True) for image in images]
        return self._table.find(stems, stems)


def check_masks(masks: str | None) -> list[Problem]:
    """What is wrong with `data.masks` where masks are read."""
    if masks is None:
        return []
    if not is_ending(masks) and not os.path.isdir(masks):
        cure = "give a folder, or an ending of file names such as -masklabel.png"
        return [Problem("data.masks", masks, "is not a folder", cure)]
    finder = MaskFinder(masks)
    if finder.is_empty:
        return [Problem("data.masks", masks, "holds no images", "check the path and the file types")]
    if twins := finder.find_twins():
        rule = f"holds two masks of one stem: {twins[0]} and {twins[1]}"
        return [Problem("data.masks", masks, rule, "keep one of them")]
    return []


class BadMaskError(BadImageError):
    """A mask that cannot be used, nor can its image then: it would be trained as if it had none."""


def add_mask(image: PreparedImage, image_file: Path, mask: Path) -> PreparedImage:
    """The same with the mask of a file, cut like the pixels. It takes the place of opacity, as in kohya's scripts.

    Resized with a triangle filter: it averages when it shrinks and never leaves the range of the values around, so that
    black stays 0 and white 1. Bicubic would overshoot.

    Args:
        image_file: the file that the image was read from.

    Raises:
        BadMaskError: missing, unreadable, transparent, or of another aspect ratio than the image.
    """
    try:
        content, mtime_ns = read_content(mask)
        grey = _decode_grey(content)
        if not _fits(grey, image.original_size):
            grey = _turn(grey, image_file)
    except BadImageError as error:
        raise BadMaskError(f"mask {error}") from None
    except DECODE_ERRORS as error:
        raise BadMaskError(f"mask {mask}: cannot be decoded: {error}") from None
    if not _fits(grey, image.original_size):
        sizes = "{}x{}, which is not the shape of its image of {}x{}".format(*grey.shape[::-1], *image.original_size)
        raise BadMaskError(f"mask {mask}: is of {sizes} px")
    cut = np.ascontiguousarray(cut_image(grey, image.placement, "bilinear"))
    file = HashedFile(str(mask), len(content), mtime_ns, hashlib.sha256(content).hexdigest())
    return replace(image, mask=cut, mask_file=file)


def _decode_grey(content: bytes) -> np.ndarray:
    """[H, W] uint8: the red channel as stored, as kohya's scripts take it; of a grey image any is the same."""
    decoded = decode_content(content)
    if decoded.alpha is not None and decoded.alpha.min() < 255:
        raise ValueError("it is transparent in places; save it as plain grey, white where the loss counts")
    return np.ascontiguousarray(decoded.pixels[..., 0])


def _fits(mask: np.ndarray, size: Size) -> bool:
    """Whether a mask [H, W] has the shape of an image of (width, height), at any scale: each side of it is less than a
    pixel off."""
    return abs(mask.shape[1] * size[1] - mask.shape[0] * size[0]) < size[0] + size[1]


def _turn(mask: np.ndarray, image_file: Path) -> np.ndarray:
    """The mask turned as EXIF says of the image: it was drawn on the pixels as they are stored."""
    image = Image.fromarray(mask)
    with Image.open(image_file) as told:
        image.getexif()[ExifTags.Base.Orientation] = told.getexif().get(ExifTags.Base.Orientation, 1)
    return np.asarray(ImageOps.exif_transpose(image))
