"""The files of a copy: what is stored in each, how it is built, and how it is checked."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import orjson

from sdxl_trainer.cache.encode.pipeline import choose_text_file
from sdxl_trainer.cache.encode.storage import (
    SHARD_FOLDER,
    NpzStorage,
    read_remote_bytes,
    verify_item,
    verify_text_item,
)
from sdxl_trainer.cache.upkeep.copy_request import CopiedItem
from sdxl_trainer.cache.upkeep.copy_source import CopySource
from sdxl_trainer.configs.problems import FailedError
from sdxl_trainer.data.files import Span
from sdxl_trainer.data.formats.manifest import ManifestEntry
from sdxl_trainer.data.formats.shards import (
    BadShardError,
    OpenFile,
    ShardWriter,
    build_sample_frame,
    compute_sample_span,
    compute_text_span,
    get_partial_path,
    locate_shard,
)
from sdxl_trainer.data.images.bucket import split_key
from sdxl_trainer.data.index.missing_latents import choose_output_file

FILES_PER_UNIT = 128  # npz files that are copied together


@dataclass(frozen=True)
class CopyUnit:
    """Items that are copied together: those of a shard, or some npz files."""

    items: Sequence[CopiedItem]
    shard: str | None  # name of the shard; None for npz files


@dataclass
class BuiltUnit:
    """A unit as it was built: its entries, its files, the records of npz files, and the items that are bad."""

    entries: list[ManifestEntry] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)  # lines of JSON
    bad: dict[str, str] = field(default_factory=dict)  # key → reason

    @property
    def files(self) -> list[str]:
        """The names of the files, each once."""
        return sorted(list_entry_files(self.entries))


def list_entry_files(entries: Iterable[ManifestEntry]) -> set[str]:
    """Return the files that entries name."""
    found = set()
    for entry in entries:
        found |= {entry.file} if entry.text is None else {entry.file, entry.text.file}
    return found


def list_files(unit: CopyUnit, form: str | None) -> list[str]:
    """Return the files that a unit will have."""
    if unit.shard is not None:
        return [f"{SHARD_FOLDER}/{unit.shard}"]
    names = [name_file(item.entry, form or "npz") for item in unit.items]
    return names + [choose_text_file(name_file(item.entry, "npz")) for item in unit.items if item.entry.text]


def name_file(entry: ManifestEntry, form: str) -> str:
    """Return the npz file of an item at the target, in this project's form or in that of kohya's scripts."""
    file = choose_output_file(entry.key, entry.source_path, beside=False)
    if form != "kohya":
        return file
    width, height = entry.original_size
    return f"{file.removesuffix('.npz')}_{width:04d}x{height:04d}_sdxl.npz"


def plan_units(
    items: Iterable[CopiedItem], form: str | None, number: int, taken: Mapping[str, int], shard_bytes: int
) -> Iterator[CopyUnit]:
    """Yield the units of a copy: shards of one bucket, and groups of npz files.

    Args:
        form: of all items; None keeps the form of each.
        number: of the copy, in the names of its shards.
        taken: bucket → number of shards of this copy that exist already.
        shard_bytes: largest size of a shard.
    """

    def place(item: CopiedItem) -> tuple:
        to_shard = form == "shards" if form else item.source.offset is not None
        return to_shard, item.source.bucket, item.source.file, item.source.offset or 0

    used = dict(taken)
    for (to_shard, bucket), group in groupby(sorted(items, key=place), key=lambda item: place(item)[:2]):
        members = list(group)
        if not to_shard:
            for start in range(0, len(members), FILES_PER_UNIT):
                yield CopyUnit(members[start : start + FILES_PER_UNIT], None)
            continue
        for some in _fill_shards(members, shard_bytes):
            name = f"{bucket[0]}x{bucket[1]}"
            yield CopyUnit(some, f"{name}-{number:05d}-{used.get(name, 0):05d}.tar")
            used[name] = used.get(name, 0) + 1


def _fill_shards(items: Sequence[CopiedItem], shard_bytes: int) -> Iterator[list[CopiedItem]]:
    held, size = [], 0
    for item in items:
        needed = item.source.bytes + (item.source.text.bytes if item.source.text else 0)
        if held and size + needed > shard_bytes:
            yield held
            held, size = [], 0
        held.append(item)
        size += compute_size(item.source)
    yield held


def compute_size(entry: ManifestEntry) -> int:
    """Return the bytes that an item takes in a shard, or a little more than in npz files."""
    size = compute_sample_span(entry.key, entry.record_bytes or 0, 0, entry.bytes).size
    return size + (compute_text_span(entry.key, 0, entry.text.bytes).size if entry.text else 0)


def build_unit(
    source: CopySource, root: Path, unit: CopyUnit, form: str | None, get_record: Callable[[ManifestEntry], bytes]
) -> BuiltUnit:
    """Write the files of a unit below `root`. Items that are bad in the source are left out and named.

    Args:
        get_record: returns the JSON of an item that has none beside it.
    """
    built = BuiltUnit()
    writer: ShardWriter | None = None
    files = NpzStorage(root, "")
    for item, found in zip(unit.items, source.read_items([item.source for item in unit.items]), strict=True):
        if isinstance(found, Exception):
            reason = found.strerror if isinstance(found, OSError) and found.strerror else str(found)
            built.bad[item.source.key] = f"{item.source.file}: {item.source.key}: {reason}"
            continue
        record, content = found.record, bytes(found.npz)
        text_content = None if found.text is None else bytes(found.text)
        if unit.shard is None:
            name = name_file(item.entry, form or "npz")
            text_file = choose_text_file(name_file(item.entry, "npz"))
            part = replace(item.entry.text, file=text_file) if item.entry.text else None
            entry = files.write_packed(replace(item.entry, file=name, text=part), content, b"{}", text_content)
            if item.source.offset is not None and not split_key(item.entry.key).prefix:
                built.records.append(build_record_line(bytes(record), name))
            built.entries.append(entry)
            continue
        if writer is None:
            path = root / SHARD_FOLDER / unit.shard
            get_partial_path(path).unlink(missing_ok=True)  # of a copy that was killed
            writer = ShardWriter(path)
        kept = bytes(record) if item.source.offset is not None else get_record(item.source)
        built.entries.append(_append(writer, item.entry, kept, content, text_content))
    if writer is not None:
        writer.flush(writer.bytes_written)
        writer.close()
    return built


def _append(
    writer: ShardWriter, entry: ManifestEntry, record: bytes, content: bytes, text: bytes | None
) -> ManifestEntry:
    """Append an item to a shard, and return its entry."""
    place = writer.append(entry.key, record, content, text)
    file, part = f"{SHARD_FOLDER}/{place.shard}", None
    if text is not None and entry.text is not None:
        part = replace(entry.text, file=file, offset=place.text_offset)
    return replace(
        entry,
        file=file,
        offset=place.offset,
        record_bytes=len(record),
        record_sha256=hashlib.sha256(record).hexdigest(),
        text=part,
    )


def build_record_line(record: bytes, file: str) -> bytes:
    """Return a record of a shard as a line of metadata that names its npz file."""
    return orjson.dumps({**orjson.loads(record), "image_path": file}) + b"\n"


def verify_built(root: Path, built: BuiltUnit) -> None:
    """Read the files of a unit back and compare each item with its checksums.

    Raises:
        FailedError: the disk gives other bytes than were written.
    """
    for entry in built.entries:
        fault = verify_item(root, entry) or verify_text_item(root, entry)
        if fault is not None:
            raise FailedError(f"the copy in {root} is not what was written: {fault}; check the disk")


def read_shard_record(source: CopySource, entry: ManifestEntry) -> bytes:
    """Read the record beside an item in a shard, without its latents; `{}` for an item in a file of its own.

    Raises:
        OSError, BadShardError: the record cannot be read, or differs from the manifest.
        StoreError: the store denies access, or does not answer.
    """
    if entry.offset is None or entry.record_bytes is None:
        return b"{}"
    frame = build_sample_frame(entry.key, entry.record_bytes, entry.bytes)
    start = compute_sample_span(entry.key, entry.record_bytes, entry.offset, entry.bytes).offset + len(frame.before)
    span = Span(start, entry.record_bytes)
    if source.url is None:
        record = bytes(OpenFile(locate_shard(source.folder / entry.file)).read(*span))
    else:
        record = read_remote_bytes(source.url, entry.file, span)
    if hashlib.sha256(record).hexdigest() != entry.record_sha256:
        raise BadShardError(f"{entry.file}: {entry.key}: record differs from the manifest")
    return record
