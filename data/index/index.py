"""The index: memory-mapped Arrow files of all records, and of the samples that join records with their latents.

Processes that open an index share its pages, and no Python object is kept for a row. The name of each file holds a
fingerprint of the sources: if a source has changed, a new index is built; if not, the existing one is opened. A process
that finds no index builds one under a temporary name. Several processes may do so at once, which costs only time.
Checksums at the end of the file show damage, and a damaged index is built again.
"""

import fcntl
import gc
import hashlib
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from loguru import logger

from sdxl_trainer.data.allocator import keep_freed_memory, release_freed_memory
from sdxl_trainer.data.files import open_atomic, remove_leftovers
from sdxl_trainer.data.formats.manifest import get_refused_file, list_manifest_parts, read_refused
from sdxl_trainer.data.images.image_files import walk_images
from sdxl_trainer.data.images.skipped_files import SkippedFiles
from sdxl_trainer.data.index.checksums import (
    DamagedIndexError,
    append_checksums,
    count_content_bytes,
    verify_checksums,
)
from sdxl_trainer.data.index.join import ALL_LATENTS, JoinSummary, LatentSelection, iterate_sample_rows, join_latents
from sdxl_trainer.data.index.schema import SAMPLE_SCHEMA
from sdxl_trainer.data.metadata.blocks import build_block
from sdxl_trainer.data.metadata.merge import merge_sources, verify_unique_keys
from sdxl_trainer.data.metadata.records import (
    RECORD_SCHEMA,
    ImageFinder,
    Record,
    build_record_rows,
    parse_record,
    read_image_folders,
)
from sdxl_trainer.data.metadata.sources import list_source_files
from sdxl_trainer.data.metadata.sqlite_file import list_changing_files
from sdxl_trainer.data.stores.remote_sources import fetch_sources, show_urls_in_errors

VERSION = 17  # part of every fingerprint: raise it when the columns or their meaning change
ROWS_PER_GROUP = 8192
KEPT_FILES = 3  # indexes of each kind that are kept, besides those in use
NS_BETWEEN_USES = 1_000_000_000  # modification times may have a resolution of a second
BUCKET_COLUMNS = ("bucket_width", "bucket_height")


class ShardGroups(NamedTuple):
    """Rows of an index by the shard that holds their latents."""

    shard_of_row: np.ndarray  # [N] int64 number of each row's shard
    names: list[str]  # name of each number, sorted


class Index:
    """An open index. While it is open, no process deletes its file."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = os.open(path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        self._map = mmap.mmap(self._lock, 0, prot=mmap.PROT_READ)
        content = memoryview(self._map)
        self.table = pa.ipc.open_file(pa.py_buffer(content[: count_content_bytes(content)])).read_all()
        self._names, groups = self.table.column_names, self.table.to_batches()
        self._ends = list(accumulate(map(len, groups)))
        self._columns_of_group = [group.columns for group in groups]

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            os.close(self._lock)

    def __len__(self) -> int:
        return self.table.num_rows

    def __reduce__(self) -> tuple:
        return (Index, (self.path,))  # a worker maps the file itself instead of receiving a copy

    def row(self, number: int) -> dict[str, Any]:
        """Return all columns of a row."""
        # Read from the columns of one group: a column of the whole table searches hundreds of groups for each value.
        group = bisect_right(self._ends, number)
        at = number - (self._ends[group - 1] if group else 0)
        columns = zip(self._names, self._columns_of_group[group], strict=True)
        return {name: column[at].as_py() for name, column in columns}

    def record(self, number: int) -> Record:
        """Return the whole record of a row."""
        return parse_record(self.row(number))

    def record_json(self, number: int) -> bytes:
        """Return the whole record of a row as JSON, for files whose readers have no index."""
        return orjson.dumps(self.record(number))

    def column(self, name: str) -> np.ndarray:
        """Return a numeric column, [N]."""
        return self.table.column(name).to_numpy()

    def arrow_column(self, name: str) -> pa.ChunkedArray:
        """Return a column of any type; its values stay in the mapped file."""
        return self.table.column(name)

    def group_by_shard(self) -> ShardGroups:
        """Group the rows by the shard that holds their latents. All npz files together count as the shard ""."""
        names = pc.call_function(
            "if_else", [self.arrow_column("offset").is_valid(), self.arrow_column("file"), pa.scalar("")]
        )
        encoded = pa.concat_arrays(names.chunks).dictionary_encode()
        dictionary = encoded.dictionary.to_pylist()
        numbers = np.argsort(np.argsort(np.array(dictionary, object)))
        return ShardGroups(numbers[encoded.indices.to_numpy()], sorted(dictionary))

    @cached_property
    def summary(self) -> JoinSummary:
        """Counts and findings of the join that built a sample index."""
        return JoinSummary.from_metadata(self.table.schema.metadata)

    @property
    def fingerprint(self) -> str:
        """Hash of the sources that the index was built from, the end of its file name."""
        return self.path.stem.rsplit("-", 1)[-1]

    def hash_rows(self) -> str:
        """Hash all keys and buckets in their order.

        They decide which sample a plan's row number means: a resumed run has the same order of batches as long as the
        hash stays the same. The location of the data and all other columns do not affect the hash.
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

    def release_pages(self) -> None:
        """Drop the pages read so far. All processes share them, but they count as each process' own memory."""
        self._map.madvise(mmap.MADV_DONTNEED)


def open_record_index(
    folder: Path,
    metadata: Sequence[Path | str],
    image_dirs: list[Path],
    separator: str = ",",
    regularisation_dirs: Sequence[Path] = (),
    masks: str | None = None,
    kohya_folders: bool = False,
) -> Index:
    """Open the index of all records under `folder`, and build it first if it does not exist.

    Args:
        separator: between caption and tags of kohya's metadata (data/metadata/records.py).
        regularisation_dirs: further image folders, whose records get `is_reg`; not with metadata.
        masks, kohya_folders: as in `read_image_folders`.

    Raises:
        ValueError: the metadata is malformed (the message names the file and the place), or two images have one stem.
        FileNotFoundError: a source does not exist.
        StoreError: a source lies on a store that cannot be read.
    """
    remove_leftovers(folder / "index")
    local = [fetch_sources(list_source_files([pattern]), folder / "index") for pattern in metadata]
    files = [file for source in local for file in source.files]
    skipped = SkippedFiles()
    images_hash, sidecars = _hash_folders([*image_dirs, *regularisation_dirs], masks, skipped)
    if not metadata:
        skipped.report(folder / "index")
    # With metadata, folders only serve to find images.
    sources = [changing for file in files for changing in list_changing_files(file)] or sidecars
    counts = [str(len(source.files)) for source in local]
    words = [*map(str, [*files, *image_dirs]), *counts, images_hash, separator, *map(str, regularisation_dirs)]
    words += [f"{masks=}"] if masks else []  # a folder of masks changes the keys of images that share a stem
    words += ["kohya_folders"] if kohya_folders else []
    path = folder / "index" / f"records-{_fingerprint(sources, words)}.arrow"
    index = _open_existing(path)
    if index is None:
        groups = [source.files for source in local]
        images = read_image_folders(image_dirs, regularisation_dirs, masks, kohya_folders)
        blocks = merge_sources(groups, path.parent, image_dirs) if metadata else map(build_block, images)
        finder = ImageFinder(image_dirs, masks)
        with show_urls_in_errors(local):
            _write(path, RECORD_SCHEMA, (build_record_rows(block, finder, separator) for block in blocks))
    return index or Index(path)


def open_sample_index(folder: Path, records: Index, selection: LatentSelection = ALL_LATENTS) -> Index:
    """Open the index of the samples of `records`, and build it first if it does not exist.

    A sample is a record with latents at one resolution. The manifest of the cache at `folder` lists the latents, or
    another program wrote them beside the images or into `folder`. With `selection.encoding`, images without latents are
    samples, too. Rows are in the order of the records, one resolution after the other.
    """
    words = [records.fingerprint, str(folder.absolute()), repr(selection)]
    refused = [file for file in (get_refused_file(folder), *read_refused(folder)) if os.path.isfile(file)]
    name = f"latents-{_fingerprint([*list_manifest_parts(folder), *refused], words)}"
    for path in (folder / "index").glob(f"{name}-*.arrow"):
        index = _open_existing(path)
        if index is None or index.summary.num_unread:
            continue
        if _hash_folder_times(index.summary.watched) == index.fingerprint:
            return index
    (folder / "index").mkdir(parents=True, exist_ok=True)
    with _bulk_memory(), join_latents(folder, records.table, selection) as joined:
        path = folder / "index" / f"{name}-{_hash_folder_times(joined.summary.watched)}.arrow"
        schema = SAMPLE_SCHEMA.with_metadata(joined.summary.to_metadata())
        batches = iterate_sample_rows(joined, records.table, records.release_pages)
        _write(path, schema, (batch.replace_schema_metadata(schema.metadata) for batch in batches))
    return Index(path)


def _write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write an index and delete old ones.

    Raises:
        DuplicateKeyError: two records have one key.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _bulk_memory(), open_atomic(path) as file:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in _regroup(batches):
                writer.write_batch(batch)
        file.flush()
        # The keys of samples need no check: each is a record's key with the prefix of a resolution.
        if schema == RECORD_SCHEMA:
            table = pa.ipc.open_file(pa.memory_map(file.name)).read_all()
            paths = table.column("image_path")
            verify_unique_keys(table.column("key"), lambda row: str(paths[row]))
        append_checksums(file)
    _clean_up(path)


@contextmanager
def _bulk_memory() -> Iterator[None]:
    """Switch off garbage collection, and keep freed memory in the process, while millions of records are read.

    No record is part of a reference cycle: searching for cycles takes a fifth of the time, and clearing fresh pages for
    each block a tenth.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    keep_freed_memory()
    try:
        yield
    finally:
        release_freed_memory()
        if was_enabled:
            gc.enable()


def _regroup(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the rows in batches of at least ROWS_PER_GROUP, because a file of many small batches opens slowly."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= ROWS_PER_GROUP:
            yield waiting[0] if len(waiting) == 1 else pa.concat_batches(waiting)
            waiting = []
    if waiting:
        yield pa.concat_batches(waiting)


def _open_existing(path: Path) -> Index | None:
    """Open an index; None if there is none, or if it is damaged. A damaged index is deleted."""
    try:
        verify_checksums(path)
        index = Index(path)
    except FileNotFoundError:  # also if another process deletes it
        return None
    except (DamagedIndexError, OSError) as error:
        logger.warning("{}: the index is damaged and is built again: {}", path, error)
        path.unlink(missing_ok=True)
        return None
    _mark_used(path)
    return index


def _list_uses(path: Path) -> dict[Path, int]:
    """Return all indexes of the same kind, each with the place of its last use among the uses of all."""
    uses: dict[Path, int] = {}
    for file in path.parent.glob(f"{path.name.split('-', 1)[0]}-*.arrow"):
        with suppress(FileNotFoundError):  # another process may delete old indexes, too
            uses[file] = file.stat().st_mtime_ns
    return uses


def _mark_used(path: Path) -> None:
    """Make an index the last used of its kind. Modification times serve as counters, because clocks are set back."""
    latest = max(_list_uses(path).values(), default=0) + NS_BETWEEN_USES
    with suppress(OSError):  # another user's index
        os.utime(path, ns=(latest, latest))


def _clean_up(path: Path) -> None:
    """Delete indexes of the same kind, except this one, those used last, and those that a process has open."""
    _mark_used(path)
    uses = _list_uses(path)
    for file in sorted(uses, key=uses.__getitem__)[:-KEPT_FILES]:
        # Either another process deleted the file, or one has it open.
        with suppress(OSError), open(file, "r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()


def _hash_folder_times(folders: Sequence[str]) -> str:
    """Hash the modification times of the folders that were searched for unlisted latents."""
    times = [os.stat(folder).st_mtime_ns if os.path.isdir(folder) else 0 for folder in folders]
    return hashlib.sha256(orjson.dumps([folders, times])).hexdigest()[:16]


def _fingerprint(files: Sequence[Path | str], words: list[str]) -> str:
    """Hash `words`, and the paths, sizes and modification times of files. A reader reports files that are missing."""
    digest = hashlib.sha256(orjson.dumps([VERSION, words]))
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            continue
        digest.update(orjson.dumps([str(file), status.st_size, status.st_mtime_ns]))
    return digest.hexdigest()[:16]


def _hash_folders(roots: Sequence[Path], masks: str | None, skipped: SkippedFiles) -> tuple[str, list[str]]:
    """Return a hash of the paths of all images below folders, and the paths of the caption files there.

    Modification times of the folders are not enough: an index or latents written among the images change them, and an
    edited caption does not.
    """
    digest, sidecars = hashlib.sha256(), []
    for folder in walk_images(roots, masks, skipped):
        if folder.images:
            digest.update(orjson.dumps([folder.path, folder.images]))
        sidecars += [os.path.join(folder.path, name) for name in sorted(folder.captions.values())]
    return digest.hexdigest(), sidecars
