"""Folders of images: what is in them, where an image is that a record names, and the caption file beside it.

Folders are listed, not asked for one file after the other: over a network that is a thousand times fewer questions.
"""

import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
CAPTION_SUFFIXES = (".txt", ".caption")
LATENT_SUFFIX = ".npz"
SIZED = re.compile(r"_\d{4,}x\d{4,}_sdxl$")  # what kohya's scripts put behind a latent file's stem
TEXT_OUTPUTS_SUFFIX = "_te_outputs.npz"  # kohya's cache of text encoder outputs: no latents
FEW = 32  # names for which a folder is not listed
MAX_LISTINGS = 256
NO_HASHES = np.empty(0, np.int64)


def strip_suffix(path: str, always: bool = False) -> str:
    """The stem of an image's path, which may be a latent file's, or have no suffix: `a/b.c.png` is `b.c`, and so is
    `a/b.c`, unless there is `always` a suffix. Of a latent file, the size that kohya puts into the name goes too."""
    name = path.replace("\\", "/").rsplit("/", 1)[-1] if "/" in path or "\\" in path else path
    stem, suffix = os.path.splitext(name)
    if suffix.lower() == LATENT_SUFFIX:
        return SIZED.sub("", stem)
    return stem if always or suffix.lower() in IMAGE_SUFFIXES else name


def walk_files(roots: Sequence[Path], masks: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """(absolute folder, sorted names of its files) of all folders below the roots, in an order that no disk decides.

    Args:
        masks: as in `data.masks`: an ending of file names, or a folder, to be passed over.
    """
    ending = masks if masks is not None and is_ending(masks) else None
    passed_over = os.path.abspath(masks) if masks is not None and ending is None else None
    for root in roots:
        for folder, folders, names in os.walk(os.path.abspath(root)):
            folders[:] = sorted(name for name in folders if os.path.join(folder, name) != passed_over)
            yield folder, sorted(name for name in names if not name.endswith(ending)) if ending else sorted(names)


def is_ending(masks: str) -> bool:
    """Whether masks are told by the ending of their names, such as `-masklabel.png`, and not by their folder."""
    return "/" not in masks and is_image(masks)


def walk_images(roots: Sequence[Path], masks: str | None = None) -> Iterator[tuple[str, list[str], set[str]]]:
    """(absolute folder, names of its images, names of all its files). Below a root that holds no images, latent
    files stand in for them; of two for one image, the one of the plain name. `masks` as for `walk_files`."""
    for root in roots:
        suffixes = IMAGE_SUFFIXES
        if not any(is_image(name) for _, names in walk_files([root], masks) for name in names):
            suffixes = frozenset({LATENT_SUFFIX})
        for folder, names in walk_files([root], masks):
            everything = set(names)
            chosen = [name for name in names if os.path.splitext(name)[1].lower() in suffixes]
            if LATENT_SUFFIX in suffixes:
                chosen = list(choose_latents(chosen).values())
            yield folder, chosen, everything


def choose_latents(names: Sequence[str]) -> dict[str, str]:
    """Stem of the image → name of its latent file, of one folder's sorted names; `{stem}.npz` goes before kohya's
    `{stem}_{W:04d}x{H:04d}_sdxl.npz`."""
    chosen: dict[str, str] = {}
    for name in names:
        if name.endswith(LATENT_SUFFIX) and not name.endswith(TEXT_OUTPUTS_SUFFIX):
            stem = strip_suffix(name)
            if len(name) == len(stem) + len(LATENT_SUFFIX):
                chosen[stem] = name
            else:
                chosen.setdefault(stem, name)
    return chosen


def is_image(name: str) -> bool:
    """Whether a file is an image, told by its suffix."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def read_sidecar(folder: str, name: str, everything: set[str]) -> str | None:
    """The caption in the `.txt` or `.caption` file beside an image.

    Raises:
        ValueError: it is not UTF-8.
    """
    stem = strip_suffix(name, always=True)
    for suffix in CAPTION_SUFFIXES:
        if stem + suffix in everything:
            path = os.path.join(folder, stem + suffix)
            try:
                return Path(path).read_text(encoding="utf-8-sig").strip()  # Windows editors put a mark in front
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None
    return None


class FileChecker:
    """Tells which files exist, mostly from listings of their folders."""

    def __init__(self) -> None:
        self._listings: OrderedDict[str, np.ndarray] = OrderedDict()

    def exist(self, paths: Sequence[str]) -> np.ndarray:
        """[N] bool: whether each absolute path is a file; "" is none. For paths of few folders at a time."""
        folders = [path.rpartition("/")[0] for path in paths]
        counts = Counter(folders)
        few = {folder for folder, count in counts.items() if count < FEW and folder not in self._listings}
        listings = [self._list(folder) for folder in counts if folder not in few]
        # Stable sorting merges what is sorted already.
        listing = np.sort(np.concatenate(listings), kind="stable") if len(listings) > 1 else [*listings, NO_HASHES][0]
        found = contains(listing, hash_texts(paths)) if len(listing) else np.zeros(len(paths), bool)
        if few - {""}:
            for at, (path, folder) in enumerate(zip(paths, folders, strict=True)):
                found[at] |= folder in few and path != "" and os.path.isfile(path)
        return found

    def _list(self, folder: str) -> np.ndarray:
        """Hashes of the paths of a folder's files, sorted."""
        listing = self._listings.get(folder)
        if listing is None:
            try:
                with os.scandir(folder or "/") as entries:
                    listing = np.sort(hash_texts([f"{folder}/{entry.name}" for entry in entries if entry.is_file()]))
            except OSError:
                listing = NO_HASHES
            self._listings[folder] = listing
            if len(self._listings) > MAX_LISTINGS:
                self._listings.popitem(last=False)
        return listing


class AmbiguousImageError(ValueError):
    """Records whose image might be one of several."""


class ImageTable:
    """Images below folders by file name and by stem. Compact: 50 bytes and the path each."""

    def __init__(self, roots: Sequence[Path], masks: str | None = None):
        paths, names, stems, seen = [], [], [], set()
        for folder, chosen, _ in walk_images(roots, masks):
            if folder in seen:  # one root lies in another
                continue
            seen.add(folder)
            paths.append(pa.array([os.path.join(folder, name) for name in chosen], pa.string()))
            names.append(hash_texts(chosen))
            stems.append(hash_texts([strip_suffix(name, always=True) for name in chosen]))
        self._paths = pa.chunked_array(paths, pa.string())
        self._names, self._stems = (_sort_hashes(hashes) for hashes in (names, stems))

    def __len__(self) -> int:
        return len(self._paths)

    def find_twins(self) -> tuple[str, str] | None:
        """Two images of one stem, or None."""
        hashes, order = self._stems
        same = np.flatnonzero(hashes[1:] == hashes[:-1])[:1]
        twins = [self._paths[int(order[at])].as_py() for place in same.tolist() for at in (place, place + 1)]
        return (twins[0], twins[1]) if twins else None

    def find(self, names: Sequence[str], stems: Sequence[str]) -> list[str | None]:
        """The image of each name, else of each stem, else None.

        Raises:
            AmbiguousImageError: there are two of a name, or of a stem where none has the name.
        """
        by_name, by_stem = (
            _search(*table, hash_texts(texts)) for table, texts in ((self._names, names), (self._stems, stems))
        )
        firsts, seconds = np.where(by_name[0] >= 0, by_name, by_stem)
        self._refuse_several(names, firsts, seconds)
        return [self._paths[row].as_py() if row >= 0 else None for row in firsts.tolist()]

    def _refuse_several(self, names: Sequence[str], firsts: np.ndarray, seconds: np.ndarray) -> None:
        several = np.flatnonzero(seconds >= 0).tolist()
        if several:
            pairs = [(names[at], self._paths[int(firsts[at])], self._paths[int(seconds[at])]) for at in several[:FEW]]
            shown = ", ".join(f"'{name}' ({first} and {second})" for name, first, second in pairs)
            more = ", ..." if len(several) > FEW else ""
            raise AmbiguousImageError(
                f"{len(several)} records name an image of which there are several under data.image_dirs: "
                f"{shown}{more}; give their whole path as image_path, or leave a folder out"
            )


def hash_texts(texts: Sequence[str]) -> np.ndarray:
    """[N] int64, the same only within this process. Of a billion texts two have one hash with a chance of 3 %."""
    return np.fromiter(map(hash, texts), np.int64, len(texts))


def contains(hashes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[N] bool: whether each of `wanted` [N] is among the sorted `hashes`."""
    if len(hashes) == 0:
        return np.zeros(len(wanted), bool)
    return hashes[np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)] == wanted


def _sort_hashes(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    hashes = np.concatenate([np.empty(0, np.int64), *parts])
    order = np.argsort(hashes, kind="stable")
    return hashes[order], order


def _search(hashes: np.ndarray, order: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[2, N] the first two rows that have each hash, -1 where there are no two, or none."""
    rows = np.full((2, len(wanted)), -1)
    places = np.searchsorted(hashes, wanted)
    for number in range(2):
        at = np.flatnonzero(places + number < len(hashes))
        at = at[hashes[places[at] + number] == wanted[at]]
        rows[number, at] = order[places[at] + number]
    return rows
