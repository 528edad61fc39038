"""The logging sink: names in data forge no lines, floods are counted, and a full disk drops lines only."""

import sys
from pathlib import Path

import pytest
from loguru import logger

from sdxl_trainer.configs.problems import MAX_PROBLEMS, Problem, UserInputError, escape_controls
from sdxl_trainer.data.counted_warnings import MAX_NAMED, CountedWarnings
from sdxl_trainer.launch.logger import init_logger, log_table

FORGED = "a\n12:00:00 ERROR   forged\r\x1b[2K\x9b1A\u202egnp.b\udcff"
ESCAPED = r"a\n12:00:00 ERROR   forged\r\x1b[2K\x9b1A\u202egnp.b\udcff"


@pytest.fixture(autouse=True)
def restore_logger():
    yield
    logger.remove()
    logger.configure(patcher=lambda record: None)
    logger.add(sys.stderr)


def test_names_from_data_cannot_forge_lines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    init_logger(0, log_folder=tmp_path)
    logger.warning("bad sample skipped: {}", FORGED)
    logger.info("raised:\n  Traceback\n  KeyError")  # lines that begin with spaces are no forgery
    log_table("first\nsecond")
    for text in (capsys.readouterr().err, (tmp_path / "train.log").read_text(encoding="utf-8")):
        assert text.count(f"bad sample skipped: {ESCAPED}\n") == 1
        assert "raised:\n  Traceback\n  KeyError\n" in text and "first\nsecond\n" in text
        assert not [line for line in text.splitlines() if line.startswith("12:00:00 ERROR")]
    assert str(Problem(FORGED, None, FORGED, FORGED)).count("\n") == 2
    assert escape_controls("ein Bild.png\tä 図") == "ein Bild.png\tä 図"


def test_a_hundred_problems_are_told_and_the_others_counted() -> None:
    text = str(UserInputError(Problem(f"data.{number}", 1, "is wrong") for number in range(250)))
    assert text.startswith("250 problems") and text.count("is wrong") == MAX_PROBLEMS == 100
    assert text.endswith("and 150 further problems")


def test_bad_items_are_named_up_to_twenty_and_then_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    init_logger(0, log_folder=tmp_path)
    warnings = CountedWarnings("bad image", tmp_path / "all.jsonl")
    for number in range(5000):
        warnings.add(f"image {number}")
    warnings.close()
    shown = capsys.readouterr().err.splitlines()
    named = [line for line in shown if "bad image: image" in line]
    assert len(named) == MAX_NAMED == 20 and len(shown) == 24  # and: counted from here, 200, 2,000, 5,000 in all
    assert f"5,000 in all; {tmp_path / 'all.jsonl'} lists them" in shown[-1]
    log = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert log.count("bad image: image") == 5000
    few = CountedWarnings("bad image", "x", num_ranks=64)  # the ranks share the number
    for _ in range(3):
        few.add("image")
    assert capsys.readouterr().err.count("bad image: image") == 1


def test_a_log_that_cannot_be_written_drops_lines_and_one_that_was_deleted_is_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "logs" / "train.log"
    file.mkdir(parents=True)  # no place for a file
    init_logger(0, log_folder=file.parent)
    for _ in range(3):
        logger.info("dropped")
    shown = capsys.readouterr().err
    assert shown.count("dropped") == 3 and shown.count(f"{file} cannot be written: Is a directory") == 1
    file.rmdir()
    logger.info("one")
    file.unlink()
    file.parent.rmdir()
    logger.info("two")
    text = file.read_text(encoding="utf-8")
    assert "one" in text and "two" in text and "3 records" in capsys.readouterr().err
