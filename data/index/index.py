"""The index: memory-mapped files of all records, and of the samples that join records with their latents.

Processes that open an index share its pages, and no Python object is kept for a row. An index has a small head, whose
name holds a fingerprint of the sources, and parts, whose names hold fingerprints of theirs. If a source has changed, a
new head is built from the parts that have not changed and from new ones; if not, the existing head is opened. A process
that finds no index builds one under a temporary name. Several processes may do so at once, which costs only time.
Checksums at the end of each file show damage, and a damaged file is built again.
"""

import fcntl
import gc
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa

from sdxl_trainer.configs.problems import MAX_PROBLEMS
from sdxl_trainer.data.allocator import keep_freed_memory, release_freed_memory
from sdxl_trainer.data.files import remove_leftovers
from sdxl_trainer.data.formats.manifest import list_manifest_parts
from sdxl_trainer.data.formats.refused_files import get_refused_file, read_refused
from sdxl_trainer.data.images.image_files import walk_images
from sdxl_trainer.data.images.skipped_files import SkippedFiles
from sdxl_trainer.data.index.index_file import IndexFile, are_undamaged, open_undamaged, write_index_file
from sdxl_trainer.data.index.join import ALL_LATENTS, LatentSelection, join_latents
from sdxl_trainer.data.index.key_hash import has_equal_keys
from sdxl_trainer.data.index.record_parts import RecordPart, RecordParts, group_files, write_record_part
from sdxl_trainer.data.index.rows import Index
from sdxl_trainer.data.index.sample_rows import write_sample_index
from sdxl_trainer.data.index.schema import PARTS, VERSION
from sdxl_trainer.data.metadata.blocks import RecordBlock, build_block, read_blocks
from sdxl_trainer.data.metadata.merge import merge_sources, verify_unique_keys
from sdxl_trainer.data.metadata.records import ImageFinder, build_record_rows, read_image_folders
from sdxl_trainer.data.metadata.sources import ROWS_AT_ONCE, detect_format, list_source_files
from sdxl_trainer.data.metadata.sqlite_file import list_changing_files
from sdxl_trainer.data.stores.remote_sources import LocalSources, fetch_sources, show_urls_in_errors

KEPT_FILES = 3  # heads of each kind that are kept, besides those in use
NS_BETWEEN_USES = 1_000_000_000  # modification times may have a resolution of a second
LOCK_FILE = "lock"  # shared by processes that build parts


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
    settings = [*map(str, image_dirs), images_hash, separator, *map(str, regularisation_dirs)]
    settings += [f"{masks=}"] if masks else []  # a folder of masks changes the keys of images that share a stem
    settings += ["kohya_folders"] if kohya_folders else []
    counts = [str(len(source.files)) for source in local]
    fingerprint = _fingerprint(sources, [*map(str, files), *counts, *settings])
    path = folder / "index" / f"records-{fingerprint}.arrow"
    index = _open_existing(path)
    if index is not None:
        return index
    with _build_parts(path):
        builder = _RecordBuilder(folder / "index", image_dirs, separator, masks, settings)
        if metadata:
            with show_urls_in_errors(local):
                parts, lengths = builder.build_from_files(local, fingerprint)
        else:
            images = read_image_folders(image_dirs, regularisation_dirs, masks, kohya_folders)
            parts, lengths = builder.build_whole(fingerprint, lambda: map(build_block, images))
        _write_record_head(path, parts, lengths)
        index = Index(path)
    _clean_up(path)
    return index


@dataclass(frozen=True)
class _RecordBuilder:
    """Builds the parts of a record index.

    Attributes:
        settings: everything besides the files that decides the records.
    """

    folder: Path
    image_dirs: list[Path]
    separator: str
    masks: str | None
    settings: list[str]

    def build_from_files(self, sources: Sequence[LocalSources], fingerprint: str) -> tuple[list[RecordPart], list[int]]:
        """Build the parts of metadata files. Sources that have keys in common are merged into one part.

        Returns:
            The parts, and the numbers of records that the readers returned at once.

        Raises:
            ValueError: malformed metadata (the error names the first fault of each file), or a source has a key twice.
        """
        faults: list[ValueError] = []
        finder = ImageFinder(self.image_dirs, self.masks)
        groups = [(number, group) for number, source in enumerate(sources) for group in group_files(source.files)]
        parts = [RecordPart(self._name_part(files), number) for number, files in groups]
        for part, (_, files) in zip(parts, groups, strict=True):
            try:
                self._build(part.name, lambda files=files: _read_files(files), finder, _has_places(files))
            except ValueError as error:
                faults.append(error)
        if faults:
            raise faults[0] if len(faults) == 1 else ValueError("\n      ".join(map(str, faults[:MAX_PROBLEMS])))
        rows = _open_parts(self.folder, parts)
        is_new = np.repeat(_list_new(parts, self.folder), rows.counts)
        if len(sources) == 1:
            _verify_unique_keys(rows, is_new)
        elif has_equal_keys(rows.hashes, is_new):
            files = [source.files for source in sources]
            return self.build_whole(fingerprint, lambda: merge_sources(files, self.folder, self.image_dirs))
        return parts, rows.lengths if len(sources) == 1 else _split_evenly(len(rows))

    def build_whole(
        self, fingerprint: str, read: Callable[[], Iterable[RecordBlock]]
    ) -> tuple[list[RecordPart], list[int]]:
        """Build one part of all sources."""
        part = RecordPart(f"records-{fingerprint}.arrow", 0)
        self._build(part.name, read, ImageFinder(self.image_dirs, self.masks), with_places=True)
        rows = _open_parts(self.folder, [part])
        _verify_unique_keys(rows)
        return [part], rows.lengths

    def _name_part(self, files: Sequence[Path]) -> str:
        words = ["part", *map(os.path.abspath, files), os.getcwd(), *self.settings]
        changing = [changed for file in files for changed in list_changing_files(file)]
        return f"records-{_fingerprint(changing, words)}.arrow"

    def _build(
        self, name: str, read: Callable[[], Iterable[RecordBlock]], finder: ImageFinder, with_places: bool
    ) -> None:
        """Build a part unless it exists."""
        path = self.folder / PARTS / name
        if open_undamaged(path, is_part=True) is None:
            rows = (build_record_rows(block, finder, self.separator) for block in read())
            write_record_part(path, rows, with_places)


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
    with _build_parts(folder / "index" / name):
        joined = join_latents(folder, records.records, selection)
        path = folder / "index" / f"{name}-{_hash_folder_times(joined.summary.watched)}.arrow"
        write_sample_index(path, joined, records)
        index = Index(path)
    _clean_up(path)
    return index


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


@contextmanager
def _build_parts(path: Path) -> Iterator[None]:
    """Keep other processes from deleting parts that no head names yet."""
    (path.parent / PARTS).mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent / PARTS)
    with open(path.parent / PARTS / LOCK_FILE, "ab") as lock, _bulk_memory():
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def _read_files(files: Sequence[Path]) -> Iterator[RecordBlock]:
    """Yield the records of files, and raise one error for the faults of all."""
    faults: list[ValueError] = []
    for file in files:
        try:
            yield from read_blocks(file)
        except ValueError as error:
            faults.append(error)
    if faults:
        raise faults[0] if len(faults) == 1 else ValueError("\n      ".join(map(str, faults[:MAX_PROBLEMS])))


def _list_new(parts: Sequence[RecordPart], folder: Path) -> list[bool]:
    """Return which parts the index of records that was used last lacks. No two keys of that index are equal."""
    uses = _list_uses(folder / "records-")
    head = open_undamaged(max(uses, key=uses.__getitem__)) if uses else None
    known = set() if head is None else set(_list_part_names(head))
    is_new = []
    for part in parts:
        is_new.append(part.name not in known)
        known.discard(part.name)  # two sources may name the same file, whose keys are then equal
    return is_new


def _verify_unique_keys(rows: RecordParts, is_new: np.ndarray | None = None) -> None:
    """Verify that no key occurs twice.

    Args:
        is_new: as in `has_equal_keys`.

    Raises:
        DuplicateKeyError: a key does.
    """
    if has_equal_keys(rows.hashes, is_new):
        paths = rows.table.column("image_path")
        verify_unique_keys(rows.table.column("key"), lambda row: str(paths[row]))


def _write_record_head(path: Path, parts: Sequence[RecordPart], lengths: Sequence[int]) -> None:
    description = {"parts": [[part.name, part.source] for part in parts], "lengths": lengths}
    write_index_file(path, pa.schema([]), [], lambda: description)


def _has_places(files: Sequence[Path]) -> bool:
    """Return whether the records of files may lie in shards."""
    return any(detect_format(file) in ("shard", "catalogue") for file in files)


def _split_evenly(num_rows: int) -> list[int]:
    """Return the numbers of records that the merge of sources returns at once."""
    return [min(ROWS_AT_ONCE, num_rows - start) for start in range(0, num_rows, ROWS_AT_ONCE)]


def _open_existing(path: Path) -> Index | None:
    """Open an index; None if there is none, or if a file of it is damaged or lacks. Damaged files are deleted.

    The records of an index of samples have been verified when their own index was opened.
    """
    head = open_undamaged(path)
    if head is None:
        return None
    if not are_undamaged([path.parent / PARTS / name for name in _list_part_names(head)]):
        return None
    try:
        index = Index(path)
    except FileNotFoundError:  # another process deletes it
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
    """Delete indexes of the same kind, except this one, those used last, and those that a process has open.

    Then delete the parts that no index has, unless a process builds parts at the moment.
    """
    _mark_used(path)
    uses = _list_uses(path)
    for file in sorted(uses, key=uses.__getitem__)[:-KEPT_FILES]:
        # Either another process deleted the file, or one has it open.
        with suppress(OSError), open(file, "r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
    with suppress(OSError), open(path.parent / PARTS / LOCK_FILE, "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        used: set[str] = set()
        for head in path.parent.glob("*-*.arrow"):
            with suppress(OSError, ValueError):  # damaged, or another process deletes it
                used.update(_list_part_names(IndexFile(head)))
        for part in (path.parent / PARTS).glob("*.arrow"):
            if part.name not in used:
                part.unlink(missing_ok=True)


def _list_part_names(head: IndexFile) -> list[str]:
    description = head.read_description()
    return [*description.get("latents", ()), *(name for name, _ in description.get("parts", ()))]


def _open_parts(folder: Path, parts: Sequence[RecordPart]) -> RecordParts:
    return RecordParts([(folder / PARTS / part.name, part.source) for part in parts])


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
