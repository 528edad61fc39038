"""Columns of the index files, of the tables of latents that are joined with records, and the summary of a join."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import pyarrow as pa

from sdxl_trainer.data.images.bucket import Placement, Size
from sdxl_trainer.data.metadata.records import RECORD_SCHEMA

VERSION = 21  # part of every fingerprint: raise it when the columns or their meaning change
PARTS = "parts"  # subfolder of the parts of indexes
TEXT_FIELDS = pa.struct(
    [
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("variants", pa.int32()),
        ("identity", pa.string()),
        ("captions_sha256", pa.string()),
    ]
)
LATENT_FIELDS = [
    ("file", pa.string()),  # npz file or shard: relative to the cache folder, or absolute
    ("bucket_width", pa.int32()),
    ("bucket_height", pa.int32()),
    ("original_width", pa.int32()),
    ("original_height", pa.int32()),
    ("resized_width", pa.int32()),
    ("crop_left", pa.int32()),
    ("crop_top", pa.int32()),
    ("offset", pa.int64()),  # of the npz in its shard; null: an npz file of its own
    ("bytes", pa.int64()),  # null: the latents do not exist yet, and `file` is where they will be written
    ("sha256", pa.binary()),  # of the npz; null: no manifest lists it
    ("flipped", pa.bool_()),  # whether the npz also holds latents of the mirrored image; null: unknown
    ("text", TEXT_FIELDS),  # the cached text encoder outputs; null: not cached
]
LATENT_COLUMNS = [name for name, _ in LATENT_FIELDS]
SAMPLE_SCHEMA = pa.schema(
    [*(RECORD_SCHEMA.field(name) for name in ("key", "image_path", "record", "source")), *LATENT_FIELDS]
)
LISTED_SCHEMA = pa.schema([("key", pa.string()), ("listed_ns", pa.int64()), ("identity", pa.string()), *LATENT_FIELDS])
FOUND_SCHEMA = pa.schema([("row", pa.int64()), ("prefix", pa.string()), ("key", pa.string()), *LATENT_FIELDS])

# The columns of index files. A text that many rows share is the number of a name in the file's description.
KEY_HASHES = ("hash", "second_hash")  # data/index/key_hash.py
HASH_FIELDS = [(name, pa.uint64()) for name in KEY_HASHES]
STORED_RECORDS = pa.schema(
    [
        *(RECORD_SCHEMA.field(name) for name in ("key", "image_path", "captioned", "is_reg", "width", "height")),
        ("texts", pa.binary()),  # `record`, compressed (data/index/compressed_texts.py)
        *HASH_FIELDS,
    ]
)
PLACES = [RECORD_SCHEMA.field(name) for name in ("offset", "bytes", "source")]  # where a file's records have them
STORED_ENTRY = [("key", pa.string()), *HASH_FIELDS, ("listed_ns", pa.int64()), ("identity", pa.int32())]
STORED_FOUND = [("row", pa.int32()), ("prefix", pa.int32()), ("key", pa.string())]
SIDES = [name for name, kind in LATENT_FIELDS if kind == pa.int32()]
STORED_TEXT = [
    ("text_file", pa.int32()),
    ("text_offset", pa.int64()),
    ("text_bytes", pa.int64()),
    ("text_variants", pa.int32()),
    ("text_identity", pa.int32()),
    ("text_captions_sha256", pa.string()),
]
STORED_SAMPLES = pa.schema(
    [
        ("record", pa.int32()),  # row of the record index
        ("latents", pa.int32()),  # row of all files of latents, one file after the other
        ("bucket", pa.int32()),  # number in the list of buckets
        ("member", pa.int32()),  # all rows, bucket after bucket
    ]
)


def build_latent_fields(narrow: bool, text: bool) -> list[tuple[str, pa.DataType]]:
    """Return the stored form of LATENT_FIELDS.

    Args:
        narrow: sides are below 65536 px, files and offsets below 4 GiB, and hashes 32 bytes.
        text: any row has text encoder outputs.
    """
    side, span, sha256 = (pa.uint16(), pa.uint32(), pa.binary(32)) if narrow else (pa.int32(), pa.int64(), pa.binary())
    places = [("file", pa.int32()), *((name, side) for name in SIDES), ("offset", span), ("bytes", span)]
    return [*places, ("sha256", sha256), ("flipped", pa.bool_()), *(STORED_TEXT if text else [])]


class BadSample(NamedTuple):
    """A sample that cannot be trained on."""

    key: str
    reason: str


@dataclass(frozen=True)
class JoinSummary:
    """Counts and findings of a join. The index stores them."""

    num_wanted: int  # samples that should have latents: the selected records at each resolution
    num_unlisted: int  # samples whose latents no manifest lists
    num_uncached: int  # samples whose latents are encoded during training
    num_assumed_sizes: int  # samples whose original size is unknown and taken to be their bucket's
    other_sizes: str  # a message about records whose size is not their image's; "" if there are none
    identities: dict[str, dict[str, int]]  # prefix → name of a cache identity → number of samples made under it
    num_bad: int  # samples whose latents or image cannot be used
    num_unread: int  # of them, those that the storage did not give, so that another join may find them whole
    bad: list[BadSample]  # the first MAX_BAD of the bad ones
    watched: list[str]  # folders that were searched for unlisted latents

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as values of JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"bad": list(map(list, self.bad))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "JoinSummary":
        """Return the summary of `to_dict`."""
        return cls(**{**values, "bad": [BadSample(*each) for each in values["bad"]]})


class FoundLatents(NamedTuple):
    """Latents of a record that no manifest lists. The fields are those of FOUND_SCHEMA, in the same order."""

    row: int  # of the record in the record index
    prefix: str  # of the resolution
    key: str  # of the sample
    file: str
    bucket_width: int
    bucket_height: int
    original_width: int
    original_height: int
    resized_width: int
    crop_left: int
    crop_top: int
    offset: int | None = None
    bytes: int | None = None
    sha256: None = None
    flipped: bool | None = None
    text: dict[str, Any] | None = None


def fits_columns(size: Size, placement: Placement) -> bool:
    """Return whether an image's size and placement fit the 32-bit columns of LATENT_FIELDS."""
    return max(*size, placement.resized.width, placement.left, placement.top) < 2**31


def build_found_batch(found: Sequence[FoundLatents]) -> pa.RecordBatch:
    """Return latents that no manifest lists as columns of FOUND_SCHEMA."""
    return build_batch(zip(*found, strict=True) if found else [[] for _ in FOUND_SCHEMA], FOUND_SCHEMA)


def build_batch(columns: Iterable[Any], schema: pa.Schema) -> pa.RecordBatch:
    """Return columns, lists or arrays of one length, as a record batch of `schema`."""
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    return pa.record_batch(arrays, schema)
