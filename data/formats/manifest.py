"""The manifest of a latent cache: `cache.json` names its settings, `manifest/part-<rank>.jsonl` lists every item.

Parts are append-only, one JSON object a line; of several lines with one key the latest counts. Any tool that reads JSON
and computes SHA-256 can audit a cache with them. The last field of a line is the CRC-32 of the line without it, which
reveals damage; a line without that field is accepted as it is.
"""

import hashlib
import os
import time
import zlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson
from loguru import logger

from sdxl_trainer.data.files import HashedFile, write_atomic
from sdxl_trainer.data.images.bucket import CropBox, Size

FORMAT_VERSION = 1
STALE = ""  # never the name of an identity
CRC_MARK = b',"crc32":'
KEY_MARK = b'{"key":"'
LATER_FIELDS = ("buckets", "alpha_mask")  # of an Identity, added after the first release


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

    @property
    def name(self) -> str:
        """A short hash of all fields, stored with every item."""
        return _hash_fields(self.list_fields())

    def list_fields(self) -> dict[str, Any]:
        """Return all fields by name; later ones only if they are set, so that the names of older caches stay valid."""
        return {name: value for name, value in asdict(self).items() if name not in LATER_FIELDS or value}


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

    @property
    def name(self) -> str:
        """A short hash of all fields, stored with every item."""
        return _hash_fields(asdict(self))


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
    listed_ns: int = 0  # time of the line: of several lines with one key the latest counts

    def as_stale(self) -> "ManifestEntry":
        """Return a copy that matches no identity, so that the item is encoded again."""
        return replace(self, identity=STALE)


def write_identity(folder: Path, identity: Identity, further: Mapping[str, Identity] | None = None) -> None:
    """Write `cache.json`.

    Args:
        further: identities of further resolutions, by the prefix of their items' keys.
    """
    fields = {"name": identity.name, **identity.list_fields()}
    if further:
        fields["further"] = {prefix: other.name for prefix, other in further.items()}
    write_atomic(folder / "cache.json", _dump_identity(fields))


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Read `cache.json`; None if the folder holds no cache.

    Raises:
        ValueError: it is no JSON object.
    """
    file = folder / "cache.json"
    if not file.is_file():
        return None
    fields = orjson.loads(file.read_bytes())
    if not isinstance(fields, dict):
        raise ValueError("is no JSON object")
    return fields


def verify_identity(folder: Path) -> str | None:
    """Return what is wrong with `cache.json`, or None if it is whole: its name must be the hash of its fields."""
    try:
        fields = read_identity(folder) or {}
        identity = Identity(**{name: value for name, value in fields.items() if name not in ("name", "further")})
        names = {
            prefix: replace(identity, resolution_px=int(prefix.removesuffix("px/"))).name
            for prefix in fields.get("further", {})
        }
        named = identity.name == fields.get("name") and names == fields.get("further", {})
    except (ValueError, TypeError, AttributeError) as error:
        return f"cache.json: damaged: {error}"
    whole = named and (folder / "cache.json").read_bytes() == _dump_identity(fields)
    return None if whole else "cache.json: damaged: its name is not the hash of its fields"


def _hash_fields(fields: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(fields, default=tuple, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def _dump_identity(fields: dict[str, Any]) -> bytes:
    return orjson.dumps(fields, default=tuple, option=orjson.OPT_INDENT_2)


def list_manifest_parts(folder: Path) -> list[Path]:
    """Return the parts that hold lines, oldest first, so that the newest line of a key is read last."""
    parts = [part for part in folder.glob("manifest/part-*.jsonl") if part.stat().st_size]
    return sorted(parts, key=lambda part: (part.stat().st_mtime_ns, part.name))


def read_entries(
    folder: Path, damaged: list[str] | None = None, keys: Container[str] | None = None
) -> Iterator[ManifestEntry]:
    """Yield the entry of every line of every part, in order.

    A damaged line is skipped with a warning: its item is encoded again. A last line without its end is skipped without
    one, because a job may be writing it.

    Args:
        damaged: gets the place of each skipped line.
        keys: yield only entries of these; lines of other keys are not parsed, which takes a tenth of the time.
    """
    damaged = [] if damaged is None else damaged
    for part in list_manifest_parts(folder):
        with open(part, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if keys is not None and _has_other_key(line, keys):
                    continue
                place = f"{part}:{number}"
                entry = _parse_entry(line, place) if line.endswith(b"\n") else None
                if entry is None:
                    damaged.append(place)
                else:
                    yield entry


def _has_other_key(line: bytes, keys: Container[str]) -> bool:
    """Return whether a line begins with a key, as ours do, that is none of `keys`."""
    key = line[len(KEY_MARK) : line.find(b'"', len(KEY_MARK))]
    return line.startswith(KEY_MARK) and b"\\" not in key and key.decode("utf-8", "replace") not in keys


def _parse_entry(line: bytes, place: str) -> ManifestEntry | None:
    try:
        fields = _load_line(line)
        source = fields.pop("source")
        for name in ("bucket", "original_size", "resized"):
            fields[name] = Size(*fields[name])
        fields["crop"] = CropBox(*fields["crop"])
        if "text" in fields:
            fields["text"] = TextPart(**fields["text"])
        if "mask" in fields:
            fields["mask"] = HashedFile(**fields["mask"])
        return ManifestEntry(
            **fields,
            source_path=source["path"],
            source_bytes=source["size"],
            source_mtime_ns=source["mtime_ns"],
            source_sha256=source["sha256"],
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("{}: damaged line skipped: {}", place, error)
        return None


def _load_line(line: bytes) -> dict[str, Any]:
    fields = orjson.loads(line)
    if "crc32" in fields and _dump_line(line[: line.rindex(CRC_MARK)] + b"}") != line:
        raise ValueError("its CRC-32 does not match")
    fields.pop("crc32", None)
    return fields


def _dump_line(content: bytes) -> bytes:
    """Return a JSON object as a line, with its CRC-32 as the last field."""
    return content[:-1] + CRC_MARK + b'"%08x"}\n' % zlib.crc32(content)


def read_latest(
    folder: Path, damaged: list[str] | None = None, keys: Container[str] | None = None
) -> dict[str, ManifestEntry]:
    """Return the latest entry of each key. `damaged` and `keys` are those of `read_entries`."""
    latest: dict[str, ManifestEntry] = {}
    for entry in read_entries(folder, damaged, keys):
        known = latest.get(entry.key)
        if known is None or entry.listed_ns >= known.listed_ns:
            latest[entry.key] = entry
    return latest


def drop_damaged_lines(folder: Path) -> None:
    """Rewrite each part that has damaged lines without them."""
    for part in list_manifest_parts(folder):
        lines = part.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n") and _parse_entry(line, str(part)) is not None]
        if len(whole) != len(lines):
            write_atomic(part, b"".join(whole))


class ManifestWriter:
    """Appends entries to the part of a rank."""

    def __init__(self, folder: Path, rank: int):
        (folder / "manifest").mkdir(parents=True, exist_ok=True)
        path = folder / "manifest" / f"part-{rank:05d}.jsonl"
        if path.is_file():
            _cut_torn_line(path)
        self._file = open(path, "ab")

    def append(self, entry: ManifestEntry) -> None:
        """Append one line and flush it to the operating system. The item must be on disk already."""
        fields = {name: value for name, value in asdict(entry).items() if value is not None}
        fields["listed_ns"] = time.time_ns()
        fields["source"] = {
            "path": fields.pop("source_path"),
            "size": fields.pop("source_bytes"),
            "mtime_ns": fields.pop("source_mtime_ns"),
            "sha256": fields.pop("source_sha256"),
        }
        self._file.write(_dump_line(orjson.dumps(fields, default=tuple)))
        self._file.flush()

    def close(self) -> None:
        """Flush all lines to disk and close the part."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def _cut_torn_line(path: Path) -> None:
    """Remove a last line without its end, left by a killed job, so that the next entry starts on a line of its own."""
    content = path.read_bytes()
    # A whole part must keep its mtime: indexes are rebuilt when it changes.
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
