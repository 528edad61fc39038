"""Keys of images in folders: the file stem or, where several images share it, the folders that tell them apart.

`10_dog/1.png` and `5_cat/1.png` get the keys `10_dog/1` and `5_cat/1`. All other images keep their stem.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdxl_trainer.data.images.bucket import split_key
from sdxl_trainer.data.images.image_files import get_image_stem, is_name_ending, walk_images
from sdxl_trainer.data.images.image_lookup import hash_texts


class FolderKeys:
    """The keys of all images below folders.

    Two images that only their suffix tells apart keep their stem, and so does an image that two roots hold: such keys
    are no longer unique, which is an error of its own. So do all images if masks lie in a folder, because a mask is
    found by the stem of its image.

    Args:
        roots, masks: as in `walk_images`.
    """

    def __init__(self, roots: Sequence[Path], masks: str | None = None):
        # Hashes of the keys that several images would have, by the number of folders that the keys hold. An image takes
        # 8 bytes here; only images that share a stem take their path too.
        self._shared: list[frozenset[int]] = []
        if masks is not None and not is_name_ending(masks):
            return
        folders = [hash_texts([_get_stem(name) for name in folder.images]) for folder in walk_images(roots, masks)]
        shared = _find_shared(np.concatenate(folders) if folders else np.empty(0, np.int64))
        if not shared:
            return
        self._shared.append(shared)
        walked = ((folder.path, name) for folder in walk_images(roots, masks) for name in folder.images)
        paths = [f"{folder}/{_get_stem(name)}" for folder, name in walked if hash(_get_stem(name)) in shared]
        while paths and len(self._shared) < max(path.count("/") for path in paths):
            keys = [_cut(path, len(self._shared)) for path in paths]
            self._shared.append(_find_shared(hash_texts(keys)))
            paths = [path for path, key in zip(paths, keys, strict=True) if hash(key) in self._shared[-1]]

    def get(self, folder: str, name: str) -> str:
        """Return the key of an image.

        Args:
            folder: absolute path of its folder.
            name: its file name.
        """
        stem = _get_stem(name)
        if not self._shared or hash(stem) not in self._shared[0]:
            return stem
        path = f"{folder}/{stem}"
        for depth in range(1, path.count("/")):
            key = _cut(path, depth)
            is_shared = depth < len(self._shared) and hash(key) in self._shared[depth]
            if not is_shared and not split_key(key).prefix:  # a folder `512px` would name a resolution
                return key
        return stem


def _get_stem(name: str) -> str:
    return get_image_stem(name, has_suffix=True)


def _cut(path: str, num_folders: int) -> str:
    """Return the end of a path, with a number of folders."""
    return "/".join(path.split("/")[-1 - num_folders :])


def _find_shared(hashes: np.ndarray) -> frozenset[int]:
    """Return the hashes that occur more than once."""
    ordered = np.sort(hashes)
    return frozenset(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
