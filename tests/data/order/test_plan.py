"""The order of batches: samples are used as often as their repeats, and a position alone determines its batch."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sdxl_trainer.data.loading.loader import iterate_specs
from sdxl_trainer.data.order.keyed_random import derive_seed, permute
from sdxl_trainer.data.order.plan import Plan, Position

# Bucket number of each row, as data/loading/loader.py makes them: width << 16 | height.
BUCKETS = st.lists(st.sampled_from([(64 << 16) | 64, (96 << 16) | 64, (64 << 16) | 96]), min_size=1, max_size=60).map(
    np.array
)


def list_epoch(plan: Plan, epoch: int) -> list:
    return [plan.batch(Position(epoch, index)) for index in range(plan.num_batches(epoch))]


def count_turns(plan: Plan, num_epochs: int) -> Counter:
    """Count how often each (epoch, row) is used in the batches of the first epochs."""
    pairs = [
        zip(batch.epochs.tolist(), batch.rows.tolist(), strict=True)
        for epoch in range(num_epochs)
        for batch in list_epoch(plan, epoch)
    ]
    return Counter(pair for batch in pairs for pair in batch)


def make_plan(num_rows: int = 100, global_batch_size: int = 8, seed: int = 0) -> Plan:
    return Plan(np.array([(64 << 16) | (64 if row % 3 else 96) for row in range(num_rows)]), global_batch_size, seed)


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_permute_is_even_and_works_index_by_index():
    size, num_keys = 7, 2000
    permuted = np.array([permute(np.arange(size), size, key) for key in range(num_keys)])
    counts = np.array([[(permuted[:, place] == value).sum() for value in range(size)] for place in range(size)])
    assert abs(counts / num_keys * size - 1).max() < 0.27  # 5 sigma
    big = 10**8
    assert permute(np.array([12_345_678]), big, 3) == permute(np.arange(12_345_600, 12_345_700), big, 3)[78]


def test_permutations_stay_as_they_are():
    """Checkpoints rely on them: a resumed run continues the order that it began with."""
    size = 20_000_000
    assert permute(np.arange(3), size, 7).tolist() == [3334354, 16700696, 17391691]  # one by one
    many = permute(np.arange(5000, 5300), size, 7)
    assert (many * np.arange(300)).sum() == 438953568951
    assert many.tolist() == [permute(np.array([index]), size, 7)[0] for index in range(5000, 5300)]
    assert permute(np.array([5]), 2**34 - 5, 9).tolist() == [11988231813]


@settings(max_examples=60, deadline=None)
@given(BUCKETS, st.integers(1, 12), st.integers(0, 2**63 - 1), st.data())
def test_every_sample_gets_its_turns_and_carried_samples_come_next(buckets, size, seed, data):
    length = len(buckets)
    repeats = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=length, max_size=length).map(np.array))
    assume(repeats is None or repeats.any())
    wanted = np.ones(length, int) if repeats is None else repeats
    plan = Plan(buckets, size, seed, repeats)
    carried = 0
    for epoch in range(3):
        batches = list_epoch(plan, epoch)
        for batch in batches:
            assert len(batch.rows) == len(batch.epochs) == size
            assert set(buckets[batch.rows]) == {batch.bucket}  # one bucket at a time
            assert batch.epochs.max() == epoch  # a batch belongs to its last sample's epoch
        assert plan.num_batches(epoch) == len(batches)
        assert plan.num_samples(epoch) == wanted.sum()
        assert len(batches) * size == carried + plan.num_samples(epoch) - plan.num_carried(epoch)
        assert plan.count_batches(Position(epoch, min(1, len(batches))), epoch + 1) == max(0, len(batches) - 1)
        carried = plan.num_carried(epoch)
        assert carried <= (size - 1) * len(plan.buckets)
    assert plan.count_batches(Position(0, 0), 3) == sum(map(plan.num_batches, range(3)))
    assert plan.count_batches(Position(3, 1), 3) == 0
    # Each of three epochs holds every sample as often as its repeats say, except for carried samples of each bucket.
    turns = count_turns(plan, 3)
    missing = {(epoch, row): wanted[row] - turns[epoch, row] for epoch in range(3) for row in range(length)}
    assert min(missing.values()) >= 0 and set(turns) <= set(missing)
    assert sum(missing.values()) == carried
    per_bucket = Counter()
    for (_, row), count in missing.items():
        per_bucket[buckets[row]] += count
    assert max(per_bucket.values()) < size


@pytest.mark.parametrize("seed", range(3))
def test_fractional_repeats_are_exact_over_the_epochs_that_make_them_whole(seed):
    # 100 epochs of 0.29 are 28.999999999999996 in floats, and must be 29 turns.
    repeats = np.array([0.29, 1.15, 0.29, 1.15, 0.29, 0.0, 2.5])
    plan = Plan(np.zeros(len(repeats), int), 1, seed, repeats)
    turns = count_turns(plan, 100)
    assert [sum(turns[epoch, row] for epoch in range(100)) for row in range(len(repeats))] == [
        29,
        115,
        29,
        115,
        29,
        0,
        250,
    ]
    for (epoch, row), count in turns.items():  # never a whole turn early or late
        assert count in (int(repeats[row]), int(repeats[row]) + 1), epoch


@settings(max_examples=40, deadline=None)
@given(BUCKETS, st.integers(1, 12), st.integers(0, 2**63 - 1), st.data())
def test_repeats_in_quarters_are_exact_after_four_epochs(buckets, size, seed, data):
    length = len(buckets)
    quarters = data.draw(st.lists(st.integers(0, 9), min_size=length, max_size=length).filter(any).map(np.array))
    plan = Plan(buckets, size, seed, quarters / 4)
    turns = count_turns(plan, 4)
    missing = [int(quarters[row]) - sum(turns[epoch, row] for epoch in range(4)) for row in range(length)]
    assert min(missing) >= 0 and sum(missing) == plan.num_carried(3)
    assert all(
        count in (quarters[row] // 4, -(-quarters[row] // 4)) or missing[row] for (_, row), count in turns.items()
    )


def test_fractional_repeats_are_spread_over_the_epochs():
    plan = Plan(np.zeros(1000, int), 1, 0, np.full(1000, 0.25))
    assert [plan.num_samples(epoch) for epoch in range(8)] == [250] * 8


@pytest.mark.parametrize("micro", [1, 2])
def test_any_number_of_ranks_reads_the_same_global_batches(micro):
    plan = make_plan(global_batch_size=16)
    num_batches = plan.num_batches(0) + plan.num_batches(1)
    expected = [batch for epoch in (0, 1) for batch in list_epoch(plan, epoch)]
    for world_size in (1, 2, 4, 8):
        num_micro = 16 // (micro * world_size)
        ranks = [
            list(islice(iterate_specs(plan, Position(0, 0), rank, world_size, micro), num_batches * num_micro))
            for rank in range(world_size)
        ]
        for number, batch in enumerate(expected):
            specs = [rank[number * num_micro + step] for step in range(num_micro) for rank in ranks]
            assert {spec.bucket for spec in specs} == {(batch.bucket >> 16, batch.bucket & 0xFFFF)}
            assert np.concatenate([spec.positions for spec in specs]).tolist() == list(range(16))
            assert np.concatenate([spec.rows for spec in specs]).tolist() == batch.rows.tolist()
            assert np.concatenate([spec.epochs for spec in specs]).tolist() == batch.epochs.tolist()


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(AssertionError, match="must divide"):
        next(iterate_specs(make_plan(), Position(0, 0), 0, 3, 1))


@settings(max_examples=25, deadline=None)
@given(BUCKETS, st.sampled_from([2, 8, 40]), st.integers(0, 12), st.integers(0, 2**63 - 1))
def test_resuming_at_any_position_gives_the_same_batches(buckets, size, num_done, seed):
    plan = Plan(buckets, size, seed)
    position = Position(0, 0)  # valid even if the first epochs complete no batch
    straight = list(islice(iterate_specs(plan, position, 0, 1, size), num_done + 5))
    for _ in range(num_done):
        position = plan.next_position(position)
    resumed = list(islice(iterate_specs(Plan(buckets, size, seed), position, 0, 1, size), 5))
    assert [spec.rows.tolist() for spec in resumed] == [spec.rows.tolist() for spec in straight[num_done:]]
    assert [spec.epochs.tolist() for spec in resumed] == [spec.epochs.tolist() for spec in straight[num_done:]]


def test_a_set_smaller_than_a_batch_repeats_until_it_fills_one():
    plan = Plan(np.zeros(3, int), 8, 0)
    assert [plan.num_batches(epoch) for epoch in range(6)] == [0, 0, 1, 0, 0, 1]
    assert plan.skip_empty_epochs(Position(0, 0)) == (2, 0) and plan.next_position(Position(0, 0)) == (5, 0)
    batch = plan.batch(Position(2, 0))
    assert batch.epochs.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(batch.rows[:3]) == sorted(batch.rows[3:6]) == [0, 1, 2]
    with pytest.raises(AssertionError, match="no batch 0"):
        plan.batch(Position(0, 0))
    with pytest.raises(AssertionError, match="needs a sample"):
        Plan(np.zeros(0, int), 8, 0)


def test_seeds_epochs_and_keys_differ():
    orders = {
        (seed, epoch): [batch.rows.tolist() for batch in list_epoch(make_plan(seed=seed), epoch)]
        for seed in range(3)
        for epoch in range(3)
    }
    assert len({str(order) for order in orders.values()}) == 9
    assert orders[0, 0] == [batch.rows.tolist() for batch in list_epoch(make_plan(seed=0), 0)]
    # The order of buckets changes too, not only the samples in a batch.
    buckets = [[batch.bucket for batch in list_epoch(make_plan(240), epoch)] for epoch in range(2)]
    assert buckets[0] != buckets[1] and Counter(buckets[0]) == Counter(buckets[1])
    keys = {derive_seed(*keys) for keys in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (-1,), (2**64 - 2,)]}
    assert len(keys) == 8 and all(0 <= key < 2**63 for key in keys)


def test_the_order_is_pinned():
    # If these numbers change, every resumed run continues in another order.
    assert derive_seed(1, 2, 3) == 2623250113353451629
    assert permute(np.arange(8), 8, 5).tolist() == [6, 2, 0, 1, 4, 5, 3, 7]
    assert make_plan(20, 4, 7).batch(Position(1, 0)).rows.tolist() == [7, 10, 16, 4]
