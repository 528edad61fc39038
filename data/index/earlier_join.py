"""The matches of an earlier index of samples: a grown set is searched only where records or latents are new.

The latents of a record stay its newest as long as the parts of both are there and no new part lists its key.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdxl_trainer.data.index.index_file import IndexFile, open_undamaged

GONE = -(1 << 62)  # no part has so many rows


class Part(NamedTuple):
    """A part of an index."""

    name: str  # of its file
    num_rows: int


class EarlierJoin:
    """The matches of an earlier index of samples, in the row numbers of the present records and latents.

    Attributes:
        is_new: whether the earlier join has not seen an entry, [entries] bool.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        record: np.ndarray,
        latents: np.ndarray,
        record_parts: Sequence[Part],
        latent_parts: Sequence[Part],
    ):
        self._prefixes = description["prefixes"]
        self._record, self._latents = record, latents
        self._record_parts = [Part(*part) for part in description["record_parts"]]
        self._record_shifts = _list_shifts(self._record_parts, record_parts)
        self._num_records = sum(part.num_rows for part in record_parts)
        earlier = [Part(*part) for part in description["latent_parts"]]
        self._latent_ends = np.cumsum([part.num_rows for part in earlier])
        # Rows after all parts are latents that no manifest lists, which each join searches for.
        self._latent_shifts = np.array([*_list_shifts(earlier, latent_parts), GONE])
        known = {part.name for part in earlier}
        self.is_new = np.repeat([part.name not in known for part in latent_parts], [p.num_rows for p in latent_parts])

    def list_known(self, prefix: str) -> np.ndarray:
        """Return for each record the row of its latents, or -1 if it is unknown, [records] int32."""
        known, begin = np.full(self._num_records, -1, np.int32), 0
        for name, end in self._prefixes:
            if name == prefix:
                self._fill_known(known, self._record[begin:end], self._latents[begin:end])
            begin = end
        return known

    def _fill_known(self, known: np.ndarray, record: np.ndarray, latents: np.ndarray) -> None:
        start = 0
        for part, shift in zip(self._record_parts, self._record_shifts, strict=True):
            first, last = np.searchsorted(record, (start, start + part.num_rows))
            if shift != GONE:
                shifts = self._latent_shifts[np.searchsorted(self._latent_ends, latents[first:last], side="right")]
                known[record[first:last] + shift] = np.where(shifts == GONE, -1, latents[first:last] + shifts)
            start += part.num_rows


def list_parts(files: Sequence[IndexFile], counts: Sequence[int]) -> list[Part]:
    """Return parts by their files and numbers of rows."""
    return [Part(file.path.name, count) for file, count in zip(files, counts, strict=True)]


def open_earlier_join(folder: Path, record_parts: Sequence[Part], latent_parts: Sequence[Part]) -> EarlierJoin | None:
    """Return the matches of the index of samples in `folder` that was used last; None if it has none to offer."""
    paths = sorted(folder.glob("latents-*.arrow"), key=_get_last_use)
    head = open_undamaged(paths[-1]) if paths else None
    description = {} if head is None else head.read_description()
    if head is None or not description.get("record_parts"):
        return None
    [batch] = head.read_batches()
    record, latents = (batch.column(name).to_numpy() for name in ("record", "latents"))
    return EarlierJoin(description, record, latents, record_parts, latent_parts)


def _get_last_use(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # another process deletes it
        return 0


def _list_shifts(earlier: Sequence[Part], now: Sequence[Part]) -> list[int]:
    """Return by how much the row numbers of each earlier part have changed, or GONE."""
    shifts, starts, start = [], {}, 0
    for part in now:
        starts[part.name] = start
        start += part.num_rows
    start = 0
    for part in earlier:
        shifts.append(starts[part.name] - start if part.name in starts else GONE)
        start += part.num_rows
    return shifts
