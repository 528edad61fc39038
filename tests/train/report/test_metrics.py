"""Metrics on disk: cut at a resume, read by TensorBoard, and not lost to a full disk or to their deletion."""

import shutil
from pathlib import Path

import orjson
from disk_calls import limit_file_size
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdxl_trainer.train.report.metrics import MetricsLog, read_changes, read_metrics


def read_board(logs: Path) -> list[tuple[int, float]]:
    """Return step and loss of each event that TensorBoard reads."""
    board = EventAccumulator(str(logs / "tensorboard")).Reload()
    return [(event.step, event.value) for event in board.Scalars("loss")]


def test_neither_a_full_disk_nor_a_deletion_ends_the_writing_of_metrics(tmp_path: Path) -> None:
    logs = tmp_path / "run" / "logs"
    log = MetricsLog(logs, 0)
    assert not logs.exists(), "a dry run writes nothing"
    log.write(1, {"loss": 0.5})
    with limit_file_size(4):
        log.write(2, {"loss": 0.25})
    log.write(3, {"loss": 0.75})
    shutil.rmtree(tmp_path / "run")
    log.write(4, {"loss": 1.0})
    log.close()
    assert [line["step"] for line in read_metrics(logs / "metrics.jsonl")] == [1, 3, 4]
    assert read_board(logs) == [(1, 0.5), (3, 0.75), (4, 1.0)]


def test_a_resume_cuts_later_and_torn_lines_and_keeps_damaged_ones(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.close()
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b"\0\0\n", *lines[1:], lines[2][:5]]))
    (board,) = (tmp_path / "tensorboard").iterdir()
    board.rename(board.with_name("events.out.tfevents.9900000000.host"))  # the clock was ahead
    resumed = MetricsLog(tmp_path, 2)
    with limit_file_size(4):  # cutting needs no space
        resumed.write(3, {"loss": 8.0})
    resumed.write(4, {"loss": 9.0})
    resumed.close()
    assert file.read_bytes() == b"".join([lines[0], b"\0\0\n", lines[1], orjson.dumps({"step": 4, "loss": 9.0}), b"\n"])
    assert read_board(tmp_path) == [(1, 1.0), (2, 2.0), (4, 9.0)]


def test_changes_are_listed_by_the_step_at_which_a_resume_made_them(tmp_path: Path) -> None:
    file = tmp_path / "changes.jsonl"
    for last_step, changes in ((0, []), (4, ["the data"]), (8, ["optim.lr: 1 -> 2"]), (8, ["optim.lr: 1 -> 3"])):
        log = MetricsLog(tmp_path, last_step, changes=changes)
        log.write(last_step + 1, {"loss": 0.5})
        log.close()
    assert read_changes(file) == {4: ["the data"], 8: ["optim.lr: 1 -> 3"]}
    log = MetricsLog(tmp_path, 4)  # back to step 4, with the settings and data that its checkpoint had
    log.write(5, {"loss": 0.5})
    assert read_changes(file) == {}
    file.write_text('{"step": 2, "changes": ["x"]}\n[1]\n{"step": "y"}\n{')
    assert read_changes(file) == {2: ["x"]} and read_changes(tmp_path / "none") == {}
