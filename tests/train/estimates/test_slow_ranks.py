"""Slow ranks: the comparison by hand-made numbers, and two gloo ranks of which each is slow in a part of its work."""

import re
from pathlib import Path

import pytest
import torch
from programs import run_program

from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.train.estimates.slow_ranks import (
    COMPUTE,
    DATA,
    RankPart,
    RankTimer,
    RankTimes,
    Slowness,
    SlowRanks,
    SlowRankTracker,
    compare_ranks,
    read_rank_times,
)
from sdxl_trainer.train.report.metrics import read_metrics
from sdxl_trainer.train.report.run_status import read_status

CPU = torch.device("cpu")
# Rank 1 is slow in the loss, rank 0 in reading captions. Both sleep longer than a step of the tiny model takes.
DELAYS = """
import os, time
from sdxl_trainer.train.run import run

run.NUM_SLOW_STEPS = 4

def delayed_loss(prediction, target):
    time.sleep(0.4 * (os.environ["RANK"] == "1"))
    return (prediction - target).square()

class Captions:
    def caption(self, record, rng):
        time.sleep(0.2 * (os.environ["RANK"] == "0"))
        return record["caption"]
"""


def test_times_are_compared_with_the_median_rank() -> None:
    times = [RankTimes(1.0, 0.0), RankTimes(1.1, 0.01), RankTimes(1.5, 0.0), RankTimes(0.9, 0.61)]
    compared = compare_ranks(times, step_seconds=3.0)
    assert compared[RankPart(2, COMPUTE)] == Slowness(1.5, 0.5)
    assert compared[RankPart(1, COMPUTE)].ratio == pytest.approx(1.1)
    # Without the wait of 0.61 s the step would take 2.39 s.
    assert compared[RankPart(3, DATA)] == (pytest.approx(3.0 / 2.39), pytest.approx(0.61))
    assert compared[RankPart(1, DATA)].ratio == pytest.approx(3.0 / 2.99), "a hundred times the median, of no account"


def test_the_median_of_two_ranks_is_the_faster_one() -> None:
    compared = compare_ranks([RankTimes(2.4, 0.5), RankTimes(2.0, 0.1)], step_seconds=2.0)
    assert compared[RankPart(0, COMPUTE)].ratio == pytest.approx(1.2)
    assert compared[RankPart(1, COMPUTE)].ratio == 1.0 == compared[RankPart(1, DATA)].ratio
    assert compared[RankPart(0, DATA)].ratio == pytest.approx(1.25)


@pytest.mark.parametrize("step_seconds", [float("nan"), 0.0])
def test_nothing_is_compared_without_times(step_seconds: float) -> None:
    """As before the first step, and at ZeRO 3, which measures no compute time."""
    assert compare_ranks([RankTimes(0.0, 0.0), RankTimes(0.0, 0.3)], step_seconds) == {}


def test_a_rank_is_slow_after_twenty_steps_in_a_row_and_recovers_after_as_many() -> None:
    tracker, part = SlowRankTracker(num_steps=20), RankPart(2, COMPUTE)
    slow, normal = {part: Slowness(1.2, 0.1)}, {part: Slowness(1.1, 0.1)}
    windows = [slow, slow, normal, slow, slow, slow, slow, normal, slow, normal, normal, normal, *4 * [slow]]
    changes = [tracker.add_window(compared, num_steps=6) for compared in windows[:6]]
    assert changes == 6 * [([], [])], "18 steps in a row are too few"
    assert tracker.add_window(windows[6], 6) == ([part], []) and tracker.slow == slow
    changes = [tracker.add_window(compared, 6) for compared in windows[7:12]]
    assert changes == 5 * [([], [])], "18 normal steps in a row are too few"
    assert tracker.add_window(normal, 6) == ([], [part]) and tracker.slow == {}
    changes = [tracker.add_window(compared, 6) for compared in windows[12:]]
    assert [change.slow for change in changes] == [[], [], [], [part]], "named again"


def test_one_window_names_no_rank() -> None:
    tracker, slow = (
        SlowRankTracker(num_steps=20),
        {RankPart(0, DATA): Slowness(1.3, 0.2), RankPart(1, COMPUTE): Slowness(2, 1)},
    )
    assert tracker.add_window(slow, num_steps=50) == ([], [])
    assert tracker.add_window(slow, num_steps=50) == ([RankPart(1, COMPUTE), RankPart(0, DATA)], [])


def test_slow_ranks_are_counted_and_described() -> None:
    ranks = SlowRanks(num_steps=2)
    times = [RankTimes(1.0, 0.0), RankTimes(1.0, 0.0), RankTimes(1.5, 1.0)]
    first = ranks.add_window(times, step_seconds=4.0, num_steps=1)
    assert first == {"num_slow_ranks": 0.0, "slowest_rank": 2.0, "slowest_rank_ratio": 1.5} and ranks.describe() == ""
    assert ranks.add_window(times, 4.0, 1)["num_slow_ranks"] == 1.0, "slow in two parts, but one rank"
    assert ranks.describe() == "2 (compute 1.50 x), 2 (data 1.33 x)"


def test_sums_over_ranks_hold_the_times_of_each() -> None:
    timers = [RankTimer(Ranks(rank, rank, 2, CPU), sees_compute=rank == 0) for rank in range(2)]
    for timer in timers:
        with timer.measure_compute():
            pass
        assert timer.finish_step(1.0, is_due=False) == []
    shared = [timer.finish_step(2.0 + rank, is_due=True) for rank, timer in enumerate(timers)]
    first, second = read_rank_times([sum(values) for values in zip(*shared, strict=True)])
    assert first.compute > 0 and first.data_wait == 1.5 and second == RankTimes(0.0, 2.0)
    assert timers[0].finish_step(4.0, is_due=True)[:2] == [0.0, 4.0], "a new window"


def test_a_single_rank_measures_nothing() -> None:
    timer = RankTimer(Ranks(0, 0, 1, CPU), sees_compute=True)
    with timer.measure_compute():
        pass
    assert timer.finish_step(1.0, is_due=True) == [] == read_rank_times([])


def test_slow_ranks_of_a_run_are_named(cached_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "delays.py").write_text(DELAYS)
    settings = {
        "run.name": "slow-ranks",
        "run.dir": tmp_path,
        "data.strategy": f"{tmp_path / 'delays.py'}:Captions",
        "data.num_workers": 0,  # captions are read by the rank itself, in each step
        "objective.loss": f"{tmp_path / 'delays.py'}:delayed_loss",
        "engine.zero_stage": 2,
        "train.max_steps": 6,
        "checkpoint.every_steps": 0,
        "sample.prompts": "[]",
        "log.every_steps": 2,
    }
    words = (f"{key}={value}" for key, value in settings.items())
    printed = run_program("train/main.py", "--cfg", cached_folder / "tiny.yaml", *words, ranks=2)
    logs = tmp_path / "slow-ranks" / "logs"
    log = (logs / "train.log").read_text()
    named = re.findall(r"rank (\d) \((\S+), cpu\) holds up the other ranks: (its forward pass|it waits)", log)
    status = read_status(logs / "status.json")
    assert status is not None
    assert sorted((rank, host, what) for rank, host, what in named) == [
        ("0", status.host, "it waits"),
        ("1", status.host, "its forward pass"),
    ]
    assert len(re.findall("holds up", " ".join(printed.split()))) == 2, "once each, by rank 0"
    ratios = dict(re.findall(r"(\d \(\w+) (\d+\.\d\d) x\)", status.slow_ranks))
    assert sorted(ratios) == ["0 (data", "1 (compute"] and min(map(float, ratios.values())) > 1.15
    lines = list(read_metrics(logs / "metrics.jsonl", "num_slow_ranks"))
    assert [(line["step"], line["num_slow_ranks"]) for line in lines] == [(2, 0), (4, 2), (6, 2)]
    assert all(line["slowest_rank"] in (0, 1) and line["slowest_rank_ratio"] > 1.15 for line in lines)
