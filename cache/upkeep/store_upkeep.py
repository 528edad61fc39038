"""Verification and tidying of a cache on a store: by sizes and checksums, or by every byte of each shard."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import orjson
from loguru import logger

from sdxl_trainer.cache.encode.spool import (
    OBJECT_PREFIX,
    CacheStore,
    ShardUploads,
    SpoolStorage,
    is_shard,
    name_part,
    name_record,
)
from sdxl_trainer.cache.encode.storage import SHARD_FOLDER, read_item, read_text_item, verify_item, verify_text_item
from sdxl_trainer.cache.upkeep.verify import VerifyResult, compute_shard_ends, verify_entries
from sdxl_trainer.data.formats.manifest import ManifestEntry, read_entries, read_latest
from sdxl_trainer.data.formats.shards import END
from sdxl_trainer.data.stores.cache_mirror import MANIFEST_FOLDER, pull_cache
from sdxl_trainer.data.stores.remote import StoredObject, download
from sdxl_trainer.launch.activity import ACTIVITY

SMALL_SHARE = 0.5  # of a full shard's size, below which `--pack` joins shards
WORK_FOLDER = "work"


def verify_store(url: str, folder: Path, entries: Mapping[str, ManifestEntry], work: Path | None) -> VerifyResult:
    """Compare the shards of a cache on a store with the manifest.

    Args:
        folder: the mirror, which is up to date.
        work: folder into which each shard is copied, and its every byte checked; None compares sizes and the store's
            checksums alone.

    Raises:
        StoreError: the store denies access, or does not answer.
    """
    stored = list_shard_objects(url, pull_cache(url, folder))
    by_shard: dict[str, dict[str, ManifestEntry]] = {}
    for key, entry in entries.items():
        by_shard.setdefault(entry.file, {})[key] = entry
    ends = compute_shard_ends(stored, entries.values())
    bad: dict[str, str] = {}
    bad_text: dict[str, str] = {}
    bad_shards: dict[str, str] = {}
    bytes_read = 0
    for file, held in by_shard.items():
        ACTIVITY.note()
        reason = find_fault(folder, file, stored.get(file))
        if reason is not None:
            bad |= {key: f"{file}: {key}: {reason}" for key in held}
        elif work is not None:
            with copy_shard(url, file, work):
                checked = verify_entries(work, held)
            bad, bad_text = bad | checked.bad, bad_text | checked.bad_text
            bytes_read += stored[file].size
    for file, item in stored.items():
        if file not in by_shard:
            # Objects with other names belong to the user.
            if is_shard(file):
                bad_shards[file] = f"{file}: holds no item that the manifest lists"
        elif item.size != ends[file] + len(END) and not any(key in bad for key in by_shard[file]):
            bad_shards[file] = f"{file}: has {item.size} bytes, but its samples take {ends[file] + len(END)}"
    return VerifyResult(
        num_items=len(entries), bytes_read=bytes_read, bad=bad, bad_text=bad_text, bad_shards=bad_shards
    )


def find_fault(folder: Path, file: str, item: StoredObject | None) -> str | None:
    """Return the fault of a shard on a store by its size and checksum, or None."""
    if item is None:
        return "is not on the store"
    try:
        content = (folder / name_record(file.rpartition("/")[2])).read_bytes()
        known = orjson.loads(content)
        size, checksum = int(known["bytes"]), str(known["checksum"])
    except (OSError, ValueError, TypeError, KeyError):
        return None  # written by a copy of a cache; the sizes of its samples show it
    if item.size != size:
        return f"has {item.size} bytes instead of {size}"
    if checksum and item.checksum and item.checksum != checksum:
        return "the store's checksum is not that of the upload"
    return None


def list_shard_objects(url: str, objects: Iterable[StoredObject]) -> dict[str, StoredObject]:
    """Return the shards among the objects of a cache, by the names that entries use."""
    names = ((item.url[len(url) + 1 :], item) for item in objects)
    return {name: item for name, item in names if name.startswith(f"{SHARD_FOLDER}/")}


@contextmanager
def copy_shard(url: str, file: str, work: Path) -> Iterator[None]:
    """Copy a shard below a folder within the context."""
    (work / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
    try:
        download(f"{url}/{file}", work / file)
        yield
    finally:
        (work / file).unlink(missing_ok=True)


def replace_stored_shards(
    store: CacheStore, folder: Path, storage: SpoolStorage, uploads: ShardUploads, small_bytes: int = 0
) -> list[str]:
    """Replace shards on a store that hold outdated samples, and return their names.

    Valid items are copied into new shards, which are listed before the old ones are deleted. A shard with a damaged
    item stays.

    Args:
        small_bytes: shards below this size are joined, if there are several of a bucket.

    Raises:
        StoreError: the store denies access, or does not answer.
    """
    stored, entries = list_shard_objects(store.url, pull_cache(store.url, folder)), read_latest(folder)
    stored = {file: item for file, item in stored.items() if store.may_delete(file)}
    ends = compute_shard_ends(stored, entries.values())
    outdated = {file for file, item in stored.items() if item.size != ends[file] + len(END)}
    outdated |= set(_list_small({file: item.size for file, item in stored.items()}, small_bytes))
    held: dict[str, list[ManifestEntry]] = {file: [] for file in sorted(outdated)}
    for entry in entries.values():
        if entry.file in outdated:
            held[entry.file].append(entry)
    outdated -= _find_unknown(folder, {file for file, items in held.items() if not items})
    work = store.spool / WORK_FOLDER
    for file, items in held.items():
        ACTIVITY.note()
        if not items:
            continue
        with copy_shard(store.url, file, work):
            if any(verify_item(work, entry) or verify_text_item(work, entry) for entry in items):
                outdated.remove(file)
                continue
            for entry in sorted(items, key=lambda entry: entry.offset or 0):
                record, content = read_item(work, entry)
                text = read_text_item(work, entry)
                uploads.append(
                    storage.write_packed(entry, bytes(content), bytes(record), None if text is None else bytes(text))
                )
    storage.close()
    uploads.sync()
    gone = _list_gone(folder, entries.values()) - stored.keys()
    for file in outdated | set(filter(store.may_delete, gone)):
        name = file.rpartition("/")[2]
        # The next job deletes a shard that has a record and that no part lists. So the record goes last.
        for each in (f"{MANIFEST_FOLDER}/{name_part(name)}", file, name_record(name)):
            store.delete([each])
    if outdated or gone:
        pull_cache(store.url, folder)
    for file in sorted(outdated):
        logger.info("replaced {}, which was partly out of date", file)
    return sorted(outdated)


def _find_unknown(folder: Path, files: set[str]) -> set[str]:
    """Return the shards that have no record and that no line of the manifest lists. They may be the user's own."""
    unknown = {file for file in files if not (folder / name_record(file.rpartition("/")[2])).is_file()}
    return unknown - {entry.file for entry in read_entries(folder)} if unknown else unknown


def _list_gone(folder: Path, entries: Iterable[ManifestEntry]) -> set[str]:
    """Return the shards of the manifest's files that no valid entry needs any more."""
    names = (file.name for file in (folder / MANIFEST_FOLDER).glob(f"{OBJECT_PREFIX}*.tar.json"))
    known = {f"{SHARD_FOLDER}/{name.removeprefix(OBJECT_PREFIX).removesuffix('.json')}" for name in names}
    return known - {entry.file for entry in entries}


def _list_small(sizes: Mapping[str, int], small_bytes: int) -> Sequence[str]:
    """Return the shards below a size, of the buckets that have several."""
    by_bucket: dict[str, list[str]] = {}
    for file, size in sizes.items():
        if size < small_bytes:
            by_bucket.setdefault(file.rpartition("/")[2].partition("-")[0], []).append(file)
    return [file for files in by_bucket.values() if len(files) > 1 for file in files]
