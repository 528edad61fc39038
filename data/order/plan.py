"""The order of batches, as a pure function of (seed, epoch, index, global batch size).

Each bucket's samples form an endless sequence: epoch 0 in one random order, epoch 1 in another, and so on. The sequence
is cut into global batches, and a batch belongs to the epoch of its last sample. Samples that do not fill a batch are
carried into the next epoch, so no sample is starved. Any batch can be computed from its two integers alone: resuming
costs nothing, and the number of ranks has no influence.

Random orders are permutations that are computed index by index, so nothing as large as the data set is shuffled.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed, permute


class Position(NamedTuple):
    """Position of a global batch in the order of a run."""

    epoch: int
    index: int  # of the global batch within its epoch


@dataclass(frozen=True)
class GlobalBatch:
    """One global batch: `rows` of the index, all of one `bucket`, and the epoch that each of them belongs to."""

    bucket: int
    rows: np.ndarray  # [global batch size] int64
    epochs: np.ndarray  # [global batch size] int64


class _BatchNumbers(NamedTuple):
    """The batches of each bucket that an epoch completes, numbered through the bucket's endless sequence."""

    first: np.ndarray  # [buckets] int64
    end: np.ndarray  # [buckets] int64, one more than the last


class BucketRows(NamedTuple):
    """The rows of each bucket. They may lie in a mapped file, which ranks share."""

    rows: np.ndarray  # [N] integers, bucket after bucket, ascending in each
    buckets: list[int]  # number of each bucket, ascending
    starts: np.ndarray  # [buckets + 1] place in `rows` where each bucket begins, and N


class Plan:
    """The samples of the global batch at each position.

    Args:
        bucket_of_row: [N] bucket number of each row; numbers need not be dense. Or the rows of each bucket.
        global_batch_size: samples per batch, over all ranks and accumulation steps.
        seed: chooses the order.
        repeats: [N] how often each row is used in an epoch; None uses each row once. A fraction holds on average, and
            exactly over as many epochs as make it a whole number.
        members: [N] all rows, bucket after bucket; None sorts the rows.
    """

    def __init__(
        self,
        bucket_of_row: np.ndarray | BucketRows,
        global_batch_size: int,
        seed: int,
        repeats: np.ndarray | None = None,
        members: np.ndarray | None = None,
    ):
        grouped = bucket_of_row if isinstance(bucket_of_row, BucketRows) else group_rows(bucket_of_row, members)
        assert global_batch_size >= 1, "a batch holds at least one sample"
        assert len(grouped.rows) and (repeats is None or np.any(repeats > 0)), "a plan needs a sample"
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._members, self.buckets, self._starts = grouped
        self._repeats = None if repeats is None or np.all(repeats == 1) else repeats[self._members].astype(np.float64)
        # Each row has a phase, which spreads the extra turns of fractional repeats over the epochs. It keeps away from
        # 0 and 1 by more than a float's error: 100 epochs of 0.29 are 28.999999999999996, and must still make 29 turns.
        self._phases = (
            (permute(self._members.astype(np.int64), len(self._members), derive_seed(seed, RandomStream.REPEATS)) + 0.5)
            / len(self._members)
            if self._repeats is not None
            else None
        )
        self._count_until = lru_cache(maxsize=4096)(self._compute_count_until)
        # The cache holds two epochs, the current one and the one before it, at 8 bytes for each sample and epoch.
        self._ends = lru_cache(maxsize=2 * len(self.buckets))(self._compute_ends)
        self._batch_numbers = lru_cache(maxsize=4)(self._compute_batch_numbers)

    @property
    def order_name(self) -> str:
        """Identifier of the order's inputs besides rows, buckets and seed; "" for this plan, which has no others."""
        return ""

    def list_shards(self, position: Position) -> tuple[str, ...]:
        """List the shards that should be local at a position: none for this plan, in which any sample may be next."""
        return ()

    def num_batches(self, epoch: int) -> int:
        """Return the number of global batches in an epoch."""
        numbers = self._batch_numbers(epoch)
        return int((numbers.end - numbers.first).sum())

    def count_batches(self, start: Position, end_epoch: int) -> int:
        """Return the number of global batches from a position to the start of an epoch; 0 if the position is later.

        Costs O(rows) at most, however many epochs lie between.
        """
        if start.epoch >= end_epoch:
            return 0
        return self._count_batches_until(end_epoch) - self._count_batches_until(start.epoch) - start.index

    def num_samples(self, epoch: int) -> int:
        """Return the number of an epoch's samples. Its batches also hold samples carried over from earlier epochs."""
        return sum(self.count_samples_by_bucket(epoch).values())

    def count_samples_by_bucket(self, epoch: int) -> dict[int, int]:
        """Return the number of an epoch's samples in each bucket."""
        numbers = range(len(self.buckets))
        return {self.buckets[b]: self._count_until(b, epoch + 1) - self._count_until(b, epoch) for b in numbers}

    def num_carried(self, epoch: int) -> int:
        """Return the number of samples that fill no batch by the end of an epoch and are carried into the next."""
        return sum(self._count_until(b, epoch + 1) % self.global_batch_size for b in range(len(self.buckets)))

    def next_position(self, position: Position) -> Position:
        """Return the position of the global batch that follows."""
        epoch, index = self.skip_empty_epochs(position)
        return self.skip_empty_epochs(Position(epoch, index + 1))

    def skip_empty_epochs(self, position: Position) -> Position:
        """Return `position`, or the next one that holds a batch: a small set completes none in its first epochs."""
        epoch, index = position
        while index >= self.num_batches(epoch):
            epoch, index = epoch + 1, 0
        return Position(epoch, index)

    def batch(self, position: Position) -> GlobalBatch:
        """Return the global batch at a position. Costs O(global batch size), wherever the position is."""
        epoch, index = position
        numbers = self._batch_numbers(epoch)
        cumulative = np.cumsum(numbers.end - numbers.first)
        num_batches, key = int(cumulative[-1]), derive_seed(self.seed, RandomStream.BATCH_ORDER, epoch)
        assert 0 <= index < num_batches, f"epoch {epoch} has {num_batches} batches, there is no batch {index}"
        chosen = int(permute(np.array([index]), num_batches, key)[0])
        bucket = int(np.searchsorted(cumulative, chosen, side="right"))
        number = int(numbers.end[bucket] - (cumulative[bucket] - chosen))
        return self._build_batch(bucket, number * self.global_batch_size, epoch)

    def _build_batch(self, bucket: int, start: int, epoch: int) -> GlobalBatch:
        """Return the batch that begins at sample `start` of a bucket's sequence and ends in `epoch`."""
        rows, epochs, end = [], [], start + self.global_batch_size
        while end > start:
            begin = self._count_until(bucket, epoch)
            if begin < end:
                size = self._count_until(bucket, epoch + 1) - begin
                offsets = np.arange(max(start, begin) - begin, end - begin)
                key = derive_seed(self.seed, RandomStream.SAMPLE_ORDER, epoch, self.buckets[bucket])
                rows.insert(0, self._find_rows(bucket, epoch, permute(offsets, size, key)))
                epochs.insert(0, np.full(len(offsets), epoch))
                end = max(start, begin)
            epoch -= 1
        return GlobalBatch(self.buckets[bucket], np.concatenate(rows), np.concatenate(epochs))

    def _find_rows(self, bucket: int, epoch: int, items: np.ndarray) -> np.ndarray:
        """Return the rows of items of a bucket's epoch. A row that is used n times has n consecutive items."""
        if self._repeats is not None:
            items = np.searchsorted(self._ends(bucket, epoch), items, side="right")
        return self._members[self._starts[bucket] + items].astype(np.int64)

    def _turns_until(self, bucket: int, epoch: int) -> np.ndarray:
        """Return how often each row has been used before `epoch` (its turns), [rows of the bucket] int64."""
        assert self._repeats is not None and self._phases is not None, "only uneven repeats are counted row by row"
        rows = slice(self._starts[bucket], self._starts[bucket + 1])
        return np.floor(epoch * self._repeats[rows] + self._phases[rows]).astype(np.int64)

    def _compute_count_until(self, bucket: int, epoch: int) -> int:
        """Count the samples of a bucket before `epoch`."""
        if self._repeats is None:
            return epoch * int(self._starts[bucket + 1] - self._starts[bucket])
        return int(self._turns_until(bucket, epoch).sum())

    def _count_batches_until(self, epoch: int) -> int:
        """Count the global batches that are complete before `epoch`."""
        return sum(self._count_until(b, epoch) // self.global_batch_size for b in range(len(self.buckets)))

    def _compute_ends(self, bucket: int, epoch: int) -> np.ndarray:
        """Return where each row's items end within an epoch, [rows of the bucket] int64."""
        return np.cumsum(self._turns_until(bucket, epoch + 1) - self._turns_until(bucket, epoch))

    def _compute_batch_numbers(self, epoch: int) -> _BatchNumbers:
        """Return the numbers of the batches that an epoch completes."""
        until = np.array([[self._count_until(b, e) for b in range(len(self.buckets))] for e in (epoch, epoch + 1)])
        numbers = until // self.global_batch_size
        return _BatchNumbers(first=numbers[0], end=numbers[1])


def group_rows(bucket_of_row: np.ndarray, members: np.ndarray | None = None) -> BucketRows:
    """Group rows by bucket.

    Args:
        members: [N] all rows, bucket after bucket; None sorts the rows.
    """
    assert len(bucket_of_row), "a plan needs a sample"
    members = argsort_stable(bucket_of_row) if members is None else members
    in_order = bucket_of_row[members]
    starts = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1]]))
    return BucketRows(members, [int(bucket) for bucket in in_order[starts]], np.append(starts, len(bucket_of_row)))


def argsort_stable(values: np.ndarray) -> np.ndarray:
    """Return np.argsort(values, kind="stable") of numbers from 0 on, [N], in linear time.

    numpy uses radix sort only for 16-bit numbers, so the values are sorted by one 16-bit digit after the other.
    """
    order = np.arange(len(values))
    for shift in range(0, 64, 16):
        digits = (values >> shift).astype(np.uint16)
        if digits.min() != digits.max():
            order = order[np.argsort(digits[order], kind="stable")]
    return order
