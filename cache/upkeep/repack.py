"""Conversion of a cache between npz files and shards, without the VAE, and replacement of outdated shards."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sdxl_trainer.cache.encode.pipeline import choose_text_file
from sdxl_trainer.cache.encode.storage import (
    ITEM_ERRORS,
    NpzStorage,
    Storage,
    read_item,
    read_text_item,
    verify_item,
    verify_text_item,
)
from sdxl_trainer.cache.upkeep.verify import list_entry_files, verify_shards
from sdxl_trainer.data.formats.manifest import ManifestEntry, ManifestWriter
from sdxl_trainer.data.images.bucket import split_key
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.launch.activity import ACTIVITY


class RepackResult(NamedTuple):
    """Result of a conversion. Bad items failed the check and stay where they are."""

    num_copied: int
    bad: dict[str, str]  # key → reason


def repack(
    folder: Path,
    entries: Mapping[str, ManifestEntry],
    storage: Storage,
    manifest: ManifestWriter,
    name_file: Callable[[ManifestEntry], str],
    get_record: Callable[[str], bytes],
) -> RepackResult:
    """Copy every item's bytes to another storage and list it there. `remove_replaced` deletes the old files afterwards.

    Items that are in that storage already stay. Each item's bytes are checked against the manifest before the copy.

    Args:
        name_file: returns the npz file of an item.
        get_record: returns the JSON that is stored beside a key's latents in a shard.
    """
    num_copied, bad = 0, {}
    to_files = isinstance(storage, NpzStorage)
    for key, entry in sorted(entries.items(), key=lambda pair: (pair[1].bucket, pair[1].file, pair[1].offset or 0)):
        if (entry.offset is None) == to_files:
            continue
        try:
            _, content = read_item(folder, entry)
            text = read_text_item(folder, entry)
        except ITEM_ERRORS as error:
            bad[key] = f"{entry.file}: {error}"
            continue
        target = _name_files(entry, name_file(entry)) if to_files else entry
        record = b"{}" if to_files else get_record(key)
        manifest.append(storage.write_packed(target, bytes(content), record, None if text is None else bytes(text)))
        num_copied += 1
    storage.close()
    return RepackResult(num_copied, bad)


def replace_outdated_shards(
    folder: Path, entries: Mapping[str, ManifestEntry], storage: Storage, manifest: ManifestWriter
) -> list[str]:
    """Replace shards that hold outdated samples or have a damaged end, and return the names of the replaced shards.

    Valid items are copied into new shards before the old ones are deleted. A shard with an unreadable item stays.
    """
    outdated = set(verify_shards(folder, entries.values()))
    listed: dict[str, list[ManifestEntry]] = {file: [] for file in outdated}
    for entry in entries.values():
        if entry.file in outdated:
            listed[entry.file].append(entry)
    for file, held in listed.items():
        ACTIVITY.note()
        if any(verify_item(folder, entry) or verify_text_item(folder, entry) for entry in held):
            outdated.remove(file)
            continue
        for entry in sorted(held, key=lambda entry: entry.offset or 0):
            ACTIVITY.note()
            record, content = read_item(folder, entry)
            beside = entry.text is not None and entry.text.offset is not None
            text = read_text_item(folder, entry) if beside else None
            manifest.append(
                storage.write_packed(entry, bytes(content), bytes(record), None if text is None else bytes(text))
            )
    storage.close()
    # The copies must be on disk and listed there before the shards are deleted.
    manifest.sync()
    for file in outdated:
        (folder / file).unlink()
    return sorted(outdated)


def build_record_reader(index: Index) -> Callable[[str], bytes]:
    """Return a function that returns the JSON of the record of latents by their key."""
    rows = {key: row for row, key in enumerate(index.arrow_column("key").to_pylist())}

    def get_record(key: str) -> bytes:
        row = rows.get(key, rows.get(split_key(key)[1]))
        return b"{}" if row is None else index.record_json(row)

    return get_record


def remove_replaced(folder: Path, before: Mapping[str, ManifestEntry], after: Mapping[str, ManifestEntry]) -> int:
    """Delete the files of `before` that no entry of `after` uses, and return their number.

    Adopted files stay: they belong to the program that made them.
    """
    ours = [entry for entry in before.values() if not entry.adopted or entry.offset is not None]
    needed = {file for entry in after.values() for file in list_entry_files(entry)}
    replaced = {file for entry in ours for file in list_entry_files(entry)} - needed
    for file in replaced:
        (folder / file).unlink(missing_ok=True)
    return len(replaced)


def _name_files(entry: ManifestEntry, file: str) -> ManifestEntry:
    """Return the entry with its latents at `file` and its text beside them."""
    text = None if entry.text is None else replace(entry.text, file=choose_text_file(file))
    return replace(entry, file=file, text=text)
