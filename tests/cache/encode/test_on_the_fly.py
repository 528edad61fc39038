"""Training over images without latents: order and losses as with a filled cache, and the latents that it stores."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from cache_samples import hash_items, run_job, write_settings
from programs import read_losses, run_program
from tiny_tokenizers import load_tiny_tokenizers

from sdxl_trainer.cache.encode import on_the_fly
from sdxl_trainer.cache.encode.background_writer import BackgroundWriter
from sdxl_trainer.cache.encode.on_the_fly import build_missing_latent_encoder, fill_missing_latents
from sdxl_trainer.cache.models.source import resolve_model
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.left_out import leave_out_bad_latents
from sdxl_trainer.data.checks.training_set import open_training_set
from sdxl_trainer.data.formats.manifest import read_latest
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.images.demo_set import draw_demo_set
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import build_bucket_rules
from sdxl_trainer.data.loading.dataset import LatentDataset, SampleSettings
from sdxl_trainer.data.loading.micro_batch import MicroBatch, MicroSpec
from sdxl_trainer.data.text.captions import CaptionSettings
from sdxl_trainer.launch.distributed import Ranks

RANKS = Ranks(0, 0, 1, torch.device("cpu"))
NUM_IMAGES = 8


@pytest.fixture(scope="module")
def images(tmp_path_factory, tiny_folder) -> Path:
    """Return a folder of eight images and settings that train at two resolutions with a flip rate of 0.5."""
    folder = tmp_path_factory.mktemp("images")
    settings = write_settings(folder, tiny_folder / "model", draw_demo_set(folder / "data", NUM_IMAGES), flip=True)
    content = settings.read_text().replace("resolution_px: 128", "resolution_px: [64, 128]\n  flip_rate: 0.5")
    settings.write_text(content.replace("min_bucket_px: 64", "min_bucket_px: 32"))
    return folder


def open_run(images: Path, folder: Path, *words: str) -> tuple[Config, Index]:
    config, problems = load_config(
        images / "settings.yaml",
        [f"cache.dir={folder}", f"run.dir={folder}/runs", "cache.on_missing=encode", *words],
    )
    index, found = open_training_set(config)
    assert problems == found == [] and index is not None
    leave_out_bad_latents(config, index, resuming=False)
    return config, index


def open_dataset(config: Config, index: Index) -> LatentDataset:
    tokenizers = load_tiny_tokenizers()
    assert config.cache.dir is not None
    settings = SampleSettings(seed=0, max_tokens=75, caption=CaptionSettings(), flip_rate=config.data.flip_rate)
    return LatentDataset(index, config.cache.dir, tokenizers, settings, rules=build_bucket_rules(config.data))


def read_all(config: Config, index: Index, epoch: int = 0, *, fill: bool = True) -> dict[str, MicroBatch]:
    """Return a micro batch by key, which holds the sample of that key in two epochs."""
    dataset, specs = open_dataset(config, index), []
    for row in range(len(index)):
        bucket = Size(int(index.column("bucket_width")[row]), int(index.column("bucket_height")[row]))
        specs.append(
            MicroSpec(
                bucket=bucket,
                rows=np.array([row, row]),
                epochs=np.array([epoch, epoch + 1]),
                positions=np.array([0, 1]),
            )
        )
    batches = [dataset[spec] for spec in specs]
    if fill:
        filled = fill_missing_latents(
            iter(batches), build_missing_latent_encoder(config, resolve_model(config.model), dataset, RANKS)
        )
        batches = list(filled)
    return dict(zip(index.arrow_column("key").to_pylist(), batches, strict=True))


@pytest.mark.parametrize(
    "words",
    [("cache.dtype=float16",), ("cache.posterior=moments", "cache.dtype=bfloat16"), ("cache.posterior=mean",)],
    ids=["sample", "moments", "mean"],
)
def test_trained_latents_equal_those_of_a_cache_job(images, tmp_path, words):
    assert run_job(images / "settings.yaml", f"cache.dir={tmp_path / 'made'}", *words) == 0
    made = read_all(*open_run(images, tmp_path / "made", *words), fill=False)
    config, index = open_run(images, tmp_path / "new", *words)
    assert index.summary.num_uncached == len(index) == 2 * NUM_IMAGES
    new = read_all(config, index)
    assert list(new) == list(made)  # same order
    flipped = 0
    for key, batch in new.items():
        assert batch.bad == [] and batch.pending == []
        for name in ("latents", "time_ids", "weights", "input_ids"):
            assert torch.equal(getattr(batch, name), getattr(made[key], name)), (key, name)
        flipped += int(batch.latents[0].ne(batch.latents[1]).any())
    assert flipped
    # The latents are now in the cache, byte for byte, and the next epoch reads them.
    assert hash_items(tmp_path / "new") == hash_items(tmp_path / "made")
    assert run_job(images / "settings.yaml", f"cache.dir={tmp_path / 'new'}", *words, "--verify") == 0
    assert all(batch.pending == [] for batch in read_all(config, index, fill=False).values())
    resumed = open_run(images, tmp_path / "new", *words)[1]
    assert resumed.summary.num_uncached == 0 and resumed.hash_rows() == index.hash_rows()


def test_bad_images_are_named_and_all_others_are_encoded(images, tmp_path):
    shutil.copytree(images / "data", tmp_path / "data")
    metadata = tmp_path / "data" / "metadata.json"
    records = json.loads(metadata.read_text())
    truncated, missing, misplaced, *_ = records
    image = tmp_path / "data" / records[truncated]["image_path"]
    image.write_bytes(image.read_bytes()[:200])
    (tmp_path / "data" / records[missing]["image_path"]).unlink()
    records[misplaced]["original_size"] = [900, 100]
    metadata.write_text(json.dumps(records))
    words = (f"data.metadata=[{metadata}]", "data.max_bad_fraction=1.0", "data.resolution_px=128")
    config, index = open_run(images, tmp_path / "cache", *words)
    lines = (tmp_path / "cache" / "runs" / "x" / "logs" / "bad_samples.jsonl").read_bytes().splitlines()
    assert [orjson.loads(line)["key"] for line in lines] == [missing]  # reported before training
    batches = read_all(config, index)
    assert len(batches) == NUM_IMAGES - 1
    reasons = {key: batch.bad[0][1] for key, batch in batches.items() if batch.bad}
    assert set(reasons) == {truncated, misplaced}
    assert "cannot be decoded" in reasons[truncated] and "its metadata says 900x100" in reasons[misplaced]
    assert all(batches[key].weights.tolist() == [0, 0] for key in reasons)
    assert set(read_latest(tmp_path / "cache")) == set(records) - {truncated, missing, misplaced}


def test_a_cache_of_other_settings_or_in_use_is_refused(images, tmp_path):
    config, index = open_run(images, tmp_path, "data.resolution_px=128")
    dataset, source = open_dataset(config, index), resolve_model(config.model)
    encoder = build_missing_latent_encoder(config, source, dataset, RANKS)
    with pytest.raises(UserInputError, match="being written by another job"):
        build_missing_latent_encoder(config, source, dataset, RANKS)
    encoder.close()
    build_missing_latent_encoder(config, source, dataset, RANKS).close()
    other, _ = open_run(images, tmp_path, "data.resolution_px=128", "cache.posterior=mean")
    with pytest.raises(UserInputError, match="posterior: sample") as caught:
        build_missing_latent_encoder(other, source, dataset, RANKS)
    assert [problem.key for problem in caught.value.problems] == ["cache.dir"]


def test_a_cache_that_cannot_be_written_does_not_end_training(images, tmp_path, monkeypatch):
    config, index = open_run(images, tmp_path, "data.resolution_px=128")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def build_writer(*arguments: Any) -> BackgroundWriter:
        writers.append(BackgroundWriter(*arguments))
        return writers[-1]

    writers: list[BackgroundWriter] = []
    monkeypatch.setattr(on_the_fly, "BackgroundWriter", build_writer)
    monkeypatch.setattr("sdxl_trainer.cache.encode.storage.write_atomic", fail)
    batches = read_all(config, index)
    assert all(batch.latents.ne(0).any() and batch.bad == [] for batch in batches.values())
    assert read_latest(tmp_path) == {}
    [writer] = writers
    assert writer._manifest._file.closed and writer._pool._shutdown


@pytest.mark.parametrize("ranks", [2])
def test_losses_equal_those_of_a_run_over_a_filled_cache(cached_folder, one_rank, tmp_path, ranks):
    words = (
        f"cache.dir={tmp_path / 'latents'}",
        f"data.image_dirs=[{cached_folder / 'images-put-away'}]",
        "run.name=fly",
        f"run.dir={tmp_path}",
        "cache.on_missing=encode",
        "train.max_steps=6",
        "sample.prompts=[]",
        "checkpoint.every_steps=0",
        "data.num_workers=1",
    )
    run_program("train/main.py", "--cfg", cached_folder / "tiny.yaml", *words, ranks=ranks)
    np.testing.assert_allclose(read_losses(tmp_path / "fly"), read_losses(one_rank)[:6], rtol=0, atol=1e-5)
    assert {key: entry.sha256 for key, entry in read_latest(tmp_path / "latents").items()}.items() <= {
        key: entry.sha256 for key, entry in read_latest(cached_folder / "latents").items()
    }.items()
