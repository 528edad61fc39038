"""The index: all records in one memory-mapped Arrow file, and the same joined with what the latent cache holds.

Processes that open an index share its pages; nothing is kept in Python per sample. Each file's name carries a
fingerprint of what it was made from, so a changed source makes a new index and an unchanged one is found again.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from sdxl_trainer.data.files import open_atomic
from sdxl_trainer.data.manifest import list_parts, read_entries
from sdxl_trainer.data.records import CAPTION_SUFFIXES, IMAGE_SUFFIXES, read_records

VERSION = 1  # part of every fingerprint: raise it when the columns or their meaning change
ROWS_PER_GROUP = 65_536

RECORD_SCHEMA = pa.schema(
    [("key", pa.string()), ("image_path", pa.string()), ("caption", pa.string()), ("record", pa.binary())]
)
LATENT_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("caption", pa.string()),
        ("record", pa.binary()),
        ("file", pa.string()),
        ("bucket_width", pa.int32()),
        ("bucket_height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("crop_left", pa.int32()),
        ("crop_top", pa.int32()),
    ]
)


class Index:
    """An open index: `len`, one row as a dict, one column as numpy."""

    def __init__(self, path: Path):
        self.path = path
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    def __len__(self) -> int:
        return self._table.num_rows

    def row(self, number: int) -> dict[str, Any]:
        """All columns of a row."""
        return {name: self._table.column(name)[number].as_py() for name in self._table.column_names}

    def column(self, name: str) -> np.ndarray:
        """A numeric column, [N]."""
        return self._table.column(name).to_numpy()

    def strings(self, name: str) -> pa.ChunkedArray:
        """A text or binary column, still in the mapped file."""
        return self._table.column(name)

    def __reduce__(self) -> tuple:
        return (Index, (self.path,))  # workers map the file anew instead of copying it

    @property
    def fingerprint(self) -> str:
        """What names the content: part of the file's name."""
        return self.path.stem.rsplit("-", 1)[-1]


@dataclass(frozen=True)
class JoinReport:
    """How many samples the records and the cache have in common."""

    num_samples: int
    num_uncached: int
    num_without_caption: int


def open_record_index(folder: Path, metadata: list[Path], image_dirs: list[Path]) -> Index:
    """The index of all records, built under `folder` unless it is there already.

    Raises:
        ValueError: the metadata is malformed (data/records.py says where).
    """
    pictures, sidecars = _list_images(image_dirs)
    sources = metadata or sidecars  # with metadata, folders only say where pictures are
    words = [str(path) for path in [*metadata, *image_dirs, *pictures]]
    path = folder / "index" / f"records-{_fingerprint(sources, words)}.arrow"
    if not path.is_file():
        records = read_records(metadata, image_dirs)
        rows = (
            {
                "key": record["key"],
                "image_path": record["image_path"],
                "caption": record["caption"],
                "record": orjson.dumps(record),
            }
            for record in records.values()
        )
        _write(path, RECORD_SCHEMA, rows)
    return Index(path)


def open_latent_index(folder: Path, records: Index) -> Index:
    """The index of the records whose latents are in the cache at `folder`, in the order of the records."""
    parts = list_parts(folder)
    path = folder / "index" / f"latents-{_fingerprint(parts, [records.fingerprint])}.arrow"
    if not path.is_file():
        _write(path, LATENT_SCHEMA, _join(folder, records))
    return Index(path)


def _join(folder: Path, records: Index) -> Iterator[dict[str, Any]]:
    entries = {entry.key: entry for entry in read_entries(folder)}
    for number in range(len(records)):
        record = records.row(number)
        entry = entries.get(record["key"])
        if entry is not None:
            yield {
                "key": entry.key,
                "caption": record["caption"],
                "record": record["record"],
                "file": entry.file,
                "bucket_width": entry.bucket[0],
                "bucket_height": entry.bucket[1],
                "original_width": entry.original_size[0],
                "original_height": entry.original_size[1],
                "crop_left": entry.crop[0],
                "crop_top": entry.crop[1],
            }


def _write(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file, pa.ipc.new_file(file, schema) as writer:
        group: list[dict[str, Any]] = []
        for row in rows:
            group.append(row)
            if len(group) == ROWS_PER_GROUP:
                writer.write_batch(pa.RecordBatch.from_pylist(group, schema=schema))
                group = []
        writer.write_batch(pa.RecordBatch.from_pylist(group, schema=schema))


def _fingerprint(files: Sequence[Path | str], words: list[str]) -> str:
    """Names what an index was made from: its files' paths, sizes and times."""
    digest = hashlib.sha256(orjson.dumps([VERSION, words]))
    for file in files:
        status = os.stat(file)
        digest.update(orjson.dumps([str(file), status.st_size, status.st_mtime_ns]))
    return digest.hexdigest()[:16]


def _list_images(roots: list[Path]) -> tuple[list[str], list[str]]:
    """Paths of the pictures and of the caption files below folders.

    Not the folders' times: an index or latents written among the pictures change those, and an edited caption does not.
    """
    pictures, sidecars = [], []
    for folder, _, names in (entry for root in roots for entry in os.walk(root)):
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                pictures.append(os.path.join(folder, name))
            elif suffix in CAPTION_SUFFIXES:
                sidecars.append(os.path.join(folder, name))
    return sorted(pictures), sorted(sidecars)
