"""Batches from whole shards in turn: every sample in every epoch, and the same order from any position."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trainer.data.order.plan import Plan, Position
from sdxl_trainer.data.order.shard_plan import ShardPlan


def build(seed: int, num_rows: int, num_shards: int, window: int, batch: int, repeats=None) -> ShardPlan:
    rng = np.random.default_rng(seed)
    buckets, shards = rng.integers(1, 4, num_rows) << 16, rng.integers(0, num_shards, num_rows)
    names = [f"s{number}" for number in range(num_shards)]
    return ShardPlan(buckets, shards, names, window, global_batch_size=batch, seed=seed, repeats=repeats)


def walk(plan: Plan, epochs: int) -> list[tuple[Position, list[int], list[int]]]:
    """Return (position, rows, epochs of the rows) of each global batch of the first epochs."""
    position, batches = plan.skip_empty_epochs(Position(0, 0)), []
    while position.epoch < epochs:
        batch = plan.batch(position)
        batches.append((position, batch.rows.tolist(), batch.epochs.tolist()))
        position = plan.next_position(position)
    return batches


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 99),
    num_rows=st.integers(1, 80),
    num_shards=st.integers(1, 9),
    window=st.integers(1, 4),
    batch=st.integers(1, 6),
    uneven=st.booleans(),
)
def test_each_epoch_holds_every_sample_as_often_as_its_repeats(seed, num_rows, num_shards, window, batch, uneven):
    """Within 3 epochs every use of a sample has happened or is carried over, because it did not fill a batch."""
    repeats = np.random.default_rng(seed).choice([0.5, 1, 2.25], num_rows) if uneven else None
    plan = build(seed, num_rows, num_shards, window, batch, repeats)
    plain = Plan(np.random.default_rng(seed).integers(1, 4, num_rows) << 16, batch, seed, repeats)
    uses = Counter(use for _, rows, epochs in walk(plan, 3) for use in zip(rows, epochs, strict=True))
    expected: Counter = Counter()
    for _, rows, epochs in walk(plain, 43):
        expected.update((row, epoch) for row, epoch in zip(rows, epochs, strict=True) if epoch < 3)
    assert not uses - expected  # never more often than in a plain plan
    assert (expected - uses).total() == plan.num_carried(2) == plain.num_carried(2)
    assert plan.count_batches(Position(0, 0), 3) == len(walk(plan, 3)) == sum(map(plan.num_batches, range(3)))
    assert [plan.num_samples(epoch) for epoch in range(3)] == [plain.num_samples(epoch) for epoch in range(3)]


def test_batches_have_one_bucket_and_come_from_listed_shards():
    plan = build(3, 400, 12, 3, 4)
    rng = np.random.default_rng(3)
    buckets, shards = rng.integers(1, 4, 400) << 16, rng.integers(0, 12, 400)
    windows, local = [], set()
    for position, rows, _ in walk(plan, 2):
        assert len(set(buckets[rows])) == 1
        previous, local = local, set(plan.list_shards(position))
        needed = {f"s{shard}" for shard in shards[rows]}
        assert len(needed - local) <= 3  # only samples carried over from earlier windows
        windows.append(plan.list_shards(position)[:3])
    assert plan.num_windows == 4
    last_window, windows = windows[-1], list(dict.fromkeys(windows))
    assert len(windows) == 8 and sorted(sum(windows[:4], ())) == sorted(sum(windows[4:], ()))  # two epochs
    assert windows[:4] != windows[4:]
    assert previous >= set(last_window)


def test_a_run_can_start_at_any_position():
    batches = walk(build(5, 100, 7, 2, 3), 3)
    for place in (0, 1, 40, len(batches) - 1):
        plan = build(5, 100, 7, 2, 3)
        position, rows, epochs = batches[place]
        batch = plan.batch(position)
        assert batch.rows.tolist() == rows and batch.epochs.tolist() == epochs
        if place + 1 < len(batches):
            assert plan.next_position(position) == batches[place + 1][0]
    assert walk(build(6, 100, 7, 2, 3), 1) != walk(build(5, 100, 7, 2, 3), 1)


def test_the_next_windows_shards_are_requested_in_time():
    plan = build(1, 600, 12, 4, 4)
    positions = [position for position, *_ in walk(plan, 1)]
    last = {plan._find_window(position).window: position for position in positions}
    first = {plan._find_window(position).window: position for position in reversed(positions)}
    for window in (0, 1):
        assert len(plan.list_shards(first[window])) < 8
        assert set(plan.list_shards(last[window])) >= set(plan.list_shards(first[window + 1])[:4])


@pytest.mark.parametrize("window", [1, 5, 100])
def test_samples_are_mixed_within_windows(window):
    plan = build(2, 300, 5, window, 4)
    rows = [row for _, batch, _ in walk(plan, 1) for row in batch]
    shards = np.random.default_rng(2)
    shards.integers(1, 4, 300)
    neighbours = np.diff(shards.integers(0, 5, 300)[rows]) == 0
    assert (neighbours.mean() > 0.9) == (window == 1)
    assert plan.order_name.endswith(f"-{window}") and Plan(np.ones(3, int), 1, 0).order_name == ""
