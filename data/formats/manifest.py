"""The manifest of a latent cache: `cache.json` holds its settings, `manifest/part-<rank>.jsonl` lists every item.

Parts are append-only and hold one JSON object per line. Lines are numbered: within a part the last line of a key
counts, and of several parts' lines the one with the highest number. Neither depends on a clock. Any tool that reads
JSON and computes SHA-256 can audit a cache with the parts. The last field of a line is the CRC-32 of the rest of the
line, which reveals damage; a line without that field is accepted. `compact_parts` turns lines into columns
(data/formats/manifest_columns.py), which readers accept in place of lines.
"""

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from sdxl_trainer.data.counted_warnings import CountedWarnings
from sdxl_trainer.data.files import HashedFile, create_folder, sync_folder, write_atomic
from sdxl_trainer.data.formats import manifest_columns
from sdxl_trainer.data.formats.latents import SDXL_CHANNELS
from sdxl_trainer.data.images.bucket import CropBox, Size

FORMAT_VERSION = 1
STALE = ""  # never the name of an identity
CRC_MARK = b',"crc32":'
KEY_MARK = b'{"key":"'
# Numbers of lines begin here, above the times in nanoseconds that releases before 0.3.0 stored in the same field.
FIRST_NUMBER = 1 << 62
LAST_NUMBER = (1 << 63) - 1  # of 64-bit columns
TAIL_BYTES = 64 << 10  # at the end of a part, in which its highest number is searched
SECONDS_BETWEEN_SYNCS = 2.0
# Fields of identities that were added after the first release, with the values that older caches have.
LATER_FIELDS = {
    "buckets": (),
    "alpha_mask": False,
    "weighted": False,
    "vae_padding": "zeros",
    "latent_channels": SDXL_CHANNELS,
}
BESIDE_IDENTITY = ("name", "further", "vae")  # keys of `cache.json` that are no fields of an Identity


@dataclass(frozen=True)
class Identity:
    """The settings that decide the latents of an image. An item with another identity is stale."""

    vae_sha256: str
    vae_precision: str
    dtype: str
    posterior: str
    flip: bool
    resolution_px: int
    min_bucket_px: int
    max_bucket_px: int
    bucket_step_px: int
    no_upscale: bool
    crop: str = "center"
    format_version: int = FORMAT_VERSION
    buckets: tuple[Size, ...] = ()  # the user's own list; the numbers of the bucket rule are 0 then
    alpha_mask: bool = False
    vae_padding: str = "zeros"
    latent_channels: int = SDXL_CHANNELS

    @property
    def name(self) -> str:
        """A short hash of all fields, stored with every item."""
        return _hash_fields(self.list_fields())

    def list_fields(self) -> dict[str, Any]:
        """Return the fields by name.

        LATER_FIELDS are left out where older caches have the same value, so that the names of these stay valid.
        """
        return _list_fields(self)


@dataclass(frozen=True)
class TextIdentity:
    """The settings that decide the text encoders' outputs of a caption."""

    encoder_sha256: str
    encoder_2_sha256: str
    tokenizer_sha256: str
    tokenizer_2_sha256: str
    max_tokens: int
    dtype: str
    format_version: int = FORMAT_VERSION
    weighted: bool = False  # brackets in captions are weights

    @property
    def name(self) -> str:
        """A short hash of all fields, stored with every item."""
        return _hash_fields(self.list_fields())

    def list_fields(self) -> dict[str, Any]:
        """Return the fields by name, like `Identity.list_fields`."""
        return _list_fields(self)


@dataclass(frozen=True, slots=True)
class TextPart:
    """An item's text encoder outputs."""

    file: str  # npz file or the item's shard, relative to the cache folder
    bytes: int
    sha256: str
    identity: str  # name of the TextIdentity
    captions_sha256: str  # of the captions encoded (data/text/variants.py)
    variants: int  # captions encoded
    offset: int | None = None  # of the npz in its shard, in bytes


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One cached item."""

    key: str
    file: str  # npz file or shard, relative to the cache folder
    bytes: int
    sha256: str
    bucket: Size
    original_size: Size
    resized: Size
    crop: CropBox  # in the resized image
    identity: str  # name of the Identity
    source_path: str
    source_bytes: int
    source_mtime_ns: int
    source_sha256: str
    offset: int | None = None  # of the npz in its shard, in bytes; this and the next two only for shards
    record_bytes: int | None = None  # of the JSON before the npz
    record_sha256: str | None = None
    adopted: bool = False  # made by another program, with the VAE that the user named
    flipped: bool | None = None  # has latents of the mirrored image too; None: unknown
    text: TextPart | None = None  # None: no cached text
    mask: HashedFile | None = None  # None: no mask file
    listed_ns: int = 0  # number of the line; releases before 0.3.0 stored its time here

    def as_stale(self) -> "ManifestEntry":
        """Return a copy that matches no identity, so that the item is encoded again."""
        return replace(self, identity=STALE)


def write_identity(
    folder: Path,
    identity: Identity,
    further: Mapping[str, Identity] | None = None,
    vae: Mapping[str, Any] | None = None,
) -> None:
    """Write `cache.json`.

    Args:
        further: identities of further resolutions, by the prefix of their items' keys.
        vae: the VAE's name and files, if they are known.
    """
    fields = {"name": identity.name, **identity.list_fields()}
    if further:
        fields["further"] = {prefix: other.name for prefix, other in further.items()}
    if vae:
        fields["vae"] = dict(vae)
    write_atomic(folder / "cache.json", _dump_identity(fields))


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Read `cache.json`; None if the folder holds no cache.

    Raises:
        ValueError: the file is not a JSON object.
    """
    file = folder / "cache.json"
    if not file.is_file():
        return None
    fields = orjson.loads(file.read_bytes())
    if not isinstance(fields, dict):
        raise ValueError("is not a JSON object")
    return fields


def verify_identity(folder: Path) -> str | None:
    """Return a message if `cache.json` is damaged, or None. Its name must be the hash of its fields."""
    try:
        fields = read_identity(folder) or {}
        identity = Identity(**{name: value for name, value in fields.items() if name not in BESIDE_IDENTITY})
        names = {
            prefix: replace(identity, resolution_px=int(prefix.removesuffix("px/"))).name
            for prefix in fields.get("further", {})
        }
        names_match = identity.name == fields.get("name") and names == fields.get("further", {})
    except (ValueError, TypeError, AttributeError) as error:
        return f"cache.json: damaged: {error}"
    is_whole = names_match and (folder / "cache.json").read_bytes() == _dump_identity(fields)
    return None if is_whole else "cache.json: damaged: its name is not the hash of its fields"


def _list_fields(identity: Identity | TextIdentity) -> dict[str, Any]:
    return {name: value for name, value in asdict(identity).items() if value != LATER_FIELDS.get(name, ...)}


def _hash_fields(fields: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(fields, default=tuple, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def _dump_identity(fields: dict[str, Any]) -> bytes:
    return orjson.dumps(fields, default=tuple, option=orjson.OPT_INDENT_2)


def list_manifest_parts(folder: Path) -> list[Path]:
    """Return the parts that hold lines, in the order of their ranks."""
    parts = (part for part in folder.glob("manifest/part-*") if part.suffix in (".jsonl", manifest_columns.SUFFIX))
    return sorted(part for part in parts if part.stat().st_size)


def read_entries(
    folder: Path, damaged: list[str] | None = None, keys: Container[str] | None = None
) -> Iterator[ManifestEntry]:
    """Yield the entry of every line of every part, in order. `damaged` and `keys` are as in `read_part`."""
    for part in list_manifest_parts(folder):
        yield from read_part(part, damaged, keys)


def read_part(
    part: Path, damaged: list[str] | None = None, keys: Container[str] | None = None
) -> Iterator[ManifestEntry]:
    """Yield the entry of every line of a part, in order.

    A damaged line is skipped with a warning: its item is encoded again. An unfinished last line is skipped without a
    warning, because a job may be writing it.

    Args:
        damaged: list to which the place of each skipped line is appended.
        keys: skip lines of other keys without parsing them, which takes a tenth of the time. A line whose key holds an
            escape is parsed and yielded all the same.
    """
    damaged = [] if damaged is None else damaged
    warnings = CountedWarnings("damaged line skipped", "the log file")
    if part.suffix == manifest_columns.SUFFIX:
        for fields in manifest_columns.read_fields(part, damaged, warnings.add):
            if keys is None or fields["key"] in keys:
                yield _build_entry(fields)
        return
    with open(part, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if keys is not None and _has_other_key(line, keys):
                continue
            place = f"{part}:{number}"
            entry = parse_entry(line, place, warnings.add) if line.endswith(b"\n") else None
            if entry is None:
                damaged.append(place)
            else:
                yield entry


def _has_other_key(line: bytes, keys: Container[str]) -> bool:
    """Return whether a line begins with a key, as lines of this project do, that is not in `keys`."""
    key = line[len(KEY_MARK) : line.find(b'"', len(KEY_MARK))]
    return line.startswith(KEY_MARK) and b"\\" not in key and key.decode("utf-8", "replace") not in keys


def parse_entry(line: bytes, place: str, warn: Callable[[str], None]) -> ManifestEntry | None:
    """Return the entry of a line; None if the line is damaged.

    Args:
        place: of the line.
        warn: called with a message that names the place of a damaged line.
    """
    try:
        fields = _load_line(line)
        source = fields.pop("source")
        fields |= {
            "source_path": source["path"],
            "source_bytes": source["size"],
            "source_mtime_ns": source["mtime_ns"],
            "source_sha256": source["sha256"],
        }
        return _build_entry(fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        warn(f"{place}: {error}")
        return None


def _build_entry(fields: dict[str, Any]) -> ManifestEntry:
    for name in ("bucket", "original_size", "resized"):
        fields[name] = Size(*fields[name])
    fields["crop"] = CropBox(*fields["crop"])
    for name, kind in (("text", TextPart), ("mask", HashedFile)):
        if fields.get(name) is not None:
            fields[name] = kind(**fields[name])
    return ManifestEntry(**fields)


def _load_line(line: bytes) -> dict[str, Any]:
    fields = orjson.loads(line)
    if "crc32" in fields and _dump_line(line[: line.rindex(CRC_MARK)] + b"}") != line:
        raise ValueError("the CRC-32 does not match")
    fields.pop("crc32", None)
    if not all(isinstance(fields[name], str) for name in ("key", "file", "sha256", "identity")):
        raise ValueError("a field is not a text")
    if not 0 <= fields.get("listed_ns", 0) <= LAST_NUMBER:
        raise ValueError("the number of the line is out of range")
    return fields


def _dump_line(content: bytes) -> bytes:
    """Return a JSON object as a line, with its CRC-32 as the last field."""
    return content[:-1] + CRC_MARK + b'"%08x"}\n' % zlib.crc32(content)


def read_latest(
    folder: Path, damaged: list[str] | None = None, keys: Container[str] | None = None
) -> dict[str, ManifestEntry]:
    """Return the latest entry of each key. `damaged` and `keys` are as in `read_part`.

    The index chooses by the same rule (data/index/join.py).
    """
    latest: dict[str, ManifestEntry] = {}
    for part in list_manifest_parts(folder):
        last_of_part = {entry.key: entry for entry in read_part(part, damaged, keys)}
        for key, entry in last_of_part.items():
            known = latest.get(key)
            if known is None or entry.listed_ns >= known.listed_ns:
                latest[key] = entry
    return latest


def drop_damaged_lines(folder: Path) -> None:
    """Remove the damaged lines from all parts."""
    for part in list_manifest_parts(folder):
        if part.suffix == manifest_columns.SUFFIX:
            manifest_columns.drop_damaged_groups(part)
            continue
        lines = part.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n") and parse_entry(line, "", lambda _: None) is not None]
        if len(whole) != len(lines):
            write_atomic(part, b"".join(whole))


class ManifestWriter:
    """Appends entries to a rank's part of the manifest.

    Each line is numbered: the first follows the highest number in the cache. Lines are flushed to disk within
    SECONDS_BETWEEN_SYNCS.
    """

    def __init__(self, folder: Path, rank: int):
        create_folder(folder / "manifest")
        path = folder / "manifest" / f"part-{rank:05d}.jsonl"
        if path.is_file():
            _remove_torn_line(path)
        self._number = find_last_number(folder)
        self._file = open(path, "ab")
        sync_folder(path.parent)
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._error: OSError | None = None

    def append(self, entry: ManifestEntry) -> None:
        """Append one line and flush it to the operating system. The item must be on disk already.

        Raises:
            OSError: this line or an earlier one cannot be written.
        """
        self._raise_error()
        with self._lock:
            self._number += 1
            self._file.write(dump_entry(entry, self._number))
            self._file.flush()
            if self._timer is None:
                self._timer = threading.Timer(SECONDS_BETWEEN_SYNCS, self._sync_later)
                self._timer.daemon = True
                self._timer.start()

    def sync(self) -> None:
        """Flush all lines to disk. What they replace may be deleted afterwards."""
        with self._lock:
            os.fsync(self._file.fileno())
        self._raise_error()

    def close(self) -> None:
        """Flush all lines to disk and close the part."""
        with self._lock, self._file:
            if self._timer is not None:
                self._timer.cancel()
            self._file.flush()
            os.fsync(self._file.fileno())
        self._raise_error()

    def _sync_later(self) -> None:
        with self._lock:
            self._timer = None
            descriptor = -1 if self._file.closed else os.dup(self._file.fileno())
        if descriptor >= 0:
            try:
                # Outside the lock, because writers of items must not wait for the disk.
                os.fsync(descriptor)
            except OSError as error:
                self._error = error
            finally:
                os.close(descriptor)

    def _raise_error(self) -> None:
        """Raise the error of a flush in the background: the system reports it only once."""
        if self._error is not None:
            raise self._error


def find_last_number(folder: Path) -> int:
    """Return the number that the next line of a cache's manifest follows."""
    return max(FIRST_NUMBER - 1, *map(find_highest_number, list_manifest_parts(folder)), 0)


def dump_entry(entry: ManifestEntry, number: int) -> bytes:
    """Return the line of an entry, with its number."""
    fields = {name: value for name, value in asdict(entry).items() if value is not None}
    fields["source"] = {
        "path": fields.pop("source_path"),
        "size": fields.pop("source_bytes"),
        "mtime_ns": fields.pop("source_mtime_ns"),
        "sha256": fields.pop("source_sha256"),
    }
    fields["listed_ns"] = number
    return _dump_line(orjson.dumps(fields, default=tuple))


def find_highest_number(part: Path) -> int:
    """Return the highest number of a part's lines.

    Numbers rise within a part, so its end holds the highest, unless all lines there are damaged.
    """
    if part.suffix == manifest_columns.SUFFIX:
        return manifest_columns.read_highest_number(part)
    with open(part, "rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL_BYTES))
        numbers = list(map(_read_number, stream))
        if not any(numbers):
            stream.seek(0)
            numbers = map(_read_number, stream)
        return max(numbers, default=0)


def _read_number(line: bytes) -> int:
    """Return the number of a line; 0 if the line is damaged or has none."""
    try:
        number = _load_line(line).get("listed_ns", 0)
    except (ValueError, TypeError, KeyError, AttributeError):
        return 0
    return number if isinstance(number, int) else 0


def _remove_torn_line(path: Path) -> None:
    """Remove the unfinished last line that a killed job left, so that the next entry starts on a new line."""
    content = path.read_bytes()
    # A whole part must keep its modification time: indexes are rebuilt when it changes.
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
