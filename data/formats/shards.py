"""Tar shards in webdataset's format: written so that a crash loses nothing, and read by offset.

A sample is two members of plain USTAR/GNU tar, `key.json` (the record) and `key.npz` (the latents), and with cached
text a third, `key.te.npz` (the text encoders' outputs). The manifest lists the offset of each npz, so one `pread` reads
it and shuffling needs no extraction. Any tar reader reads a shard.

A shard is built under a hidden name. A killed job leaves it there; `recover_shard` cuts it after the last sample that
the manifest lists, closes it and renames it.
"""

import errno
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from sdxl_trainer.data.files import Span, create_folder, open_regular, open_stream, replace_file, sync_folder

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)  # of a tar
# Zip and npy headers take the first 189 bytes of an npz. At this shift the array's values are aligned in memory, which
# makes checks and copies faster.
NPZ_SHIFT = 3
TEXT_SUFFIX = ".te.npz"
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Members that webdataset takes for metadata of the shard.
META_NAME = re.compile(r"__[^/]*__(?:$|/)")
MAX_SAMPLE_BYTES = 1 << 30  # of a sample's latents: four times those of 16384 x 16384 px in float64


@dataclass(frozen=True)
class ShardPlace:
    """The place of a sample's npz: bytes [offset, offset + size) of a shard."""

    shard: str
    offset: int
    size: int
    text_offset: int | None = None  # of the text encoders' outputs


class ShardMember(NamedTuple):
    """A file in a shard. Its content is bytes [offset, offset + size) of the tar."""

    key: str
    suffix: str  # such as `npz`
    offset: int
    size: int


class SampleContent(NamedTuple):
    """The content of a sample of a shard."""

    record: memoryview
    npz: memoryview


class SampleFrame(NamedTuple):
    """The headers and padding that tar puts around a sample's record and npz."""

    before: bytes
    between: bytes
    after: bytes


class MemberFrame(NamedTuple):
    """The header and padding that tar puts around a member's content."""

    header: bytes
    padding: bytes


class BadShardError(ValueError):
    """A shard that cannot be read or must not be trusted; the message is the reason."""


class CutShardError(BadShardError):
    """A tar that ends before its headers say."""


class ImageShardError(BadShardError):
    """A tar of images instead of latents."""


class ShardWriter:
    """Appends samples to one shard.

    Each sample is written at its offset instead of at the end of the file. The next sample therefore overwrites the
    remains of a failed write (on a full disk), or `close` removes them.

    Args:
        path: final name of the shard, which appears when `close` is called.
    """

    def __init__(self, path: Path):
        self.path = path
        create_folder(path.parent)
        self._descriptor = os.open(get_partial_path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        sync_folder(path.parent)
        self._flush_lock = threading.Lock()
        self._bytes_flushed = 0
        self.bytes_written = 0
        self.num_samples = 0

    def append(
        self, key: str, json_content: bytes, npz_content: bytes, text_content: bytes | None = None
    ) -> ShardPlace:
        """Append one sample and return the place of its npz. The sample is on disk only after `flush`.

        Raises:
            OSError: the sample could not be written; the shard is unchanged.
        """
        frame = build_sample_frame(key, len(json_content), len(npz_content))
        sample = b"".join((frame.before, json_content, frame.between, npz_content, frame.after))
        offset = self.bytes_written + len(frame.before) + len(json_content) + len(frame.between)
        text_offset = None
        if text_content is not None:
            header, padding = build_text_frame(key, len(text_content))
            text_offset = self.bytes_written + len(sample) + len(header)
            sample = b"".join((sample, header, text_content, padding))
        _write_at(self._descriptor, sample, self.bytes_written)
        self.bytes_written += len(sample)
        self.num_samples += 1
        return ShardPlace(self.path.name, offset, len(npz_content), text_offset)

    def flush(self, end: int) -> None:
        """Flush bytes [0, end) to disk.

        Threads may call this at the same time, also while one of them appends. One sync serves all waiting threads.
        """
        with self._flush_lock:
            if self._bytes_flushed < end:
                written = self.bytes_written
                os.fsync(self._descriptor)
                self._bytes_flushed = written

    def close(self) -> None:
        """Close the tar and rename the shard to its final name.

        Raises:
            OSError: the end of the tar could not be written; the shard stays unfinished, for `recover_shard`.
        """
        with self._flush_lock:
            try:
                _write_end(self._descriptor, self.bytes_written)
                self._bytes_flushed = self.bytes_written
            finally:
                os.close(self._descriptor)
        replace_file(get_partial_path(self.path), self.path)


def build_sample_frame(key: str, record_bytes: int, npz_bytes: int) -> SampleFrame:
    """Build the frame of a sample's record and npz.

    The frame follows from the manifest's fields, so a reader finds every wrong byte of it.
    """
    name = encode_key(key)
    between = bytes(_count_padding(record_bytes)) + _build_header(f"{name}.npz", npz_bytes)
    return SampleFrame(_build_header(f"{name}.json", record_bytes), between, bytes(_count_padding(npz_bytes)))


def build_text_frame(key: str, text_bytes: int) -> MemberFrame:
    """Build the frame of a sample's text encoder outputs."""
    return MemberFrame(_build_header(encode_key(key) + TEXT_SUFFIX, text_bytes), bytes(_count_padding(text_bytes)))


def compute_sample_span(key: str, record_bytes: int, offset: int, npz_bytes: int) -> Span:
    """Compute the span of a shard that a sample's record and npz take with their frame. The npz is at `offset`."""
    length = len(encode_key(key).encode())
    record = _count_header_bytes(length + len(".json")) + record_bytes + _count_padding(record_bytes)
    before = record + _count_header_bytes(length + len(".npz"))
    return Span(offset - before, before + npz_bytes + _count_padding(npz_bytes))


def compute_text_span(key: str, offset: int, text_bytes: int) -> Span:
    """Compute the span of a shard that a sample's text encoder outputs at `offset` take with their frame."""
    header = _count_header_bytes(len(encode_key(key).encode()) + len(TEXT_SUFFIX))
    return Span(offset - header, header + text_bytes + _count_padding(text_bytes))


def read_sample(path: Path, key: str, record_bytes: int, offset: int, npz_bytes: int) -> SampleContent:
    """Read one sample of a shard, finished or not, and check the tar headers and padding around it.

    Raises:
        OSError: the shard is missing or unreadable.
        BadShardError: the sample is not at this offset, or is damaged.
    """
    content = _read_span(path, compute_sample_span(key, record_bytes, offset, npz_bytes), "sample")
    return parse_sample(content, key, record_bytes, offset, npz_bytes)


def parse_sample(content: memoryview, key: str, record_bytes: int, offset: int, npz_bytes: int) -> SampleContent:
    """Return one sample of the bytes of its span, and check the tar headers and padding around it.

    Raises:
        BadShardError: the sample is damaged.
    """
    span = compute_sample_span(key, record_bytes, offset, npz_bytes)
    if len(content) != span.size:
        raise BadShardError(f"is cut short: holds {len(content)} of the {span.size} bytes of the sample")
    frame = build_sample_frame(key, record_bytes, npz_bytes)
    record_start, npz_start = len(frame.before), offset - span.offset
    record_end, npz_end = record_start + record_bytes, npz_start + npz_bytes
    if (content[:record_start], content[record_end:npz_start], content[npz_end:]) != frame:
        raise BadShardError("has a wrong tar header or padding around the sample")
    return SampleContent(content[record_start:record_end], content[npz_start:npz_end])


def read_text_member(path: Path, key: str, offset: int, text_bytes: int) -> memoryview:
    """Read the text encoder outputs of one sample of a shard, and check the tar header and padding around them.

    Raises:
        OSError: the shard is missing or unreadable.
        BadShardError: the outputs are not at this offset, or are damaged.
    """
    span = compute_text_span(key, offset, text_bytes)
    content = _read_span(path, span, "text outputs")
    start, end = offset - span.offset, offset - span.offset + text_bytes
    if (content[:start], content[end:]) != build_text_frame(key, text_bytes):
        raise BadShardError("has a wrong tar header or padding around the text outputs")
    return content[start:end]


def get_partial_path(path: Path) -> Path:
    """Return the hidden name under which a shard is built."""
    return path.with_name(f".{path.name}.partial")


def locate_shard(path: Path) -> Path:
    """Return the path of a shard: its final name, or the hidden one while it is unfinished."""
    return path if path.exists() else get_partial_path(path)


class OpenFile:
    """A file that stays open as long as this object exists."""

    def __init__(self, path: Path | str):
        self._descriptor = open_regular(path)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int = 0, size: int | None = None) -> memoryview:
        """Return `size` bytes from `offset` on, or fewer if the file ends before. None reads up to the end.

        Raises:
            OSError: the storage failed, or more than MAX_SAMPLE_BYTES are to be read.
        """
        size = os.fstat(self._descriptor).st_size - offset if size is None else size
        if size > MAX_SAMPLE_BYTES:
            raise OSError(errno.EFBIG, f"has {size:,} bytes, more than {MAX_SAMPLE_BYTES:,}")
        buffer = np.empty(NPZ_SHIFT + size, np.uint8)[NPZ_SHIFT:].data
        return buffer[: os.preadv(self._descriptor, (buffer,), offset)]


class OpenShards:
    """The most recently used shards, kept open."""

    def __init__(self, limit: int = 64):
        self._limit = limit
        self._files: OrderedDict[str, OpenFile] = OrderedDict()

    def open(self, path: str) -> OpenFile:
        """Return the open file of a shard, finished or not."""
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = OpenFile(locate_shard(Path(path)))
            if len(self._files) > self._limit:
                self._files.popitem(last=False)
        else:
            self._files.move_to_end(path)
        return file

    def forget(self, path: str) -> None:
        """Drop a shard's handle, which may be stale, so that the next `open` opens the file again."""
        self._files.pop(path, None)


def list_partial_shards(folder: Path) -> list[Path]:
    """Return the final names of the shards that a job left unfinished."""
    return [folder / path.name[1 : -len(".partial")] for path in sorted(folder.glob(".*.tar.partial"))]


def recover_shard(path: Path, end: int) -> None:
    """Finish an unfinished shard with its bytes [0, end), which the manifest lists; `end` 0 removes it."""
    partial = get_partial_path(path)
    if end == 0:
        partial.unlink()
        return
    with open(partial, "rb+") as file:
        _write_end(file.fileno(), end + _count_padding(end))
    replace_file(partial, path)


def verify_shard_end(path: Path, end: int) -> str | None:
    """Return a message if a finished shard is damaged after its samples, which end at `end`; None if it is whole.

    Raises:
        OSError: the shard cannot be read.
    """
    size = path.stat().st_size
    if size != end + len(END):
        return f"has {size} bytes, but its samples and the end of the tar take {end + len(END)}"
    return None if _read_at(path, Span(end, len(END))) == END else "does not end as a tar does"


def iterate_members(path: Path | str, stream: IO[bytes] | None = None) -> Iterator[ShardMember]:
    """Yield every file of a tar that webdataset reads, from its headers alone.

    As in webdataset, folders, links and devices are skipped, and so are members named `__NAME__` and those below such a
    folder. A member whose name has no key has its whole name for a key, and no suffix.

    Args:
        path: path of the tar, or its name for errors if a stream is given.
        stream: the tar; None opens `path`.

    Raises:
        BadShardError: the tar is torn or compressed, the file is not a tar, or a member is sparse or points outside
            the tar.
    """
    from webdataset.tariterators import base_plus_ext  # imports torch, which few programs need before training

    try:
        with (
            nullcontext(stream) if stream else open_stream(path) as file,
            _open_tar(path, file) as tar,
        ):
            for member in tar:
                _check_member(path, member)
                if member.isfile() and not META_NAME.match(member.name):
                    key, suffix = base_plus_ext(member.name)
                    yield ShardMember(decode_key(key or member.name), suffix or "", member.offset_data, member.size)
            # tarfile treats a damaged header, and the end of the file, as the end of the tar.
            file.seek(tar.offset)
            following = file.read(BLOCK)
            if len(following) < BLOCK:
                raise CutShardError(f"{path}: is cut short at byte {tar.offset + len(following)}")
            if following != bytes(BLOCK):
                raise BadShardError(f"{path}: is damaged at byte {tar.offset}")
    except (tarfile.TarError, EOFError, OSError) as error:
        if "unexpected end of data" in str(error):
            raise CutShardError(f"{path}: is cut short: it ends before its own headers say") from None
        raise BadShardError(f"{path}: not a readable tar: {error}") from None


def encode_key(key: str) -> str:
    """Escape dots and slashes of a key, because webdataset ends the key at the first dot of a member's name.

    Null characters are escaped too: they end a name in a tar.
    """
    return key.replace("%", "%25").replace(".", "%2E").replace("/", "%2F").replace("\0", "%00")


def decode_key(name: str) -> str:
    """Return the key of a member's name."""
    return name.replace("%00", "\0").replace("%2F", "/").replace("%2E", ".").replace("%25", "%")


def _open_tar(path: Path | str, file: IO[bytes]) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:", encoding="utf-8")
    except tarfile.ReadError:
        file.seek(0)
        start = file.read(max(map(len, COMPRESSIONS)))
        for magic, program in COMPRESSIONS.items():
            if start.startswith(magic):
                raise BadShardError(
                    f"{path}: is compressed; samples are read by position, so decompress it ({program} -d)"
                ) from None
        raise


def _check_member(path: Path | str, member: tarfile.TarInfo) -> None:
    if member.name.startswith("/") or ".." in Path(member.name).parts:
        raise BadShardError(f"{path}: member '{member.name}' points outside the archive")
    if member.sparse is not None:
        raise BadShardError(f"{path}: member '{member.name}' is stored with holes; write the tar without --sparse")


def _build_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8")


def _count_header_bytes(name_bytes: int) -> int:
    """Return the length of a member's header. GNU tar stores a name of more than 100 bytes in a member before it."""
    return BLOCK if name_bytes <= tarfile.LENGTH_NAME else 2 * BLOCK + name_bytes + 1 + _count_padding(name_bytes + 1)


def _count_padding(size: int) -> int:
    """Return the number of bytes up to the next full block."""
    return -size % BLOCK


def _write_end(descriptor: int, end: int) -> None:
    """Cut a tar at `end`, write the blocks that close it, and flush the file to disk."""
    os.ftruncate(descriptor, end)
    _write_at(descriptor, END, end)
    os.fsync(descriptor)


def _write_at(descriptor: int, content: bytes, place: int) -> None:
    rest = memoryview(content)
    while rest:
        written = os.pwrite(descriptor, rest, place)
        rest, place = rest[written:], place + written


def _read_span(path: Path, span: Span, name: str) -> memoryview:
    if span.offset < 0:
        raise BadShardError(f"cannot hold the {name} at the offset in the manifest")
    content = memoryview(_read_at(path, span))
    if len(content) != span.size:
        raise BadShardError(f"is cut short: holds {len(content)} of the {span.size} bytes of the {name}")
    return content


def _read_at(path: Path, span: Span) -> bytes:
    descriptor = open_regular(path)
    try:
        return os.pread(descriptor, span.size, span.offset)
    finally:
        os.close(descriptor)
