"""Tar shards in webdataset's form, written so that a crash loses nothing and read by position.

A sample is two members, `key.json` (the record) and `key.npz` (the latents), and where text is cached a third,
`key.te.npz` (the text encoders' outputs), of plain USTAR/GNU tar. The manifest lists the offset of each npz, so one
`pread` gets it and shuffling needs no extraction. Any tar reader reads them.

A shard is built under a hidden name. A job that is killed leaves it there, and `recover_shard` cuts it after the last
sample that the manifest lists, closes it and gives it its name.
"""

import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)  # what closes a tar
# Zip and npy headers put the first array of an npz 189 bytes in. From here its values are aligned in memory: faster to
# look at and to copy.
NPZ_SHIFT = 3
TEXT_SUFFIX = ".te.npz"


@dataclass(frozen=True)
class ShardPlace:
    """Where a sample's npz lies: bytes [offset, offset + size) of a shard."""

    shard: str
    offset: int
    size: int
    text_offset: int | None = None  # of the text encoders' outputs


class BadShardError(ValueError):
    """A shard that cannot be read or must not be trusted; the message is the reason."""


class ShardWriter:
    """Appends samples to one shard.

    Each is written at the place where it belongs and not at the end of the file: what a failed write (the disk is
    full) left half done is overwritten by the next sample, or cut off when the shard is closed.

    Args:
        path: the shard's final name; it appears when `close` is called.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(get_partial_path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._flush_lock = threading.Lock()
        self._bytes_flushed = 0
        self.bytes_written = 0

    def append(
        self, key: str, json_content: bytes, npz_content: bytes, text_content: bytes | None = None
    ) -> ShardPlace:
        """Write one sample and return where its parts lie. It is on disk only after `flush`.

        Raises:
            OSError: it could not be written; the shard is as it was before.
        """
        first, between, last = build_frame(key, len(json_content), len(npz_content))
        sample = b"".join((first, json_content, between, npz_content, last))
        offset = self.bytes_written + len(first) + len(json_content) + len(between)
        text_offset = None
        if text_content is not None:
            header, padding = build_text_frame(key, len(text_content))
            text_offset = self.bytes_written + len(sample) + len(header)
            sample = b"".join((sample, header, text_content, padding))
        _write_at(self._descriptor, sample, self.bytes_written)
        self.bytes_written += len(sample)
        return ShardPlace(self.path.name, offset, len(npz_content), text_offset)

    def flush(self, end: int) -> None:
        """Bring bytes [0, end) to disk. Threads may call it at once, also while one appends: one sync serves all that
        wait for it."""
        with self._flush_lock:
            if self._bytes_flushed < end:
                written = self.bytes_written
                os.fsync(self._descriptor)
                self._bytes_flushed = written

    def close(self) -> None:
        """Close the tar and give the shard its name.

        Raises:
            OSError: it could not be written; the shard stays unfinished, for `recover_shard`.
        """
        with self._flush_lock:
            try:
                _finish(self._descriptor, self.bytes_written)
                self._bytes_flushed = self.bytes_written
            finally:
                os.close(self._descriptor)
        os.replace(get_partial_path(self.path), self.path)


def build_frame(key: str, record_bytes: int, npz_bytes: int) -> tuple[bytes, bytes, bytes]:
    """What tar puts before a sample's record, between it and the npz, and after that.

    It follows from the manifest alone, so a single wrong byte of it can be told.
    """
    name = encode_key(key)
    between = bytes(_pad(record_bytes)) + _build_header(f"{name}.npz", npz_bytes)
    return _build_header(f"{name}.json", record_bytes), between, bytes(_pad(npz_bytes))


def build_text_frame(key: str, text_bytes: int) -> tuple[bytes, bytes]:
    """What tar puts before a sample's text encoder outputs, and after them."""
    return _build_header(encode_key(key) + TEXT_SUFFIX, text_bytes), bytes(_pad(text_bytes))


def compute_sample_span(key: str, record_bytes: int, offset: int, npz_bytes: int) -> tuple[int, int]:
    """Bytes [start, end) of a shard that a sample's record and latents take, headers included; the npz at `offset`."""
    length = len(encode_key(key).encode())
    record = _count_header_bytes(length + len(".json")) + record_bytes + _pad(record_bytes)
    return offset - _count_header_bytes(length + len(".npz")) - record, offset + npz_bytes + _pad(npz_bytes)


def compute_text_span(key: str, offset: int, text_bytes: int) -> tuple[int, int]:
    """Bytes [start, end) of a shard that a sample's text encoder outputs at `offset` take, header included."""
    header = _count_header_bytes(len(encode_key(key).encode()) + len(TEXT_SUFFIX))
    return offset - header, offset + text_bytes + _pad(text_bytes)


def read_sample(path: Path, key: str, record_bytes: int, offset: int, npz_bytes: int) -> tuple[memoryview, memoryview]:
    """(record, npz) of one sample of a shard, finished or not, with all that tar puts around them checked.

    Raises:
        OSError: there is no such shard, or it cannot be read.
        BadShardError: the sample does not lie there, or is not whole.
    """
    start, end = compute_sample_span(key, record_bytes, offset, npz_bytes)
    if start < 0:
        raise BadShardError("cannot hold the sample where the manifest says")
    content = memoryview(_read_at(path, start, end - start))
    first, between, last = build_frame(key, record_bytes, npz_bytes)
    record_end, npz_start = len(first) + record_bytes, offset - start
    if len(content) != end - start:
        raise BadShardError(f"is cut short: {len(content)} of the sample's {end - start} bytes are left")
    frame = (content[: len(first)], content[record_end:npz_start], content[npz_start + npz_bytes :])
    if frame != (first, between, last):
        raise BadShardError("has another tar header around the sample than it should have")
    return content[len(first) : record_end], content[npz_start : npz_start + npz_bytes]


def read_text_member(path: Path, key: str, offset: int, text_bytes: int) -> memoryview:
    """The text encoder outputs of one sample of a shard, with all that tar puts around them checked.

    Raises:
        OSError: there is no such shard, or it cannot be read.
        BadShardError: they do not lie there, or are not whole.
    """
    start, end = compute_text_span(key, offset, text_bytes)
    if start < 0:
        raise BadShardError("cannot hold the text outputs where the manifest says")
    content = memoryview(_read_at(path, start, end - start))
    if len(content) != end - start:
        raise BadShardError(f"is cut short: {len(content)} of the text outputs' {end - start} bytes are left")
    head, tail = offset - start, offset - start + text_bytes
    if (content[:head], content[tail:]) != build_text_frame(key, text_bytes):
        raise BadShardError("has another tar header around the text outputs than it should have")
    return content[head:tail]


def get_partial_path(path: Path) -> Path:
    """The hidden name under which a shard is built."""
    return path.with_name(f".{path.name}.partial")


def locate_shard(path: Path) -> Path:
    """Where a shard is now: under its name, or, while a job builds it or was killed over it, under the hidden one."""
    return path if path.exists() else get_partial_path(path)


class OpenFile:
    """A file that is open as long as somebody has this."""

    def __init__(self, path: Path | str):
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int = 0, size: int | None = None) -> memoryview:
        """Return `size` bytes from `offset` on, or all up to the end; fewer if the file ends before."""
        size = os.fstat(self._descriptor).st_size - offset if size is None else size
        buffer = np.empty(NPZ_SHIFT + size, np.uint8)[NPZ_SHIFT:].data
        return buffer[: os.preadv(self._descriptor, (buffer,), offset)]


class OpenShards:
    """Shards that stay open, the most recent ones."""

    def __init__(self, limit: int = 64):
        self._limit = limit
        self._files: OrderedDict[str, OpenFile] = OrderedDict()

    def open(self, path: str) -> OpenFile:
        """A shard, finished or not."""
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = OpenFile(locate_shard(Path(path)))
            if len(self._files) > self._limit:
                self._files.popitem(last=False)
        else:
            self._files.move_to_end(path)
        return file

    def forget(self, path: str) -> None:
        """Open it anew when it is asked for again: the handle of a file may have become stale."""
        self._files.pop(path, None)


def list_partial_shards(folder: Path) -> list[Path]:
    """Final names of the shards that a job left unfinished."""
    return [folder / path.name[1 : -len(".partial")] for path in sorted(folder.glob(".*.tar.partial"))]


def recover_shard(path: Path, end: int) -> None:
    """Finish an unfinished shard: keep bytes [0, end), which the manifest vouches for; end 0 removes it."""
    partial = get_partial_path(path)
    if end == 0:
        partial.unlink()
        return
    with open(partial, "rb+") as file:
        _finish(file.fileno(), end + _pad(end))
    os.replace(partial, path)


def verify_shard_end(path: Path, end: int) -> str | None:
    """What is wrong with a finished shard behind its samples, which end at `end`, or None.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size != end + len(END):
        return f"has {size} bytes where its samples and the end of the tar take {end + len(END)}"
    return None if _read_at(path, end, len(END)) == END else "does not end as a tar does"


def iterate_members(path: Path | str, stream: IO[bytes] | None = None) -> Iterator[tuple[str, str, int, int]]:
    """(key, suffix such as "npz", offset, size) of every file in a tar, told from the headers alone.

    Args:
        path: of the tar, or what it is called in errors where a stream is given.

    Raises:
        BadShardError: torn, no tar, or a member that is a link, or whose name is absolute or climbs out with `..`.
    """
    try:
        with nullcontext(stream) if stream else open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                _check_member(path, member)
                if member.isfile():
                    key, _, suffix = member.name.partition(".") if "/" not in member.name else _split(member.name)
                    yield decode_key(key), suffix, member.offset_data, member.size
            # tarfile takes a damaged header, or the end of the file, for the end of the tar.
            file.seek(tar.offset)
            if file.read(BLOCK) != bytes(BLOCK):
                raise BadShardError(f"{path}: is cut short or damaged at byte {tar.offset}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BadShardError(f"{path}: not a readable tar: {error}") from None


def encode_key(key: str) -> str:
    """A key as a member name: webdataset ends the key at the first dot, so dots (and what paths use) are escaped."""
    return key.replace("%", "%25").replace(".", "%2E").replace("/", "%2F")


def decode_key(name: str) -> str:
    """The key of a member name."""
    return name.replace("%2F", "/").replace("%2E", ".").replace("%25", "%")


def _check_member(path: Path | str, member: tarfile.TarInfo) -> None:
    if member.name.startswith("/") or ".." in Path(member.name).parts:
        raise BadShardError(f"{path}: member '{member.name}' points outside the archive")
    if not (member.isfile() or member.isdir()):
        raise BadShardError(f"{path}: member '{member.name}' is no plain file, but a link or a device")


def _split(name: str) -> tuple[str, str, str]:
    """webdataset's rule: the key ends at the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    key, dot, suffix = base.partition(".")
    return f"{folder}/{key}", dot, suffix


def _build_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8")


def _count_header_bytes(name_bytes: int) -> int:
    """Length of `_build_header`: GNU tar puts a name of more than 100 bytes into a member of its own before it."""
    return BLOCK if name_bytes <= tarfile.LENGTH_NAME else 2 * BLOCK + name_bytes + 1 + _pad(name_bytes + 1)


def _pad(size: int) -> int:
    """Bytes up to the next full block."""
    return -size % BLOCK


def _finish(descriptor: int, end: int) -> None:
    os.ftruncate(descriptor, end)
    _write_at(descriptor, END, end)
    os.fsync(descriptor)


def _write_at(descriptor: int, content: bytes, place: int) -> None:
    rest = memoryview(content)
    while rest:
        written = os.pwrite(descriptor, rest, place)
        rest, place = rest[written:], place + written


def _read_at(path: Path, place: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, size, place)
    finally:
        os.close(descriptor)
