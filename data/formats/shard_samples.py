"""List the samples of a webdataset shard, with their offsets and records, in one pass over the headers.

The pass takes two reads of a few KB for each sample, and reads no latents. For a remote shard, a local file stores the
samples: the shard's catalogue. One pass is then enough.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from sdxl_trainer.configs.problems import describe_encoding, format_count, join_reasons
from sdxl_trainer.data.counted_warnings import CountedWarnings
from sdxl_trainer.data.files import open_stream, write_atomic
from sdxl_trainer.data.formats.latent_header import LatentHeader, parse_latent_header
from sdxl_trainer.data.formats.latents import BadLatentError
from sdxl_trainer.data.formats.shards import (
    TEXT_SUFFIX,
    BadShardError,
    ImageShardError,
    ShardMember,
    iterate_members,
)
from sdxl_trainer.data.images.bucket import CropBox, Size
from sdxl_trainer.data.images.image_files import IMAGE_SUFFIXES

# webdataset's names of members, those of records and captions in falling order.
RECORD_SUFFIXES, CAPTION_SUFFIXES = ("json", "jsn"), ("txt", "text", "transcript")
NUMBER_SUFFIXES = ("cls", "cls2", "index", "inx", "id")  # each is a field of the record, under the same name
SAMPLE_SUFFIXES = {"npz", *RECORD_SUFFIXES, *CAPTION_SUFFIXES}  # a sample has at least one of them
READ_SUFFIXES = {*RECORD_SUFFIXES, *CAPTION_SUFFIXES, *NUMBER_SUFFIXES}  # with their content
MAX_RECORD_BYTES = 16 << 20
MAX_SHOWN = 20  # members that a warning names
_STRAYS = CountedWarnings(
    "not used, outside any sample (a sample is KEY.npz with KEY.json or KEY.txt, and its key ends at the first dot)",
    "the log file",
)
CATALOGUE_SUFFIX = ".catalogue"
# Bytes read around a header: the small arrays before it, the record after it.
WINDOW_BEFORE, WINDOW_AFTER = 2 << 10, 6 << 10


@dataclass(frozen=True)
class ShardSample:
    """A sample of a shard."""

    key: str
    record: dict[str, Any]
    offset: int | None  # of the npz, in bytes; None: it has none
    size: int | None  # of the npz, in bytes
    header: LatentHeader | None = None  # None: not read, or bad
    bad: str | None = None  # the reason why its latents are bad


def list_shard_samples(name: str, stream: IO[bytes], with_headers: bool = False) -> list[ShardSample]:
    """List the samples of a shard that have latents or a record, in their order.

    Members that belong to no sample are counted and named in a warning.

    Args:
        name: name of the shard, for errors.
        with_headers: read the headers of the npz files too.

    Raises:
        BadShardError: the shard is torn or not a tar, it holds images instead of latents, two members have the same
            name, a record is not a JSON object, or texts are not UTF-8.
    """
    members: dict[str, dict[str, Any]] = {}
    headers: dict[str, LatentHeader | str] = {}
    pending: ShardMember | None = None
    strays: list[str] = []
    for key, written_suffix, offset, size in iterate_members(name, stream):
        suffix = written_suffix.lower()
        if _is_stray(key, suffix):
            strays.append(f"{key}.{written_suffix}" if written_suffix else key)
            continue
        # A header is read with the next member's, because the end of an npz file lies in the same window.
        headers |= _read_header(stream, pending)
        pending = ShardMember(key, suffix, offset, size) if with_headers and suffix == "npz" else None
        if suffix in members.setdefault(key, {}) and suffix in SAMPLE_SUFFIXES:
            raise BadShardError(f"{name}: has two members '{key}.{suffix}'; give each sample a key of its own")
        members[key][suffix] = (offset, size)
        if suffix in READ_SUFFIXES:
            if size > MAX_RECORD_BYTES:
                raise BadShardError(f"{name}: member {key}.{suffix} has {size} bytes, more than {MAX_RECORD_BYTES}")
            stream.seek(offset)
            members[key][suffix] = stream.read(size)
    headers |= _read_header(stream, pending)
    _refuse_other_contents(name, members)
    samples, problems = [], []
    for key, parts in members.items():
        if not parts.keys() & SAMPLE_SUFFIXES:
            strays += [f"{key}.{suffix}" for suffix in parts]
            continue
        try:
            record = _build_record(name, key, parts)
        except BadShardError as error:
            problems.append(str(error))
            continue
        offset, size = parts.get("npz", (None, None))
        header = headers.get(key)
        header, bad = (None, header) if isinstance(header, str) else (header, None)
        samples.append(ShardSample(key=key, record=record, offset=offset, size=size, header=header, bad=bad))
    if problems:
        raise BadShardError(join_reasons(problems))
    if strays:
        _warn_about_strays(name, strays)
    return samples


def save_catalogue(path: Path, url: str, samples: list[ShardSample]) -> None:
    """Write a catalogue as JSON Lines: the URL of the shard, its samples, and the SHA-256 of these lines."""
    lines = [orjson.dumps({"url": url}), *(orjson.dumps(asdict(sample), default=tuple) for sample in samples)]
    content = b"".join(line + b"\n" for line in lines)
    write_atomic(path, content + _dump_checksum(content))


def load_catalogue(path: Path) -> tuple[str, list[ShardSample]]:
    """Load a catalogue: the URL of the shard, and its samples.

    Raises:
        BadShardError: the catalogue is damaged. It is deleted, so that the next start reads the shard again.
    """
    with open_stream(path) as stream:
        content = stream.read()
    end = content.rfind(b"\n", 0, -1) + 1
    if content[end:] != _dump_checksum(content[:end]):
        path.unlink()
        raise BadShardError(f"{path}: was damaged and is deleted; run the same command again, which writes it anew")
    first, *lines = content[:end].splitlines()
    return orjson.loads(first)["url"], list(map(_parse_sample, lines))


def _dump_checksum(content: bytes) -> bytes:
    return orjson.dumps({"sha256": hashlib.sha256(content).hexdigest()}) + b"\n"


def _parse_sample(line: bytes) -> ShardSample:
    fields = orjson.loads(line)
    header = fields.pop("header")
    if header is not None:
        header["bucket"] = Size(*header["bucket"])
        if header["original_size"] is not None:
            header["original_size"] = Size(*header["original_size"])
        header["crop_ltrb"] = CropBox(*header["crop_ltrb"]) if header["crop_ltrb"] else None
        header = LatentHeader(**header)
    return ShardSample(**fields, header=header)


def _is_stray(key: str, suffix: str) -> bool:
    """Return whether a member cannot be part of a sample.

    It has no key or no suffix, its key has a dot, or its name is not UTF-8.
    """
    *others, last = suffix.split(".")
    has_dot = bool(others) and last in SAMPLE_SUFFIXES and f".{suffix}" != TEXT_SUFFIX
    return not suffix or has_dot or not key.rpartition("/")[2] or _escape(key + suffix) != key + suffix


def _escape(name: str) -> str:
    """Return a name with the bytes that are not UTF-8, which Python keeps as halves of surrogate pairs, escaped."""
    return name.encode(errors="backslashreplace").decode()


def _warn_about_strays(name: str, strays: list[str]) -> None:
    shown = ", ".join(map(_escape, strays[:MAX_SHOWN])) + (", ..." if len(strays) > MAX_SHOWN else "")
    _STRAYS.add(f"{name}: {format_count(len(strays), 'member')}: {shown}")


def _refuse_other_contents(name: str, members: Mapping[str, Collection[str]]) -> None:
    """Raise if a shard holds images or other files, and latents of no sample."""
    if any("npz" in parts for parts in members.values()):
        return
    known = {*SAMPLE_SUFFIXES, *NUMBER_SUFFIXES}
    others = [(key, suffix) for key, parts in members.items() for suffix in parts if suffix not in known]
    images = [f"{key}.{suffix}" for key, suffix in others if f".{suffix}" in IMAGE_SUFFIXES]
    if images:
        raise ImageShardError(f"{name}: holds images, such as {images[0]}, and no latents (.npz)")
    if others:
        other = ".".join(others[0])
        raise BadShardError(f"{name}: holds {other} and no latents; those are members KEY.npz with an array `latents`")


def _read_header(stream: IO[bytes], member: ShardMember | None) -> dict[str, LatentHeader | str]:
    """Return the header of an npz by its key, or the reason why the npz is bad; an empty dict without a member."""
    if member is None:
        return {}

    def read(start: int, count: int) -> bytes:
        stream.seek(start)
        return stream.read(count)

    try:
        return {member.key: parse_latent_header(read, member.offset, member.offset + member.size)}
    except BadLatentError as error:
        return {member.key: str(error)}


def _build_record(name: str, key: str, parts: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for suffix in filter(parts.__contains__, NUMBER_SUFFIXES):
        fields[suffix] = _read_number(parts[suffix])
    for suffix in filter(parts.__contains__, reversed(RECORD_SUFFIXES)):
        fields |= _parse_json(name, f"{key}.{suffix}", parts[suffix])
    caption = fields.get("caption")
    captions = caption if isinstance(caption, list) else [caption]
    suffix = next(filter(parts.__contains__, CAPTION_SUFFIXES), None)
    if suffix and all(text is None or (isinstance(text, str) and not text.strip()) for text in captions):
        try:
            fields["caption"] = parts[suffix].decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise BadShardError(f"{name}: member {key}.{suffix} {describe_encoding(error)}") from None
    return fields


def _parse_json(name: str, member: str, content: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise BadShardError(f"{name}: member {member}:{error.lineno}:{error.colno}: malformed: {error.msg}") from None
    if not isinstance(fields, dict):
        raise BadShardError(f"{name}: member {member} must be a JSON object, not a {type(fields).__name__}")
    return fields


def _read_number(content: bytes) -> int | str:
    """Return a number as webdataset decodes it, or the member's text if it is no number of 64 bits."""
    try:
        number = int(content)
    except ValueError:
        number = None
    return number if number is not None and -(1 << 63) <= number < 1 << 63 else content.decode(errors="replace").strip()
