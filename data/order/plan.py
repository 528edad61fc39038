"""The order of batches, as a pure function of (seed, epoch, index, global batch size).

Each bucket's samples form an endless stream: epoch 0 in one random order, then epoch 1 in another, and so on. The
stream is cut into global batches, and a batch belongs to the epoch in which its last sample falls. So what does not
fill a batch is carried into the next epoch, no sample is starved, and any batch can be computed from its two integers
alone: resuming costs nothing and the number of ranks plays no part.

Random orders are permutations computed point by point (a Feistel network on the index), so nothing of the size of the
data set is ever shuffled or kept.
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


class Plan:
    """Which samples make up the global batch at (epoch, index).

    Args:
        bucket_of_row: [N] bucket number of each row; numbers need not be dense.
        global_batch_size: samples per batch, over all ranks and accumulation steps.
        seed: names the order.
        repeats: [N] how often each row comes in an epoch; a fraction is kept on average, and exactly over the epochs
            that make it whole. None means once.
        members: [N] all rows, bucket after bucket; None sorts them.
    """

    def __init__(
        self,
        bucket_of_row: np.ndarray,
        global_batch_size: int,
        seed: int,
        repeats: np.ndarray | None = None,
        members: np.ndarray | None = None,
    ):
        assert global_batch_size >= 1, "a batch holds at least one sample"
        assert len(bucket_of_row) and (repeats is None or np.any(repeats > 0)), "a plan needs a sample"
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._members = argsort_stable(bucket_of_row) if members is None else members
        in_order = bucket_of_row[self._members]
        starts = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1]]))
        self.buckets = [int(bucket) for bucket in in_order[starts]]
        self._starts = np.append(starts, len(bucket_of_row))
        self._repeats = None if repeats is None or np.all(repeats == 1) else repeats[self._members].astype(np.float64)
        # A phase per row spreads the extra turns of fractional repeats over the epochs. It lies within 0..1, clear of
        # both by more than a float's error: 100 epochs of 0.29 are 28.999999999999996, and must still make 29 turns.
        self._phases = (
            (permute(self._members, len(self._members), derive_seed(seed, RandomStream.REPEATS)) + 0.5)
            / len(self._members)
            if self._repeats is not None
            else None
        )
        self._count_until = lru_cache(maxsize=4096)(self._compute_count_until)
        # 8 bytes a sample and epoch: those of the epoch that is read, and of the one that is carried on from.
        self._ends = lru_cache(maxsize=2 * len(self.buckets))(self._compute_ends)
        self._batch_numbers = lru_cache(maxsize=4)(self._compute_batch_numbers)

    @property
    def order_name(self) -> str:
        """Names what decides the order besides the rows, their buckets and the seed; nothing here."""
        return ""

    def list_shards(self, position: Position) -> tuple[str, ...]:
        """Shards to have at hand at a position; none here, where any sample may come next."""
        return ()

    def num_batches(self, epoch: int) -> int:
        """Global batches in an epoch."""
        first, last = self._batch_numbers(epoch)
        return int((last - first).sum())

    def num_samples(self, epoch: int) -> int:
        """Samples that an epoch's own share of the stream holds (what its batches hold differs by what is carried)."""
        return sum(self.count_samples_by_bucket(epoch).values())

    def count_samples_by_bucket(self, epoch: int) -> dict[int, int]:
        """Samples that an epoch's own share of each bucket's stream holds."""
        numbers = range(len(self.buckets))
        return {self.buckets[b]: self._count_until(b, epoch + 1) - self._count_until(b, epoch) for b in numbers}

    def num_carried(self, epoch: int) -> int:
        """Samples that do not fill a batch by the end of an epoch and are carried into the next."""
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
        first, last = self._batch_numbers(epoch)
        cumulative = np.cumsum(last - first)
        assert 0 <= index < cumulative[-1], f"epoch {epoch} has {cumulative[-1]} batches, there is no batch {index}"
        chosen = int(
            permute(np.array([index]), int(cumulative[-1]), derive_seed(self.seed, RandomStream.BATCH_ORDER, epoch))[0]
        )
        bucket = int(np.searchsorted(cumulative, chosen, side="right"))
        number = int(last[bucket] - (cumulative[bucket] - chosen))
        rows, epochs = self._read_stream(bucket, number * self.global_batch_size, self.global_batch_size, epoch)
        return GlobalBatch(self.buckets[bucket], rows, epochs)

    def _read_stream(self, bucket: int, start: int, length: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples [start, start + length) of a bucket's stream, whose last sample falls in `epoch`."""
        rows, epochs, end = [], [], start + length
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
        return np.concatenate(rows), np.concatenate(epochs)

    def _find_rows(self, bucket: int, epoch: int, items: np.ndarray) -> np.ndarray:
        """Rows of the items of a bucket's epoch, where a row with n turns makes n items."""
        if self._repeats is not None:
            items = np.searchsorted(self._ends(bucket, epoch), items, side="right")
        return self._members[self._starts[bucket] + items]

    def _turns_until(self, bucket: int, epoch: int) -> np.ndarray:
        """[rows of the bucket] turns that each row has had before `epoch` begins."""
        assert self._repeats is not None and self._phases is not None, "only uneven repeats are counted row by row"
        rows = slice(self._starts[bucket], self._starts[bucket + 1])
        return np.floor(epoch * self._repeats[rows] + self._phases[rows]).astype(np.int64)

    def _compute_count_until(self, bucket: int, epoch: int) -> int:
        """Samples in a bucket's stream before `epoch` begins."""
        if self._repeats is None:
            return epoch * int(self._starts[bucket + 1] - self._starts[bucket])
        return int(self._turns_until(bucket, epoch).sum())

    def _compute_ends(self, bucket: int, epoch: int) -> np.ndarray:
        """[rows of the bucket] where each row's items end within an epoch."""
        return np.cumsum(self._turns_until(bucket, epoch + 1) - self._turns_until(bucket, epoch))

    def _compute_batch_numbers(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Per bucket, the first batch number that an epoch completes and the one after its last."""
        until = np.array([[self._count_until(b, e) for b in range(len(self.buckets))] for e in (epoch, epoch + 1)])
        numbers = until // self.global_batch_size
        return numbers[0], numbers[1]


def argsort_stable(values: np.ndarray) -> np.ndarray:
    """[N] what np.argsort(values, kind="stable") gives of numbers from 0 on: an order that the data alone decide.

    numpy sorts 16-bit numbers by radix, in linear time, so it is given one digit after the other.
    """
    order = np.arange(len(values))
    for shift in range(0, 64, 16):
        digits = (values >> shift).astype(np.uint16)
        if digits.min() != digits.max():
            order = order[np.argsort(digits[order], kind="stable")]
    return order
