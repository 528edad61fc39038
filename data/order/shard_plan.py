"""The order of batches for shards that are read whole: samples are shuffled over a few shards at a time.

An epoch reads the shards in its own random order, a few at a time; these few shards are a *window*. A window is to this
plan what an epoch is to the plain plan (data/order/plan.py): each bucket's samples are in random order within a window,
their sequence continues from window to window and from epoch to epoch, and a batch belongs to the window of its last
sample. Batches are still a pure function of their position, every sample is used in every epoch, and resuming and the
number of ranks change nothing. Samples are mixed only over the shards of a window, which is less than in a plain plan.
"""

import hashlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed, permute
from sdxl_trainer.data.order.plan import GlobalBatch, Plan, Position, argsort_stable

FETCH_SHARE = 0.75  # share of a window's batches over which all shards of the next window are requested


class _WindowPosition(NamedTuple):
    """Position of a global batch in an epoch."""

    window: int
    index: int  # of the global batch within its window


class ShardPlan(Plan):
    """A plan that mixes samples over windows of shards.

    Public methods take and return epochs. Inherited private methods get the number of a window, counted over all epochs
    (epoch x windows + window), wherever `Plan` has an epoch.

    Args:
        bucket_of_row: [N] as in `Plan`.
        shard_of_row: [N] number of the shard that holds each row.
        shard_names: the name of each number.
        shards_per_window: number of shards that samples are mixed over.
        global_batch_size, seed, repeats: as in `Plan`.
    """

    def __init__(
        self,
        bucket_of_row: np.ndarray,
        shard_of_row: np.ndarray,
        shard_names: list[str],
        shards_per_window: int,
        *,
        global_batch_size: int,
        seed: int,
        repeats: np.ndarray | None = None,
    ):
        num_shards = len(shard_names)
        members = argsort_stable(bucket_of_row.astype(np.int64) * num_shards + shard_of_row)
        super().__init__(bucket_of_row, global_batch_size, seed, repeats, members)
        self._names = shard_names
        self._per_window = shards_per_window
        self.num_windows = -(-num_shards // shards_per_window)
        bucket_of_member = np.repeat(np.arange(len(self.buckets)), np.diff(self._starts))
        self._groups = bucket_of_member * num_shards + shard_of_row[self._members]  # [N] ascending
        self._group_starts = np.searchsorted(self._groups, np.arange(len(self.buckets) * num_shards + 1))
        self._order_hash = hashlib.sha256(shard_of_row.astype(np.int64).tobytes()).hexdigest()[:16]
        self._shard_order = lru_cache(maxsize=8)(self._compute_shard_order)
        self._window_starts = lru_cache(maxsize=8)(self._compute_window_starts)
        self._window_ends = lru_cache(maxsize=8)(self._compute_window_ends)
        self._window_rows = lru_cache(maxsize=256)(self._compute_window_rows)

    @property
    def order_name(self) -> str:
        """Identifier of the order's inputs besides rows, buckets and seed: the shards and the window size."""
        return f"{self._order_hash}-{self._per_window}"

    def num_batches(self, epoch: int) -> int:
        return int(self._window_ends(epoch)[-1])

    def count_samples_by_bucket(self, epoch: int) -> dict[int, int]:
        first, last = epoch * self.num_windows, (epoch + 1) * self.num_windows
        numbers = range(len(self.buckets))
        return {self.buckets[b]: self._count_until(b, last) - self._count_until(b, first) for b in numbers}

    def num_carried(self, epoch: int) -> int:
        return super().num_carried((epoch + 1) * self.num_windows - 1)

    def batch(self, position: Position) -> GlobalBatch:
        window, index = self._find_window(position)
        batch = super().batch(Position(position.epoch * self.num_windows + window, index))
        return GlobalBatch(batch.bucket, batch.rows, batch.epochs // self.num_windows)

    def list_shards(self, position: Position) -> tuple[str, ...]:
        """List the shards that should be local at a position: its window's, and more and more of the next window's."""
        window, index = self._find_window(position)
        ends = self._window_ends(position.epoch)
        num_batches = int(ends[window]) - (int(ends[window - 1]) if window else 0)
        coming = self._list_window(*divmod(position.epoch * self.num_windows + window + 1, self.num_windows))
        num_requested = round(len(coming) * min(1.0, (index + 1) / (FETCH_SHARE * num_batches)))
        wanted = [*self._list_window(position.epoch, window), *coming[:num_requested]]
        return tuple(self._names[shard] for shard in wanted)

    def _find_window(self, position: Position) -> _WindowPosition:
        ends = self._window_ends(position.epoch)
        window = int(np.searchsorted(ends, position.index, side="right"))
        return _WindowPosition(window, position.index - (int(ends[window - 1]) if window else 0))

    def _list_window(self, epoch: int, window: int) -> list[int]:
        return self._shard_order(epoch)[window * self._per_window :][: self._per_window].tolist()

    def _find_rows(self, bucket: int, epoch: int, items: np.ndarray) -> np.ndarray:
        return self._window_rows(bucket, epoch)[items]

    def _count_batches_until(self, epoch: int) -> int:
        return super()._count_batches_until(epoch * self.num_windows)

    def _compute_count_until(self, bucket: int, epoch: int) -> int:
        epoch, window = divmod(epoch, self.num_windows)
        return super()._compute_count_until(bucket, epoch) + int(self._window_starts(epoch)[bucket, window])

    def _compute_shard_order(self, epoch: int) -> np.ndarray:
        size = len(self._names)
        return permute(np.arange(size), size, derive_seed(self.seed, RandomStream.SHARD_ORDER, epoch))

    def _compute_window_starts(self, epoch: int) -> np.ndarray:
        """Count each bucket's samples in the windows of an epoch before each window, [buckets, windows] int64."""
        size = len(self._names)
        turns = None if self._repeats is None else self._compute_turns(epoch, slice(None))
        counts = np.bincount(self._groups, turns, minlength=len(self.buckets) * size).astype(np.int64)
        in_order = counts.reshape(len(self.buckets), size)[:, self._shard_order(epoch)]
        ends = np.cumsum(in_order, axis=1)
        return np.concatenate(
            [np.zeros((len(ends), 1), np.int64), ends[:, self._per_window - 1 :: self._per_window]], 1
        )

    def _compute_window_ends(self, epoch: int) -> np.ndarray:
        """Count the batches of an epoch up to the end of each window, [windows] int64."""
        first = epoch * self.num_windows
        return np.cumsum([Plan.num_batches(self, first + window) for window in range(self.num_windows)])

    def _compute_window_rows(self, bucket: int, number: int) -> np.ndarray:
        """Return the rows of a bucket in a window, each as often as it is used.

        Args:
            number: the window's number, counted over all epochs.
        """
        epoch, window = divmod(number, self.num_windows)
        groups = bucket * len(self._names) + np.array(self._list_window(epoch, window))
        starts, ends = self._group_starts[groups].tolist(), self._group_starts[groups + 1].tolist()
        places = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
        if self._repeats is not None:
            places = np.repeat(places, self._compute_turns(epoch, places))
        return self._members[places]

    def _compute_turns(self, epoch: int, places: np.ndarray | slice) -> np.ndarray:
        """Return how often the members at `places` are used in an epoch (their turns), [places] int64."""
        assert self._repeats is not None and self._phases is not None, "only uneven repeats are counted row by row"
        repeats, phases = self._repeats[places], self._phases[places]
        return (np.floor((epoch + 1) * repeats + phases) - np.floor(epoch * repeats + phases)).astype(np.int64)
