"""The cache job's estimate of its duration."""

import json
import re
from dataclasses import dataclass

import numpy as np
import pytest
from cache_samples import RULE, run_job, write_settings
from PIL import Image

from sdxl_trainer.cache.encode.decoder import WorkItem
from sdxl_trainer.cache.encode.estimate import Estimate, time_encoding, try_decoding
from sdxl_trainer.cache.encode.latent_encoder import EncodedBatch
from sdxl_trainer.configs.problems import describe_seconds
from sdxl_trainer.data.formats.manifest import read_latest


@dataclass
class SteadyDevice:
    """Device that takes 1 s to warm up and 40 ms for each megapixel, by its own clock."""

    now: float = 0.0
    warm: bool = False
    shape: tuple[int, ...] = ()

    def clock(self) -> float:
        return self.now

    def launch(self, pixels: np.ndarray, keys: list[str]) -> "SteadyDevice":
        assert len(keys) == len(pixels)
        self.shape = pixels.shape
        self.now += 0.04 * pixels[..., 0].size / 1e6 + (0.0 if self.warm else 1.0)
        self.warm = True
        return self

    def wait(self) -> EncodedBatch:
        return EncodedBatch(np.zeros(0))


@pytest.mark.parametrize(("side", "trial_side"), [(1024, 512), (1000, 448), (100, 64)])
def test_the_time_per_pixel_excludes_the_first_batch(side, trial_side):
    device = SteadyDevice()
    assert time_encoding(device, side, 3, device.clock) == pytest.approx(0.04e-6)
    assert device.shape == (3, trial_side, trial_side, 3)


def test_decoding_is_timed_on_evenly_spaced_images_and_bad_ones_are_named(tmp_path):
    ticks = iter((5.0, 13.0))
    items = []
    for number in range(100):
        path = tmp_path / f"{number}.png"
        items.append(WorkItem(key=path.stem, image_path=str(path), file=f"{number}.npz"))
        if number % 25 == 0:  # the images of the trial; one of them is broken
            Image.new("RGB", (128, 128)).save(path) if number else path.write_bytes(b"no image")
        else:
            path.symlink_to(path)  # reading it would raise an unexpected error
    trial = try_decoding(items, RULE, 4, 1, lambda: next(ticks))
    assert (trial.seconds, trial.num_images) == (8, 4)
    assert [reason.partition(": ")[0] for reason in trial.bad] == [str(tmp_path / "0.png")]


def test_the_duration_is_that_of_the_slower_of_decoding_and_encoding():
    assert Estimate(10, 3, 4).seconds == 10
    assert Estimate(6, 3, 4).seconds == 7


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (89.0, "89 s"),
        (91, "2 min"),
        (3569, "59 min"),
        (3600, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (172_800 + 4 * 3600, "2 d 4 h"),
    ],
)
def test_durations_as_text(seconds, text):
    assert describe_seconds(seconds) == text


@pytest.mark.parametrize("text", [False, True])
def test_the_estimate_is_logged_before_the_start_and_by_a_dry_run(tmp_path, tiny_folder, capsys, text):
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (128, 128)).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text("an image")
    settings = write_settings(tmp_path, tiny_folder / "model", text=text)
    pattern = r"estimated time: \d+ s \(images \d+ s" + (r", captions \d+ s;" if text else ";")
    assert run_job(settings, "--dry-run") == 0
    output = capsys.readouterr().err
    assert re.search(pattern, output) and output.rstrip().endswith("nothing was written")
    assert sorted(file.name for file in (tmp_path / "latents").rglob("*") if file.suffix in (".json", ".npz")) == []
    assert run_job(settings) == 0
    output = capsys.readouterr().err
    assert re.search(pattern, output)
    assert len(read_latest(tmp_path / "latents")) == 2
    assert run_job(settings) == 0
    assert "estimated time" not in capsys.readouterr().err  # nothing to encode


def test_a_dry_run_opens_images_and_fails_where_the_job_would(tmp_path, tiny_folder, capsys):
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (128, 128)).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text("an image")
    settings = write_settings(tmp_path, tiny_folder / "model")
    assert run_job(settings, "--dry-run") == 0
    assert "opened 6 of the 6 images to encode: all can be used" in capsys.readouterr().err
    (tmp_path / "images" / "3.png").write_bytes(b"no image")
    assert run_job(settings, "--dry-run") == 0  # one or two images of a small set
    printed = capsys.readouterr().err
    assert "1 image of 6 cannot be used; the job will skip such images" in printed and "3.png: " in printed
    assert run_job(settings, "--dry-run", "data.max_bad_fraction=0") == 1
    printed = capsys.readouterr().err
    assert "the job would fail" in printed and "data.image_dirs" in printed and "3.png: " in printed
    assert "nothing was written" not in printed
    assert run_job(settings, "data.max_bad_fraction=0") == 1
    # The image is not tried again, and counts.
    assert run_job(settings, "--dry-run", "data.max_bad_fraction=0") == 1
    assert "1 image of 6 cannot be used, more than" in capsys.readouterr().err
    assert run_job(settings, "--dry-run") == run_job(settings) == 0


def test_a_dry_run_of_records_whose_images_are_gone_fails(tmp_path, tiny_folder, capsys):
    metadata = tmp_path / "gone.json"
    records = {f"{number}": {"image_path": f"gone/{number}.jpg", "caption": "a"} for number in range(2000)}
    metadata.write_text(json.dumps(records))
    settings = write_settings(tmp_path, tiny_folder / "model", metadata)
    assert run_job(settings, "--dry-run") == 1
    printed = capsys.readouterr().err
    assert "512 of 512 images that were opened, of 2,000 to encode, cannot be used" in printed
    assert printed.count("No such file") == 5 and "... and 507 more" in printed
