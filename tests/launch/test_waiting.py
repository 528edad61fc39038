"""Ranks wait for others without a limit while those make progress, and name those that do not."""

import os
from pathlib import Path

from forked_ranks import run_forked

PROGRAM = Path(__file__).parent.parent / "support" / "waiting_ranks.py"


def run(case: str, ranks: int) -> tuple[int, str]:
    return run_forked(PROGRAM, [case], ranks, dict(os.environ), timeout=60)


def test_a_slow_rank_is_waited_for_and_a_stuck_one_is_named() -> None:
    status, printed = run("slow", 3)
    assert printed.count("[0, 1, 2]") == 3, printed
    assert "waiting for 1 of 3 ranks: 1 (encoding images)" in printed, printed
    named = "the planted work: rank 2 (encoding images) made no progress for engine.timeout_minutes = 0.025"
    assert status == 1 and printed.count(named) == 2, printed
    assert "status 1 of rank 0" in printed and "status 1 of rank 1" in printed, printed


def test_a_rank_0_that_is_frozen_with_the_store_ends_the_others() -> None:
    status, printed = run("frozen", 2)
    assert status == 1 and "no progress" in printed, printed
    assert "waiting for other ranks, the planted work" in printed, printed


def test_a_waiting_rank_heeds_a_signal() -> None:
    status, printed = run("signal", 2)
    assert status == 143 and "status 143 of rank 1" in printed, printed
    assert "stopped by SIGTERM, and other ranks do not answer" in printed, printed
