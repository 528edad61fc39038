"""Flipped samples have the latents, the crop and the mask of the mirrored image."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from loguru import logger
from tiny_tokenizers import load_tiny_tokenizers

from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.training_set import open_training_set
from sdxl_trainer.data.formats.latents import LatentSample, pack_latents
from sdxl_trainer.data.formats.manifest import ManifestEntry, ManifestWriter
from sdxl_trainer.data.formats.shards import ShardWriter
from sdxl_trainer.data.index.index import open_record_index, open_sample_index
from sdxl_trainer.data.loading.dataset import LatentDataset, SampleSettings
from sdxl_trainer.data.loading.micro_batch import MicroSpec
from sdxl_trainer.data.text.captions import CaptionSettings

BUCKET, RESIZED, CROP = (64, 96), (75, 96), (5, 0, 69, 96)
SHAPE = (4, 12, 8)


def make_sample(number: int, flipped: bool) -> LatentSample:
    rng = np.random.default_rng(number)
    latents, mirrored = rng.standard_normal((2, *SHAPE), np.float32)
    mask = np.linspace(0, 1, 96 * 64, dtype=np.float32).reshape(96, 64) if number == 0 else None
    return LatentSample(
        latents=latents,
        original_size=(750, 960),
        crop_ltrb=CROP,
        flipped=mirrored if flipped else None,
        alpha_mask=mask,
    )


def fill_cache(folder: Path, flipped: list[bool], *, shards: bool = False, listed: bool = True) -> None:
    """Write a cache of one sample for each of `flipped`; `listed` puts the flip into the manifest."""
    folder.mkdir(exist_ok=True)
    captions = {f"s{number}": {"caption": f"a, b, {number}"} for number in range(len(flipped))}
    (folder / "metadata.json").write_text(json.dumps(captions))
    manifest, tar = ManifestWriter(folder, 0), ShardWriter(folder / "shards" / "x.tar") if shards else None
    for number, has_flipped in enumerate(flipped):
        content = pack_latents(make_sample(number, has_flipped))
        file, offset = f"s{number}.npz", None
        if tar:
            place = tar.append(f"s{number}", b"{}", content)
            file, offset = "shards/x.tar", place.offset
        else:
            (folder / file).write_bytes(content)
        place = {"bucket": BUCKET, "original_size": (750, 960), "resized": RESIZED, "crop": CROP, "offset": offset}
        source = {"source_path": "", "source_bytes": 1, "source_mtime_ns": 1, "source_sha256": "", "identity": ""}
        manifest.append(
            ManifestEntry(
                key=f"s{number}",
                file=file,
                bytes=len(content),
                sha256="",
                **place,
                **source,
                flipped=has_flipped if listed else None,
            )
        )
    manifest.close()
    if tar:
        tar.close()


def open_dataset(folder: Path, rate: float) -> LatentDataset:
    tokenizers = load_tiny_tokenizers()
    index = open_sample_index(folder, open_record_index(folder, [folder / "metadata.json"], []))
    return LatentDataset(
        index,
        folder,
        tokenizers,
        SampleSettings(seed=3, max_tokens=75, caption=CaptionSettings(shuffle=True), flip_rate=rate),
    )


def make_spec(rows: list[int], epochs: list[int]) -> MicroSpec:
    return MicroSpec(bucket=BUCKET, rows=np.array(rows), epochs=np.array(epochs), positions=np.arange(len(rows)))


@pytest.mark.parametrize("shards", [False, True])
def test_a_flipped_sample_has_the_latents_crop_and_mask_of_the_mirrored_image(tmp_path, shards):
    fill_cache(tmp_path, [True, True, False], shards=shards)
    batch = open_dataset(tmp_path, 1.0)[make_spec([0, 1, 2], [0, 0, 0])]
    assert batch.bad == [] and batch.masks is not None
    for number, has_flipped in enumerate((True, True, False)):
        sample = make_sample(number, has_flipped)
        assert torch.equal(batch.latents[number], torch.from_numpy(sample.flipped if has_flipped else sample.latents))
    # 5 px were cropped on the left and 75 - 64 - 5 = 6 px on the right. In the mirrored image, 6 px are on the left.
    assert batch.time_ids[:, 3].tolist() == [6, 6, 5] and batch.time_ids[:, 2].tolist() == [0, 0, 0]
    mask = make_sample(0, True).alpha_mask
    assert mask is not None and np.array_equal(batch.masks[0].numpy(), mask[:, ::-1])
    assert batch.masks[1:].eq(1).all()


def test_flips_are_keyed_to_sample_and_epoch_and_change_nothing_else(tmp_path):
    fill_cache(tmp_path, [True, True, True, False])
    rows, epochs = [0, 1, 2, 3] * 100, [epoch for epoch in range(100) for _ in range(4)]
    plain, half = (open_dataset(tmp_path, rate)[make_spec(rows, epochs)] for rate in (0.0, 0.5))
    flips = half.latents.ne(plain.latents).flatten(1).any(1).numpy()
    share = flips.reshape(100, 4).mean(0)
    assert share[3] == 0 and (abs(share[:3] - 0.5) < 0.2).all() and 0.42 < share[:3].mean() < 0.58
    assert np.array_equal(half.time_ids[:, 3].numpy(), np.where(flips, 6, 5))
    assert torch.equal(half.input_ids, plain.input_ids) and torch.equal(half.weights, plain.weights)
    order = np.random.default_rng(0).permutation(400)
    reordered = open_dataset(tmp_path, 0.5)[make_spec([rows[i] for i in order], [epochs[i] for i in order])]
    assert torch.equal(reordered.latents, half.latents[torch.from_numpy(order)])


def check(folder: Path, rate: float) -> tuple[list[tuple[str, str]], str]:
    """Return the key and cure of each problem, and the warnings."""
    lines = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    config = Config.model_validate(
        {
            "run": {"dir": folder / "runs"},
            "data": {"metadata": [folder / "metadata.json"], "flip_rate": rate},
            "cache": {"dir": folder},
        }
    )
    _, problems = open_training_set(config)
    logger.remove(sink)
    return [(problem.key, problem.cure) for problem in problems], "".join(lines)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("shards", [True, False])
def test_samples_without_flipped_latents_are_counted(tmp_path, shards, listed):
    fill_cache(tmp_path, [True, False, False], shards=shards, listed=listed)
    problems, warnings = check(tmp_path, 0.5)
    assert problems == [] and "2 of 3 samples have no latents of the mirrored image" in warnings
    problems, warnings = check(tmp_path, 0.0)
    assert problems == [] and "mirrored" not in warnings
    fill_cache(tmp_path / "none", [False, False], listed=listed)
    [(key, cure)], _ = check(tmp_path / "none", 0.5)
    assert key == "data.flip_rate" and "cache.flip: true" in cure


def test_flips_of_unlisted_latents_are_read_from_their_headers(tmp_path):
    fill_cache(tmp_path, [True, False])
    for part in (tmp_path / "manifest").iterdir():
        part.unlink()
    assert open_dataset(tmp_path, 1.0).index.arrow_column("flipped").to_pylist() == [True, False]
    (tmp_path / "s0.npz").write_bytes(pack_latents(make_sample(0, True), "bfloat16"))
    (tmp_path / "new.npz").touch()  # the folder changed, so it is searched again
    assert open_dataset(tmp_path, 1.0).index.arrow_column("flipped").to_pylist() == [True, False]
