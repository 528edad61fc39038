"""The VAE of a cache: its channels in every form of latents, and the comparison with the VAE of the settings."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_samples import run_job, write_settings
from PIL import Image
from tiny_tokenizers import load_tiny_tokenizers

from sdxl_trainer.cache.encode.cache_vae import check_cache_vae, describe_vae
from sdxl_trainer.cache.encode.on_the_fly import build_missing_latent_encoder, fill_missing_latents
from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.cache.models.vae import load_vae
from sdxl_trainer.cache.preview.contact_sheet import PreviewSample, decode_samples
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import ModelConfig
from sdxl_trainer.data.checks.latent_files import check_latent_channels
from sdxl_trainer.data.checks.records import open_checked_records
from sdxl_trainer.data.formats.latents import read_latents
from sdxl_trainer.data.formats.manifest import Identity, read_identity, read_latest
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.images.demo_set import draw_demo_set
from sdxl_trainer.data.index.index import Index, open_sample_index
from sdxl_trainer.data.index.selection import build_latent_selection
from sdxl_trainer.data.loading.loader import build_dataset
from sdxl_trainer.data.loading.micro_batch import MicroSpec
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.train.tiny.build import load_wide_vae

CHANNELS = 16
JOB = ("cache.posterior=moments", "cache.flip=true", "cache.dtype=float32")


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tiny_folder) -> Path:
    """Return a folder with six images, a VAE of 16 channels (`vae`), settings, and a cache filled with that VAE."""
    folder = tmp_path_factory.mktemp("wide")
    load_wide_vae(CHANNELS).save_pretrained(folder / "vae")
    settings = write_settings(folder, tiny_folder / "model", draw_demo_set(folder / "data", 6))
    settings.write_text(settings.read_text().replace("model:\n", "model:\n  adapt_channels: true\n"))
    assert run_job(settings, f"model.vae={folder / 'vae'}", *JOB) == 0
    return folder


def open_samples(folder: Path, *words: str) -> tuple[Index, ModelConfig]:
    config, problems = load_config(folder / "settings.yaml", [f"model.vae={folder / 'vae'}", *words])
    records, found = open_checked_records(config)
    assert records is not None and problems == found == [] and config.cache.dir is not None
    return open_sample_index(config.cache.dir, records, build_latent_selection(config)), config.model


def list_problems(cache: Path, model: ModelConfig) -> list[Problem]:
    return list(check_cache_vae(cache, model, describe_vae(None, model)))


def test_latents_of_sixteen_channels_are_the_vaes(wide):
    index, model = open_samples(wide)
    vae: Any = load_vae(ModelSource(wide), model)
    identity = read_identity(wide / "latents")
    assert identity is not None and identity["latent_channels"] == CHANNELS
    for row in map(index.row, range(len(index))):
        sample = read_latents(wide / "latents" / row["file"], (row["bucket_width"], row["bucket_height"]))
        image = np.asarray(Image.open(row["image_path"]).convert("RGB"))
        if image.shape[:2] != (row["bucket_height"], row["bucket_width"]):
            continue
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        for array, shown in ((sample.latents, pixels), (sample.flipped, pixels.flip(3))):
            assert array is not None and array.shape == (CHANNELS, image.shape[0] // 8, image.shape[1] // 8)
            expected = vae.encode(torch.cat([shown, shown])).latent_dist
            torch.testing.assert_close(torch.from_numpy(array), expected.mean[0], rtol=1e-4, atol=1e-4)
        assert sample.std is not None and sample.std.shape == sample.latents.shape
        drawn = PreviewSample(
            key="a", caption="", note="", latents=torch.from_numpy(sample.latents), pixels=None, bad=None
        )
        [(_, decoded)] = decode_samples([drawn], ModelSource(wide), model)
        assert decoded.shape == image.shape


def test_images_encoded_while_training_have_the_latents_of_the_cache(wide, tmp_path):
    words = [f"cache.dir={tmp_path}", "cache.on_missing=encode", *JOB[1:]]
    index, model = open_samples(wide, *words)
    assert index.summary.num_uncached == 6
    config, _ = load_config(wide / "settings.yaml", [f"model.vae={wide / 'vae'}", *words])
    dataset = build_dataset(config, index, load_tiny_tokenizers(), None, CHANNELS)
    bucket = Size(int(index.column("bucket_width")[0]), int(index.column("bucket_height")[0]))
    spec = MicroSpec(bucket=bucket, rows=np.array([0]), epochs=np.array([0]), positions=np.array([0]))
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    encoder = build_missing_latent_encoder(config, ModelSource(wide), dataset, ranks)
    [batch] = fill_missing_latents(iter([dataset[spec]]), encoder)
    assert batch.latents.shape == (1, CHANNELS, bucket.height // 8, bucket.width // 8) and batch.bad == []
    stored = read_latents(tmp_path / index.row(0)["file"], bucket)
    np.testing.assert_array_equal(stored.latents, batch.latents[0].numpy())
    identity = read_identity(tmp_path)
    assert identity is not None and identity["latent_channels"] == CHANNELS
    assert list_problems(tmp_path, model) == []


def test_packing_verifying_and_adopting_keep_the_channels(wide, tmp_path, capsys):
    shutil.copytree(wide / "latents", tmp_path / "latents")
    words = (f"model.vae={wide / 'vae'}", f"cache.dir={tmp_path / 'latents'}", *JOB)
    for command in ("--pack", "--verify", "--unpack", "--verify"):
        assert run_job(wide / "settings.yaml", command, *words) == 0, command
    for name in ("cache.json", "manifest"):  # as if another program had made the files
        path = tmp_path / "latents" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run_job(wide / "settings.yaml", "--adopt", *words) == 0
    assert len(read_latest(tmp_path / "latents")) == 6
    shutil.rmtree(tmp_path / "latents" / "manifest")
    (tmp_path / "latents" / "cache.json").unlink()
    capsys.readouterr()
    assert run_job(wide / "settings.yaml", "--adopt", *words[1:]) == 1  # the model's own VAE has 4 channels
    assert f"has {CHANNELS} latent channels, and the VAE of the settings gives 4" in capsys.readouterr().err


def test_a_cache_of_another_vae_ends_with_status_2(wide, tmp_path, capsys):
    shutil.copytree(wide / "latents", tmp_path / "latents")
    words = (f"cache.dir={tmp_path / 'latents'}", *JOB)
    before = (tmp_path / "latents" / "cache.json").read_bytes()
    assert run_job(wide / "settings.yaml", *words) == 2
    message = capsys.readouterr().err
    assert f"the VAE {wide / 'vae'} (16 channels, padding zeros)" in message and "--repair" in message
    assert (tmp_path / "latents" / "cache.json").read_bytes() == before
    assert run_job(wide / "settings.yaml", "--repair", *words) == 0  # that was asked for
    assert {len(read_latents(file).latents) for file in (tmp_path / "latents").glob("*.npz")} == {4}
    assert "latent_channels" not in json.loads((tmp_path / "latents" / "cache.json").read_bytes())


def test_weights_are_read_only_if_files_differ(wide, tmp_path):
    """The comparison at a start reads sizes and times; a copy of the VAE is hashed."""
    shutil.copytree(wide / "vae", tmp_path / "vae")
    copied = ModelConfig(path="x", vae=str(tmp_path / "vae"))
    assert list_problems(wide / "latents", copied) == []  # the same weights at another place
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 0x40  # of the last weight
    weights.write_bytes(content)
    [problem] = list_problems(wide / "latents", copied)
    assert problem.key == "cache.dir" and f"the settings have {tmp_path / 'vae'}" in problem.rule
    # With size and time of the recorded files nothing is read, so the damage is not seen.
    shutil.copytree(wide / "latents", tmp_path / "latents")
    file = tmp_path / "latents" / "cache.json"
    fields = json.loads(file.read_bytes())
    status = os.stat(weights)
    fields["vae"]["files"] = [[str(weights.absolute()), status.st_size, status.st_mtime_ns]]
    file.write_text(json.dumps(fields))
    assert list_problems(tmp_path / "latents", copied) == []


def test_padding_channels_and_foreign_caches_are_told_apart(wide, tmp_path):
    vae = str(wide / "vae")
    [problem] = list_problems(wide / "latents", ModelConfig(path="x", vae=vae, vae_padding="reflect"))
    assert "padding zeros), and the settings have" in problem.rule and "padding reflect)" in problem.rule
    assert list_problems(tmp_path, ModelConfig(path="x", vae=vae)) == []  # no cache.json: another program's
    index, _ = open_samples(wide)
    assert list(check_latent_channels(index, wide / "latents", CHANNELS)) == []
    [problem] = check_latent_channels(index, wide / "latents", 4)
    assert "holds latents of 16 channels, and the VAE of the settings gives 4" in problem.rule
    assert "6 of 6 that were looked at" in problem.rule


def test_padding_and_channels_are_part_of_the_identity_and_older_names_stay():
    fields: dict[str, Any] = {
        "vae_sha256": "ab",
        "vae_precision": "fp32",
        "dtype": "float32",
        "posterior": "sample",
        "flip": False,
        "resolution_px": 1024,
        "min_bucket_px": 256,
        "max_bucket_px": 2048,
        "bucket_step_px": 64,
        "no_upscale": False,
    }
    plain = Identity(**fields)
    assert plain.list_fields().keys() == fields.keys() | {"crop", "format_version"}
    others = [Identity(**fields, vae_padding="reflect"), Identity(**fields, latent_channels=16)]
    assert len({plain.name, *(other.name for other in others)}) == 3
    assert others[0].list_fields()["vae_padding"] == "reflect" and others[1].list_fields()["latent_channels"] == 16
