"""Training on cached text: the same losses as with text encoders, which no step loads."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cache_samples import run_job
from programs import run_program
from tiny_tokenizers import load_tiny_tokenizers

from sdxl_trainer.cache.models.encoders import TextEncoders
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.data.formats.manifest import read_latest
from sdxl_trainer.data.index.index import open_record_index, open_sample_index
from sdxl_trainer.data.loading.dataset import LatentDataset, SampleSettings
from sdxl_trainer.data.loading.micro_batch import MicroSpec
from sdxl_trainer.data.metadata.records import parse_record
from sdxl_trainer.data.text.cached_text import CachedText
from sdxl_trainer.data.text.captions import CaptionSettings
from sdxl_trainer.data.text.variants import CaptionVariants
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.train.networks.conditioning import LazyTextConditioner
from sdxl_trainer.train.report.metrics import read_metrics
from sdxl_trainer.train.run.checks import verify_run
from sdxl_trainer.train.sampling.job import load_image_generator
from sdxl_trainer.train.sampling.pipeline import generate_images
from sdxl_trainer.train.sampling.prompts import load_prompts

TOKENIZERS = load_tiny_tokenizers()
SHUFFLED = ("data.caption.shuffle=true", 'data.caption.separator=" "', "cache.text_variants=4")


@pytest.fixture(scope="module")
def texted(cached_folder, tmp_path_factory) -> Path:
    """Write a settings file for the samples of `cached_folder`, with cached text added to a copy of their latents."""
    folder = tmp_path_factory.mktemp("texted")
    shutil.copytree(cached_folder / "latents", folder / "latents")
    config = yaml.safe_load((cached_folder / "tiny.yaml").read_text())
    config["cache"] |= {"dir": str(folder / "latents"), "text": True}
    config["run"]["dir"] = str(folder / "runs")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert run_job(folder / "tiny.yaml") == 0  # the images are not needed
    return folder / "tiny.yaml"


def open_dataset(settings: Path, caption: CaptionSettings, variants: int) -> LatentDataset:
    config, _ = load_config(settings)
    folder = config.cache.dir
    assert folder is not None
    index = open_sample_index(folder, open_record_index(folder, config.data.metadata, []))
    text = CachedText(folder, CaptionVariants(caption, variants), seed=3)
    return LatentDataset(index, folder, TOKENIZERS, SampleSettings(seed=3, max_tokens=75, caption=caption), text=text)


def make_spec(dataset: LatentDataset, epoch: int) -> MicroSpec:
    """Build the spec of a micro batch: two samples of one bucket."""
    row = dataset.index.row(0)
    bucket = (row["bucket_width"], row["bucket_height"])
    same = np.flatnonzero(
        (dataset.index.column("bucket_width") == bucket[0]) & (dataset.index.column("bucket_height") == bucket[1])
    )[:2]
    return MicroSpec(bucket=bucket, rows=same, epochs=np.array([epoch, epoch]), positions=np.arange(2))


def test_losses_are_those_without_cached_text(texted, one_rank):
    run_program("train/main.py", "--cfg", texted, "run.name=cached", "sample.prompts=[]", "train.max_steps=8")
    found, wanted = (
        [line["loss"] for line in read_metrics(run / "logs" / "metrics.jsonl")]
        for run in (texted.parent / "runs" / "cached", one_rank)
    )
    assert len(found) == 8
    np.testing.assert_allclose(found, wanted[:8], rtol=0, atol=1e-5)  # with a tenth of the captions dropped
    exported = next((texted.parent / "runs" / "cached" / "models").iterdir())
    difference = exported.stat().st_size - next((one_rank / "models").iterdir()).stat().st_size
    assert abs(difference) < 100  # the text encoders are in both files; the metadata differ in the run's name


def test_encoders_are_loaded_on_first_use():
    loaded = []

    def load():
        loaded.append(1)
        return TextEncoders(torch.nn.Linear(1, 1), torch.nn.Linear(2, 2))

    conditioner = LazyTextConditioner(load)
    text = {"hidden": torch.zeros(1, 77, 3), "hidden_2": torch.zeros(1, 77, 4), "pooled": torch.zeros(1, 4)}
    batch = type("Batch", (), {"text": text})()
    assert conditioner.build_inputs(batch, torch.device("cpu")).keys() == text.keys() and not loaded
    encoder, encoder_2 = conditioner.encoders
    assert encoder_2.in_features == 2 and encoder.in_features == 1 and len(loaded) == 1
    conditioner.release()
    conditioner.release()
    assert conditioner.encoders.encoder.in_features == 1 and len(loaded) == 2


def test_prompts_are_encoded_once_and_without_the_encoders_beside_the_unet(cached_folder: Path):
    words = ["sample.num_inference_steps=2", "sample.width_px=64", "sample.height_px=64"]
    config, problems = load_config(cached_folder / "tiny.yaml", words)
    assert problems == []
    prompts, _ = load_prompts(config.sample.model_copy(update={"prompts": ["a cat", "a dog"]}), config.objective)
    generator, loads = load_image_generator(config, None, torch.device("cpu")), []
    encoders, ranks = generator.conditioner.encoders, Ranks(0, 0, 1, torch.device("cpu"))
    expected = generate_images(generator, prompts, ranks)

    def load() -> TextEncoders:
        loads.append(1)
        return encoders

    conditioner = LazyTextConditioner(load)
    generator.unet.register_forward_pre_hook(lambda *_: loads.append(conditioner._encoders))
    lazy = replace(generator, conditioner=conditioner)
    for _ in range(2):
        images = generate_images(lazy, prompts, ranks)
        assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    assert loads == [1] + [None] * 8


def test_variants_are_drawn_by_epoch_and_dropped_captions_are_empty(texted, tmp_path):
    shutil.copytree(texted.parent / "latents", tmp_path / "latents")
    words = (f"cache.dir={tmp_path / 'latents'}", *SHUFFLED)
    assert run_job(texted, *words) == 0
    settings = tmp_path / "tiny.yaml"
    settings.write_text(texted.read_text().replace(str(texted.parent / "latents"), str(tmp_path / "latents")))
    caption = CaptionSettings(shuffle=True, separator=" ", dropout_rate=0.3)
    dataset = open_dataset(settings, caption, 4)
    batches = [dataset[make_spec(dataset, epoch)] for epoch in range(30)]
    assert all(not batch.bad and batch.input_ids.shape == (2, 0, 77) for batch in batches)
    empty = torch.from_numpy(dataset.text.empty.hidden_1)
    first = [batch.text["hidden"][0] for batch in batches]
    dropped = sum(torch.equal(hidden, empty) for hidden in first)
    different = {hidden.numpy().tobytes() for hidden in first}
    assert 4 <= dropped <= 16 and len(different) == 5  # four variants and the empty caption
    again = dataset[make_spec(dataset, 7)]
    assert all(torch.equal(again.text[name], batches[7].text[name]) for name in again.text)
    # The same samples lose their caption as when text is encoded during training.
    plain = replace(caption, shuffle=False)
    dropping = CachedText(dataset.cache_folder, CaptionVariants(plain, 1), seed=3)
    shaped = LatentDataset(
        dataset.index, dataset.cache_folder, TOKENIZERS, SampleSettings(seed=3, max_tokens=75, caption=plain)
    )
    row = dataset.index.row(0)
    record = parse_record(row)
    for epoch in range(30):
        assert dropping._is_dropped(record, epoch, 0) == (shaped.draw_caption(row, 0, epoch, 0).text == "")


def test_a_sample_whose_caption_or_text_is_another_is_left_out(texted, tmp_path):
    shutil.copytree(texted.parent / "latents", tmp_path / "latents")
    settings = tmp_path / "tiny.yaml"
    settings.write_text(texted.read_text().replace(str(texted.parent / "latents"), str(tmp_path / "latents")))
    dataset = open_dataset(settings, CaptionSettings(), 1)
    spec = make_spec(dataset, 0)
    key = dataset.index.row(int(spec.rows[0]))["key"]
    (tmp_path / "latents" / f"{key}_te_outputs.npz").write_bytes(b"torn")
    batch = dataset[spec]
    assert [bad[0] for bad in batch.bad] == [key] and "not a readable npz file" in batch.bad[0][1]
    assert batch.weights.tolist() == [0, 1] and batch.text["hidden"].shape[1] == 77
    other = open_dataset(settings, CaptionSettings(prefix="edited"), 1)[spec]
    assert len(other.bad) == 2 and "its captions have changed since its text was cached" in other.bad[0][1]


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (SHUFFLED, "outdated in 24 of 24 checked samples"),
        (["data.caption.shuffle=true"], "would keep one random form of each caption"),
        (["data.max_tokens=150"], "24 have text made with max_tokens 75"),
        (["data.caption.weighted=true"], "24 have text made with weighted False"),
        (["cache.dtype=float16"], "24 have text made with dtype float32"),
        (["cache.on_missing=encode"], "encodes latents without text"),
        (["optim.text_encoder_2_lr=1e-6"], "trains a text encoder, which does not run with cache.text"),
        (["data.caption.prefix=a photo of"], "its captions have changed since its text was cached"),
    ],
)
def test_text_that_is_not_what_the_settings_say_is_refused(texted, words, rule):
    config, problems = load_config(texted, words)
    _, found = verify_run(config, 1)
    assert problems == [] and len(found) == 1 and rule in str(found[0])


def test_missing_text_is_refused(texted, cached_folder, tmp_path):
    config, _ = load_config(texted, [f"cache.dir={cached_folder / 'latents'}"])
    assert "holds no cached text" in str(verify_run(config, 1)[1][0])
    shutil.copytree(texted.parent / "latents", tmp_path / "latents")
    part = next(part for part in (tmp_path / "latents" / "manifest").glob("part-*") if b'"text"' in part.read_bytes())
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(line for line in lines if b'"text"' not in line) + b"".join(lines[-3:]))
    config, _ = load_config(texted, [f"cache.dir={tmp_path / 'latents'}"])
    listed = sum(entry.text is not None for entry in read_latest(tmp_path / "latents").values())
    assert f"of 24 samples, {24 - listed} have no cached text" in str(verify_run(config, 1)[1][0])
