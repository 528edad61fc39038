"""Objects on stores that fsspec opens (`s3://`, `gs://`, `https://`, ...): list them, describe them, read byte ranges.

fsspec itself finds credentials and endpoints: in environment variables and files of the back end, in `FSSPEC_...`
variables, and in `~/.config/fsspec`. Transient errors (a dropped connection, a busy server) are retried after growing
waits. An error that remains is not a fault of a sample: it ends the job, whose state is saved.
"""

import asyncio
import errno
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.registry import known_implementations
from loguru import logger

from sdxl_trainer.data.files import SeekableBytes, commit_file, open_temporary
from sdxl_trainer.data.stores.streams import PIPE, UNKNOWN_BYTES, RefusedStreamError, copy_stream, is_streamed

T = TypeVar("T")

ATTEMPTS, DESCRIBE_ATTEMPTS = 8, 3
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0
REPORT_SECONDS = 10.0  # without an answer, after which the log says that a store is still waited for
RETRY_LIMIT_SECONDS = 60.0  # retries end after this time, because the back ends' own retries take long, too
NUM_THREADS = 32
SHARD_SUFFIX = ".tar"
MIN_OBJECTS_TO_LIST = 32  # for fewer objects, each one is described without a listing of its folder
VERSION_FIELDS = (
    *("ETag", "etag", "md5Hash", "crc32c", "LastModified", "last_modified", "updated", "mtime", "created"),
    *("Last-Modified", "Content-MD5", "Digest"),  # of HTTP servers
)
TIME_FIELDS = ("LastModified", "last_modified", "mtime", "created")
CHECKSUM_FIELDS = ("md5Hash", "content_md5", "ETag", "etag")
# Errors of libraries that may not be installed. A library that is not loaded cannot have raised an error.
FOREIGN_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("httpx", "HTTPError"),
    ("requests.exceptions", "RequestException"),
)
PERMANENT_ERRORS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "GoogleAuthError",
    "ParamValidationError",
}
EXPIRED = re.compile(r"\bexpired\b|ExpiredToken", re.IGNORECASE)  # in the message of an error

_last_report = -REPORT_SECONDS  # time of the last line of `report_wait`


class RemoteSpan(NamedTuple):
    """A range of bytes of an object."""

    url: str
    offset: int
    size: int


class StoreError(RuntimeError):
    """A store that cannot be used: access denied, unreachable, or its package is not installed."""


class NoRangesError(StoreError):
    """A server that sends only whole files."""


@dataclass(frozen=True)
class StoredObject:
    """An object, with its size and version."""

    url: str
    size: int  # UNKNOWN_BYTES for a stream
    version: str  # differs from the version of an earlier object with this URL
    checksum: str = ""  # as the store names it, such as an ETag; "" if it names none
    modified: float | None = None  # time of the last change by the store's clock; None if it names none


def is_remote(name: str | Path) -> bool:
    """Return whether a name is a URL and not a path."""
    return "://" in str(name) or str(name).startswith(PIPE)


def is_remote_shard(name: str | Path) -> bool:
    """Return whether a name is the URL of a shard. The output of a command is always one."""
    url = str(name)
    return is_remote(url) and (url.startswith(PIPE) or url.partition("?")[0].lower().endswith(SHARD_SUFFIX))


def open_store(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it.

    Raises:
        StoreError: the protocol is unknown, or its package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        protocol = url.partition("://")[0]
        known = known_implementations.get(protocol, {}).get("err", str(error))
        raise StoreError(f"{protocol}:// needs a package that is not installed: {known}") from None
    except ValueError as error:
        raise StoreError(str(error)) from None


def find_objects(pattern: str) -> list[str]:
    """List the URLs that match a pattern with `*`, sorted.

    Raises:
        StoreError: the store cannot be listed.
    """
    store, path = open_store(pattern)
    try:
        with report_silence(pattern, lambda: 0):
            return sorted(store.unstrip_protocol(name) for name in store.glob(path))
    except list_error_classes() as error:
        raise StoreError(f"{pattern}: {describe_error(error)}") from error


def describe_objects(urls: Sequence[str]) -> list[StoredObject | FileNotFoundError]:
    """Return the size and version of each object, or the error if it does not exist.

    Raises:
        StoreError: the store does not answer, or denies access.
    """
    folders = {url.rpartition("/")[0] for url in urls if not is_streamed(url)}
    for folder in folders if len(urls) >= MIN_OBJECTS_TO_LIST else ():
        _list_folder(folder)
    items: list[StoredObject | FileNotFoundError] = []
    with ThreadPoolExecutor(NUM_THREADS) as pool, report_silence(urls[0] if urls else "", lambda: len(items)):
        for item in pool.map(_describe_object, urls):
            items.append(item)
    return items


@contextmanager
def report_silence(url: str, count_answers: Callable[[], int]) -> Iterator[None]:
    """Log every REPORT_SECONDS in the context that a store does not answer: its library may retry for minutes."""
    is_over = threading.Event()

    def watch() -> None:
        silent_seconds, num_before = 0.0, count_answers()
        while not is_over.wait(REPORT_SECONDS):
            num_answers = count_answers()
            silent_seconds = 0.0 if num_answers > num_before else silent_seconds + REPORT_SECONDS
            num_before = num_answers
            if silent_seconds:
                report_wait(url, silent_seconds)

    watcher = threading.Thread(target=watch, name="store-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def report_wait(url: str, seconds: float) -> None:
    """Log that a store has not answered yet, at most every REPORT_SECONDS: many threads may wait for it.

    The doctor shows a line with `is_wait` at once.
    """
    global _last_report
    if time.monotonic() - _last_report >= 0.9 * REPORT_SECONDS:
        _last_report = time.monotonic()
        logger.bind(is_wait=True).warning("{}: no answer for {:.0f} s; still trying", url, seconds)


def read_spans(spans: Sequence[RemoteSpan], attempts: int = ATTEMPTS) -> list[bytes | FileNotFoundError]:
    """Read all spans concurrently. The bytes of a span are fewer if its object ends before the span.

    Raises:
        StoreError: a store denies access, or does not answer any of the attempts.
    """
    results: list[Any] = [None] * len(spans)
    pending = list(range(len(spans)))
    for _ in _iterate_attempts(attempts, spans[0].url if spans else ""):
        for number, result in zip(pending, _read_once([spans[number] for number in pending]), strict=True):
            results[number] = result
        pending = [number for number in pending if _is_transient(results[number])]
        if not pending:
            break
        _renew_access(spans[pending[0]].url, results[pending[0]])
    for (url, offset, _), result in zip(spans, results, strict=True):
        if isinstance(result, NoRangesError):
            raise result
        if isinstance(result, Exception) and not isinstance(result, FileNotFoundError):
            raise StoreError(f"{url} at byte {offset}: {describe_error(result)}") from result
    return results


def download(url: str, target: Path) -> None:
    """Copy a whole object to a file, which appears when it is complete.

    Raises:
        FileNotFoundError: the object does not exist.
        StoreError: the store denies access, does not answer any of the attempts, or sends another number of bytes.
    """
    with open_temporary(target) as file:
        copy_object(url, Path(file.name))
        commit_file(Path(file.name), target)


def copy_object(url: str, file: Path) -> None:
    """Copy a whole object into a temporary file. Raises like `download`."""
    if is_streamed(url):
        call_with_retries(url, DESCRIBE_ATTEMPTS, lambda: copy_stream(url, file))
        return
    [item] = describe_objects([url])
    if isinstance(item, FileNotFoundError):
        raise item
    store, path = open_store(url)
    call_with_retries(url, ATTEMPTS, lambda: store.get_file(path, str(file)))
    if (size := file.stat().st_size) != item.size:
        raise StoreError(f"{url}: received {size} of {item.size} bytes")


class RemoteFile(SeekableBytes):
    """File object over a remote object. It reads windows around the position of a read, and keeps the latest windows.

    Args:
        before: bytes of a window before the position.
        after: bytes of a window from the position on.
    """

    MAX_WINDOWS = 4

    def __init__(self, item: StoredObject, before: int = 0, after: int = 4 << 20):
        super().__init__(item.size)
        self._item = item
        self._before, self._after = before, after
        self._windows: list[tuple[int, bytes]] = []

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, unless the object ends before, and return the number of bytes read.

        Raises:
            FileNotFoundError: the object no longer exists.
            StoreError: the store does not answer.
        """
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and self._place < self._item.size:
            start, content = self._find_window()
            part = content[self._place - start :][: len(view) - done]
            if not part:
                break  # the object has become shorter
            view[done : done + len(part)] = part
            done, self._place = done + len(part), self._place + len(part)
        return done

    def _find_window(self) -> tuple[int, bytes]:
        for start, content in self._windows:
            if start <= self._place < start + len(content):
                return start, content
        start, end = max(0, self._place - self._before), min(self._place + self._after, self._item.size)
        [content] = read_spans([RemoteSpan(self._item.url, start, end - start)])
        if isinstance(content, FileNotFoundError):
            raise content
        self._windows = [*self._windows[1 - self.MAX_WINDOWS :], (start, content)]
        return start, content


def _read_once(spans: Sequence[RemoteSpan]) -> list[Any]:
    """Return the bytes or the error of each span."""
    results: list[Any] = [None] * len(spans)
    by_store: dict[Any, list[int]] = {}
    paths = []
    for number, (url, _, _) in enumerate(spans):
        if is_streamed(url):
            results[number] = NoRangesError(f"{url}: a stream has no byte ranges; set data.remote_shards.copies_dir")
            paths.append(url)
            continue
        store, path = open_store(url)
        paths.append(path)
        by_store.setdefault(store, []).append(number)
    for store, numbers in by_store.items():
        starts = [spans[number].offset for number in numbers]
        ends = [spans[number].offset + spans[number].size for number in numbers]
        try:
            found = store.cat_ranges([paths[number] for number in numbers], starts, ends, on_error="return")
        except list_error_classes() as error:
            found = [error] * len(numbers)
        for number, result in zip(numbers, found, strict=True):
            results[number] = _verify_answer(result, spans[number])
    return results


def _is_beyond_end(error: Exception) -> bool:
    """Return whether an error says that an object ends before a span. A number in its text may be part of the URL."""
    statuses = (getattr(error, name, None) for name in ("status", "code", "status_code"))
    return 416 in statuses or re.search("range.*not satisfiable|InvalidRange", str(error), re.I) is not None


def _verify_answer(result: Any, span: RemoteSpan) -> Any:
    """Return a store's answer to a span, b"" if the object ends before the span, or an error for a whole file."""
    if isinstance(result, Exception) and _is_beyond_end(result):
        return b""
    if not isinstance(result, Exception) and len(result) > span.size:
        return NoRangesError(f"{span.url}: the server sends only whole files; set data.remote_shards.shuffle_shards")
    return result


def _describe_object(url: str) -> StoredObject | FileNotFoundError:
    if is_streamed(url):
        return StoredObject(url, UNKNOWN_BYTES, "stream")  # only reading the stream would tell
    store, path = open_store(url)
    try:
        fields = call_with_retries(url, DESCRIBE_ATTEMPTS, lambda: store.info(path))
    except FileNotFoundError as error:
        return error
    if fields.get("type", "file") != "file" or fields.get("size") is None:
        return FileNotFoundError(errno.ENOENT, "not a file, or its size is unknown", url)
    return build_stored_object(url, fields)


def build_stored_object(url: str, fields: Mapping[str, Any]) -> StoredObject:
    """Return an object from the fields by which fsspec describes it."""
    version = "|".join(str(fields[name]) for name in VERSION_FIELDS if fields.get(name) is not None)
    checksum = next((str(fields[name]).strip('"') for name in CHECKSUM_FIELDS if fields.get(name)), "")
    return StoredObject(url, int(fields["size"]), f"{fields['size']}|{version}", checksum, _find_time(fields))


def _find_time(fields: Mapping[str, Any]) -> float | None:
    for value in map(fields.get, TIME_FIELDS):
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return None


def call_with_retries(url: str, attempts: int, call: Callable[[], T]) -> T:
    """Call a store and return the result. Repeat the call after a transient error.

    Raises:
        FileNotFoundError: the object does not exist.
        FileExistsError: the object exists and must not.
        StoreError: the store denies access, or does not answer any of the attempts.
    """
    failure: Exception | None = None
    for _ in _iterate_attempts(attempts, url):
        try:
            return call()
        except (FileNotFoundError, FileExistsError):
            raise
        except list_error_classes() as error:
            failure = error
            if not _is_transient(error):
                break
            _renew_access(url, error)
    assert failure is not None, "at least one attempt was made"
    raise StoreError(f"{url}: {describe_error(failure)}") from failure


def _iterate_attempts(attempts: int, url: str) -> Iterator[int]:
    """Yield the number of each attempt. Wait before all but the first, and end after RETRY_LIMIT_SECONDS."""
    started = time.monotonic()
    for attempt in range(attempts):
        if attempt:
            if (waited := time.monotonic() - started) > REPORT_SECONDS:
                report_wait(url, waited)
            time.sleep(_choose_wait(attempt))
        yield attempt
        if time.monotonic() - started > RETRY_LIMIT_SECONDS:
            return


def _list_folder(folder: str) -> None:
    """List a folder, so that fsspec caches the size and version of all its objects in one request. Ignore errors."""
    store, path = open_store(folder)
    try:
        store.ls(path, detail=True)
    except list_error_classes():
        return


def _is_transient(result: Any) -> bool:
    """Return whether a store's answer is an error that a retry may cure."""
    if not isinstance(result, Exception):
        return False
    if _has_expired(result):
        return True
    if isinstance(result, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, StoreError)):
        return False
    if isinstance(result, RefusedStreamError):
        return False
    if any(base.__name__ in PERMANENT_ERRORS for base in type(result).__mro__):
        return False
    status = getattr(result, "status", 0) or getattr(result, "code", 0)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 429))


def _has_expired(error: Exception) -> bool:
    """Return whether a store refused credentials that were valid before."""
    return isinstance(error, OSError) and EXPIRED.search(str(error)) is not None


def _renew_access(url: str, error: Exception) -> None:
    """Read the credentials of a store again if they have expired: a file or a service may give new ones by now."""
    if not _has_expired(error):
        return
    store, _ = open_store(url)
    if hasattr(store, "connect"):  # s3fs; others renew a token themselves
        with suppress(*list_error_classes()):
            store.connect(refresh=True)


def list_error_classes() -> tuple[type[Exception], ...]:
    """Return the classes of errors that a store may raise."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in FOREIGN_ERRORS)
    return (OSError, TimeoutError, asyncio.TimeoutError, *(error for error in found if error))


def describe_error(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _choose_wait(attempt: int) -> float:
    """Return the seconds before an attempt: doubled each time, and random, so that ranks do not retry together."""
    return min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
