"""Reading of run folders: only new lines, in bounded memory, nothing outside the folder, and states that are true."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdxl_trainer.launch.signals import Interrupted, InterruptedAlone
from sdxl_trainer.train.report.run_state import Holder, RunState, read_holder, resolve_state
from sdxl_trainer.train.report.run_status import (
    RunStatus,
    describe_process,
    identify_machine,
    read_process_start,
    read_status,
    write_status,
)
from sdxl_trainer.train.run import interruption
from sdxl_trainer.train.run.status_writer import describe_end
from sdxl_trainer.train.watch import curves, run_reader
from sdxl_trainer.train.watch.curves import Curves
from sdxl_trainer.train.watch.file_tail import FileTail
from sdxl_trainer.train.watch.library import RunLibrary
from sdxl_trainer.train.watch.messages import Messages
from sdxl_trainer.train.watch.run_folder import locate
from sdxl_trainer.train.watch.run_reader import RunReader

MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def test_a_tail_reads_each_line_once_and_notices_cuts(tmp_path: Path) -> None:
    file = tmp_path / "log"
    tail = FileTail(file)
    assert tail.read(99) == b"" and tail.generation == 0
    file.write_bytes(b"one\ntwo\nthr")
    assert tail.read(5) == b"one\n" and tail.share == 4 / 11
    # A torn last line is nothing that another call could read.
    assert tail.read(99) == b"two\n" and tail.share == 1 and tail.read(99) == b"" and tail.share == 1
    with open(file, "ab") as stream:
        stream.write(b"ee\n" + b"x" * 30 + b"\nfour\n")
    assert tail.read(8) == b"three\n"
    assert [tail.read(8) for _ in range(5)] == [b"", b"", b"", b"four\n"[:0], b"four\n"], "a line that is too long"
    assert tail.share == 1 and tail.read(99) == b"" and tail.generation == 0
    # Cut and grown again beyond the place of reading, as after a resume; replaced; deleted.
    file.write_bytes(b"one\n" + b"2" * 60 + b"\n")
    assert tail.read(99) == b"one\n" + b"2" * 60 + b"\n" and tail.generation == 1
    (tmp_path / "new").write_bytes(file.read_bytes() + b"five\n")
    (tmp_path / "new").rename(file)
    assert tail.read(99).endswith(b"five\n") and tail.generation == 2
    file.unlink()
    assert tail.read(99) == b"" and tail.generation == 3
    os.mkfifo(file)
    assert tail.read(99) == b""


def test_curves_are_exact_while_short_and_bounded_when_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "MAX_RANGES", 8)
    short = Curves()
    lines = [{"step": step, "loss": None if step == 2 else step / 2, "epoch": 0} for step in range(1, 6)]
    damaged = [
        '{"step": 3,',
        "[1]",
        '{"step": -1, "loss": 9}',
        '{"step": 3, "loss": "x"}',
        '{"step": 1e9, "loss": 9}',
        "\0",
    ]
    text = "\n".join([*map(json.dumps, lines[:3]), *damaged, *map(json.dumps, lines[3:]), ""])
    short.add_lines(text.encode())
    exported = short.export()
    assert list(exported) == ["loss"] and short.last_step == 5
    columns = {name: np.asarray(column).tolist() for name, column in exported["loss"].items()}
    assert columns == {"range": [1, 3, 4, 5], "step": [1, 3, 4, 5], "mean": [0.5, 1.5, 2.0, 2.5], "broken": [2, 2]}
    long = Curves()
    for first in range(0, 40, 5):  # in parts, as polls do
        rows = [{"step": step, "loss": float(step)} for step in range(first, first + 5)]
        long.add_lines("".join(json.dumps(row) + "\n" for row in rows).encode())
    loss = long.export()["loss"]
    assert (long.width, long.revision) == (8, 3) and loss["step"].tolist() == [7, 15, 23, 31, 39]
    assert loss["mean"].tolist() == [3.5, 11.5, 19.5, 27.5, 35.5]
    assert loss["low"].tolist() == [0, 8, 16, 24, 32] and loss["high"].tolist() == [7, 15, 23, 31, 39]
    assert long.export(4)["loss"]["range"].tolist() == [4]


def test_a_poll_reads_only_new_lines(tmp_path: Path, write_run, append) -> None:
    reader = RunReader(write_run(tmp_path / "a", 30), "a")
    first = reader.read_curves("", 0)
    assert first["share"] == 1 and first["last_step"] == 30 and len(first["curves"]["loss"]["range"]) == 30
    append(tmp_path / "a", 31, 33)
    more = reader.read_curves(first["version"], 30)
    assert more["version"] == first["version"] and more["curves"]["loss"]["range"].tolist() == [30, 31, 32, 33]
    # The run resumes from step 20: later lines are cut, and the page gets everything anew.
    file = tmp_path / "a" / "logs" / "metrics.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:20]))
    append(tmp_path / "a", 21, 40)
    again = reader.read_curves(more["version"], 33)
    assert again["version"] != more["version"] and again["first"] == 0 and again["last_step"] == 40
    assert len(again["curves"]["loss"]["range"]) == 40
    assert set(run_reader.REQUESTS) == {interruption.SAVE_FILE, interruption.SAMPLE_FILE, interruption.STOP_FILE}


def test_a_long_file_is_read_in_several_polls(tmp_path: Path, write_run, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = RunReader(write_run(tmp_path / "a", 200), "a")
    monkeypatch.setattr(run_reader, "READ_SECONDS", 0.0)
    assert (
        reader.read_curves("", 0)["share"] == 1.0 and reader.read_curves("", 0)["last_step"] == 0
    )  # no time, no lines
    ticks = iter(range(99))
    monkeypatch.setattr(run_reader.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(run_reader, "READ_SECONDS", 1.5)
    monkeypatch.setattr(run_reader, "READ_BYTES", 5000)
    shares = [reader.read_curves("", 0)["share"] for _ in range(6)]
    assert shares == sorted(shares) and 0 < shares[0] < 0.5 < shares[-1]


def test_the_state_of_a_live_and_of_a_killed_process(tmp_path: Path, write_run) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = read_process_start(child.pid)
    write_run(tmp_path / "a", process=child.pid, process_started=started)
    library = RunLibrary(tmp_path)
    summary = library.list_runs()[0]
    assert (summary["state"], summary["step"], summary["max_steps"]) == ("running", 30, 100)
    assert summary["text"] == f"training {MARKUP}" and summary["has_prompts"]
    child.kill()
    child.wait()
    summary = library.list_runs()[0]
    assert (summary["state"], summary["text"]) == ("failed", "ended without a word after step 30")
    assert summary["seconds_left"] is None
    write_run(tmp_path / "b", state="stopped", reason="stopped by SIGTERM")
    shutil.rmtree(tmp_path / "a")
    assert [(run["name"], run["state"], run["text"]) for run in library.list_runs()] == [
        ("b", "stopped", "stopped by SIGTERM")
    ]
    assert library.open_run("a") is None and library.open_run("..") is None and library.open_run("") is None


HERE = describe_process()
LIVE = RunStatus(state="running", step=5, max_steps=9, now="training", **HERE)  # pyright: ignore
DEAD = RunStatus(state="running", step=5, max_steps=9, **{**HERE, "process_started": 1})  # pyright: ignore
FAR = RunStatus(state="running", step=5, max_steps=9, now="training", machine="another")
ENDED = RunStatus(state="finished", step=9, max_steps=9, **HERE)  # pyright: ignore


@pytest.mark.parametrize(
    ("status", "holder", "silent", "last_step", "expected"),
    [
        (LIVE, None, 1, 5, ("running", "training")),
        (LIVE, None, 600, 5, ("running", "training; no sign of life for 10 min")),
        (DEAD, None, 1, 7, ("failed", "ended without a word after step 7")),
        (DEAD, Holder(7, True), 1, 7, ("running", "starting")),  # another job resumes it
        (FAR, None, 59, 5, ("running", "training")),
        (FAR, None, 61, 5, ("failed", "ended without a word after step 5")),
        (ENDED, None, 1, 9, ("finished", "")),
        (ENDED, Holder(os.getpid(), True), 1, 9, ("finished", "")),  # the job that ends holds the lock a little longer
        (ENDED, Holder(7, True), 1, 9, ("running", "starting")),
        (ENDED, Holder(7, False), 1, 9, ("finished", "")),
        (RunStatus(state="of version 9"), None, 1, 9, ("stopped", "")),
        (None, Holder(7, True), 999, 0, ("running", "starting")),
        (None, None, 999, 0, ("stopped", "before the first step")),
        (None, None, 5, 4, ("running", "")),  # of an earlier version
        (None, None, 999, 4, ("stopped", "after step 4")),
        (None, None, 999, 9, ("finished", "")),
    ],
)
def test_the_state_of_a_run_follows_from_its_files(status, holder, silent, last_step, expected) -> None:
    assert resolve_state(status, holder, silent, last_step, 9) == RunState(*expected)


def test_how_a_run_has_ended() -> None:
    assert describe_end(None) == ("finished", "")
    assert describe_end(Interrupted(signal.SIGTERM)) == ("stopped", "stopped by SIGTERM")
    assert describe_end(InterruptedAlone(signal.SIGTERM)) == (
        "failed",
        "stopped by SIGTERM, and other ranks do not answer",
    )
    assert describe_end(ValueError("two\nlines")) == ("failed", "ValueError: two")
    state, reason = describe_end(OSError(errno.ENOSPC, "No space left on device", "/x"))
    assert state == "failed" and reason.startswith("/x: No space left on device; free some space there")


def test_a_status_file_is_read_back_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "status.json"
    write_status(file, LIVE)
    assert read_status(file) == LIVE and [path.name for path in file.parent.iterdir()] == ["status.json"]
    for content in (b"", b"[1]", b'{"state": 5}', b'{"state": "running", "step": "x"}', b"\xff", b"9" * 100_000):
        file.write_bytes(content)
        assert read_status(file) is None, content
    file.write_bytes(b'{"state": "running", "later": [1]}')
    assert read_status(file) == RunStatus(state="running")
    assert identify_machine() and read_process_start(os.getpid()) > 0 and read_process_start(2**31 - 1) == 0


def test_the_lock_file_names_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    assert read_holder(tmp_path) is None
    lock.write_text(f"host {socket.gethostname()}, process {os.getpid()}, started now")
    assert read_holder(tmp_path) == Holder(os.getpid(), True)
    os.utime(lock, (1, 1))  # the holder has ended, and this process got its number
    assert read_holder(tmp_path) == Holder(os.getpid(), False)
    lock.write_text("host elsewhere, process 1, started now")
    assert read_holder(tmp_path) is None


def test_a_starting_run_accepts_no_request_yet(tmp_path: Path, write_run) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / ".lock").write_text(f"host {socket.gethostname()}, process {os.getpid()}, started now")
    write_run(tmp_path / "on")
    write_run(tmp_path / "silent", has_prompts=False)
    runs = {run["name"]: (run["state"], run["accepts"]) for run in RunLibrary(tmp_path).list_runs()}
    assert runs["new"] == ("running", []) and runs["on"] == ("running", ["save", "sample", "stop"])
    assert runs["silent"] == ("running", ["save", "stop"])


def test_links_out_of_a_run_folder_lead_nowhere(tmp_path: Path, write_run) -> None:
    runs = tmp_path / "runs"
    run, secret = write_run(runs / "a"), tmp_path / "secret.yaml"
    secret.write_text("password: x\n")
    with pytest.raises(OSError, match="out of the run folder"):
        (run / "link").symlink_to(secret)
        locate(run, "link")
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(secret)
    (run / "samples" / "step-00000030").symlink_to(tmp_path)
    shutil.move(run / "logs", tmp_path / "logs")
    (run / "logs").symlink_to(tmp_path / "logs")
    (runs / "b").symlink_to(run)  # a link beside the runs is its owner's choice
    reader = RunLibrary(runs).open_run("b")
    assert reader is not None and reader.folder == run
    assert reader.read_settings() == {} and reader.read_curves("", 0)["curves"] == {}
    assert reader.read_images()["steps"] == [10, 20] and reader.read_messages()["warnings"] == []


def test_messages_images_and_settings(tmp_path: Path, write_run) -> None:
    run = write_run(tmp_path / "a")
    messages = Messages(run)
    found = messages.read()
    assert found["warnings"] == [{"time": "2026-11-28 10:00:00", "level": "WARNING", "rank": 1, "text": MARKUP}]
    assert found["bad_samples"] == [{"step": 3, "key": MARKUP, "reason": "cannot be read"}] and found["num_bad"] == 1
    with open(run / "logs" / "train-rank1.log", "a", encoding="utf-8") as file:
        file.write("2026-11-28 11:00:00.000 ERROR   [rank 1] __main__: two\n  lines \x1b[2J\n2026-11-28 12:")
    assert [item["text"] for item in messages.read()["warnings"]] == ["two\n  lines \\x1b[2J", MARKUP]
    (run / "logs" / "train-rank1.log").write_text("")
    assert messages.read()["warnings"] == []
    reader = RunReader(run, "a")
    prompt = {"number": 0, "steps": [10, 20], "prompt": MARKUP, "negative": "", "settings": "Steps: 4"}
    assert reader.read_images() == {"steps": [10, 20], "prompts": [prompt]}
    shutil.copytree(run / "samples" / "step-00000010", run / "samples" / "step-00000030")
    assert reader.read_images()["steps"] == [10, 20, 30]
    assert reader.read_settings() == {"run.name": "a", "optim.lr": "0.1", "model.path": MARKUP}
    (run / "config.yaml").write_text("a: [1")
    assert reader.read_settings() == {}
    older = RunReader(write_run(tmp_path / "old"), "old")
    (older.folder / "logs" / "status.json").unlink()
    (older.folder / "config.yaml").write_text("train:\n  max_steps: 30\n")
    os.utime(older.folder / "logs" / "metrics.jsonl", (1, 1))
    assert [older.summarize()[name] for name in ("state", "step", "max_steps")] == ["finished", 30, 30]
