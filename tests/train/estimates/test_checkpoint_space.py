"""A disk that is too small for a run's checkpoints is named at its start."""

import shutil
from pathlib import Path

import pytest

from sdxl_trainer.configs.load import build_config
from sdxl_trainer.train.estimates.checkpoint_size import check_checkpoint_space, compute_checkpoint_bytes

SHAPES = [(1000, 1000)]


@pytest.mark.parametrize(
    ("num_kept", "missing", "is_named"), [(0, 0, False), (0, 1, True), (2, 1, False), (1, 2, True)]
)
def test_checkpoints_that_are_there_need_no_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_kept: int, missing: int, is_named: bool
) -> None:
    """Two are kept and one is written; `missing` is of the space for three beside those that are there."""
    config, _ = build_config({}, [f"run.dir={tmp_path}", "run.name=my", "checkpoint.keep_last=2"])
    size = compute_checkpoint_bytes(config, SHAPES)
    for number in range(num_kept):
        folder = tmp_path / "my" / "checkpoints" / f"step-{number}"
        folder.mkdir(parents=True)
        (folder / "state").write_bytes(bytes(size))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=(3 - missing) * size))
    found = list(check_checkpoint_space(config, SHAPES))
    assert [problem.key for problem in found] == (["run.dir"] if is_named else [])
    assert all("3 checkpoints need about" in problem.rule for problem in found)
