"""Objects on stores that fsspec opens (`s3://`, `gs://`, `https://`, ...): what is there, and ranges of their bytes.

Credentials and endpoints are found by fsspec's own means: the back end's environment variables and files, `FSSPEC_...`
variables, and `~/.config/fsspec`. What may pass (a dropped connection, a busy server) is tried again after growing
waits. What then still fails is no fault of a sample: it ends the job, whose state is saved.
"""

import asyncio
import errno
import os
import random
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.registry import known_implementations

from sdxl_trainer.data.files import SeekableBytes

ATTEMPTS, FEW_ATTEMPTS = 8, 3
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0
PATIENCE_SECONDS = 60.0  # after which no further attempt begins: packages have retries of their own, which take long
NUM_THREADS = 32
MANY = 32  # objects of one folder, for which it is listed instead of asking for each
VERSION_FIELDS = ("ETag", "etag", "md5Hash", "crc32c", "LastModified", "last_modified", "updated", "mtime", "created")
# Errors of libraries that need not be installed: those that are not loaded cannot have raised.
FOREIGN_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("requests.exceptions", "RequestException"),
)
LASTING = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "GoogleAuthError",
    "ParamValidationError",
}

Span = tuple[str, int, int]  # url, offset and size in bytes


class StoreError(RuntimeError):
    """A store that cannot be used: no access, not to be reached, or the package for it is missing."""


class NoRangesError(StoreError):
    """A server that does not send parts of a file."""


@dataclass(frozen=True)
class StoredObject:
    """An object and what tells it from an earlier one of the same name."""

    url: str
    size: int
    version: str


def is_remote(name: str | Path) -> bool:
    """Whether a name is a URL, and not a path."""
    return "://" in str(name)


def open_store(url: str) -> tuple[Any, str]:
    """(fsspec's file system of a URL, the path in it).

    Raises:
        StoreError: there is none of that name, or its package is not installed.
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
    """URLs that match a pattern with `*`, sorted.

    Raises:
        StoreError: the store cannot be listed.
    """
    store, path = open_store(pattern)
    try:
        return sorted(store.unstrip_protocol(name) for name in store.glob(path))
    except _list_error_classes() as error:
        raise StoreError(f"{pattern}: {_describe(error)}") from error


def describe_objects(urls: Sequence[str]) -> list[StoredObject | FileNotFoundError]:
    """Size and version of each object, from listings of their folders or one by one, or that it is not there.

    Raises:
        StoreError: the store does not answer, or refuses.
    """
    for folder in {url.rpartition("/")[0] for url in urls} if len(urls) >= MANY else ():
        _list_folder(folder)  # which fsspec keeps; where a store cannot be listed, each object is asked for
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(_describe_object, urls))


def read_spans(spans: Sequence[Span], attempts: int = ATTEMPTS) -> list[bytes | FileNotFoundError]:
    """The bytes of each span, all asked for at once; fewer where an object ends before.

    Raises:
        StoreError: a store refuses, or did not answer to any of the attempts.
    """
    results: list[Any] = [None] * len(spans)
    left = list(range(len(spans)))
    for _ in _iterate_attempts(attempts):
        for number, result in zip(left, _read_once([spans[number] for number in left]), strict=True):
            results[number] = result
        left = [number for number in left if isinstance(results[number], Exception) and _may_pass(results[number])]
        if not left:
            break
    for (url, offset, _), result in zip(spans, results, strict=True):
        if isinstance(result, NoRangesError):
            raise result
        if isinstance(result, Exception) and not isinstance(result, FileNotFoundError):
            raise StoreError(f"{url} at byte {offset}: {_describe(result)}") from result
    return results


def download(url: str, target: Path) -> None:
    """Copy a whole object to a file, which appears when it is complete.

    Raises:
        FileNotFoundError: there is none.
        StoreError: the store refuses, did not answer to any of the attempts, or sent another number of bytes.
    """
    [item] = describe_objects([url])
    if isinstance(item, FileNotFoundError):
        raise item
    store, path = open_store(url)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _try_often(url, ATTEMPTS, lambda: store.get_file(path, str(temporary)))
        if (size := temporary.stat().st_size) != item.size:
            raise StoreError(f"{url}: {size} bytes came of {item.size}")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


class RemoteFile(SeekableBytes):
    """An object as a file to read and seek in. It reads windows around where it is asked and keeps the last ones.

    Args:
        before: bytes of a window that lie before the place asked for.
        after: bytes from there on.
    """

    KEPT = 4  # windows

    def __init__(self, item: StoredObject, before: int = 0, after: int = 4 << 20):
        super().__init__(item.size)
        self._item = item
        self._before, self._after = before, after
        self._windows: list[tuple[int, bytes]] = []

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, unless the object ends before.

        Raises:
            FileNotFoundError: the object is gone.
            StoreError: the store does not answer.
        """
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and self._place < self._item.size:
            start, content = self._find_window()
            part = content[self._place - start :][: len(view) - done]
            if not part:
                break  # the object is shorter than it was
            view[done : done + len(part)] = part
            done, self._place = done + len(part), self._place + len(part)
        return done

    def _find_window(self) -> tuple[int, bytes]:
        for start, content in self._windows:
            if start <= self._place < start + len(content):
                return start, content
        start = max(0, self._place - self._before)
        [content] = read_spans([(self._item.url, start, min(self._place + self._after, self._item.size) - start)])
        if isinstance(content, FileNotFoundError):
            raise content
        self._windows = [*self._windows[1 - self.KEPT :], (start, content)]
        return start, content


def _read_once(spans: Sequence[Span]) -> list[Any]:
    """Bytes or the error of each span."""
    results: list[Any] = [None] * len(spans)
    by_store: dict[Any, list[int]] = {}
    paths = []
    for number, (url, _, _) in enumerate(spans):
        store, path = open_store(url)
        paths.append(path)
        by_store.setdefault(store, []).append(number)
    for store, numbers in by_store.items():
        starts = [spans[number][1] for number in numbers]
        ends = [spans[number][1] + spans[number][2] for number in numbers]
        try:
            found = store.cat_ranges([paths[number] for number in numbers], starts, ends, on_error="return")
        except _list_error_classes() as error:
            found = [error] * len(numbers)
        for number, result in zip(numbers, found, strict=True):
            results[number] = _trim(result, *spans[number])
    return results


def _trim(result: Any, url: str, offset: int, size: int) -> Any:
    """What a store answered, if it is what was asked for."""
    if isinstance(result, Exception) and re.search("range.*not satisfiable|\\b416\\b", str(result), re.I):
        return b""  # the object ends before
    if not isinstance(result, Exception) and len(result) > size:
        return NoRangesError(f"{url}: the server sends whole files only; set data.remote_shards.shuffle_shards")
    return result


def _describe_object(url: str) -> StoredObject | FileNotFoundError:
    store, path = open_store(url)
    try:
        fields = _try_often(url, FEW_ATTEMPTS, lambda: store.info(path))
    except FileNotFoundError as error:
        return error
    if fields.get("type", "file") != "file" or fields.get("size") is None:
        return FileNotFoundError(errno.ENOENT, "is no file, or its size is not known", url)
    version = "|".join(str(fields[name]) for name in VERSION_FIELDS if fields.get(name) is not None)
    return StoredObject(url, int(fields["size"]), f"{fields['size']}|{version}")


def _try_often(url: str, attempts: int, call: Callable[[], Any]) -> Any:
    """What a call to a store gives.

    Raises:
        FileNotFoundError: the object is not there.
        StoreError: the store refuses, or did not answer to any of the attempts.
    """
    failure: Exception | None = None
    for _ in _iterate_attempts(attempts):
        try:
            return call()
        except FileNotFoundError:
            raise
        except _list_error_classes() as error:
            failure = error
            if not _may_pass(error):
                break
    assert failure is not None, "there is an attempt, and it failed"
    raise StoreError(f"{url}: {_describe(failure)}") from failure


def _iterate_attempts(attempts: int) -> Iterator[int]:
    """Numbers of attempts, each after a wait, as long as there is patience."""
    started = time.monotonic()
    for attempt in range(attempts):
        if attempt:
            time.sleep(_choose_wait(attempt))
        yield attempt
        if time.monotonic() - started > PATIENCE_SECONDS:
            return


def _list_folder(folder: str) -> None:
    store, path = open_store(folder)
    try:
        store.ls(path, detail=True)
    except _list_error_classes():
        return


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help."""
    status = getattr(error, "status", 0) or getattr(error, "code", 0)
    lasting = isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, StoreError))
    lasting |= any(base.__name__ in LASTING for base in type(error).__mro__)
    return not lasting and not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 429))


def _list_error_classes() -> tuple[type[Exception], ...]:
    """What reading from a store may raise."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in FOREIGN_ERRORS)
    return (OSError, TimeoutError, asyncio.TimeoutError, *(error for error in found if error))


def _describe(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _choose_wait(attempt: int) -> float:
    """Seconds before an attempt, at random around what doubles each time, so that not all come back at once."""
    return min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
