"""Folders that are named as kohya's scripts read them: `10_sks dog` holds images with 10 repeats and this caption."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sdxl_trainer.configs.paths import REPEATS_PREFIX

MAX_REPEATS = 1000  # a larger number is no repeat, but a year
MAX_SHOWN = 3  # folders that a message names


class KohyaFolder(NamedTuple):
    """The meaning of a folder's name."""

    repeats: int
    caption: str | None  # of images without a caption file; None if the name has only a number


def parse_folder_name(name: str) -> KohyaFolder | None:
    """Parse a folder's name; None if it does not begin with a number and an underscore."""
    match = re.match(REPEATS_PREFIX, name)
    return KohyaFolder(int(match[1]), name[match.end() :].strip() or None) if match else None


def find_kohya_folder(folder: str, roots: Sequence[str]) -> KohyaFolder | None:
    """Return the meaning of the nearest folder above an image that has one, up to and including its root.

    Args:
        folder: absolute path of the image's folder.
        roots: absolute paths of image folders. The longest that holds the image counts.
    """
    holding = [root for root in roots if folder == root or folder.startswith(f"{root}/")]
    if not holding:
        return None
    names = folder[len(os.path.dirname(max(holding, key=len))) :].strip("/").split("/")
    return next((found for name in reversed(names) if (found := parse_folder_name(name))), None)


def list_kohya_folders(roots: Sequence[Path]) -> list[str]:
    """List the names of folders, the roots and those in them, that look like kohya's with repeats other than 1."""
    names = [os.path.basename(os.path.abspath(root)) for root in roots]
    for root in roots:
        try:
            with os.scandir(root) as entries:
                names += sorted(entry.name for entry in entries if entry.is_dir())
        except OSError:  # check_sources reports it
            continue
    parsed = [(name, parse_folder_name(name)) for name in names]
    return [name for name, found in parsed if found and found.repeats != 1 and found.repeats < MAX_REPEATS]


def describe_folders(names: Sequence[str]) -> str:
    """Return the first names of folders, for a message."""
    return ", ".join(names[:MAX_SHOWN]) + (", ..." if len(names) > MAX_SHOWN else "")
