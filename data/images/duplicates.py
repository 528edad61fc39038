"""Duplicates among images: files of equal bytes, and images that look alike.

Images that look alike have perceptual hashes that differ in few bits, and thumbnails of nearly equal colours. The hash
is the usual one: the signs of an image's 64 lowest frequencies, which survive another size, format or compression.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from sdxl_trainer.data.files import hash_file, open_stream

T = TypeVar("T", bound=Hashable)

GREY_PX, NUM_WAVES = 32, 8  # side of the image that is transformed, and its frequencies in each direction
COLOUR_PX = 8  # side of the thumbnail whose colours are compared
MAX_BITS = 5  # of 64 that the hashes of images which look alike may differ in
# Of 0 to 255, averaged over a thumbnail. A copy in another size and compression differs by 1 to 3; a shape in another
# colour, which has the same hash, by more than 20.
MAX_COLOUR_DIFFERENCE = 8
END_BYTES = 4096  # of a file, hashed before the whole file is


class Likeness(NamedTuple):
    """The look of an image."""

    bits: int  # perceptual hash, 64 bits
    colours: np.ndarray  # [8, 8, 3] uint8


def measure_likeness(image: Image.Image) -> Likeness:
    """Measure the look of an RGB image of any size."""
    grey = np.asarray(image.convert("L").resize((GREY_PX, GREY_PX), Image.Resampling.BOX), np.float32)
    places = np.arange(GREY_PX) + 0.5
    waves = np.cos(np.pi / GREY_PX * np.outer(np.arange(NUM_WAVES), places))  # [8, 32], the discrete cosine transform
    # Rounded, because those of a flat image are only rounding errors. [64]; the first is the mean brightness.
    frequencies = np.rint(waves @ grey @ waves.T).ravel()
    is_high = frequencies > np.median(frequencies[1:])
    colours = image.convert("RGB").resize((COLOUR_PX, COLOUR_PX), Image.Resampling.BOX)
    return Likeness(int.from_bytes(np.packbits(is_high).tobytes(), "big"), np.asarray(colours))


def group_alike(likenesses: Sequence[Likeness]) -> list[list[int]]:
    """Return the groups of images that look alike, by their places. An image is in the group of any that it is like.

    Images are compared if their hashes agree in one of six parts, which those that differ in at most five bits do. So a
    million images need no million squared comparisons.
    """
    if not likenesses:
        return []
    places_of_hash: dict[int, list[int]] = defaultdict(list)
    for place, likeness in enumerate(likenesses):
        places_of_hash[likeness.bits].append(place)
    groups = _Groups(len(likenesses))
    colours = np.stack([likeness.colours for likeness in likenesses]).reshape(len(likenesses), -1).astype(np.int16)
    for places in places_of_hash.values():
        for first, others in _split_by_colours(places, colours):
            groups.join(first, others)
    hashes = np.array(list(places_of_hash), np.uint64)
    for one, other in _find_close_hashes(hashes):
        for place in places_of_hash[int(hashes[one])]:
            partners = np.array(places_of_hash[int(hashes[other])])
            close = np.abs(colours[partners] - colours[place]).mean(1) <= MAX_COLOUR_DIFFERENCE
            groups.join(place, partners[close].tolist())
    return groups.list_all()


def _split_by_colours(places: Sequence[int], colours: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """Yield the images of one hash in groups of nearly equal colours: the first of a group, and the others."""
    left = np.array(places)
    while len(left) > 1:
        close = np.abs(colours[left] - colours[left[0]]).mean(1) <= MAX_COLOUR_DIFFERENCE
        yield int(left[0]), left[close].tolist()
        left = left[~close]


def _find_close_hashes(hashes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the places of each two different hashes that differ in at most MAX_BITS bits; some pairs come twice.

    Args:
        hashes: [N] uint64, all different.
    """
    num_parts = MAX_BITS + 1
    edges = [64 * part // num_parts for part in range(num_parts + 1)]
    for low, high in zip(edges, edges[1:], strict=False):
        parts = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(parts, kind="stable")
        ends = np.flatnonzero(np.append(np.diff(parts[order]) != 0, True)) + 1
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            same = order[start:end]
            for number, place in enumerate(same[:-1].tolist()):
                others = same[number + 1 :]
                differing = np.unpackbits((hashes[others] ^ hashes[place]).view(np.uint8).reshape(-1, 8), axis=1).sum(1)
                yield from ((place, other) for other in others[differing <= MAX_BITS].tolist())


def group_equal_files(paths: Sequence[str], num_workers: int) -> list[list[int]]:
    """Return the groups of files with the same bytes, by their places. Only files of one size are read.

    Files that are empty or cannot be read are in no group. A path that comes twice counts once.
    """
    places: dict[str, int] = {}
    for place, path in enumerate(paths):
        places.setdefault(path, place)
    with ThreadPoolExecutor(num_workers) as pool:
        candidates = _group_by(places.values(), pool.map(_read_size, places))
        for describe in (_hash_end, _hash_whole):
            left = [place for group in candidates for place in group]
            known = [key for number, group in enumerate(candidates) for key in [number] * len(group)]
            described = pool.map(describe, [paths[place] for place in left])
            keys = [text and (number, text) for number, text in zip(known, described, strict=True)]
            candidates = _group_by(left, keys)
    return candidates


def _group_by(places: Iterable[int], keys: Iterable[T | None]) -> list[list[int]]:
    """Return the groups of at least two places with one key; None is no key."""
    groups: dict[T, list[int]] = defaultdict(list)
    for place, key in zip(places, keys, strict=True):
        if key is not None:
            groups[key].append(place)
    return [group for group in groups.values() if len(group) > 1]


def _read_size(path: str) -> int | None:
    with suppress(OSError, ValueError):
        return os.stat(path).st_size or None
    return None


def _hash_end(path: str) -> str | None:
    """Hash the last bytes of a file, which differ in nearly all files of one size."""
    with suppress(OSError), open_stream(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - END_BYTES))
        return hashlib.sha256(file.read(END_BYTES)).hexdigest()
    return None


def _hash_whole(path: str) -> str | None:
    with suppress(OSError):
        return hash_file(Path(path))
    return None


class _Groups:
    """Places that are joined into groups (a union-find forest)."""

    def __init__(self, number: int):
        self._parents = list(range(number))

    def _find(self, place: int) -> int:
        while self._parents[place] != place:
            self._parents[place] = self._parents[self._parents[place]]
            place = self._parents[place]
        return place

    def join(self, place: int, others: Iterable[int]) -> None:
        """Put places into the group of `place`."""
        for other in others:
            self._parents[self._find(other)] = self._find(place)

    def list_all(self) -> list[list[int]]:
        """List the groups of at least two places, in the order of their first ones."""
        return _group_by(range(len(self._parents)), map(self._find, range(len(self._parents))))
