"""Mask files: found beside the images or in a folder, cropped like the image, stored with its latents, and learnt."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_samples import BUCKETS, RULE, run_job, write_settings
from PIL import Image

from sdxl_trainer.cache.encode.on_the_fly import build_missing_latent_encoder
from sdxl_trainer.cache.models.source import resolve_model
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.data.checks.left_out import leave_out_bad_latents
from sdxl_trainer.data.checks.training_set import open_training_set
from sdxl_trainer.data.formats.latents import read_latents
from sdxl_trainer.data.formats.manifest import read_identity, read_latest
from sdxl_trainer.data.images.masks import BadMaskError, MaskFinder, add_mask, check_masks
from sdxl_trainer.data.images.transforms import PreparedImage, prepare_image
from sdxl_trainer.data.index.index import Index, open_record_index, open_sample_index
from sdxl_trainer.launch.distributed import Ranks
from sdxl_trainer.train.objective.diffusion import LatentStatistics
from sdxl_trainer.train.objective.objective import Objective

ENDING = "-masklabel.png"
WIDE = (300, 200)  # size of an image, which is resized to 160x107 and cropped to 160x96


def save(path: Path, content: np.ndarray | int, size: tuple[int, int] = WIDE, **options) -> Path:
    """Save a grey image with the given values [H, W], or with one value everywhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.full((size[1], size[0]), content, np.uint8) if isinstance(content, int) else content
    Image.fromarray(grey.astype(np.uint8)).save(path, **options)
    return path


def draw_ramp(width: int, height: int) -> np.ndarray:
    """Return values [height, width] that rise from 0 at the left edge to 255 at the right edge."""
    return np.broadcast_to((np.arange(width) + 0.5) / width * 255, (height, width))


def prepare(path: Path, mask: Path) -> PreparedImage:
    return add_mask(prepare_image(path, RULE, BUCKETS), path, mask)


def get_mask(path: Path, mask: Path) -> np.ndarray:
    prepared = prepare(path, mask)
    assert prepared.mask is not None and prepared.mask.dtype == np.uint8
    assert prepared.mask.shape == prepared.pixels.shape[:2]
    return prepared.mask.astype(int)


def list_keys(index: Index) -> list[str]:
    return index.arrow_column("key").to_pylist()


def test_masks_are_found_and_are_no_images(tmp_path):
    images, mask_folder = tmp_path / "images", tmp_path / "images" / "masks"
    image_files = [save(images / name, 9) for name in ("a.jpg", "b.png", "c.png", "sub/d.png")]
    beside = [save(images / name, 9) for name in (f"a{ENDING}", f"sub/d{ENDING}", f"lonely{ENDING}")]
    inside = [save(mask_folder / name, 9) for name in ("b.png", "deep/c.webp")]
    paths = [str(image) for image in image_files]
    assert list(MaskFinder(ENDING).find(paths)) == [str(beside[0]), None, None, str(beside[1])]
    assert list(MaskFinder(str(mask_folder)).find(paths)) == [None, str(inside[0]), str(inside[1]), None]
    assert list_keys(open_record_index(tmp_path / "1", [], [images / "sub"])) == ["d-masklabel", "d"]
    assert list_keys(open_record_index(tmp_path / "1", [], [images / "sub"], masks=ENDING)) == ["d"]
    for file in beside:
        file.unlink()
    assert list_keys(open_record_index(tmp_path / "2", [], [images], masks=str(mask_folder))) == ["a", "b", "c", "d"]
    metadata = tmp_path / "m.json"
    metadata.write_text(json.dumps({"b": {"caption": "x"}}))
    index = open_record_index(tmp_path / "3", [metadata], [images], masks=str(mask_folder))
    assert index.row(0)["image_path"] == str(images / "b.png")  # not ambiguous, although the mask has the same name


def test_an_invalid_setting_of_masks_is_refused(tmp_path):
    assert list(check_masks(None)) == list(check_masks(ENDING)) == []
    (tmp_path / "empty").mkdir()
    save(tmp_path / "masks" / "a.png", 9)
    assert list(check_masks(str(tmp_path / "masks"))) == []
    save(tmp_path / "masks" / "old" / "a.jpg", 9)
    for masks, rule in (
        (".png", "is not a folder"),
        (str(tmp_path / "empty"), "holds no images"),
        (str(tmp_path / "masks"), "two masks with the same stem"),
    ):
        problem, *others = check_masks(masks)
        assert (problem.key, problem.value, others) == ("data.masks", masks, []) and rule in problem.rule


@pytest.mark.parametrize("scale", [1, 2, 0.5, 0.25])
def test_a_mask_of_any_scale_is_cropped_like_its_image(tmp_path, scale):
    image = save(tmp_path / "a.png", 9)
    placement = prepare_image(image, RULE, BUCKETS).placement
    assert (placement.resized, placement.bucket, placement.crop) == ((160, 107), (160, 96), (0, 5, 160, 101))
    size = (round(WIDE[0] * scale), round(WIDE[1] * scale))
    across = get_mask(image, save(tmp_path / "m.png", draw_ramp(*size)))
    down = get_mask(image, save(tmp_path / "m.png", draw_ramp(*size[::-1]).T))
    expected = (np.arange(160) + 0.5) / 160 * 255, (np.arange(5, 101) + 0.5) / 107 * 255
    tolerance = 1.5 if scale >= 0.5 else 2.5
    np.testing.assert_allclose(across[:, 2:-2], np.broadcast_to(expected[0], (96, 160))[:, 2:-2], atol=tolerance)
    np.testing.assert_allclose(down, np.broadcast_to(expected[1][:, None], (96, 160)), atol=tolerance)


def test_resizing_keeps_grey_levels_and_sharp_edges_do_not_ring(tmp_path):
    image = save(tmp_path / "a.png", 9)
    assert (get_mask(image, save(tmp_path / "m.png", 77)) == 77).all()
    halves = np.where(np.arange(300) < 150, 50, 200)[None].repeat(200, 0)
    mask = get_mask(image, save(tmp_path / "m.png", halves))
    assert (mask[:, :78] == 50).all() and (mask[:, 82:] == 200).all()
    assert mask.min() == 50 and mask.max() == 200
    coloured = np.dstack([halves, np.zeros_like(halves), np.full_like(halves, 255)]).astype(np.uint8)
    Image.fromarray(coloured).save(tmp_path / "red.png")
    assert (get_mask(image, tmp_path / "red.png") == mask).all()  # kohya's scripts use the red channel too
    Image.fromarray(np.full((200, 300), 77 << 8, np.uint16)).save(tmp_path / "deep.png")
    assert (get_mask(image, tmp_path / "deep.png") == 77).all()


def test_a_mask_drawn_on_the_stored_pixels_is_rotated_like_its_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers show the image rotated by 90° clockwise
    image = save(tmp_path / "a.jpg", 9, exif=exif)
    assert prepare_image(image, RULE, BUCKETS).original_size == (200, 300)
    upright = get_mask(image, save(tmp_path / "m.png", draw_ramp(300, 200).T))  # dark at the top
    stored = get_mask(image, save(tmp_path / "m.png", draw_ramp(300, 200)))  # dark at the left: rotated, at the top
    tagged = get_mask(image, save(tmp_path / "m.png", draw_ramp(300, 200), exif=exif))
    assert (upright == stored).all() and (upright == tagged).all()
    assert upright.shape == (160, 96) and upright[0].max() < 3 and upright[-1].min() > 252


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda mask: mask.write_bytes(mask.read_bytes()[:60]), "m.png: cannot be decoded"),
        (lambda mask: mask.write_bytes(b""), "m.png: cannot be decoded"),
        (lambda mask: mask.unlink(), "m.png: cannot be read"),
        (lambda mask: save(mask, 9, (200, 200)), "200x200 px is not the aspect ratio of its image, 300x200 px"),
        (lambda mask: save(mask, 9, (200, 300)), "200x300 px is not the aspect ratio"),
        (lambda mask: Image.new("RGBA", WIDE, (255, 255, 255, 128)).save(mask), "transparent in places"),
    ],
)
def test_the_error_of_a_broken_mask_names_the_mask(tmp_path, damage, message):
    image, mask = save(tmp_path / "a.png", 9), save(tmp_path / "m.png", 9)
    damage(mask)
    with pytest.raises(BadMaskError, match=message) as caught:
        prepare(image, mask)
    assert str(caught.value).startswith("mask ")


@pytest.fixture
def folder(tmp_path, tiny_folder) -> Path:
    """Settings for four images without masks: a, b and c grey, and d with its left half transparent."""
    for key, level in zip("abc", (40, 120, 200), strict=True):
        save(tmp_path / "images" / f"{key}.png", level)
        (tmp_path / "images" / f"{key}.txt").write_text("a caption")
    alpha = np.where(np.arange(300) < 150, 0, 255)[None].repeat(200, 0).astype(np.uint8)
    grey = Image.new("L", WIDE, 90)
    Image.merge("RGBA", [grey, grey, grey, Image.fromarray(alpha)]).save(tmp_path / "images" / "d.png")
    write_settings(tmp_path, tiny_folder / "model")
    return tmp_path


def encode(folder: Path, *words: str, masks: str = ENDING, expect: int = 0) -> list[str]:
    """Run the cache job and return the keys of the items that it encoded."""
    before = {key: entry.listed_ns for key, entry in read_latest(folder / "latents").items()}
    assert run_job(folder / "settings.yaml", f"data.masks={masks}", *words) == expect
    after = read_latest(folder / "latents")
    report = json.loads((folder / "latents" / "cache_report.json").read_text())
    changed = sorted(key for key, entry in after.items() if before.get(key) != entry.listed_ns)
    assert "--repair" in words or report["encoded"] <= len(changed)
    return changed if report["encoded"] else []


def read_mask(folder: Path, key: str) -> np.ndarray | None:
    return read_latents(folder / "latents" / f"{key}.npz").alpha_mask


def test_exactly_the_images_whose_masks_changed_are_encoded_again(folder, capsys):
    settings, images = folder / "settings.yaml", folder / "images"
    assert run_job(settings) == 0
    identity = read_identity(folder / "latents")
    plain = {key: entry.sha256 for key, entry in read_latest(folder / "latents").items()}
    assert run_job(settings, f"data.masks={ENDING}") == 2
    errors = capsys.readouterr().err
    assert "data.masks = '-masklabel.png'" in errors and "matches no image's mask" in errors
    left = np.where(np.arange(300) < 150, 0, 255)[None].repeat(200, 0)
    mask = save(images / f"a{ENDING}", left)
    assert encode(folder) == ["a"]  # images without a mask keep their latents
    assert "1 images have a mask; the loss of the other 3 counts everywhere" in capsys.readouterr().err
    stored, entry = read_mask(folder, "a"), read_latest(folder / "latents")["a"]
    assert stored is not None and stored.shape == (96, 160) and stored.dtype == np.float32
    assert (stored[:, :78] == 0).all() and (stored[:, 82:] == 1).all()
    assert entry.mask is not None and (entry.mask.path, entry.mask.bytes) == (str(mask), mask.stat().st_size)
    assert read_identity(folder / "latents") == identity
    assert encode(folder) == []
    os.utime(mask, ns=(1, 1))
    assert encode(folder) == []  # touched, not changed
    assert read_latest(folder / "latents")["a"].mask.mtime_ns == 1
    save(mask, 255 - left)
    save(images / f"b{ENDING}", 102)
    assert encode(folder) == ["a", "b"]
    stored = read_mask(folder, "a")
    assert (stored[:, :78] == 1).all() and (stored[:, 82:] == 0).all()
    np.testing.assert_allclose(read_mask(folder, "b"), 0.4, atol=1e-6)
    mask.unlink()
    assert encode(folder) == ["a"] and read_mask(folder, "a") is None
    (images / f"b{ENDING}").unlink()
    assert encode(folder, masks=str(save(folder / "apart" / "c.jpg", 255).parent)) == ["b", "c"]
    assert (read_mask(folder, "c") == 1).all()
    for file in (images, folder / "apart"):
        file.rename(file.with_name(f"{file.name}-away"))
    assert run_job(settings, "--verify", f"data.masks={folder / 'apart'}") == 0
    (folder / "images-away").rename(images)
    assert run_job(settings) == 0  # without masks the job restores the first latents
    assert {key: entry.sha256 for key, entry in read_latest(folder / "latents").items()} == plain


def test_a_mask_file_has_priority_over_opacity(folder):
    save(folder / "images" / f"a{ENDING}", 51)
    assert encode(folder, "cache.alpha_mask=true") == ["a", "b", "c", "d"]
    opacity = read_mask(folder, "d")
    assert (opacity[:, :76] == 0).all() and (opacity[:, 84:] == 1).all() and read_mask(folder, "b") is None
    save(folder / "images" / f"d{ENDING}", 51)
    assert encode(folder, "cache.alpha_mask=true") == ["d"]
    np.testing.assert_allclose(read_mask(folder, "d"), 0.2, atol=1e-6)


@pytest.mark.parametrize("cache_format", ["npz", "shards"])
def test_an_image_with_a_broken_mask_is_bad_and_never_trained_unmasked(folder, cache_format):
    words = (f"cache.format={cache_format}", "data.max_bad_fraction=0.5")
    assert run_job(folder / "settings.yaml", *words) == 0
    whole = save(folder / "images" / f"a{ENDING}", 255)
    broken = save(folder / "images" / f"b{ENDING}", 0)
    content = broken.read_bytes()
    broken.write_bytes(content[:50])
    encode(folder, *words)
    lines = [json.loads(line) for line in (folder / "latents" / "logs" / "bad_samples.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["b"] and f"mask {broken}: cannot be decoded" in lines[0]["reason"]
    assert read_latest(folder / "latents")["a"].mask is not None
    bad = list_bad_latents(folder, *words)
    assert [line["key"] for line in bad] == ["b"] and "cannot be read" in bad[0]["reason"]
    assert encode(folder, *words) == []  # the mask is still broken
    broken.write_bytes(content)
    assert encode(folder, *words, "--repair") == ["b"]
    assert run_job(folder / "settings.yaml", *words, f"data.masks={ENDING}", "--verify") == 0
    assert list_bad_latents(folder, *words) == []
    masks = {key: entry.mask for key, entry in read_latest(folder / "latents").items()}
    command = "--unpack" if cache_format == "shards" else "--pack"
    assert run_job(folder / "settings.yaml", *words, f"data.masks={ENDING}", command) == 0
    assert {key: entry.mask for key, entry in read_latest(folder / "latents").items()} == masks
    assert masks["b"] is not None and masks["a"] is not None and masks["a"].path == str(whole) and masks["c"] is None
    assert encode(folder, *words) == []


def list_bad_latents(folder: Path, *words: str) -> list[dict]:
    """Start a run and return its log of bad samples: the latents that it leaves out."""
    run = (f"run.name=run-{len(list(folder.glob('runs/*')))}", f"data.masks={ENDING}")
    config, problems = load_config(folder / "settings.yaml", [*words, *run])
    index, found = open_training_set(config)
    assert problems == found == [] and index is not None and len(index) == 4
    leave_out_bad_latents(config, index, resuming=False)
    log = config.run.folder / "logs" / "bad_samples.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def test_nothing_is_learnt_where_a_mask_is_black(folder):
    """The mask file reaches the gradient of the U-Net's prediction."""
    save(folder / "images" / f"a{ENDING}", np.where(np.arange(300) < 150, 0, 255)[None].repeat(200, 0))
    assert encode(folder) == ["a", "b", "c", "d"]
    sample = read_latents(folder / "latents" / "a.npz")
    prediction = torch.zeros(2, *sample.latents.shape, requires_grad=True)
    masks = torch.stack([torch.from_numpy(np.array(sample.alpha_mask)), torch.ones(96, 160)])
    objective = Objective(
        ObjectiveConfig(masked_loss=True),
        LatentStatistics(mean=torch.zeros(1), scale=torch.ones(1)),
        global_batch_size=2,
    )
    target = torch.ones_like(prediction)
    losses = objective.compute_losses(prediction, target, torch.tensor([100, 900]), masks)
    assert losses.tolist() == pytest.approx([0.5, 1], abs=2e-3)  # the mean over the whole area; black counts as 0
    losses.sum().backward()
    assert prediction.grad is not None and prediction.grad[0, ..., :9].eq(0).all()
    assert prediction.grad[0, ..., 11:].eq(-2 / prediction[0].numel()).all()
    assert prediction.grad[1].eq(-2 / prediction[0].numel()).all()


def test_masks_need_the_cache_job(folder):
    words = [f"data.masks={ENDING}", "cache.on_missing=encode"]
    config, _ = load_config(folder / "settings.yaml", words)
    index = open_sample_index(folder / "latents", open_record_index(folder, [], [folder / "images"]))
    with pytest.raises(UserInputError, match="needs latents made by the cache job") as caught:
        build_missing_latent_encoder(config, resolve_model(config.model), index, Ranks(0, 0, 1, torch.device("cpu")))
    assert [problem.key for problem in caught.value.problems] == ["data.masks"]
