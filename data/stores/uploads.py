"""Objects written to stores: whole files with their checksums, small objects, conditional writes, listing, deletion.

An object appears whole or not at all, because stores show an object only once all its bytes have arrived. Transient
errors are retried as for reads (remote.py).
"""

import hashlib
import inspect
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdxl_trainer.data.counted_warnings import CountedWarnings
from sdxl_trainer.data.files import open_stream
from sdxl_trainer.data.stores.remote import (
    ATTEMPTS,
    NUM_THREADS,
    StoredObject,
    StoreError,
    build_stored_object,
    call_with_retries,
    open_store,
    report_silence,
)

CHUNK_BYTES = 32 << 20  # of a file that is sent in parts; S3 takes at most 10,000 parts
PARTS_AT_ONCE = 4
# Checksums that the MD5 or SHA-256 of the bytes can be compared with: hexadecimal, base64, or of S3's parts.
COMPARABLE = re.compile(r"[0-9a-f]{32}(-\d+)?|[0-9a-f]{64}|[A-Za-z0-9+/]{22}==")
_READ_BACK = CountedWarnings("the store's checksum is not of the bytes, so the object is read back", "the log file")


@dataclass
class FileHashes:
    """Checksums of a file or of bytes, in the forms in which stores name them.

    Attributes:
        size: number of bytes.
        sha256: hexadecimal.
    """

    size: int = 0
    sha256: str = ""
    _forms: set[str] = field(default_factory=set)

    @classmethod
    def compute(cls, chunks: Iterable[bytes]) -> "FileHashes":
        """Compute the checksums of some chunks of CHUNK_BYTES, of which the last may be shorter."""
        size, whole, sha256, parts = 0, hashlib.md5(usedforsecurity=False), hashlib.sha256(), []
        for chunk in chunks:
            size += len(chunk)
            whole.update(chunk)
            sha256.update(chunk)
            parts.append(hashlib.md5(chunk, usedforsecurity=False).digest())
        of_parts = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
        forms = {whole.hexdigest(), b64encode(whole.digest()).decode(), f"{of_parts}-{len(parts)}", sha256.hexdigest()}
        return cls(size, sha256.hexdigest(), forms)

    def contradicts(self, item: StoredObject) -> bool:
        """Return whether an object certainly has other bytes, or may have: its checksum is another one."""
        if item.size != self.size:
            return True
        return COMPARABLE.fullmatch(item.checksum) is not None and item.checksum not in self._forms

    def matches(self, item: StoredObject) -> bool:
        """Return whether an object certainly has these bytes, by its size and checksum."""
        return item.size == self.size and item.checksum in self._forms


@dataclass(frozen=True)
class Upload:
    """An object that was uploaded, and the SHA-256 of its bytes."""

    item: StoredObject
    sha256: str


def upload_file(path: Path, url: str, only_if_absent: bool = False) -> Upload:
    """Copy a file to a store and compare the object's size and checksum with the file's.

    Args:
        only_if_absent: do not replace another object. One with the same bytes is taken for this one, because the
            answer to an earlier attempt may have been lost.

    Raises:
        FileNotFoundError: the bucket does not exist.
        FileExistsError: `only_if_absent`, and another object has this URL.
        StoreError: the store denies access, does not answer any of the attempts, or has other bytes.
    """
    hashes = FileHashes.compute(_iterate_chunks(path))
    store, target = open_store(url)
    further: dict[str, Any] = {}
    if "s3" in _list_protocols(store):
        further = {"chunksize": CHUNK_BYTES, "max_concurrency": PARTS_AT_ONCE}
    _write(url, lambda mode: store.put_file(str(path), target, **mode, **further), hashes, only_if_absent)
    item = describe_object(url)
    if hashes.contradicts(item):
        _READ_BACK.add(item.url)
        if not _has_bytes(item, hashes):
            raise StoreError(f"{url}: the store holds other bytes than were sent")
    return Upload(item, hashes.sha256)


def put_bytes(data: bytes, url: str, only_if_absent: bool = False) -> bool:
    """Write a small object. Return False if `only_if_absent`, and another object has this URL.

    Raises:
        FileNotFoundError: the bucket does not exist.
        StoreError: the store denies access, or does not answer any of the attempts.
    """
    store, target = open_store(url)
    hashes = FileHashes.compute([data])
    try:
        _write(url, lambda mode: store.pipe_file(target, data, **mode), hashes, only_if_absent)
    except FileExistsError:
        return False
    return True


def read_bytes(url: str) -> bytes:
    """Read a whole small object.

    Raises:
        FileNotFoundError: the object does not exist.
        StoreError: the store denies access, or does not answer any of the attempts.
    """
    store, path = open_store(url)
    return call_with_retries(url, ATTEMPTS, lambda: store.cat_file(path))


def list_objects(folder: str) -> list[StoredObject]:
    """List all objects whose URLs begin with `folder` and a slash, sorted; none if there is no such folder.

    Raises:
        FileNotFoundError: the bucket does not exist.
        StoreError: the store denies access, or does not answer any of the attempts.
    """
    store, path = open_store(folder)

    def list_now() -> dict[str, Any]:
        store.invalidate_cache()
        return store.find(path, detail=True)

    with report_silence(folder, lambda: 0):
        found = call_with_retries(folder, ATTEMPTS, list_now)
    start = f"{path}/"
    own = {name: fields for name, fields in found.items() if name.startswith(start)}
    return [build_stored_object(f"{folder}/{name[len(start) :]}", own[name]) for name in sorted(own)]


def delete_objects(urls: Sequence[str]) -> None:
    """Delete objects. One that does not exist is no error.

    Raises:
        StoreError: the store denies access, or does not answer any of the attempts.
    """
    # One request each: fsspec ignores the errors of single objects in a request for many.
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(_delete, urls))


def describe_object(url: str) -> StoredObject:
    """Return the present size, version and checksum of an object, without fsspec's cache of listings.

    Raises:
        FileNotFoundError: the object does not exist.
        StoreError: the store denies access, or does not answer any of the attempts.
    """
    store, path = open_store(url)

    def describe() -> dict[str, Any]:
        store.invalidate_cache(url.rpartition("/")[0])
        return store.info(path)

    return build_stored_object(url, call_with_retries(url, ATTEMPTS, describe))


def _write(url: str, write: Callable[[dict[str, str]], Any], hashes: FileHashes, only_if_absent: bool) -> None:
    """Call `write` with the arguments of its mode, until the store answers.

    Raises:
        FileExistsError: `only_if_absent`, and another object has this URL.
    """
    store, path = open_store(url)
    mode = {"mode": "create"} if only_if_absent and _knows_mode(store) else {}

    def attempt() -> None:
        if only_if_absent and not mode and store.exists(path):
            raise FileExistsError(url)
        write(mode)

    try:
        call_with_retries(url, ATTEMPTS, attempt)
    except FileExistsError:
        item = describe_object(url)
        if hashes.contradicts(item) or not _has_bytes(item, hashes):
            raise FileExistsError(f"{url}: another object has this name") from None


def _delete(url: str) -> None:
    store, path = open_store(url)
    with suppress(FileNotFoundError):
        call_with_retries(url, ATTEMPTS, lambda: store.rm_file(path))


def _iterate_chunks(path: Path) -> Iterator[bytes]:
    with open_stream(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _has_bytes(item: StoredObject, hashes: FileHashes) -> bool:
    """Return whether an object has the bytes of a file, by reading it.

    An encrypted bucket names checksums that are not of the bytes.
    """
    if item.size != hashes.size:
        return False
    store, path = open_store(item.url)

    def read() -> str:
        digest = hashlib.sha256()
        for start in range(0, item.size, CHUNK_BYTES):
            digest.update(store.cat_file(path, start=start, end=min(item.size, start + CHUNK_BYTES)))
        return digest.hexdigest()

    return call_with_retries(item.url, ATTEMPTS, read) == hashes.sha256


def _knows_mode(store: Any) -> bool:
    """Return whether a store's file system takes `mode="create"`, which refuses to replace an object."""
    return all("mode" in inspect.signature(write).parameters for write in (store.put_file, store.pipe_file))


def _list_protocols(store: Any) -> tuple[str, ...]:
    return (store.protocol,) if isinstance(store.protocol, str) else tuple(store.protocol)
