"""Shards of a cache on a store: built in a local spool folder, uploaded in the background, listed once they are up.

For each shard the spool holds the tar and a journal: the last number of the manifest when the job began, and the
manifest lines of the shard's samples. They are written to the store in
this order: the lines as `pending/<part>`, the shard, its size and checksums as `manifest/object-<shard>.json`, and the
lines as `manifest/<part>`. After that `pending/<part>` and the files in the spool are deleted. So a killed job leaves
nothing that another one cannot finish: a shard in the spool is uploaded, and a shard that is up is listed.
"""

import re
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

import orjson
from filelock import FileLock
from loguru import logger

from sdxl_trainer.cache.encode.storage import (
    SHARD_FOLDER,
    SHARD_NAME,
    ShardStorage,
    read_remote_item,
    verify_item,
    verify_text_item,
)
from sdxl_trainer.data.formats.manifest import (
    ManifestEntry,
    drop_damaged_lines,
    dump_entry,
    list_manifest_parts,
    parse_entry,
    read_latest,
)
from sdxl_trainer.data.formats.shards import ShardWriter, get_partial_path, recover_shard
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.stores.cache_mirror import MANIFEST_FOLDER, push_files
from sdxl_trainer.data.stores.remote import StoredObject
from sdxl_trainer.data.stores.store_lock import LockTicket
from sdxl_trainer.data.stores.uploads import delete_objects, list_objects, put_bytes, read_bytes, upload_file
from sdxl_trainer.launch.activity import ACTIVITY

PENDING_FOLDER = "pending"
OBJECT_PREFIX = "object-"  # of the files in `manifest/` that hold the size and checksums of a shard
JOURNAL_SUFFIX = ".jsonl"
PENDING_FILE = re.compile(rf"{PENDING_FOLDER}/part-\d+-\d+x\d+-\d+-\d+\.jsonl")
LAST_NUMBER = "last_number"  # field of the first line of a journal
NUM_NAMES = 10**12  # of shards; a name is never used twice, because readers may keep copies


@dataclass(frozen=True)
class CacheStore:
    """A cache on a store, as a rank writes it.

    Args:
        url: URL of the cache.
        spool: folder in which this node builds shards.
        ticket: of the lock that this job holds.
        sources: URLs of the settings' metadata, which may hold `*` and `?`. No job deletes what they name.
    """

    url: str
    spool: Path
    ticket: LockTicket
    sources: tuple[str, ...] = ()

    def may_delete(self, name: str) -> bool:
        """Return whether an object has the name of this project's shards, and is not among the settings' metadata."""
        url = f"{self.url}/{name}"
        return is_shard(name) and not any(url == source or fnmatchcase(url, source) for source in self.sources)

    def publish_shard(self, file: Path, lines: bytes) -> None:
        """Upload a finished shard, and list its samples. May be called again after a kill at any point.

        Raises:
            FailedError: another job has taken over the cache.
            StoreError: the store denies access, or does not answer.
        """
        part = name_part(file.name)
        put_bytes(lines, f"{self.url}/{PENDING_FOLDER}/{part}")
        upload = upload_file(file, f"{self.url}/{SHARD_FOLDER}/{file.name}", only_if_absent=True)
        self._list_shard(file.name, upload.item, upload.sha256, lines)

    def publish_lines(self, lines: bytes, rank: int) -> None:
        """List entries of shards that are up already."""
        self.ticket.verify()
        put_bytes(lines, f"{self.url}/manifest/part-{rank:05d}-{secrets.token_hex(8)}.jsonl")

    def finish_pending(self, objects: Sequence[StoredObject]) -> None:
        """List the shards that a killed job has uploaded and not listed; forget those that it has not uploaded.

        Args:
            objects: all objects of the cache.
        """
        stored = {item.url[len(self.url) + 1 :]: item for item in objects}
        for name in filter(PENDING_FILE.fullmatch, stored):
            ACTIVITY.note()
            part = name.rpartition("/")[2]
            shard = stored.get(f"{SHARD_FOLDER}/{name_shard(part)}")
            if shard is not None and f"manifest/{part}" not in stored:
                logger.info("listing {}, uploaded by an interrupted job", shard.url)
                self._list_shard(name_shard(part), shard, None, read_bytes(f"{self.url}/{name}"))
            else:
                delete_objects([f"{self.url}/{name}"])

    def rewrite_damaged_parts(self, folder: Path) -> None:
        """Remove the damaged lines from the manifest.

        Args:
            folder: the mirror, which is up to date.
        """
        drop_damaged_lines(folder)
        push_files(self.url, folder, [part.relative_to(folder).as_posix() for part in list_manifest_parts(folder)])

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects of the cache by their names in it.

        Raises:
            FailedError: another job has taken over the cache.
            StoreError: the store denies access, or does not answer.
        """
        self.ticket.verify()
        delete_objects([f"{self.url}/{name}" for name in names])

    def _list_shard(self, name: str, item: StoredObject, sha256: str | None, lines: bytes) -> None:
        part = name_part(name)
        fields = {"file": f"{SHARD_FOLDER}/{name}", "bytes": item.size, "sha256": sha256, "checksum": item.checksum}
        self.ticket.verify()
        put_bytes(orjson.dumps(fields), f"{self.url}/{name_record(name)}")
        put_bytes(lines, f"{self.url}/manifest/{part}")
        delete_objects([f"{self.url}/{PENDING_FOLDER}/{part}"])


def is_shard(name: str) -> bool:
    """Return whether an object of a cache has the name of this project's shards."""
    folder, _, file = name.rpartition("/")
    return folder == SHARD_FOLDER and SHARD_NAME.fullmatch(file) is not None


def name_record(shard: str) -> str:
    """Return the object that holds the size and checksums of a shard; by it a job knows a shard as this project's."""
    return f"{MANIFEST_FOLDER}/{OBJECT_PREFIX}{shard}.json"


def name_part(shard: str) -> str:
    """Return the name of the manifest's part that lists a shard."""
    stem = shard.removesuffix(".tar")
    return f"part-{stem.split('-')[1]}-{stem}.jsonl"


def name_shard(part: str) -> str:
    """Return the name of the shard that a part of the manifest lists."""
    return part.removesuffix(".jsonl").split("-", 2)[2] + ".tar"


def recover_spool(store: CacheStore, mirror: Path) -> None:
    """Finish, upload and list the shards that a killed job left in the spool; delete damaged ones.

    Items that another job has listed since the killed one began are not listed: theirs are newer.

    Args:
        mirror: the mirror of the cache, which is up to date.

    Raises:
        FailedError: another job has taken over the cache.
        StoreError: the store denies access, or does not answer.
    """
    folder = store.spool / SHARD_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(store.spool / ".recover.lock"):  # nodes may share the folder
        listed = {item.url.rpartition("/")[2] for item in list_objects(f"{store.url}/manifest")}
        for journal in sorted(folder.glob(f"*{JOURNAL_SUFFIX}")):
            ACTIVITY.note()
            shard = journal.with_suffix(".tar")
            if name_part(shard.name) not in listed and (lines := _recover_shard(store.spool, shard, journal, mirror)):
                logger.info("uploading {}, left by an interrupted job", shard)
                store.publish_shard(shard, lines)
            delete_spooled(shard)
        for file in folder.glob("*.tar"):  # without a journal
            file.unlink()
        for file in folder.glob(".*.tar.partial"):
            file.unlink()


def _recover_shard(spool: Path, shard: Path, journal: Path, mirror: Path) -> bytes:
    """Finish a shard of a killed job. Return the lines to list, or b"" if nothing in it can be used."""
    last_number, entries = _read_journal(journal)
    end = max((_find_end(entry) for entry in entries), default=0)
    if not end:
        return b""
    if get_partial_path(shard).exists():
        recover_shard(shard, end)
    if any(verify_item(spool, entry) or verify_text_item(spool, entry) for entry in entries):
        logger.warning("{}, left by an interrupted job, is damaged; its images are encoded again", shard)
        return b""
    known = read_latest(mirror, keys=frozenset(entry.key for entry in entries))
    new = (entry for entry in entries if entry.key not in known or known[entry.key].listed_ns <= last_number)
    return b"".join(dump_entry(entry, entry.listed_ns) for entry in new)


def _read_journal(journal: Path) -> tuple[int, list[ManifestEntry]]:
    """Return the last number of the manifest when a job began, and the entries that the job added to a shard."""
    first, *lines = journal.read_bytes().splitlines(keepends=True) or [b""]
    try:
        last_number = int(orjson.loads(first)[LAST_NUMBER])
    except (ValueError, TypeError, KeyError):
        last_number = 0  # torn by a kill: only items that no other job has listed count
    entries = (parse_entry(line, str(journal), logger.warning) for line in lines if line.endswith(b"\n"))
    return last_number, [entry for entry in entries if entry is not None]


def _find_end(entry: ManifestEntry) -> int:
    text = entry.text
    ends = [entry.offset + entry.bytes] if entry.offset is not None else []
    return max([*ends, *([text.offset + text.bytes] if text is not None and text.offset is not None else [])])


def delete_spooled(shard: Path) -> None:
    """Delete a shard of the spool; its journal goes last, because it tells that there may be one."""
    for file in (shard, get_partial_path(shard), shard.with_suffix(JOURNAL_SUFFIX)):
        file.unlink(missing_ok=True)


@dataclass
class _SpooledShard:
    """A shard in the spool, and the lines of its samples."""

    path: Path
    journal: IO[bytes]
    lines: list[bytes] = field(default_factory=list)
    num_samples: int | None = None  # None: not finished
    size: int = 0

    @property
    def is_complete(self) -> bool:
        """Return whether the shard is finished and all its samples have been appended."""
        return self.num_samples == len(self.lines)


class ShardUploads:
    """The manifest of a cache on a store: lists entries, those of a shard in the spool once the shard is up.

    Args:
        store: the cache.
        rank: number of this rank.
        last_number: number of the last line in the manifest.
    """

    def __init__(self, store: CacheStore, rank: int, last_number: int):
        self.store = store
        self._rank = rank
        self._last_number = self._number = last_number
        self._shards: dict[str, _SpooledShard] = {}  # by the name that entries use
        self._loose: list[bytes] = []  # lines of shards that are up
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="uploads")
        self._error: BaseException | None = None

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the shards that are finished and not yet up."""
        with self._changed:
            return sum(shard.size for shard in self._shards.values())

    def holds(self, file: str) -> bool:
        """Return whether a shard, by the name that entries use, is in the spool."""
        with self._changed:
            return file in self._shards

    def begin(self, path: Path) -> None:
        """Open the journal of a new shard."""
        shard = _SpooledShard(path, open(path.with_suffix(JOURNAL_SUFFIX), "xb"))
        shard.journal.write(orjson.dumps({LAST_NUMBER: self._last_number}) + b"\n")
        shard.journal.flush()
        with self._changed:
            self._shards[f"{SHARD_FOLDER}/{path.name}"] = shard

    def finish(self, path: Path, num_samples: int) -> None:
        """Upload a finished shard once all its samples have been appended."""
        shard = self._shards[f"{SHARD_FOLDER}/{path.name}"]
        with self._changed:
            shard.num_samples, shard.size = num_samples, path.stat().st_size
            self._upload_if_complete(shard)

    def append(self, entry: ManifestEntry) -> None:
        """List an entry: of a shard in the spool with that shard, of a shard that is up with the next `sync`.

        Raises:
            StoreError, FailedError: an earlier shard could not be uploaded.
            OSError: the disk is full.
        """
        self.raise_error()
        with self._changed:
            self._number += 1
            line = dump_entry(entry, self._number)
            shard = self._shards.get(entry.file)
            if shard is None:
                self._loose.append(line)
                return
            try:
                shard.journal.write(line)
                shard.journal.flush()
            except OSError as error:
                self.fail(error)
                raise
            shard.lines.append(line)
            self._upload_if_complete(shard)

    def sync(self) -> None:
        """Wait until all finished shards are up, and everything that was appended is listed.

        Raises:
            StoreError, FailedError: a shard could not be uploaded.
        """
        with self._changed:
            while any(shard.num_samples is not None for shard in self._shards.values()) and self._error is None:
                if any(shard.is_complete for shard in self._shards.values()):
                    ACTIVITY.note()
                self._changed.wait(1.0)
            lines, self._loose = self._loose, []
        self.raise_error()
        if lines:
            self.store.publish_lines(b"".join(lines), self._rank)

    def close(self) -> None:
        """Wait as `sync`, and end the uploads. Raises as `sync`."""
        try:
            self.sync()
        finally:
            self._pool.shutdown(wait=True)

    def wait(self) -> None:
        """Wait a moment for an upload to end.

        Raises:
            StoreError, FailedError: a shard could not be uploaded.
        """
        with self._changed:
            self._changed.wait(0.2)
        self.raise_error()

    def fail(self, error: BaseException) -> None:
        """End the uploads, because a sample was not stored or listed: its shard will never be complete."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def raise_error(self) -> None:
        """Raise the first error of the uploads or of the writers, if there was one."""
        if self._error is not None:
            raise self._error

    def _upload_if_complete(self, shard: _SpooledShard) -> None:
        if shard.is_complete:
            shard.journal.close()
            self._pool.submit(self._publish, shard).add_done_callback(self._note_end)

    def _publish(self, shard: _SpooledShard) -> None:
        if self._error is not None:
            return
        self.store.publish_shard(shard.path, b"".join(shard.lines))
        delete_spooled(shard.path)
        with self._changed:
            del self._shards[f"{SHARD_FOLDER}/{shard.path.name}"]

    def _note_end(self, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            self.fail(error)
        with self._changed:
            self._changed.notify_all()


class SpoolStorage(ShardStorage):
    """Builds shards in the spool. Each full shard is handed over for upload.

    Args:
        uploads: takes the finished shards.
        shard_bytes: largest size of a shard.
        limit_bytes: largest size of all shards of this rank in the spool. Beyond it the largest shard is finished
            early, and writers wait for the uploads.
    """

    def __init__(self, uploads: ShardUploads, dtype: str, rank: int, shard_bytes: int, limit_bytes: int):
        super().__init__(uploads.store.spool, dtype, rank, shard_bytes)
        self._uploads = uploads
        self._limit_bytes = limit_bytes

    def write_packed(
        self, entry: ManifestEntry, content: bytes, record: bytes, text: bytes | None = None
    ) -> ManifestEntry:
        self._wait_for_room(len(content) + len(record) + len(text or b""))
        try:
            return super().write_packed(entry, content, record, text)
        except OSError as error:
            self._uploads.fail(error)
            raise

    def _choose_path(self, bucket: Size) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{bucket[0]}x{bucket[1]}-{self._rank:05d}-{secrets.randbelow(NUM_NAMES):012d}.tar"
        self._uploads.begin(self._folder / name)
        return self._folder / name

    def _finish(self, writer: ShardWriter) -> None:
        writer.close()
        self._uploads.finish(writer.path, writer.num_samples)

    def _read_latents(self, entry: ManifestEntry) -> bytes:
        if self._uploads.holds(entry.file):
            return super()._read_latents(entry)
        return bytes(read_remote_item(self._uploads.store.url, entry).npz)

    def _wait_for_room(self, size: int) -> None:
        """Wait until the spool has room for `size` bytes."""
        while True:
            with self._lock:
                open_bytes, waiting_bytes = sum(map(_get_size, self._open.values())), self._uploads.waiting_bytes
                if open_bytes + waiting_bytes + size <= self._limit_bytes or not open_bytes + waiting_bytes:
                    return
                if not waiting_bytes:
                    largest = max(self._open, key=lambda bucket: _get_size(self._open[bucket]))
                    self._finish(self._open.pop(largest))
            self._uploads.wait()


def _get_size(writer: ShardWriter) -> int:
    return writer.bytes_written
