"""The preview: the counts of training, and its samples cropped and flipped."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_samples import run_job, write_settings
from PIL import Image
from rich.console import Console

from sdxl_trainer.cache.models.source import resolve_model
from sdxl_trainer.cache.preview import contact_sheet, preview, program
from sdxl_trainer.cache.preview.contact_sheet import CELL_PX, PreviewSample, decode_samples, draw_sheet
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.images.demo_set import draw_demo_set

NUM_IMAGES = 10
CAPTIONS = ("data.caption.shuffle=true", "data.flip_rate=1.0", "cache.flip=true", "data.max_tokens=75")


@pytest.fixture(scope="module")
def filled(tmp_path_factory, tiny_folder) -> Path:
    """Fill a cache of ten demo images, of which one is not encoded and one has truncated latents."""
    folder = tmp_path_factory.mktemp("filled")
    settings = write_settings(folder, tiny_folder / "model", draw_demo_set(folder / "data", num_images=NUM_IMAGES))
    metadata = folder / "data" / "metadata.json"
    records = json.loads(metadata.read_text())
    first, last = list(records)[0], list(records)[-1]
    for record in records.values():
        record["caption"] = "red, green, blue, circle, star, square"
    records[first]["caption"] = ", ".join(["red"] * 60)
    metadata.write_text(json.dumps({key: record for key, record in records.items() if key != last}))
    assert run_job(settings, *CAPTIONS) == 0
    metadata.write_text(json.dumps(records))
    truncated = folder / "latents" / f"{list(records)[1]}.npz"
    truncated.write_bytes(truncated.read_bytes()[:999])
    return folder


def run(filled: Path, *words: str, expect: int = 0, images: int = 0) -> None:
    arguments = ["--cfg", str(filled / "settings.yaml"), "--images", str(images), *CAPTIONS, *words]
    arguments += [] if "--out" in words else ["--out", str(filled / "out" / "preview")]
    assert program.main(arguments) == expect


def test_a_dropped_caption_is_not_shown_as_an_empty_one(filled, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    run(filled, "data.caption.dropout_rate=1.0", "data.source_weights=[3]")
    printed = capsys.readouterr().out
    assert "repeats: 9 samples, 27 an epoch" in printed
    assert "(dropped by design)" in printed and "(empty)" not in printed


def test_the_counts_are_those_of_training(filled, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    run(filled)
    printed = capsys.readouterr().out
    rows = {cells[1].strip(): cells[2].strip() for line in printed.splitlines() if len(cells := line.split("│")) > 3}
    assert rows["records"] == "10" and rows["with latents"] == "9" and rows["skipped: no latents"] == "1"
    assert rows["bad among 9 verified"] == "1" and "9 samples" in printed
    sizes = {key: count for key, count in rows.items() if "x" in key and key[0].isdigit()}
    assert sizes and "has 999 bytes instead of" in printed
    # Eight captions have 11 tokens, and one is cut off.
    title = "longer than data.max_tokens = 75: 1 for encoder 1, 1 for encoder 2"
    assert rows["1-20"] == "8" and title in " ".join(printed.split())
    drawn = [line.split("│")[2:5] for line in printed.splitlines() if "square" in line]
    assert any(len({text.strip() for text in texts}) > 1 for texts in drawn)  # shuffled anew each epoch
    written = sorted(path.name for path in (filled / "out").iterdir())
    assert not (filled / "runs").exists() and written == ["preview.html", "preview.jsonl"]


def test_before_the_cache_the_sheet_shows_images_of_every_bucket(filled, tmp_path, capsys):
    run(filled, f"cache.dir={tmp_path / 'none'}", "--out", str(tmp_path / "preview.png"), images=6)
    printed = capsys.readouterr().out
    assert "4 buckets of 10 images whose size is known" in printed and "no latents yet: bash launch/cache.sh" in printed
    assert "6 samples: " in printed and Image.open(tmp_path / "preview.png").width > 4 * CELL_PX


def test_the_contact_sheet_shows_samples_as_trained(filled, tmp_path, capsys):
    file = tmp_path / "deep" / "sheet.png"
    run(filled, "--out", str(file), images=6)
    sheet = Image.open(file)
    assert sheet.width > 4 * CELL_PX and sheet.height > 2 * CELL_PX
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 50
    assert "6 samples" in capsys.readouterr().out


def test_captions_are_shown_before_their_text_is_cached(filled, tmp_path, capsys):
    run(filled, "cache.text=true", "cache.text_variants=2", "--out", str(tmp_path / "sheet.png"), images=2)
    assert "2 samples" in capsys.readouterr().out


def read_samples(filled: Path, *words: str) -> tuple[Config, dict[str, tuple[PreviewSample, np.ndarray]]]:
    """Return the settings, and each sample with its pixels on the contact sheet, by key."""
    config, _ = load_config(filled / "settings.yaml", [*CAPTIONS, *words])
    console = Console(record=True)
    shown = {}

    def keep(decoded):
        shown.update({sample.key: (sample, pixels) for sample, pixels in decoded})
        return draw_sheet(decoded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contact_sheet, "draw_sheet", keep)
        options = Namespace(out=filled / "sheet.png", images=60, examine=1, enlarged=1.5, cropped=25.0)
        preview.show_preview(config, [], options, console)
    return config, shown


def test_flipped_samples_are_mirrored_and_uncached_samples_show_their_image(filled, tmp_path):
    shutil.copytree(filled / "latents", tmp_path / "latents")
    words = (f"cache.dir={tmp_path / 'latents'}", "train.global_batch_size=1", "cache.on_missing=encode")
    _, plain = read_samples(filled, *words, "data.flip_rate=0.0")
    _, flipped = read_samples(filled, *words)
    assert set(plain) == set(flipped) and len(plain) == NUM_IMAGES
    bad = [key for key, (sample, _) in plain.items() if sample.bad]
    new = [key for key, (sample, _) in plain.items() if sample.pixels is not None]
    assert len(bad) == len(new) == 1
    for key in set(plain) - {*bad, *new}:
        difference = np.abs(plain[key][1][:, ::-1].astype(int) - flipped[key][1]).mean()
        assert difference < 12, key
    image = Image.open(next((filled / "data" / "images").glob(f"{new[0]}.*"))).convert("RGB")
    assert abs(np.asarray(image).mean() - plain[new[0]][1].mean()) < 12  # pixels that no VAE has encoded


def test_the_vae_is_loaded_only_for_latents(filled, monkeypatch):
    config, _ = load_config(filled / "settings.yaml", [])
    uncached = PreviewSample(
        key="a", caption="b", note="", latents=torch.zeros(4, 8, 8), pixels=np.zeros((64, 64, 3), np.uint8), bad=None
    )
    monkeypatch.setattr("sdxl_trainer.cache.preview.contact_sheet.load_vae", None)
    [(_, pixels)] = decode_samples([uncached], resolve_model(config.model), config.model)
    assert pixels.shape == (64, 64, 3)
    run(filled)
