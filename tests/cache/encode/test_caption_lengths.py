"""Captions that are cut off are named by training, the doctor and a cache job that encodes text."""

from pathlib import Path

import pytest
from cache_samples import run_job, write_settings
from PIL import Image

from sdxl_trainer.cache.encode.caption_lengths import check_caption_lengths
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.data.checks.records import open_checked_records


@pytest.mark.parametrize(("num_long", "named"), [(0, 0), (1, 0), (3, 3)])
def test_captions_that_are_cut_off_are_named(tmp_path: Path, tiny_folder: Path, num_long: int, named: int) -> None:
    """One of 40 may be an accident."""
    (tmp_path / "images").mkdir()
    for number in range(40):
        Image.new("RGB", (96, 96)).save(tmp_path / "images" / f"{number}.png")
        words = "a red cat " * (40 if number < num_long else 3)
        (tmp_path / "images" / f"{number}.txt").write_text(words)
    config, _ = load_config(write_settings(tmp_path, tiny_folder / "model"))
    records, problems = open_checked_records(config)
    assert records is not None and problems == []
    found = list(check_caption_lengths(config, records))
    assert [problem.rule for problem in found] == (
        [f"cuts off the end of {named} of the 40 captions that were looked at"] if named else []
    )
    # The tiny tokenizers have few words, so that 120 words are more than 150 tokens.
    cure = "raise it (225 for the longest), or shorten the captions"
    assert [problem.cure for problem in found] == [cure] * bool(found)


def test_a_cache_job_that_encodes_text_names_them(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (96, 96)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a red cat " * 40)
    settings = write_settings(tmp_path, tiny_folder / "model")
    assert run_job(settings) == 0
    assert "data.max_tokens" not in capsys.readouterr().err
    assert run_job(settings, "cache.text=true") == 0
    assert "data.max_tokens=75: cuts off the end of 1 of the 1 caption" in capsys.readouterr().err
