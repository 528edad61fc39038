"""Files of latents: rows of LATENT_FIELDS in the smallest form, which every sample index that needs them shares."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_trainer.data.index.gather import RowGroups
from sdxl_trainer.data.index.index_file import IndexFile, regroup, write_index_file
from sdxl_trainer.data.index.key_hash import hash_keys
from sdxl_trainer.data.index.schema import (
    KEY_HASHES,
    LATENT_COLUMNS,
    LATENT_FIELDS,
    STORED_ENTRY,
    STORED_FOUND,
    build_latent_fields,
)

KEY_MARK = "\0"  # in a file's name, in place of the sample's key; no file name can hold it
SHARDS = "shards/"  # begins the names of a cache's shards
TYPES = dict(LATENT_FIELDS)
KINDS = {**TYPES, "key": pa.string(), "listed_ns": pa.int64()}
ROWS_AT_ONCE = 1 << 20
# Files of latents in the order in which they are tried: the smallest that can hold the rows.
FORMS = ((True, False), (True, True), (False, True))


class Names:
    """Texts that many rows share, each with its number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, name: str) -> int:
        """Return the number of a text."""
        return self._numbers.setdefault(name, len(self._numbers))

    def to_list(self, base: str = "") -> list[str]:
        """Return the texts by number, shards with the URL `base` of their cache before them."""
        return [f"{base}/{name}" if base and name.startswith(SHARDS) else name for name in self._numbers]


def write_latent_file(
    path: Path, list_batches: Callable[[], Iterator[pa.RecordBatch]], is_listed: bool, base: str = ""
) -> None:
    """Write rows of LISTED_SCHEMA or FOUND_SCHEMA.

    Args:
        list_batches: returns the rows; called again if the first form cannot hold them.
        is_listed: the rows are those of LISTED_SCHEMA.
        base: URL of a cache on a store, before the names of its shards.
    """
    for number, (narrow, text) in enumerate(FORMS, 1):
        names = Names()
        schema = pa.schema([*(STORED_ENTRY if is_listed else STORED_FOUND), *build_latent_fields(narrow, text)])
        batches = (_store_batch(batch, schema, names) for batch in list_batches())
        try:
            write_index_file(path, schema, regroup(batches), lambda names=names: {"names": names.to_list(base)})
            return
        except _UnfitError:
            assert number < len(FORMS), "the last form holds all rows"


class _UnfitError(Exception):
    """A form of latent files cannot hold a value."""


def _store_batch(batch: pa.RecordBatch, schema: pa.Schema, names: Names) -> pa.RecordBatch:
    """Return a batch in its stored form.

    Raises:
        _UnfitError: `schema` cannot hold a value.
    """
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    keys, offsets = columns["key"].to_pylist(), columns["offset"]
    # An npz file is mostly named by its key. Shards keep their names, which samples share.
    own = [offset is None for offset in offsets.to_pylist()] if offsets.null_count else [False] * len(keys)
    columns["file"] = [
        names.number(file.replace(key, KEY_MARK, 1) if is_own and key else file)
        for file, key, is_own in zip(columns["file"].to_pylist(), keys, own, strict=True)
    ]
    for name in ("identity", "prefix"):
        if name in columns:
            columns[name] = list(map(names.number, columns[name].to_pylist()))
    if "hash" in schema.names:
        columns.update(zip(KEY_HASHES, hash_keys(columns["key"]), strict=True))
    text = columns.pop("text")
    if "text_file" in schema.names:
        columns |= _store_text(text.to_pylist(), names)
    elif text.null_count < len(text):
        raise _UnfitError
    try:
        arrays = [_convert(columns[field.name], field.type) for field in schema]
    except (pa.ArrowInvalid, OverflowError):
        raise _UnfitError from None
    return pa.record_batch(arrays, schema)


def _convert(column: Any, kind: pa.DataType) -> pa.Array:
    return column.cast(kind) if isinstance(column, pa.Array) else pa.array(column, kind)


def _store_text(texts: Sequence[dict[str, Any] | None], names: Names) -> dict[str, list[Any]]:
    fields = [text or {} for text in texts]
    columns = {f"text_{name}": [text.get(name) for text in fields] for name in TYPES["text"].names}
    for name in ("text_file", "text_identity"):
        columns[name] = [None if value is None else names.number(value) for value in columns[name]]
    return columns


class LatentFiles:
    """The rows of several files of latents, one after the other."""

    def __init__(self, paths: Iterable[Path]):
        self.files = [IndexFile(path) for path in paths]
        batches = [file.read_batches() for file in self.files]
        self._groups = RowGroups([batch for part in batches for batch in part])
        self._names: list[Any] = [np.array(file.read_description()["names"], object) for file in self.files]
        self.lengths = [sum(map(len, part)) for part in batches]  # rows of each file
        self._file_of_group = [number for number, part in enumerate(batches) for _ in part]

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def batches(self) -> list[pa.RecordBatch]:
        """The rows in their stored form."""
        return self._groups.batches

    def iterate_names(self) -> Iterator[tuple[pa.RecordBatch, Any]]:
        """Yield each batch in its stored form, with the names that its numbers stand for."""
        for batch, file in zip(self.batches, self._file_of_group, strict=True):
            yield batch, self._names[file]

    def row(self, number: int) -> dict[str, Any]:
        """Return the LATENT_COLUMNS of a row."""
        group, at = self._groups.locate(number)
        names = self._names[self._file_of_group[group]]
        row = {name: column[at].as_py() for name, column in self._groups.columns[group].items()}
        row["file"] = names[row["file"]].replace(KEY_MARK, row["key"])
        row["text"] = _load_text({name: row.get(f"text_{name}") for name in TYPES["text"].names}, names)
        return {name: row[name] for name in LATENT_COLUMNS}

    def take(self, name: str, rows: np.ndarray) -> pa.Array:
        """Return a column of LATENT_FIELDS, `key` or `listed_ns`, at the given rows."""
        if name == "file":
            return self._groups.gather(rows, self._decode_files, pa.string())
        if name == "text":
            return self._groups.gather(rows, self._decode_texts, TYPES["text"])
        kind = KINDS[name]
        return self._groups.gather(rows, lambda group, at: self._get(group, name).take(pa.array(at)).cast(kind), kind)

    def _get(self, group: int, name: str) -> pa.Array:
        return self._groups.columns[group][name]

    def _decode_files(self, group: int, at: np.ndarray) -> pa.Array:
        files = self._names[self._file_of_group[group]][self._get(group, "file").take(pa.array(at)).to_numpy()]
        if not any(KEY_MARK in name for name in set(files)):
            return pa.array(files, pa.string())
        keys = self._get(group, "key").take(pa.array(at)).to_pylist()
        return pa.array([file.replace(KEY_MARK, key) for file, key in zip(files, keys, strict=True)], pa.string())

    def _decode_texts(self, group: int, at: np.ndarray) -> pa.Array:
        fields, names = TYPES["text"].names, self._names[self._file_of_group[group]]
        if "text_file" not in self._groups.columns[group]:
            return pa.nulls(len(at), TYPES["text"])
        columns = [self._get(group, f"text_{name}").take(pa.array(at)).to_pylist() for name in fields]
        texts = [_load_text(dict(zip(fields, row, strict=True)), names) for row in zip(*columns, strict=True)]
        return pa.array(texts, TYPES["text"])

    def count_identities(self, rows_of: Mapping[str, np.ndarray]) -> dict[str, dict[str, int]]:
        """Count the cache identities of listed latents: for each entry of `rows_of`, name of the identity → number.

        Args:
            rows_of: rows of listed latents, and -1.
        """
        names = Names()
        parts: list[np.ndarray] = [np.empty(0, np.uint16)]
        for batch, own in self.iterate_names():
            stored = batch.column("identity").to_numpy()
            used = np.unique(stored)
            numbers = [names.number(own[number]) for number in used.tolist()]
            kind = np.uint16 if len(names) <= 1 << 16 else np.int32
            # Most batches have one identity, which needs no search.
            places = np.searchsorted(used, stored) if len(used) > 1 else np.zeros(len(stored), np.intp)
            parts.append(np.array(numbers, kind)[places])
        numbers, texts = np.concatenate(parts), names.to_list()
        counts = {key: np.zeros(len(texts), np.int64) for key in rows_of}
        for key, rows in rows_of.items():
            for start in range(0, len(rows), ROWS_AT_ONCE):
                part = rows[start : start + ROWS_AT_ONCE]
                counts[key] += np.bincount(numbers[part[part >= 0]], minlength=len(texts))
        return {key: {texts[at]: int(found[at]) for at in np.flatnonzero(found)} for key, found in counts.items()}

    def pack_sizes(self, name: str) -> np.ndarray:
        """Return each row's `bucket` or `original` size, packed in 32 bits if all sides take 16, else in 64."""
        sides = [[batch.column(f"{name}_{side}").to_numpy() for side in ("width", "height")] for batch in self.batches]
        if all(width.dtype == np.uint16 for width, _ in sides):
            parts = [width.astype(np.uint32) << np.uint32(16) | height for width, height in sides]
            return np.concatenate([np.empty(0, np.uint32), *parts])
        return np.concatenate([pack_size(width, height) for width, height in sides])

    def number_shards(self) -> tuple[np.ndarray, list[str]]:
        """Return the number of each row's shard, [N] int32, and the name of each number; npz files are the shard ""."""
        shards, parts = Names(), [np.empty(0, np.int32)]
        npz = shards.number("")
        for batch, names in self.iterate_names():
            in_shard = pc.call_function("is_valid", [batch.column("offset")]).to_numpy(zero_copy_only=False)
            codes, inverse = np.unique(batch.column("file").to_numpy(), return_inverse=True)
            numbers = np.full(len(batch), npz, np.int32)
            used = np.zeros(len(codes), bool)
            used[inverse[in_shard]] = True
            local = np.array(
                [shards.number(names[code]) if use else npz for code, use in zip(codes, used, strict=True)]
            )
            numbers[in_shard] = local[inverse[in_shard]]
            parts.append(numbers)
        return np.concatenate(parts), shards.to_list()

    def release_pages(self) -> None:
        """Drop the pages read so far from this process' memory."""
        for file in self.files:
            file.release_pages()


def _load_text(fields: dict[str, Any], names: np.ndarray) -> dict[str, Any] | None:
    """Return a row's text encoder outputs; None if it has none."""
    if fields["file"] is None:
        return None
    return fields | {name: names[fields[name]] for name in ("file", "identity")}


def pack_size(width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Return sizes as one number each, [N] uint64: `width << 32 | height`."""
    return width.astype(np.uint64) << np.uint64(32) | height.astype(np.uint64)


def widen_sizes(sizes: np.ndarray) -> np.ndarray:
    """Return sizes of `LatentFiles.pack_sizes` in the form of `pack_size`."""
    return sizes if sizes.dtype == np.uint64 else pack_size(sizes >> np.uint32(16), sizes & np.uint32(0xFFFF))
