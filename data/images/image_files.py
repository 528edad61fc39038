"""Image files in folders: list them, and read the caption files beside them."""

import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from sdxl_trainer.configs.problems import describe_encoding, format_count
from sdxl_trainer.data.files import read_regular
from sdxl_trainer.data.images.skipped_files import SkippedFiles

IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
        *(".avif", ".jp2", ".j2k", ".jpx", ".jpf", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi"),
        *(".jxl", ".heic", ".heif"),
    )
)
PLUG_INS = {".jxl": "pillow_jxl", ".heic": "pillow_heif", ".heif": "pillow_heif"}  # modules that Pillow needs
CAPTION_SUFFIXES = (".txt", ".caption")
LATENT_SUFFIX = ".npz"
SIZE_ENDING = re.compile(r"_\d{4,}x\d{4,}_sdxl$")  # kohya's scripts append it to a latent file's stem
TEXT_OUTPUTS_SUFFIX = "_te_outputs.npz"  # kohya's cache of text encoder outputs, not of latents
MAX_CAPTION_BYTES = 1 << 20
# Folders of operating systems and file servers, in lower case. They hold thumbnails, deleted files and resource forks.
SYSTEM_FOLDERS = frozenset(
    ("__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found")
    + ("system volume information",)
)
MAX_SHOWN = 20  # folders that an error lists


class UnreadableFolderError(ValueError):
    """Folders of images that cannot be listed."""


class ImageFolder(NamedTuple):
    """The files of a folder."""

    path: str  # absolute
    images: list[str]  # names, sorted
    captions: dict[str, str]  # stem or name of an image → name of its caption file


class _Listing(NamedTuple):
    """The entries of a folder that are not hidden, by kind; each list is sorted."""

    files: list[str]
    folders: list[str]
    links: list[str]  # to folders


def get_image_stem(path: str, has_suffix: bool = False) -> str:
    """Return the stem of an image's or a latent file's path: both `a/b.c.png` and `a/b.c` give `b.c`.

    The size that kohya's scripts append to the name of a latent file is removed too.

    Args:
        has_suffix: True removes any suffix; False removes only the suffix of an image or latent file.
    """
    name = path.replace("\\", "/").rsplit("/", 1)[-1] if "/" in path or "\\" in path else path
    stem, dot, ending = name.rpartition(".")
    if not stem.strip("."):  # such as `.png`, which has no suffix
        return name
    suffix = dot + ending.lower()
    if suffix == LATENT_SUFFIX:
        return SIZE_ENDING.sub("", stem)
    return stem if has_suffix or suffix in IMAGE_SUFFIXES else name


def walk_files(
    roots: Sequence[Path], masks: str | None = None, skipped: SkippedFiles | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yield (absolute path, sorted names of its files) for each folder below the roots, in sorted order.

    Hidden entries and those of the system are skipped. Folders that are links come after all others of their root, and
    no folder comes twice, so that a link to a folder above it ends there.

    Args:
        masks: as in `data.masks`, an ending of file names or a folder; mask files are skipped.
        skipped: collects what is skipped.

    Raises:
        UnreadableFolderError: after all other folders: some cannot be listed.
    """
    ending = masks if masks is not None and is_name_ending(masks) else None
    mask_folder = os.path.abspath(masks) if masks is not None and ending is None else None
    unreadable: list[str] = []
    for root in roots:
        seen: set[tuple[int, int]] = set()
        waiting, links = [os.path.abspath(root)], []
        while waiting or links:
            folder = waiting.pop() if waiting else links.pop(0)
            try:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                files, folders, linked = _list_folder(folder, skipped)
            except FileNotFoundError:
                continue
            except OSError as error:
                unreadable.append(f"{folder} ({error.strerror})")
                continue
            yield folder, [name for name in files if not name.endswith(ending)] if ending else files
            waiting += reversed([path for name in folders if (path := os.path.join(folder, name)) != mask_folder])
            links += [path for name in linked if (path := os.path.join(folder, name)) != mask_folder]
    if unreadable:
        shown = ", ".join(unreadable[:MAX_SHOWN]) + (", ..." if len(unreadable) > MAX_SHOWN else "")
        raise UnreadableFolderError(f"{format_count(len(unreadable), 'folder')} cannot be listed: {shown}")


def _list_folder(folder: str, skipped: SkippedFiles | None) -> _Listing:
    """List a folder's entries.

    Raises:
        OSError: the folder cannot be listed.
    """
    listing = _Listing([], [], [])
    with os.scandir(folder) as entries:
        for entry in entries:
            _add_entry(listing, entry, skipped)
    for names in listing:
        names.sort()
    return listing


def _add_entry(listing: _Listing, entry: os.DirEntry, skipped: SkippedFiles | None) -> None:
    """Add an entry of a folder to its listing, or note why it is skipped."""
    name, is_folder = entry.name, _is_folder(entry)
    if not _is_utf8(name):
        _note(skipped, "not_utf8", os.fsencode(entry.path).decode(errors="backslashreplace"))
    elif name.startswith(".") or (is_folder and name.lower() in SYSTEM_FOLDERS):
        if is_folder or is_image(name):
            _note(skipped, "hidden", entry.path)
    elif not is_folder:
        listing.files.append(name)
    else:
        (listing.links if entry.is_symlink() else listing.folders).append(name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a loop: if it is named like an image, decoding it reports the reason
        return False


def _is_utf8(name: str) -> bool:
    try:
        return name.isascii() or bool(name.encode())
    except UnicodeEncodeError:  # Python keeps the bytes of such a name as halves of surrogate pairs
        return False


def _note(skipped: SkippedFiles | None, kind: str, path: str) -> None:
    if skipped is not None:
        skipped.add(kind, path)


def is_name_ending(masks: str) -> bool:
    """Return whether `data.masks` is an ending of file names, such as `-masklabel.png`, and not a folder."""
    return "/" not in masks and is_image(masks)


def walk_images(
    roots: Sequence[Path], masks: str | None = None, skipped: SkippedFiles | None = None
) -> Iterator[ImageFolder]:
    """Yield the images of each folder below the roots.

    If a root holds no images, its latent files take their place, one for each stem.

    Args:
        masks, skipped: as in `walk_files`.

    Raises:
        UnreadableFolderError: as `walk_files`.
    """
    for root in roots:
        suffixes = list_readable_suffixes()
        if not any(_has_suffix(name, suffixes) for _, names in walk_files([root], masks) for name in names):
            suffixes = frozenset({LATENT_SUFFIX})
        for folder, names in walk_files([root], masks, skipped):
            chosen = [name for name in names if _has_suffix(name, suffixes)]
            if LATENT_SUFFIX in suffixes:
                chosen = list(choose_latent_files(chosen).values())
            captions = _find_captions(names)
            if skipped is not None:
                _note_files(folder, names, chosen, captions, skipped)
            yield ImageFolder(folder, chosen, captions)


@cache
def list_readable_suffixes() -> frozenset[str]:
    """List the suffixes of images that can be decoded here: some need a plug-in of Pillow."""
    missing = {suffix for suffix, module in PLUG_INS.items() if find_spec(module) is None}
    return IMAGE_SUFFIXES - missing


def _has_suffix(name: str, suffixes: frozenset[str]) -> bool:
    return os.path.splitext(name)[1].lower() in suffixes


def _find_captions(names: Sequence[str]) -> dict[str, str]:
    """Return the caption file of each stem or image name. `.txt` comes before `.caption`, other cases come last."""
    captions: dict[str, str] = {}
    for suffix in CAPTION_SUFFIXES:
        captions = {name[: -len(suffix)]: name for name in names if name.endswith(suffix)} | captions
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in CAPTION_SUFFIXES:
            captions.setdefault(stem, name)
    return captions


def _note_files(
    folder: str, names: Sequence[str], images: Sequence[str], captions: dict[str, str], skipped: SkippedFiles
) -> None:
    """Note the files of a folder that are no images here, though a caption or their suffix suggests that they are."""
    stems = {get_image_stem(name, has_suffix=True) for name in images}
    alone = captions.keys() - stems - set(images)
    for name in names:
        stem, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        if suffix in IMAGE_SUFFIXES and suffix not in list_readable_suffixes():
            skipped.add("no_plug_in", os.path.join(folder, name))
        elif suffix == ".json" and (stem in stems or get_image_stem(stem, has_suffix=True) in stems):
            skipped.add("json", os.path.join(folder, name))
        elif (stem in alone or name in alone) and suffix not in (*CAPTION_SUFFIXES, ".json"):
            skipped.add("captioned", os.path.join(folder, name))


def choose_latent_files(names: Sequence[str]) -> dict[str, str]:
    """Choose one latent file of a folder for each stem.

    `{stem}.npz` is preferred to kohya's `{stem}_{W:04d}x{H:04d}_sdxl.npz`.

    Args:
        names: names of the folder's files, sorted.

    Returns:
        stem of the image → name of its latent file.
    """
    chosen: dict[str, str] = {}
    for name in names:
        if name.endswith(LATENT_SUFFIX) and not name.endswith(TEXT_OUTPUTS_SUFFIX):
            stem = get_image_stem(name)
            if len(name) == len(stem) + len(LATENT_SUFFIX):
                chosen[stem] = name
            else:
                chosen.setdefault(stem, name)
    return chosen


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image."""
    return _has_suffix(name, IMAGE_SUFFIXES)


def read_caption_file(folder: ImageFolder, name: str) -> str | None:
    """Read the caption file beside an image: `.txt` or `.caption` after its stem or its whole name.

    Args:
        name: file name of the image in the folder.

    Returns:
        The caption without surrounding white space, or None if there is no such file.

    Raises:
        ValueError: the file cannot be read, is larger than MAX_CAPTION_BYTES, or is not UTF-8.
    """
    captions = folder.captions
    found = captions.get(get_image_stem(name, has_suffix=True)) or captions.get(name)
    if found is None:
        return None
    path = os.path.join(folder.path, found)
    try:
        text = read_regular(path, MAX_CAPTION_BYTES).content.decode("utf-8-sig")  # Windows writes a byte order mark
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {describe_encoding(error)}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()
