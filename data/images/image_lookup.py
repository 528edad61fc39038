"""Lookup of image files: by path, in listings of their folders, and by file name or stem below folders.

Whole folders are listed instead of looking up each file, which takes a thousand times fewer requests over a network.
"""

import os
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.data.images.image_files import get_image_stem, walk_images

MIN_NAMES_TO_LIST = 32  # for fewer names in a folder, each file is looked up
MAX_LISTINGS = 256  # folders whose listing is kept
MAX_SHOWN = 32  # records that an error lists
NO_HASHES = np.empty(0, np.int64)


class FileChecker:
    """Checks whether files exist, mostly in listings of their folders."""

    def __init__(self) -> None:
        self._listings: OrderedDict[str, np.ndarray] = OrderedDict()

    def exist(self, paths: Sequence[str]) -> np.ndarray:
        """Return whether each absolute path is a file, [N] bool. An empty path is not a file.

        A call holds the listings of all its folders in memory, so pass paths of few folders.
        """
        folders = [path.rpartition("/")[0] for path in paths]
        counts = Counter(folders)
        unlisted = {name for name, count in counts.items() if count < MIN_NAMES_TO_LIST and name not in self._listings}
        listings = [self._list(folder) for folder in counts if folder not in unlisted]
        # The listings are sorted; a stable sort merges them.
        listing = np.sort(np.concatenate(listings), kind="stable") if len(listings) > 1 else [*listings, NO_HASHES][0]
        found = _contains(listing, hash_texts(paths))
        if unlisted - {""}:
            for at, (path, folder) in enumerate(zip(paths, folders, strict=True)):
                found[at] |= folder in unlisted and path != "" and os.path.isfile(path)
        return found

    def _list(self, folder: str) -> np.ndarray:
        """Return the sorted hashes of the paths of a folder's files."""
        listing = self._listings.get(folder)
        if listing is None:
            try:
                with os.scandir(folder or "/") as entries:
                    listing = np.sort(hash_texts([f"{folder}/{entry.name}" for entry in entries if _is_file(entry)]))
            except OSError:
                listing = NO_HASHES
            self._listings[folder] = listing
            if len(self._listings) > MAX_LISTINGS:
                self._listings.popitem(last=False)
        return listing


class AmbiguousImageError(ValueError):
    """Records name an image that exists more than once."""


class ImageTable:
    """Images below folders, by file name and by stem. An image takes 50 bytes plus its path."""

    def __init__(self, roots: Sequence[Path], masks: str | None = None):
        paths, names, stems, seen = [], [], [], set()
        for folder in walk_images(roots, masks):
            if folder.path in seen:  # one root lies in another
                continue
            seen.add(folder.path)
            paths.append(pa.array([os.path.join(folder.path, name) for name in folder.images], pa.string()))
            names.append(hash_texts(folder.images))
            stems.append(hash_texts([get_image_stem(name, has_suffix=True) for name in folder.images]))
        self._paths = pa.chunked_array(paths, pa.string())
        self._names, self._stems = (_sort_hashes(hashes) for hashes in (names, stems))

    def __len__(self) -> int:
        return len(self._paths)

    def find_duplicate_stem(self) -> tuple[str, str] | None:
        """Return the paths of two images with the same stem, or None."""
        hashes, order = self._stems
        same = np.flatnonzero(hashes[1:] == hashes[:-1])[:1]
        pair = [self._paths[int(order[at])].as_py() for place in same.tolist() for at in (place, place + 1)]
        return (pair[0], pair[1]) if pair else None

    def find(self, names: Sequence[str], stems: Sequence[str]) -> list[str | None]:
        """Return the path of the image with each name, or else with each stem, or else None.

        Raises:
            AmbiguousImageError: two images have the name, or none has it and two have the stem.
        """
        by_name, by_stem = (
            _search(*table, hash_texts(texts)) for table, texts in ((self._names, names), (self._stems, stems))
        )
        firsts, seconds = np.where(by_name[0] >= 0, by_name, by_stem)
        self._raise_if_ambiguous(names, firsts, seconds)
        return [self._paths[row].as_py() if row >= 0 else None for row in firsts.tolist()]

    def _raise_if_ambiguous(self, names: Sequence[str], firsts: np.ndarray, seconds: np.ndarray) -> None:
        ambiguous = np.flatnonzero(seconds >= 0).tolist()
        if ambiguous:
            shown = ", ".join(
                f"'{names[at]}' ({self._paths[int(firsts[at])]} and {self._paths[int(seconds[at])]})"
                for at in ambiguous[:MAX_SHOWN]
            )
            more = ", ..." if len(ambiguous) > MAX_SHOWN else ""
            raise AmbiguousImageError(
                f"{format_count(len(ambiguous), 'image name')} found more than once under data.image_dirs: "
                f"{shown}{more}; set image_path to the whole path, or remove a folder"
            )


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link in a loop, which must not hide the other files of its folder
        return False


def hash_texts(texts: Sequence[str]) -> np.ndarray:
    """Return the hash of each text, [N] int64, valid within this process.

    The chance that two of a billion texts have the same hash is 3 %.
    """
    return np.fromiter(map(hash, texts), np.int64, len(texts))


def _contains(hashes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return whether each of `wanted` [N] is among the sorted `hashes`, [N] bool."""
    if len(hashes) == 0:
        return np.zeros(len(wanted), bool)
    return hashes[np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)] == wanted


def _sort_hashes(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sort the concatenated hashes. Return ([N] sorted hashes, [N] their positions before the sort)."""
    hashes = np.concatenate([NO_HASHES, *parts])
    order = np.argsort(hashes, kind="stable")
    return hashes[order], order


def _search(hashes: np.ndarray, order: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the first two rows that have each hash, [2, N]; -1 where there are fewer."""
    rows = np.full((2, len(wanted)), -1)
    places = np.searchsorted(hashes, wanted)
    for number in range(2):
        at = np.flatnonzero(places + number < len(hashes))
        at = at[hashes[places[at] + number] == wanted[at]]
        rows[number, at] = order[places[at] + number]
    return rows
