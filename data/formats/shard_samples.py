"""The samples of a webdataset shard: where each lies and what its record says, told by one pass over the headers.

Of a shard on a store this is kept in a local file, its catalogue, so that the pass is made once: two short reads a
sample, of some KB, and none of the latents.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from sdxl_trainer.data.files import open_atomic
from sdxl_trainer.data.formats.latent_header import LatentHeader, parse_latent_header
from sdxl_trainer.data.formats.latents import BadLatentError
from sdxl_trainer.data.formats.shards import BadShardError, iterate_members

MAX_RECORD_BYTES = 16 << 20
CATALOGUE_SUFFIX = ".catalogue"
WINDOW_BEFORE, WINDOW_AFTER = 2 << 10, 6 << 10  # bytes around a header: the small arrays before it, the record behind


@dataclass(frozen=True)
class ShardSample:
    """A sample of a shard. The npz is at [offset, offset + size) bytes, if there is one."""

    key: str
    record: dict[str, Any]
    offset: int | None
    size: int | None
    header: LatentHeader | None = None  # None: not looked at, or bad
    bad: str | None = None  # why its latents are bad


def read_shard(name: str, stream: IO[bytes], with_headers: bool = False) -> list[ShardSample]:
    """All samples of a shard, in their order: what has latents or a record.

    Args:
        name: what the shard is called in errors.
        with_headers: read the headers of the npz files too.

    Raises:
        BadShardError: torn, no tar, two members of one name, or a record that is no JSON object.
    """
    members: dict[str, dict[str, Any]] = {}
    headers: dict[str, LatentHeader | str] = {}
    pending: tuple[str, int, int] | None = None
    for key, suffix, offset, size in iterate_members(name, stream):
        # A header is read when the next member's is at hand: the end of an npz file lies in the same window.
        headers |= _look_at(stream, pending)
        pending = (key, offset, offset + size) if with_headers and suffix == "npz" else None
        if suffix in members.setdefault(key, {}):
            raise BadShardError(f"{name}: has two members '{key}.{suffix}'")
        members[key][suffix] = (offset, size)
        if suffix in ("json", "txt"):
            if size > MAX_RECORD_BYTES:
                raise BadShardError(f"{name}: member {key}.{suffix} has {size} bytes")
            stream.seek(offset)
            members[key][suffix] = stream.read(size)
    headers |= _look_at(stream, pending)
    samples = []
    for key, parts in members.items():
        if parts.keys() & {"npz", "json", "txt"}:
            offset, size = parts.get("npz", (None, None))
            header = headers.get(key)
            header, bad = (None, header) if isinstance(header, str) else (header, None)
            samples.append(ShardSample(key, _build_record(name, key, parts), offset, size, header, bad))
    return samples


def save_catalogue(path: Path, url: str, samples: list[ShardSample]) -> None:
    """Write a catalogue: JSON Lines, the URL first, then the samples."""
    with open_atomic(path) as file:
        file.write(orjson.dumps({"url": url}) + b"\n")
        file.writelines(orjson.dumps(asdict(sample), default=tuple) + b"\n" for sample in samples)


def load_catalogue(path: Path) -> tuple[str, list[ShardSample]]:
    """(URL of the shard, its samples) from a catalogue."""
    with open(path, "rb") as lines:
        url = orjson.loads(next(lines))["url"]
        return url, list(map(_parse_sample, lines))


def _parse_sample(line: bytes) -> ShardSample:
    fields = orjson.loads(line)
    header = fields.pop("header")
    if header is not None:
        tuples: dict[str, Any] = {name: tuple(value) for name, value in header.items() if isinstance(value, list)}
        header = LatentHeader(**{**header, **tuples})
    return ShardSample(**fields, header=header)


def _look_at(stream: IO[bytes], pending: tuple[str, int, int] | None) -> dict[str, LatentHeader | str]:
    if pending is None:
        return {}
    key, offset, end = pending

    def read(place: int, count: int) -> bytes:
        stream.seek(place)
        return stream.read(count)

    try:
        return {key: parse_latent_header(read, offset, end)}
    except BadLatentError as error:
        return {key: str(error)}


def _build_record(name: str, key: str, parts: dict[str, Any]) -> dict[str, Any]:
    try:
        fields = orjson.loads(parts["json"]) if "json" in parts else {}
    except orjson.JSONDecodeError as error:
        raise BadShardError(f"{name}: member {key}.json:{error.lineno}:{error.colno}: malformed: {error.msg}") from None
    if not isinstance(fields, dict):
        raise BadShardError(f"{name}: member {key}.json must be a JSON object, not a {type(fields).__name__}")
    if "txt" in parts and not fields.get("caption"):
        fields["caption"] = parts["txt"].decode("utf-8", "replace").strip()
    return fields
