"""Weights of sources: how often the samples of each source are used in an epoch, on any number of ranks."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from PIL import Image

from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.schema import DataConfig
from sdxl_trainer.data.checks.records import open_checked_records
from sdxl_trainer.data.checks.training_set import open_training_set
from sdxl_trainer.data.formats.latents import LatentSample, write_latents
from sdxl_trainer.data.index.index import Index, open_record_index, open_sample_index
from sdxl_trainer.data.loading.loader import build_plan, iterate_specs
from sdxl_trainer.data.order.plan import Position
from sdxl_trainer.data.order.source_weights import (
    apply_data_repeats,
    apply_source_weights,
    check_weighted_samples,
    list_repeats,
    read_folder_repeats,
)
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.train.run.training_data import combine_repeats

SOURCES = {"a.json": range(0, 8), "b.json": range(8, 13), "c.json": range(3, 16)}  # the last file updates the others


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make 16 latents of two buckets and three metadata files, which have 8, 5 and 3 records of their own."""
    for name, rows in SOURCES.items():
        (tmp_path / name).write_bytes(orjson.dumps({f"s{row:02d}": {"caption": name} for row in rows}))
    for row in range(16):
        side = (64, 96) if row % 2 else (64, 64)
        write_latents(
            tmp_path / f"s{row:02d}.npz",
            LatentSample(
                latents=np.zeros((4, side[1] // 8, 8), np.float32), original_size=side, crop_ltrb=(0, 0, *side)
            ),
        )
    return tmp_path


def open_index(folder: Path, *names: str) -> Index:
    return open_sample_index(folder, open_record_index(folder, [folder / name for name in names], []))


def test_a_record_belongs_to_the_source_in_which_it_first_appears(folder: Path) -> None:
    index = open_index(folder, *SOURCES)
    assert index.column("source").tolist() == [0] * 8 + [1] * 5 + [2] * 3
    assert index.record(4)["caption"] == "c.json" and "//source" not in index.record(4)
    # All files that match one entry's pattern are one source. Another list of files gives another index.
    (folder / "c.json").unlink()
    assert open_index(folder, "{a,b}.json").column("source").tolist() == [0] * 13
    index = open_index(folder, "a.json", "b.json")
    assert index.column("source").tolist() == [0] * 8 + [1] * 5
    data = DataConfig.model_validate({"metadata": ["a.json", "b.json"], "source_weights": [3, 0.5]})
    assert list_repeats(index, data) == [("a.json", 8, 24), ("b.json", 5, 2.5)]
    assert list_repeats(index, data.model_copy(update={"source_weights": []})) == []


def test_kohyas_folders_give_repeats(tmp_path: Path) -> None:
    """The nearest folder counts, up to the entry itself; regularisation images are left to their own setting."""
    for name in ("10_dog/a", "10_dog/3_in/b", "0_off/c", "plain/d", "4_root/e", "7_reg/r"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_latents(
            tmp_path / f"{name}.npz",
            LatentSample(latents=np.zeros((4, 8, 8), np.float32), original_size=(64, 64), crop_ltrb=(0, 0, 64, 64)),
        )
    roots = [tmp_path / "10_dog", tmp_path / "0_off", tmp_path / "plain", tmp_path / "4_root"]
    records = open_record_index(tmp_path / "cache", [], roots, regularisation_dirs=[tmp_path / "7_reg"])
    index = open_sample_index(tmp_path / "cache", records)
    repeats = dict(zip(index.arrow_column("key").to_pylist(), read_folder_repeats(index, roots).tolist(), strict=True))
    assert repeats == {"a": 10, "b": 3, "c": 0, "d": 1, "e": 4, "r": 1}
    data = DataConfig.model_validate({"image_dirs": roots, "kohya_folders": True, "source_weights": [0.5, 1, 1, 1]})
    assert apply_data_repeats(index, None, data).tolist() == [5, 1.5, 0, 1, 4, 1]  # pyright: ignore
    listed = {Path(each.name).relative_to(tmp_path).as_posix(): each[1:] for each in list_repeats(index, data)}
    assert listed == {
        **{"0_off": (1, 0), "10_dog": (1, 5), "10_dog/3_in": (1, 1.5)},
        **{"4_root": (1, 4), "7_reg": (1, 1), "plain": (1, 1)},
    }
    data = DataConfig.model_validate({"image_dirs": [tmp_path / "0_off"], "kohya_folders": True})
    records = open_record_index(tmp_path / "cache", [], data.image_dirs)
    (problem,) = check_weighted_samples(data, open_sample_index(tmp_path / "cache", records))
    assert problem.key == "data.kohya_folders" and problem.rule == "leaves nothing to train on"


def test_sources_are_used_by_their_weight_on_any_number_of_ranks(folder: Path) -> None:
    index = open_index(folder, *SOURCES)
    assert apply_source_weights(index, None, []) is None and apply_source_weights(index, None, [1, 1, 1]) is None
    repeats = apply_source_weights(index, None, [1, 2.25, 0])
    assert repeats is not None and repeats.tolist() == [1.0] * 8 + [2.25] * 5 + [0.0] * 3
    held_out = np.array([0.0] + [2.0] * 15)  # multiplied with the repeats of a strategy or a validation set
    assert apply_source_weights(index, held_out, [1, 2.25, 0]).tolist() == [0.0] + [2.0] * 7 + [4.5] * 5 + [0.0] * 3  # pyright: ignore
    plan = build_plan(index, 8, 3, repeats)
    batches = [plan.batch(Position(epoch, number)) for epoch in range(4) for number in range(plan.num_batches(epoch))]
    turns = Counter(row for batch in batches for row in batch.rows.tolist())
    wanted = np.array([4] * 8 + [9] * 5 + [0] * 3)  # whole numbers of turns in four epochs
    missing = wanted - np.array([turns[row] for row in range(16)])
    assert missing.min() >= 0 and missing.sum() == plan.num_carried(3) < 2 * 8
    for world_size in (1, 2, 4, 8):
        steps = 8 // world_size
        ranks = [
            list(islice(iterate_specs(plan, Position(0, 0), rank, world_size, 1), len(batches) * steps))
            for rank in range(world_size)
        ]
        rows = [int(rank[step].rows[0]) for step in range(len(batches) * steps) for rank in ranks]
        assert rows == [row for batch in batches for row in batch.rows.tolist()]


def test_image_folders_have_weights_but_regularisation_folders_do_not(tmp_path: Path) -> None:
    for name in ("one", "two", "prior"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / name / f"{name}.png")
    folders = [tmp_path / "one", tmp_path / "two"]
    index = open_record_index(tmp_path, [], folders, ",", [tmp_path / "prior"])
    assert index.column("source").tolist() == [0, 1, 2]
    assert apply_source_weights(index, None, [0.5, 3]).tolist() == [0.5, 3, 1]  # pyright: ignore[reportOptionalMemberAccess]


def test_wrong_weights_are_problems(folder: Path) -> None:
    settings = folder / "x.yaml"

    def write(weights: str, text: str = "") -> None:
        files = ", ".join(str(folder / name) for name in SOURCES)
        settings.write_text(
            f"data: {{metadata: [{files}], source_weights: {weights}}}\nrun: {{dir: {folder / 'runs'}}}\n{text}"
        )

    write("[1, 2]")
    [problem] = open_checked_records(load_config(settings)[0])[1]
    assert problem.key == "data.source_weights" and "2 numbers for the 3 entries of data.metadata" in problem.rule
    write("[0, 0, 0]")
    [problem] = open_training_set(load_config(settings)[0])[1]
    assert problem.key == "data.source_weights" and "nothing to train on" in problem.rule
    write("[0, 0, 0.5]")
    config = load_config(settings)[0]
    index, problems = open_training_set(config)
    assert problems == [] and index is not None
    repeats = combine_repeats(config, index, np.array([15]), None, Ranks(0, 0, 1, torch.device("cpu")))
    assert repeats is not None and repeats.tolist() == [0.0] * 13 + [0.5, 0.5, 0.0]  # the last row is held out
    write("[1, -1, 1]")
    assert [problem.key for problem in load_config(settings)[1]] == ["data.source_weights.1"]
