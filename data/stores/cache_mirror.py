"""Local mirror of a cache on a store: its manifest and state files, without the shards.

The mirror is an ordinary cache folder whose shards are missing, so whatever reads a manifest reads the mirror's. Its
`store.json` holds the cache's URL, and the version of each object that was copied.
"""

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import orjson
from filelock import FileLock
from loguru import logger

from sdxl_trainer.data.files import create_folder, write_atomic
from sdxl_trainer.data.stores.remote import NUM_THREADS, StoredObject
from sdxl_trainer.data.stores.uploads import FileHashes, list_objects, put_bytes, read_bytes

STORE_FILE = "store.json"
MIRRORS_FOLDER = ".caches"  # in the folder of runs
SHARD_FOLDER, MANIFEST_FOLDER = "shards", "manifest"
# Files outside of the manifest's folder that belong to a cache.
STATE_FILES = ("cache.json", "text.json")


def name_mirror(runs: Path, url: str) -> Path:
    """Return the folder of the mirror of a cache."""
    readable = re.sub(r"[^\w.-]+", "-", url.partition("://")[2])[:80].strip("-.")
    return runs / MIRRORS_FOLDER / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def read_store_url(folder: Path) -> str | None:
    """Return the URL of the cache that a folder mirrors; None if it is a cache folder of its own."""
    try:
        return str(orjson.loads((folder / STORE_FILE).read_bytes())["url"])
    except FileNotFoundError:
        return None


def pull_cache(url: str, folder: Path) -> list[StoredObject]:
    """Bring the mirror up to date, and return all objects of the cache.

    Raises:
        FileNotFoundError: the bucket does not exist.
        StoreError: the store denies access, or does not answer.
    """
    create_folder(folder / MANIFEST_FOLDER)
    with lock_mirror(folder):
        objects = list_objects(url)
        wanted = {name: item for item in objects if is_mirrored(name := item.url[len(url) + 1 :])}
        known = _read_versions(folder)
        changed = [name for name, item in wanted.items() if known.get(name) != item.version]
        changed += [name for name in wanted.keys() - set(changed) if not (folder / name).is_file()]
        if len(changed) > 1000:
            logger.info("copying {} files of the manifest of {}", len(changed), url)
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            list(pool.map(lambda name: _copy(wanted[name].url, folder / name), changed))
        local = [*STATE_FILES, *(f"{MANIFEST_FOLDER}/{file.name}" for file in (folder / MANIFEST_FOLDER).iterdir())]
        for name in local:
            if name not in wanted:
                (folder / name).unlink(missing_ok=True)
        versions = {name: item.version for name, item in wanted.items()}
        if versions != known or not (folder / STORE_FILE).is_file():
            write_atomic(folder / STORE_FILE, orjson.dumps({"url": url, "versions": versions}))
    return objects


def lock_mirror(folder: Path) -> AbstractContextManager:
    """Return a context in which no program pulls the mirror. A pull deletes the files that the store lacks."""
    return FileLock(folder / ".pull.lock")


def push_files(url: str, folder: Path, names: Sequence[str]) -> None:
    """Write files of the mirror to the store, in this order, unless the store has them.

    Raises:
        StoreError: the store denies access, or does not answer.
    """
    stored = {item.url: item for item in list_objects(url)}
    for name in names:
        content, target = (folder / name).read_bytes(), f"{url}/{name}"
        if target not in stored or not FileHashes.compute([content]).matches(stored[target]):
            put_bytes(content, target)


def is_mirrored(name: str) -> bool:
    """Return whether an object, by its name in the cache, belongs into the mirror."""
    folder, _, rest = name.rpartition("/")
    return name in STATE_FILES or (folder == MANIFEST_FOLDER and not rest.startswith("."))


def _copy(url: str, file: Path) -> None:
    write_atomic(file, read_bytes(url))


def _read_versions(folder: Path) -> dict[str, str]:
    try:
        return dict(orjson.loads((folder / STORE_FILE).read_bytes())["versions"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
