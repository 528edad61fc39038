"""Mask files (`data.masks`): grey pictures that say where the loss counts. Which picture has one, and where it is."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.data.folders import FileChecker, PictureTable, is_ending, strip_suffix

AT_ONCE = 8192  # pictures, of few folders mostly


class MaskFinder:
    """Finds the masks of pictures.

    Args:
        masks: as in `data.masks`: how the names of masks end beside their pictures, or the folder that holds them.
    """

    def __init__(self, masks: str):
        self._ending = masks if is_ending(masks) else None
        self._checker = FileChecker()
        self._table = PictureTable([Path(masks)] if self._ending is None else [])

    def find(self, images: Iterable[str]) -> Iterator[str | None]:
        """The absolute path of each picture's mask, None where there is none."""
        images = iter(images)
        while some := list(islice(images, AT_ONCE)):
            yield from self._find_in_folder(some) if self._ending is None else self._find_beside(some, self._ending)

    def find_twins(self) -> tuple[str, str] | None:
        """Two masks of one stem, or None."""
        return self._table.find_twins()

    @property
    def is_empty(self) -> bool:
        """Whether there can be no masks: the folder holds no pictures."""
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
        return [Problem("data.masks", masks, "holds no pictures", "check the path and the file types")]
    if twins := finder.find_twins():
        rule = f"holds two masks of one stem: {twins[0]} and {twins[1]}"
        return [Problem("data.masks", masks, rule, "keep one of them")]
    return []
