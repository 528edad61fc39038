"""Latents that the manifest lists under an earlier key of their image, found by the path of the image.

The key of an image in a folder changes when another image of its stem is added or removed: from `1` to `10_dog/1`, or
back (data/images/folder_keys.py). Its latents stay where they are.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from sdxl_trainer.data.formats.manifest import ManifestEntry, read_latest
from sdxl_trainer.data.images.bucket import split_key


class Place(NamedTuple):
    """The traits that stay when the key of an image changes."""

    prefix: str  # of the resolution
    stem: str  # the last part of the key
    path: str  # of the image


class _KeysOfStems:
    """The keys whose last part is one of some stems."""

    def __init__(self, stems: frozenset[str]):
        self._stems = stems

    def __contains__(self, key: str) -> bool:
        return get_last_part(key) in self._stems


def get_last_part(key: str) -> str:
    """Return the stem in a key, `1` of `512px/10_dog/1`."""
    return key.rpartition("/")[2]


def find_moved_entries(folder: Path, records: pa.Table, paths: Mapping[str, str]) -> dict[str, ManifestEntry]:
    """Find the latents of images without an entry of their key: key → the newest entry that the image has.

    Args:
        folder: cache folder.
        records: table of all records, whose own latents are nobody else's.
        paths: key of each sample without an entry, with the prefix of its resolution → path of its image.
    """
    stems = frozenset(map(get_last_part, paths))
    found = read_latest(folder, keys=_KeysOfStems(stems)) if stems else {}
    found = {key: entry for key, entry in found.items() if get_last_part(key) in stems}
    newest = _choose_newest(found, _find_own_keys(found, records))
    moved = ((key, newest.get(_get_place(key, path))) for key, path in paths.items())
    return {key: entry for key, entry in moved if entry is not None}


def rename_entries(entries: Mapping[str, ManifestEntry], records: pa.Table) -> dict[str, ManifestEntry]:
    """Return all entries, those of images that have another key now under that key."""
    own = _find_own_keys(entries, records)
    newest = _choose_newest(entries, own)
    if not newest:
        return dict(entries)
    kept = {key: entry for key, entry in entries.items() if key in own}
    prefixes = {place.prefix for place in newest}
    for key, path in zip(*(records.column(name).to_pylist() for name in ("key", "image_path")), strict=True):
        for prefix in prefixes:
            entry = newest.pop(_get_place(prefix + key, path), None)
            if entry is not None and prefix + key not in kept:
                kept[prefix + key] = replace(entry, key=prefix + key)
    # Images that are no longer in the data keep their entries.
    return kept | {entry.key: entry for entry in newest.values()}


def drop_replaced_entries(entries: Mapping[str, ManifestEntry]) -> dict[str, ManifestEntry]:
    """Return the entries without npz files that a later entry of the same image, under another key, has replaced.

    Samples of shards stay, because the bytes of a shard must all be listed.
    """
    newest = _choose_newest(entries, frozenset())
    kept = {entry.key for entry in newest.values()}
    return {
        key: entry for key, entry in entries.items() if key in kept or entry.offset is not None or not entry.source_path
    }


def _get_place(key: str, path: str) -> Place:
    return Place(split_key(key).prefix, get_last_part(key), path)


def _find_own_keys(entries: Mapping[str, ManifestEntry], records: pa.Table) -> frozenset[str]:
    """Return the keys of entries that are keys of records."""
    names = pa.array([split_key(key).name for key in entries], pa.string())
    found = pc.call_function("is_in", [names], pc.SetLookupOptions(records.column("key").combine_chunks()))
    return frozenset(key for key, is_own in zip(entries, found.to_pylist(), strict=True) if is_own)


def _choose_newest(entries: Mapping[str, ManifestEntry], own: frozenset[str]) -> dict[Place, ManifestEntry]:
    """Return the newest entry of each image among those whose keys are not in `own`."""
    newest: dict[Place, ManifestEntry] = {}
    for key, entry in entries.items():
        place = _get_place(key, entry.source_path)
        if place.path and key not in own and (place not in newest or entry.listed_ns > newest[place].listed_ns):
            newest[place] = entry
    return newest
