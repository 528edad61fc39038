"""The index: all records in one memory-mapped Arrow file, and the same joined with what the latent cache holds.

Processes that open an index share its pages; nothing is kept in Python per sample. Each file's name carries a
fingerprint of what it was made from, so a changed source makes a new index and an unchanged one is found again.
Whoever finds none builds it under a temporary name; if many do at once, that costs time and nothing else.
"""

import fcntl
import gc
import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_trainer.data.allocator import give_freed_memory_back, keep_freed_memory
from sdxl_trainer.data.files import open_atomic
from sdxl_trainer.data.formats.manifest import list_manifest_parts
from sdxl_trainer.data.images.image_files import CAPTION_SUFFIXES, walk_images
from sdxl_trainer.data.index.join import ALL_LATENTS, LATENT_SCHEMA, LatentSelection, iterate_sample_rows, join_latents
from sdxl_trainer.data.index.rows import RowReader
from sdxl_trainer.data.metadata.blocks import build_block
from sdxl_trainer.data.metadata.merge import merge_sources, raise_duplicate_keys
from sdxl_trainer.data.metadata.records import (
    RECORD_SCHEMA,
    ImageFinder,
    Record,
    build_record_rows,
    parse_record,
    read_image_folders,
)
from sdxl_trainer.data.metadata.sources import list_source_files
from sdxl_trainer.data.stores.remote_sources import fetch_sources, show_urls_in_errors

VERSION = 11  # part of every fingerprint: raise it when the columns or their meaning change
ROWS_PER_GROUP = 8192
KEPT_FILES = 3  # of records and of latents, besides those that are in use
BUCKET_COLUMNS = ("bucket_width", "bucket_height")


class ShardGroups(NamedTuple):
    """Rows of an index by the shard that holds their latents."""

    shard_of_row: np.ndarray  # [N] int64 number of each row's shard
    names: list[str]  # name of each number, sorted


class Index:
    """An open index: `len`, one row as a dict, one column as numpy."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = os.open(path, os.O_RDONLY)  # as long as it is held, the file is not cleaned up
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        self._map = mmap.mmap(self._lock, 0, prot=mmap.PROT_READ)
        self.table = pa.ipc.open_file(pa.py_buffer(self._map)).read_all()
        self._rows = RowReader(self.table)

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            os.close(self._lock)

    def __len__(self) -> int:
        return self.table.num_rows

    def row(self, number: int) -> dict[str, Any]:
        """All columns of a row."""
        return self._rows.read(number)

    def record(self, number: int) -> Record:
        """The whole record of a row."""
        return parse_record(self.row(number))

    def record_json(self, number: int) -> bytes:
        """The same as JSON, for files that are read without this index."""
        return orjson.dumps(self.record(number))

    def column(self, name: str) -> np.ndarray:
        """A numeric column, [N]."""
        return self.table.column(name).to_numpy()

    def arrow_column(self, name: str) -> pa.ChunkedArray:
        """A text or binary column, still in the mapped file."""
        return self.table.column(name)

    def group_by_shard(self) -> ShardGroups:
        """Return which shard holds each row's latents. All npz files together count as the shard ""."""
        names = pc.call_function(
            "if_else", [self.arrow_column("offset").is_valid(), self.arrow_column("file"), pa.scalar("")]
        )
        encoded = pa.concat_arrays(names.chunks).dictionary_encode()
        dictionary = encoded.dictionary.to_pylist()
        numbers = np.argsort(np.argsort(np.array(dictionary, object)))
        return ShardGroups(numbers[encoded.indices.to_numpy()], sorted(dictionary))

    def note(self, name: str) -> Any:
        """What was noted when the index was made, or None."""
        notes = self.table.schema.metadata or {}
        return orjson.loads(notes[name.encode()]) if name.encode() in notes else None

    def release(self) -> None:
        """Give the pages read so far back, which count as this process' memory although all share them."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def hash_rows(self) -> str:
        """Names the rows by their keys and buckets: the same wherever the data lie and whatever else changes.

        It decides what a plan's row numbers mean, so a resume is right as long as it stays.
        """
        digest = hashlib.sha256()
        for chunk in self.table.column("key").chunks:
            _, offsets, letters = chunk.buffers()
            places = np.frombuffer(offsets, np.int32, len(chunk) + 1, 4 * chunk.offset) if len(chunk) else np.zeros(1)
            digest.update(np.diff(places).tobytes())
            digest.update(memoryview(letters or b"")[int(places[0]) : int(places[-1])])
        for name in BUCKET_COLUMNS:
            digest.update(self.column(name).tobytes())
        return digest.hexdigest()[:16]

    def __reduce__(self) -> tuple:
        return (Index, (self.path,))  # workers map the file anew instead of copying it

    @property
    def fingerprint(self) -> str:
        """Names what it was made from: part of the file's name."""
        return self.path.stem.rsplit("-", 1)[-1]


def open_record_index(
    folder: Path,
    metadata: Sequence[Path | str],
    image_dirs: list[Path],
    separator: str = ",",
    regularisation_dirs: Sequence[Path] = (),
    masks: str | None = None,
) -> Index:
    """The index of all records, built under `folder` unless it is there already.

    Args:
        separator: between caption and tags in kohya's metadata (data/metadata/records.py).
        regularisation_dirs: further image folders, whose records get `is_reg`; not with metadata.
        masks: as in `data.masks`, which are no images of their own.

    Raises:
        ValueError: the metadata is malformed (data/metadata/sources.py says where), or two images have one stem.
        FileNotFoundError: a source is not there.
        StoreError: a source lies on a store that cannot be read.
    """
    local = [fetch_sources(list_source_files([pattern]), folder / "index") for pattern in metadata]
    files = [file for source in local for file in source.files]
    names, sidecars = _hash_folders([*image_dirs, *regularisation_dirs], masks)
    sources = files or sidecars  # with metadata, folders only say where images are
    counts = [str(len(source.files)) for source in local]  # which files are one source
    words = [*map(str, [*files, *image_dirs]), *counts, names, separator, *map(str, regularisation_dirs)]
    path = folder / "index" / f"records-{_fingerprint(sources, words)}.arrow"
    if not path.is_file():
        groups = [source.files for source in local]
        images = read_image_folders(image_dirs, regularisation_dirs, masks)
        blocks = merge_sources(groups, path.parent) if metadata else map(build_block, images)
        finder = ImageFinder(image_dirs, masks)
        with show_urls_in_errors(local):
            _write(path, RECORD_SCHEMA, (build_record_rows(block, finder, separator) for block in blocks))
    return _open(path)


def open_sample_index(folder: Path, records: Index, selection: LatentSelection = ALL_LATENTS) -> Index:
    """The index of the records that have latents: those that the manifest of the cache at `folder` lists, and those of
    other programs that lie beside the images or in `folder`. In the order of the records; of several resolutions one
    after the other. With `selection.encoding` also those that have none, planned for when these are made.

    Notes: `num_wanted` (samples that were looked for), `num_unlisted` (not from the manifest), `num_uncached` (to be
    encoded), `num_assumed_sizes` (their original size is not known), `other_sizes` (what metadata say wrongly of it),
    `identities` (for each resolution, how many from the manifest were made under which), and `bad` (latent files or
    images with a reason why they are left out).
    """
    words = [records.fingerprint, str(folder.absolute()), repr(selection)]
    name = f"latents-{_fingerprint(list_manifest_parts(folder), words)}"
    for path in (folder / "index").glob(f"{name}-*.arrow"):
        index = _open(path)
        if _watch(index.note("watched")) == index.fingerprint:
            return index
    (folder / "index").mkdir(parents=True, exist_ok=True)
    with _building(), join_latents(folder, records.table, selection) as (joined, notes):
        path = folder / "index" / f"{name}-{_watch(notes['watched'])}.arrow"
        schema = LATENT_SCHEMA.with_metadata({name: orjson.dumps(note) for name, note in notes.items()})
        batches = iterate_sample_rows(joined, records.table, records.release)
        _write(path, schema, (batch.replace_schema_metadata(schema.metadata) for batch in batches))
    return _open(path)


def _write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write an index and clean up old ones.

    Raises:
        DuplicateKeyError: a key occurs twice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _building(), open_atomic(path) as file:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in _regroup(batches):
                writer.write_batch(batch)
        file.flush()
        if schema == RECORD_SCHEMA:  # of latents keys are those of records, with another prefix at each resolution
            table = pa.ipc.open_file(pa.memory_map(file.name)).read_all()
            paths = table.column("image_path")
            raise_duplicate_keys(table.column("key"), lambda row: str(paths[row]))
    _clean_up(path)


@contextmanager
def _building() -> Iterator[None]:
    """Millions of records pass by and none is part of a cycle: looking for cycles takes a fifth of the time, and
    clearing the memory of each block anew a tenth."""
    was_enabled = gc.isenabled()
    gc.disable()
    keep_freed_memory()
    try:
        yield
    finally:
        give_freed_memory_back()
        if was_enabled:
            gc.enable()


def _regroup(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of at least ROWS_PER_GROUP: a file of many small ones opens slowly."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= ROWS_PER_GROUP:
            yield waiting[0] if len(waiting) == 1 else pa.concat_batches(waiting)
            waiting = []
    if waiting:
        yield pa.concat_batches(waiting)


def _open(path: Path) -> Index:
    index = Index(path)
    os.utime(path)  # when it was used last
    return index


def _clean_up(path: Path) -> None:
    """Delete indexes of the same kind, but neither this one, nor the last used, nor those that a process has open."""
    files = list(path.parent.glob(f"{path.name.split('-', 1)[0]}-*.arrow"))
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns)[:-KEPT_FILES]:
        with open(file, "rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            file.unlink(missing_ok=True)


def _watch(folders: Sequence[str]) -> str:
    """Names the state of folders in which latent files of other programs were looked for."""
    times = [os.stat(folder).st_mtime_ns if os.path.isdir(folder) else 0 for folder in folders]
    return hashlib.sha256(orjson.dumps([folders, times])).hexdigest()[:16]


def _fingerprint(files: Sequence[Path | str], words: list[str]) -> str:
    """Names what an index was made from: its files' paths, sizes and times."""
    digest = hashlib.sha256(orjson.dumps([VERSION, words]))
    for file in files:
        status = os.stat(file)
        digest.update(orjson.dumps([str(file), status.st_size, status.st_mtime_ns]))
    return digest.hexdigest()[:16]


def _hash_folders(roots: Sequence[Path], masks: str | None) -> tuple[str, list[str]]:
    """(hash of the paths of all images, paths of the caption files) below folders.

    Not the folders' times: an index or latents written among the images change those, and an edited caption does not.
    """
    digest, sidecars = hashlib.sha256(), []
    for folder, images, everything in walk_images(roots, masks):
        if images:
            digest.update(orjson.dumps([folder, images]))
        sidecars += [os.path.join(folder, name) for name in sorted(everything) if name.endswith(CAPTION_SUFFIXES)]
    return digest.hexdigest(), sidecars
