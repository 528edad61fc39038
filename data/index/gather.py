"""Read rows that lie in many record batches."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import pyarrow as pa


class RowGroups:
    """Record batches one after the other, with the rows numbered through all of them."""

    def __init__(self, batches: Sequence[pa.RecordBatch]):
        self.batches = list(batches)
        self.ends = list(accumulate(map(len, self.batches)))
        # Columns by name: a batch searches its schema for each one.
        self.columns = [dict(zip(batch.schema.names, batch.columns, strict=True)) for batch in self.batches]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def locate(self, number: int) -> tuple[int, int]:
        """Return the number of the batch that holds a row, and the row's place in it."""
        if not 0 <= number < len(self):
            raise IndexError(f"there is no row {number}")
        group = bisect_right(self.ends, number)
        return group, number - (self.ends[group - 1] if group else 0)

    def split(self, rows: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Return the batches that hold rows: (batch, places in `rows`, places in the batch) of each."""
        groups = np.searchsorted(self.ends, rows, side="right")
        order = np.argsort(groups, kind="stable")
        cuts = np.flatnonzero(np.diff(groups[order])) + 1
        starts = [0, *self.ends]
        split = []
        for places in np.split(order, cuts) if len(order) else []:
            group = int(groups[places[0]])
            split.append((group, places, rows[places] - starts[group]))
        return split

    def gather(self, rows: np.ndarray, read: Callable[[int, np.ndarray], pa.Array], kind: pa.DataType) -> pa.Array:
        """Return the values of rows.

        Args:
            read: returns the values of a batch at the given places.
        """
        split = self.split(rows)
        if not split:
            return pa.array([], kind)
        values = pa.concat_arrays([read(group, at) for group, _, at in split])
        places = np.concatenate([places for _, places, _ in split])
        if np.all(places[1:] > places[:-1]):
            return values
        inverse = np.empty(len(rows), np.int64)
        inverse[places] = np.arange(len(rows))
        return values.take(pa.array(inverse))
