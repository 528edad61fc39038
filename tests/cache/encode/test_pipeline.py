"""The pipeline: batches of one bucket, in order, and latents that do not depend on their batch."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_samples import BUCKETS, RULE, hash_items
from PIL import Image

from sdxl_trainer.cache.encode.background_writer import BackgroundWriter
from sdxl_trainer.cache.encode.decoder import WorkItem
from sdxl_trainer.cache.encode.latent_encoder import EncodedBatch, VaeEncoder, build_vae_encoder
from sdxl_trainer.cache.encode.pipeline import Pipeline
from sdxl_trainer.cache.encode.progress import RankProgress
from sdxl_trainer.cache.encode.storage import NpzStorage
from sdxl_trainer.cache.patches import enable_tiling
from sdxl_trainer.configs.problems import FailedError
from sdxl_trainer.configs.schema import CacheConfig
from sdxl_trainer.data.formats.latents import read_latents
from sdxl_trainer.data.formats.manifest import ManifestWriter, read_latest
from sdxl_trainer.data.images.bucket import place_image
from sdxl_trainer.data.images.transforms import prepare_image
from sdxl_trainer.launch.kernels import use_tf32

SIZES = [(128, 128), (200, 100), (100, 200), (130, 120), (64, 64), (300, 60)]


@pytest.fixture(scope="module")
def vae(tiny_folder):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(tiny_folder / "model", subfolder="vae").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[WorkItem]:
    """Return 23 images of noise in four buckets."""
    folder = tmp_path_factory.mktemp("images")
    items = []
    for number in range(23):
        size = SIZES[number * number % len(SIZES)]
        pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
        path = folder / f"p{number:02d}.png"
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
        items.append(WorkItem(key=path.stem, image_path=str(path), file=f"{path.stem}.npz", size=size))
    return items


@dataclass
class FakeEncoder:
    """Device whose latents are the mean of each block of pixels, with a record of its batches."""

    batches: list[list[str]] = field(default_factory=list)
    waited: list[list[str]] = field(default_factory=list)
    fail_at: int | None = None

    def launch(self, pixels: np.ndarray, keys: list[str]) -> "FakePending":
        if len(self.batches) == self.fail_at:
            raise RuntimeError("out of memory")
        assert pixels.dtype == np.uint8 and pixels.ndim == 4 and len(pixels) == len(keys)
        self.batches.append(keys)
        return FakePending(self, pixels, keys)


@dataclass
class FakePending:
    encoder: FakeEncoder
    pixels: np.ndarray
    keys: list[str]

    def wait(self) -> EncodedBatch:
        self.encoder.waited.append(self.keys)
        count, height, width, _ = self.pixels.shape
        blocks = self.pixels.reshape(count, height // 8, 8, width // 8, 8, 3).mean((2, 4)).transpose(0, 3, 1, 2)
        return EncodedBatch(np.concatenate([blocks, blocks[:, :1]], 1).astype(np.float32))


def run(folder: Path, items: list[WorkItem], encoder, batch_size: int = 4, raise_if_stopped=lambda: None):
    """Run the pipeline and return (bad, progress)."""
    bad: list[tuple[str, str]] = []
    progress = RankProgress(total=len(items))
    writer = BackgroundWriter(NpzStorage(folder, "float32"), ManifestWriter(folder, 0))
    pipeline = Pipeline(
        encoder=encoder,
        writer=writer,
        rule=RULE,
        identity="identity",
        batch_size=batch_size,
        num_workers=3,
        progress=progress,
        report_bad=lambda key, file, reason: bad.append((key, str(reason))),
        raise_if_stopped=raise_if_stopped,
    )
    try:
        pipeline.run(items)
    finally:
        writer.close()
    return bad, progress


def get_bucket(item: WorkItem) -> tuple[int, int]:
    with Image.open(item.image_path) as image:
        return place_image(image.size, RULE, BUCKETS).bucket


@pytest.mark.parametrize("recorded", ["right", "unknown", "wrong"])
def test_batches_are_of_one_bucket_and_full(tmp_path, images, recorded):
    sizes = {"right": lambda item: item.size, "unknown": lambda _: None, "wrong": lambda item: (item.size[1] * 3, 50)}
    items = [replace(item, size=sizes[recorded](item)) for item in images]
    encoder = FakeEncoder()
    bad, progress = run(tmp_path, items, encoder)
    buckets = {item.key: get_bucket(item) for item in items}
    assert bad == [] and (progress.done, progress.bad) == (23, 0)
    assert sorted(key for batch in encoder.batches for key in batch) == [item.key for item in items]
    for batch in encoder.batches:
        assert len({buckets[key] for key in batch}) == 1 and batch == sorted(batch)
    # At most one incomplete batch for each bucket.
    counts = [list(buckets.values()).count(bucket) for bucket in set(buckets.values())]
    assert len(encoder.batches) == sum(-(-count // 4) for count in counts)
    assert encoder.waited == encoder.batches
    entries = read_latest(tmp_path)
    assert {key: entry.bucket for key, entry in entries.items()} == buckets
    for item in items:
        entry, image = entries[item.key], prepare_image(Path(item.image_path), RULE, BUCKETS)
        sample = read_latents(tmp_path / entry.file, entry.bucket)
        assert sample.latents[0, 0, 0] == pytest.approx(image.pixels[:8, :8, 0].mean(), abs=1e-3)
        assert (sample.original_size, entry.original_size) == (image.original_size, image.original_size)
        assert sample.crop_ltrb == entry.crop == image.placement.crop
        assert (entry.source_sha256, entry.identity) == (image.source_sha256, "identity")


def test_bad_images_are_named_and_all_others_are_encoded(tmp_path, images):
    items = list(images)
    (tmp_path / "broken.png").write_bytes(Path(items[0].image_path).read_bytes()[:200])
    for place, key, path, size in (
        (5, "broken", tmp_path / "broken.png", (128, 128)),
        (9, "absent", tmp_path / "absent.png", None),
        (25, "last", tmp_path, (128, 128)),
    ):
        items.insert(place, WorkItem(key=key, image_path=str(path), file=f"{key}.npz", size=size))
    bad, progress = run(tmp_path, items, FakeEncoder())
    assert {key for key, _ in bad} == {"broken", "absent", "last"} and (progress.done, progress.bad) == (23, 3)
    reasons = dict(bad)
    assert reasons["broken"].startswith(f"{tmp_path}/broken.png: cannot be decoded")
    assert reasons["absent"] == f"{tmp_path}/absent.png: cannot be read: No such file or directory"
    assert set(read_latest(tmp_path)) == {item.key for item in images}


def test_only_bad_images_and_no_images(tmp_path):
    bad, progress = run(tmp_path, [WorkItem(key="a", image_path="/absent/a.png", file="a.npz")] * 3, FakeEncoder())
    assert len(bad) == progress.bad == 3 and read_latest(tmp_path) == {}
    assert run(tmp_path, [], FakeEncoder())[1].done == 0


class StopError(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 3])
def test_launched_batches_are_written_when_the_work_is_stopped(tmp_path, images, after):
    encoder = FakeEncoder()

    def stop() -> None:
        if len(encoder.batches) > after:
            raise StopError

    with pytest.raises(StopError):
        run(tmp_path, images, encoder, raise_if_stopped=stop)
    assert len(encoder.batches) == after + 1 and encoder.waited == encoder.batches
    assert set(read_latest(tmp_path)) == {key for batch in encoder.batches for key in batch}


def test_launched_batches_are_written_when_the_device_fails(tmp_path, images):
    encoder = FakeEncoder(fail_at=3)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, images, encoder)
    assert set(read_latest(tmp_path)) == {key for batch in encoder.batches for key in batch}
    assert len(encoder.batches) == 3


def test_the_next_batch_is_launched_before_the_previous_one_is_awaited(tmp_path, images):
    encoder, order = FakeEncoder(), []
    launch = encoder.launch

    def spy(pixels: np.ndarray, keys: list[str]):
        order.append(len(encoder.waited))
        return launch(pixels, keys)

    encoder.launch = spy
    run(tmp_path, images, encoder)
    assert order == [0, 0, *range(1, len(order) - 1)]  # all but the newest one have been waited for


def test_waiting_for_images_is_counted(tmp_path, images, monkeypatch):
    import sdxl_trainer.cache.encode.decoder as module

    prepare = module.prepare_image
    monkeypatch.setattr(module, "prepare_image", lambda *arguments: (time.sleep(0.06), prepare(*arguments))[1])
    started = time.monotonic()
    _, progress = run(tmp_path, images[:12], FakeEncoder())
    # Twelve images at 60 ms each take three threads 240 ms.
    assert 0.15 < progress.wait_seconds < time.monotonic() - started


@pytest.mark.parametrize(("posterior", "flip"), [("sample", True), ("moments", True), ("mean", False)])
def test_latents_do_not_depend_on_the_batch(tmp_path, images, vae, posterior, flip):
    hashes = []
    for batch_size in (1, 2, 3, 4):
        folder = tmp_path / str(batch_size)
        folder.mkdir()
        items = images if batch_size % 2 else images[::-1]  # other neighbours in the batch, too
        run(folder, items, VaeEncoder(vae, posterior, flip), batch_size)
        hashes.append(hash_items(folder))
    assert len(hashes[0]) == len(set(hashes[0].values())) == 23
    assert all(other == hashes[0] for other in hashes[1:])


def prepare(prepared: list[WorkItem], bucket: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    chosen = [item for item in prepared if get_bucket(item) == bucket]
    images = [prepare_image(Path(item.image_path), RULE, BUCKETS).pixels for item in chosen]
    return np.stack(images), [item.key for item in chosen]


def test_latents_are_diffusers_own(images, vae):
    from diffusers.image_processor import VaeImageProcessor

    pixels, keys = prepare(images, (128, 128))
    processed = VaeImageProcessor().preprocess([Image.fromarray(image) for image in pixels])
    distribution = vae.encode(processed).latent_dist
    encoded = VaeEncoder(vae, "moments", flip=False).launch(pixels, keys).wait()
    np.testing.assert_allclose(encoded.latents, distribution.mean.numpy(), atol=1e-5)
    np.testing.assert_allclose(encoded.std, distribution.std.numpy(), atol=1e-5)
    assert encoded.flipped is None and encoded.flipped_std is None
    mean = VaeEncoder(vae, "mean", flip=False).launch(pixels, keys).wait()
    assert np.array_equal(mean.latents, encoded.latents) and mean.std is None
    assert encoded.latents.dtype == np.float32 and np.abs(encoded.latents).max() > 0.1
    # Latents are not multiplied by the scaling factor, by which diffusers divides before decoding.
    assert vae.config.scaling_factor == pytest.approx(0.13025)


def test_samples_are_drawn_from_the_posterior(images, vae):
    pixels, _ = prepare(images, (128, 128))
    keys = [f"k{number}" for number in range(200)]
    many = np.repeat(pixels[:1], 200, 0)
    moments = VaeEncoder(vae, "moments", flip=False).launch(pixels[:1], ["x"]).wait()
    sampled = VaeEncoder(vae, "sample", flip=False).launch(many, keys).wait().latents
    noise = (sampled - moments.latents) / moments.std
    assert np.abs(noise.mean()) < 0.01 and noise.std() == pytest.approx(1, abs=0.01)
    assert np.abs(np.corrcoef(noise.reshape(200, -1)[:20]) - np.eye(20)).max() < 0.2  # each key has its own noise


@pytest.mark.parametrize("posterior", ["mean", "moments"])
def test_flipped_latents_are_those_of_the_mirrored_image(images, vae, posterior):
    pixels, keys = prepare(images, (128, 128))
    encoded = VaeEncoder(vae, posterior, flip=True).launch(pixels, keys).wait()
    mirrored = VaeEncoder(vae, posterior, flip=False).launch(np.ascontiguousarray(pixels[:, :, ::-1]), keys).wait()
    np.testing.assert_allclose(encoded.flipped, mirrored.latents, atol=1e-6)
    assert np.abs(encoded.flipped - encoded.latents[..., ::-1]).max() > 1e-4  # not the mirrored latent
    if posterior == "moments":
        np.testing.assert_allclose(encoded.flipped_std, mirrored.std, atol=1e-6)
    else:
        assert encoded.std is None and encoded.flipped_std is None


def test_the_flipped_sample_has_noise_of_its_own(images, vae):
    pixels, keys = prepare(images, (128, 128))
    same = np.full_like(pixels, 77)  # its own mirror image
    encoded = VaeEncoder(vae, "sample", flip=True).launch(same, keys).wait()
    means = VaeEncoder(vae, "mean", flip=True).launch(same, keys).wait()
    assert np.array_equal(means.flipped, means.latents)
    assert np.abs(encoded.flipped - encoded.latents).max() > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_the_vae_rounds_to_tf32_only_where_the_settings_say_so(images, vae, precision):
    pixels, keys = prepare(images, (128, 128))
    flags = []

    def record(*_):
        flags.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))

    allowed = precision == "tf32"
    encoder = build_vae_encoder(CacheConfig(vae_precision=precision), vae, torch.device("cpu"))
    hook = vae.encoder.conv_in.register_forward_hook(record)
    with use_tf32(not allowed):  # as training may have chosen
        encoder.launch(pixels, keys).wait()
        record()
    hook.remove()
    assert flags == [(allowed, allowed), (not allowed, not allowed)]


def test_half_precision_stays_near(images, vae):
    import copy

    pixels, keys = prepare(images, (128, 128))
    full = VaeEncoder(vae, "mean", flip=False).launch(pixels, keys).wait().latents
    half = VaeEncoder(copy.deepcopy(vae).to(torch.bfloat16), "mean", flip=False).launch(pixels, keys).wait().latents
    assert half.dtype == np.float32 and np.abs(half - full).max() < 0.05 * np.abs(full).max()


class SmallDevice(torch.nn.Module):
    """The VAE on a device with memory for `most` images at once."""

    def __init__(self, vae, most: int):
        super().__init__()
        self.vae, self.most, self.sizes = vae, most, []

    def encode(self, images: torch.Tensor):
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return self.vae.encode(images)


@pytest.mark.parametrize("posterior", ["sample", "moments"])
def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same_latents(images, vae, posterior):
    pixels, keys = (np.concatenate([part, part])[:7] for part in prepare(images, (128, 128)))
    small = SmallDevice(vae, 2)
    found = VaeEncoder(small, posterior, flip=True)
    wanted = VaeEncoder(vae, posterior, flip=True).launch(pixels, list(keys)).wait()
    first = found.launch(pixels, list(keys)).wait()
    assert small.sizes[:2] == [7, 3] and max(small.sizes[2:]) <= 4
    small.sizes.clear()
    second = found.launch(pixels, list(keys)).wait()
    assert max(small.sizes) <= 2  # the encoder remembers the limit
    for name, part in vars(wanted).items():
        for encoded in (first, second):
            assert part is None or np.array_equal(getattr(encoded, name), part), name
    with pytest.raises(FailedError, match="set cache.tile_above_px: 64"):
        VaeEncoder(SmallDevice(vae, 0), posterior, flip=False).launch(pixels, list(keys))


def test_tiles_give_nearly_what_the_whole_image_gives(vae):
    import copy

    # In soft noise, the statistics of a tile are close to those of the whole image.
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
    pixels = np.array(noise.resize((512, 384), Image.Resampling.BICUBIC))[None]
    tiled, sizes = copy.deepcopy(vae), []
    enable_tiling(tiled, 256)
    tiled.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    whole = VaeEncoder(vae, "mean", flip=False).launch(pixels, ["a"]).wait().latents
    parts = VaeEncoder(tiled, "mean", flip=False).launch(pixels, ["a"]).wait().latents
    assert parts.shape == whole.shape == (1, 4, 48, 64)
    assert len(sizes) > 1 and max(max(size) for size in sizes) <= 256  # this bounds the memory
    assert np.abs(parts - whole).mean() < 0.05 * np.abs(whole).mean()
    small = np.ascontiguousarray(pixels[:, :256, :256])
    sizes.clear()
    assert np.array_equal(
        VaeEncoder(tiled, "mean", flip=False).launch(small, ["a"]).wait().latents,
        VaeEncoder(vae, "mean", flip=False).launch(small, ["a"]).wait().latents,
    )
    assert sizes == [(256, 256)]
