"""The doctor names images that have changed since their latents were made."""

import os
from pathlib import Path

from cache_samples import run_job, write_settings
from PIL import Image

from sdxl_trainer.configs.load import load_config
from sdxl_trainer.data.checks.training_set import open_training_set
from sdxl_trainer.train.doctor.changed_images import examine_changed_images


def test_changed_images_are_named(tmp_path: Path, tiny_folder: Path) -> None:
    images = [tmp_path / "images" / f"{name}.png" for name in "abcd"]
    images[0].parent.mkdir()
    for shade, image in enumerate(images):
        Image.new("RGB", (96, 96), (shade, 0, 0)).save(image)
        image.with_suffix(".txt").write_text("a shade")
    settings = write_settings(tmp_path, tiny_folder / "model")
    assert run_job(settings) == 0
    config, _ = load_config(settings)
    samples, problems = open_training_set(config)
    assert samples is not None and problems == []
    images[0].unlink()  # training needs no images
    os.utime(images[1], (1, 1))  # a copy that kept its bytes
    assert list(examine_changed_images(config, samples)) == []
    Image.new("RGB", (96, 96), (9, 9, 9)).save(images[2])
    (finding,) = examine_changed_images(config, samples)
    assert finding.is_note and "1 of 4 images looked at have changed" in finding.detail
    assert finding.detail.endswith(str(images[2])) and "launch/cache.sh" in finding.cure
