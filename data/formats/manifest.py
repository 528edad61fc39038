"""The manifest of a latent cache: `cache.json` says what made it, `manifest/part-<rank>.jsonl` lists every item.

Parts are append-only, one JSON object a line; of several lines with one key the one listed last counts.
Any tool that knows JSON and SHA-256 can audit a cache with them. A line's last field is the CRC-32 of the line without
it, so that a damaged line is told from a whole one; a line without that field is taken as it is.
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

FORMAT_VERSION = 1
STALE = ""  # the name of no identity
CRC_MARK = b',"crc32":'
KEY_MARK = b'{"key":"'
LATER_FIELDS = ("buckets", "alpha_mask")  # of an Identity


@dataclass(frozen=True)
class Identity:
    """What decides the latents of an image besides its pixels. An item made under another identity is stale."""

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
    buckets: tuple[tuple[int, int], ...] = ()  # a fixed list; the numbers of the rule are 0 then
    alpha_mask: bool = False

    @property
    def name(self) -> str:
        """A short hash of all of it, noted with every item."""
        return _name_fields(self.list_fields())

    def list_fields(self) -> dict[str, Any]:
        """All of it; what came later only if it is set, because identities that never knew it stay what they are."""
        return {name: value for name, value in asdict(self).items() if name not in LATER_FIELDS or value}


@dataclass(frozen=True)
class TextIdentity:
    """What decides the text encoders' outputs besides the captions."""

    encoder_sha256: str
    encoder_2_sha256: str
    tokenizer_sha256: str
    tokenizer_2_sha256: str
    max_tokens: int
    dtype: str
    format_version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        """A short hash of all of it, noted with every item."""
        return _name_fields(asdict(self))


@dataclass(frozen=True, slots=True)
class TextPart:
    """An item's text encoder outputs."""

    file: str  # npz file or the item's shard, as in ManifestEntry
    bytes: int
    sha256: str
    identity: str  # name of the TextIdentity they were made under
    captions_sha256: str  # of the captions encoded (data/text/variants.py)
    variants: int  # captions encoded
    offset: int | None = None  # where the npz begins in its shard


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One cached item. Sizes in pixels, (width, height)."""

    key: str
    file: str  # npz file or shard, relative to the cache folder
    bytes: int
    sha256: str
    bucket: tuple[int, int]
    original_size: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int, int, int]  # left, top, right, bottom in the resized image
    identity: str  # name of the Identity it was made under
    source_path: str
    source_bytes: int
    source_mtime_ns: int
    source_sha256: str
    offset: int | None = None  # where the npz begins in its shard; this and the next two only for shards
    record_bytes: int | None = None  # of the JSON before it
    record_sha256: str | None = None
    adopted: bool = False  # made by another program; its VAE is the user's word
    flipped: bool | None = None  # whether it holds latents of the mirrored image too; None: the line does not tell
    text: TextPart | None = None  # None: not encoded
    mask: HashedFile | None = None  # None: from no file
    listed_ns: int = 0  # when the line was written: of several lines with one key the latest counts

    def as_stale(self) -> "ManifestEntry":
        """The same, as if made under settings that nobody has: it will be encoded again."""
        return replace(self, identity=STALE)


def write_identity(folder: Path, identity: Identity, further: Mapping[str, Identity] | None = None) -> None:
    """Write `cache.json`.

    Args:
        further: of other resolutions: what stands before the keys of their items → what these were made under.
    """
    fields = {"name": identity.name, **identity.list_fields()}
    if further:
        fields["further"] = {prefix: other.name for prefix, other in further.items()}
    write_atomic(folder / "cache.json", _dump_identity(fields))


def read_identity(folder: Path) -> dict[str, Any] | None:
    """The content of `cache.json`, or None if the folder holds no cache.

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
    """What is wrong with `cache.json`, or None: its name is a hash of the rest."""
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
    return None if whole else "cache.json: damaged: its name does not belong to what it says"


def _name_fields(fields: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def _dump_identity(fields: dict[str, Any]) -> bytes:
    return orjson.dumps(fields, option=orjson.OPT_INDENT_2)


def list_manifest_parts(folder: Path) -> list[Path]:
    """The manifest's parts that hold lines, oldest first, so that the newest line of a key is read last."""
    parts = [part for part in folder.glob("manifest/part-*.jsonl") if part.stat().st_size]
    return sorted(parts, key=lambda part: (part.stat().st_mtime_ns, part.name))


def read_entries(
    folder: Path, damaged: list[str] | None = None, keys: Container[str] | None = None
) -> Iterator[ManifestEntry]:
    """Every line of every part, in order. A damaged line is passed over with a warning: its item is done again.

    A torn last line is passed over silently, because the job may be writing it just now.

    Args:
        damaged: gets the place of each line passed over, torn ones too.
        keys: only entries of these; the lines of others are hardly looked at, in a tenth of the time.
    """
    damaged = [] if damaged is None else damaged
    for part in list_manifest_parts(folder):
        with open(part, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if keys is not None and _is_of_others(line, keys):
                    continue
                place = f"{part}:{number}"
                entry = _parse_entry(line, place) if line.endswith(b"\n") else None
                if entry is None:
                    damaged.append(place)
                else:
                    yield entry


def _is_of_others(line: bytes, keys: Container[str]) -> bool:
    """Whether a line that begins with its key, as ours do, names none of `keys`."""
    key = line[len(KEY_MARK) : line.find(b'"', len(KEY_MARK))]
    return line.startswith(KEY_MARK) and b"\\" not in key and key.decode("utf-8", "replace") not in keys


def _parse_entry(line: bytes, place: str) -> ManifestEntry | None:
    try:
        fields = _load_line(line)
        source = fields.pop("source")
        for name in ("bucket", "original_size", "resized", "crop"):
            fields[name] = tuple(fields[name])
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
        logger.warning("{}: damaged line passed over: {}", place, error)
        return None


def _load_line(line: bytes) -> dict[str, Any]:
    fields = orjson.loads(line)
    if "crc32" in fields and _dump_line(line[: line.rindex(CRC_MARK)] + b"}") != line:
        raise ValueError("its CRC-32 is another")
    fields.pop("crc32", None)
    return fields


def _dump_line(content: bytes) -> bytes:
    """A JSON object as a line, with its CRC-32 as a last field."""
    return content[:-1] + CRC_MARK + b'"%08x"}\n' % zlib.crc32(content)


def read_latest(
    folder: Path, damaged: list[str] | None = None, keys: Container[str] | None = None
) -> dict[str, ManifestEntry]:
    """The entry of each key that was listed last. `damaged` and `keys` as in `read_entries`."""
    latest: dict[str, ManifestEntry] = {}
    for entry in read_entries(folder, damaged, keys):
        known = latest.get(entry.key)
        if known is None or entry.listed_ns >= known.listed_ns:
            latest[entry.key] = entry
    return latest


def drop_damaged_lines(folder: Path) -> None:
    """Write each part that has damaged lines anew without them."""
    for part in list_manifest_parts(folder):
        lines = part.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n") and _parse_entry(line, str(part)) is not None]
        if len(whole) != len(lines):
            write_atomic(part, b"".join(whole))


class ManifestWriter:
    """Appends entries to a rank's part."""

    def __init__(self, folder: Path, rank: int):
        (folder / "manifest").mkdir(parents=True, exist_ok=True)
        path = folder / "manifest" / f"part-{rank:05d}.jsonl"
        if path.is_file():
            _cut_torn_line(path)
        self._file = open(path, "ab")

    def append(self, entry: ManifestEntry) -> None:
        """Add one line and hand it to the operating system. The item it names must be on disk already."""
        fields = {name: value for name, value in asdict(entry).items() if value is not None}
        fields["listed_ns"] = time.time_ns()
        fields["source"] = {
            "path": fields.pop("source_path"),
            "size": fields.pop("source_bytes"),
            "mtime_ns": fields.pop("source_mtime_ns"),
            "sha256": fields.pop("source_sha256"),
        }
        self._file.write(_dump_line(orjson.dumps(fields)))
        self._file.flush()

    def close(self) -> None:
        """Bring all lines to disk."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def _cut_torn_line(path: Path) -> None:
    """Remove a last line that a killed job left without its end, so that the next one starts on a line of its own."""
    content = path.read_bytes()
    # A whole part must keep its time, or all that is made from it is made again.
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
