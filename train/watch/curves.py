"""Downsampled metrics of a run: minimum, maximum and mean of each range of steps, in bounded memory.

A run of a million steps takes as much memory as one of a thousand. When the steps need more ranges than there may be,
each two neighbours become one.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import orjson

MAX_RANGES = 1024  # of a curve; a chart has about as many pixels
MAX_CURVES = 400
MAX_STEP = 10**10  # a larger one in a damaged line would make one range of all others
HIDDEN = frozenset(  # no curves
    {"step", "epoch", "step_seconds", "num_bad", "num_non_finite", "num_slow_ranks", "slowest_rank"}
)


class Curve:
    """Sums over the ranges of a metric, each [MAX_RANGES]."""

    def __init__(self) -> None:
        self.count = np.zeros(MAX_RANGES, np.int64)  # finite values
        self.num_non_finite = np.zeros(MAX_RANGES, np.int64)
        self.last_step = np.zeros(MAX_RANGES, np.int64)
        self.total = np.zeros(MAX_RANGES)
        self.low = np.full(MAX_RANGES, np.inf)
        self.high = np.full(MAX_RANGES, -np.inf)

    def add(self, ranges: np.ndarray, starts: np.ndarray, steps: np.ndarray, values: np.ndarray) -> None:
        """Add values.

        Args:
            ranges: [R] number of the range of each sequence of values.
            starts: [R] first value of each sequence.
            steps, values: [N]; values are NaN or infinite where they were not finite.
        """
        is_finite = np.isfinite(values)
        sizes = np.diff(starts, append=len(values))
        finite_counts = np.add.reduceat(is_finite.astype(np.int64), starts)
        np.add.at(self.count, ranges, finite_counts)
        np.add.at(self.num_non_finite, ranges, sizes - finite_counts)
        np.maximum.at(self.last_step, ranges, np.maximum.reduceat(steps, starts))
        np.add.at(self.total, ranges, np.add.reduceat(np.where(is_finite, values, 0.0), starts))
        np.minimum.at(self.low, ranges, np.minimum.reduceat(np.where(is_finite, values, np.inf), starts))
        np.maximum.at(self.high, ranges, np.maximum.reduceat(np.where(is_finite, values, -np.inf), starts))

    def halve(self) -> None:
        """Make one range of each two neighbours."""
        half = MAX_RANGES // 2
        merges = {"count": np.add, "num_non_finite": np.add, "total": np.add, "last_step": np.maximum}
        for name, merge in {**merges, "low": np.minimum, "high": np.maximum}.items():
            column = getattr(self, name)
            merged, empty = merge(column[0::2], column[1::2]), getattr(Curve(), name)
            column[:half], column[half:] = merged, empty[half:]

    def export(self, first: int) -> dict[str, Any]:
        """Return the ranges from number `first` on that have values, as columns for JSON."""
        used = np.flatnonzero(self.count[first:]) + first
        columns = {
            "range": used,
            "step": self.last_step[used],
            "mean": (self.total[used] / self.count[used]).astype(np.float32),
        }
        if (self.count[used] > 1).any():
            columns |= {"low": self.low[used].astype(np.float32), "high": self.high[used].astype(np.float32)}
        broken = np.flatnonzero(self.num_non_finite[first:]) + first
        return {**columns, "broken": np.stack([broken, self.last_step[broken]], axis=1).ravel()}


class Curves:
    """All curves of a run, built from the lines of its metrics file.

    Attributes:
        width: steps of a range.
        revision: number of times that ranges were merged.
        last_step: largest step so far.
    """

    def __init__(self) -> None:
        self.width, self.revision, self.last_step = 1, 0, 0
        self._curves: dict[str, Curve] = {}

    def add_lines(self, lines: bytes) -> None:
        """Add whole lines of a metrics file. Damaged ones are skipped."""
        groups: dict[tuple[str, ...], list[list[Any]]] = {}
        for row in _parse_rows(lines):
            if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] <= MAX_STEP:
                groups.setdefault(tuple(row), []).append(list(row.values()))
        for names, rows in groups.items():
            self._add_rows(names, rows)

    def export(self, first: int = 0) -> dict[str, dict[str, Any]]:
        """Return the ranges of all curves from number `first` on, as columns for JSON, by metric."""
        return {name: curve.export(first) for name, curve in self._curves.items()}

    def _add_rows(self, names: tuple[str, ...], rows: list[list[Any]]) -> None:
        """Add rows of numbers with the same names."""
        try:
            table = np.array(rows, np.float64)  # None becomes NaN
        except (ValueError, TypeError, OverflowError):
            table = np.array([row for row in rows if all(map(_is_number, row))], np.float64)
        if table.ndim != 2 or not len(table):
            return
        steps = table[:, names.index("step")].astype(np.int64)
        self.last_step = max(self.last_step, int(steps.max()))
        while self.last_step // self.width >= MAX_RANGES:
            self._widen()
        ranges = steps // self.width
        starts = np.flatnonzero(np.diff(ranges, prepend=-1))
        for name, values in zip(names, table.T, strict=True):
            if name not in HIDDEN and (name in self._curves or len(self._curves) < MAX_CURVES):
                self._curves.setdefault(name, Curve()).add(ranges[starts], starts, steps, values)

    def _widen(self) -> None:
        self.width *= 2
        self.revision += 1
        for curve in self._curves.values():
            curve.halve()


def _parse_rows(lines: bytes) -> Iterable[Any]:
    """Parse lines of JSON, all at once if none is damaged."""
    try:
        return orjson.loads(b"[" + lines.strip().replace(b"\n", b",") + b"]")
    except orjson.JSONDecodeError:
        return list(_parse_one_by_one(lines.splitlines()))


def _parse_one_by_one(lines: Sequence[bytes]) -> Iterable[Any]:
    for line in lines:
        try:
            yield orjson.loads(line)
        except orjson.JSONDecodeError:
            continue


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))
