"""The watchdog ends a process without progress, and no other one."""

import threading
import time
from collections.abc import Iterator

import pytest
from loguru import logger

from sdxl_trainer.launch import activity
from sdxl_trainer.launch.activity import Activity, Watchdog


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Activity:
    fresh = Activity()
    monkeypatch.setattr(activity, "ACTIVITY", fresh)
    return fresh


def test_pieces_of_a_phase_are_counted_and_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    sink = logger.add(messages.append, format="{message}")
    pieces = Activity()
    with pieces.during("generating images"):
        pieces.note_piece(2, 8)
        assert pieces.describe() == "generating images (2 of 8)" and messages == []  # a short phase logs nothing
        monkeypatch.setattr(activity, "LINE_SECONDS", 0.0)
        pieces.note_piece(4, 8)
        pieces.note_piece(8, 8)
    logger.remove(sink)
    assert messages == ["generating images: 4 of 8\n"] and pieces.part == ""


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Stand-in for the end of the process."""
    event = threading.Event()
    monkeypatch.setattr(activity, "exit_with_failure", event.set)
    yield event
    for thread in threading.enumerate():
        if thread.name == "watchdog":
            thread.join(20)


def test_progress_keeps_the_process_alive_and_a_stall_ends_it(current, ended, messages) -> None:
    order = []
    current.finish_step(12)
    with Watchdog(0.4, on_stall=lambda: order.append(ended.is_set())), current.during("training"):
        for _ in range(30):
            current.note("updating the weights")
            time.sleep(0.04)
        assert not ended.is_set(), "it made progress for thrice the limit"
        assert ended.wait(20)
    assert order == [False], "the state is saved before the process ends"
    assert "in: training (updating the weights), last finished step 12" in messages[-1]


def test_the_first_step_may_take_longer(current, ended) -> None:
    with Watchdog(0.2, first_extra_seconds=600):
        assert not ended.wait(0.6)
        current.finish_step(1)
        assert ended.wait(20)


def test_a_save_that_hangs_too_does_not_keep_the_process_alive(current, ended) -> None:
    proceed = threading.Event()
    with Watchdog(0.1, on_stall=lambda: proceed.wait(20), stall_seconds=0.2):
        assert ended.wait(10)
    proceed.set()


def test_another_thread_makes_progress_only_while_it_is_waited_for(current) -> None:
    moves = iter([1, 1, 0, None])

    def wait(_: float) -> bool:
        move = next(moves)
        current.background += move or 0
        return move is None

    current.background += 5
    assert current.count == 0
    current.follow(wait)
    assert current.count == 2


def test_progress_is_published_at_each_phase_and_once_a_second(current, monkeypatch) -> None:
    sent, now = [], [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    current.publish_by(sent.append)
    with current.during("validating"):
        current.note()
        now[0] += 2
        current.note()
        current.note()
    assert sent == ["0 starting", "1 validating", "3 validating", "5 starting"]
