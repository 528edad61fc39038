"""Prior preservation: finding regularisation samples, and how often they are used."""

from pathlib import Path

import numpy as np
import orjson
import pytest
from PIL import Image

from sdxl_trainer.configs.load import load_config
from sdxl_trainer.data.checks.records import open_checked_records
from sdxl_trainer.data.index.index import open_record_index
from sdxl_trainer.data.order.plan import Plan, Position
from sdxl_trainer.data.order.regularisation import balance_regularisation, find_regularisation_rows


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Make six images in `own/` and four in `prior/`. Captions contain the mark's text, which has no effect."""
    for name, number in (("own", 6), ("prior", 4)):
        (tmp_path / name).mkdir()
        for at in range(number):
            Image.new("RGB", (64, 64)).save(tmp_path / name / f"{name}{at}.png")
            (tmp_path / name / f"{name}{at}.txt").write_text('they say "is_reg": true')
    return tmp_path


def test_images_of_regularisation_folders_are_marked(folders: Path) -> None:
    index = open_record_index(folders / "cache", [], [folders / "own"], ",", [folders / "prior"])
    rows = find_regularisation_rows(index)
    assert [index.row(row)["key"] for row in rows.tolist()] == ["prior0", "prior1", "prior2", "prior3"]
    assert find_regularisation_rows(open_record_index(folders / "cache", [], [folders / "own"])).tolist() == []


def test_is_reg_marks_records_of_metadata(tmp_path: Path) -> None:
    marks = {"a": {"is_reg": True}, "b": {}, "c": {"is_reg": False}, "d": {"note": "is_reg: true"}, "e": {"is_reg": 1}}
    items = {key: {"image_path": f"{key}.png", "caption": key, **fields} for key, fields in marks.items()}
    (tmp_path / "metadata.json").write_bytes(orjson.dumps(items, option=orjson.OPT_INDENT_2))
    index = open_record_index(tmp_path, [tmp_path / "metadata.json"], [])
    assert [index.row(row)["key"] for row in find_regularisation_rows(index).tolist()] == ["a", "e"]


def test_balanced_uses_regularisation_samples_as_often_as_all_others() -> None:
    regular = np.array([6, 7, 8, 9])
    balanced = balance_regularisation(regular, 10, None, "balanced")
    assert balanced.tolist() == [1] * 6 + [1.5] * 4
    # Held-out and repeated images count in the balance. Few images are repeated, and many are used less often.
    repeats = np.array([0, 1, 1, 1, 1, 2, 1, 1, 2, 0])
    assert balance_regularisation(regular, 10, repeats, "balanced").tolist() == [0, 1, 1, 1, 1, 2, 1.5, 1.5, 3, 0]
    assert balance_regularisation(np.arange(2, 10), 10, None, "balanced").tolist() == [1, 1] + [0.25] * 8
    assert balance_regularisation(regular, 10, None, 1.0) is None
    assert balance_regularisation(np.empty(0, int), 10, None, "balanced") is None
    assert balance_regularisation(regular, 10, None, 3.0)[6:].tolist() == [3] * 4
    plan = Plan(np.zeros(10, np.int64), 4, 0, balanced)
    rows = np.concatenate(
        [plan.batch(Position(epoch, at)).rows for epoch in range(2) for at in range(plan.num_batches(epoch))]
    )
    assert np.bincount(rows, minlength=10).tolist() == [2] * 6 + [3] * 4


def test_wrong_folders_are_problems(folders: Path) -> None:
    (folders / "x.yaml").write_text(f"data: {{image_dirs: [{folders}/own], regularisation_dirs: [{folders}/nothing]}}")
    config, problems = load_config(folders / "x.yaml")
    assert problems == []
    assert [problem.key for problem in open_checked_records(config)[1]] == ["data.regularisation_dirs.0"]
    (folders / "x.yaml").write_text(f"data: {{metadata: [x.json], regularisation_dirs: [{folders}/prior]}}")
    problems = open_checked_records(load_config(folders / "x.yaml")[0])[1]
    assert [problem.key for problem in problems] == ["data.metadata.0", "data.regularisation_dirs"]
    assert '"is_reg": true' in problems[1].cure
