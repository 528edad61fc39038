"""Speed of the cache job as a share of the device's speed, and its cost to the host.

The input is 200 images with sides of 256 to 1536 px (60 % JPEG, 20 % PNG, 20 % WebP) of soft colours, shapes and some
grain, cached at 1024². The stand-in device sleeps 40 ms for each megapixel, so that only the pipeline is measured. The
same run measures the limits: a plain pipe of two threads (one decodes, one encodes and writes), the bare encode loop,
and `sha256sum`.
"""

import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from harness import Figure, parse_arguments, print_result
from PIL import Image, ImageDraw

from sdxl_trainer.cache.encode.background_writer import BackgroundWriter
from sdxl_trainer.cache.encode.decoder import WorkItem
from sdxl_trainer.cache.encode.latent_encoder import EncodedBatch, VaeEncoder
from sdxl_trainer.cache.encode.pipeline import Pipeline
from sdxl_trainer.cache.encode.progress import RankProgress
from sdxl_trainer.cache.encode.storage import NpzStorage
from sdxl_trainer.cache.models.source import SDXL_CONFIG_FOLDER
from sdxl_trainer.cache.upkeep.verify import verify_entries
from sdxl_trainer.data.allocator import keep_freed_memory
from sdxl_trainer.data.formats.manifest import ManifestWriter, read_latest
from sdxl_trainer.data.images.bucket import BucketRule, list_buckets, place_image
from sdxl_trainer.data.images.transforms import prepare_image

RULE = BucketRule(resolution_px=1024, min_px=256, max_px=2048, step_px=64)
SMALL_RULE = BucketRule(
    resolution_px=256, min_px=256, max_px=256, step_px=32
)  # one bucket, because a CPU encodes only a few batches in the time
SECONDS_PER_MEGAPIXEL = 0.04
FORMATS = ("jpg", "jpg", "jpg", "png", "webp")
BATCH_SIZE, NUM_WORKERS = 4, 4


class StandIn:
    """Device that takes 40 ms for each megapixel and no host time."""

    def __init__(self, seconds_per_megapixel: float = SECONDS_PER_MEGAPIXEL):
        self.seconds_per_megapixel = seconds_per_megapixel
        self.busy_seconds = 0.0
        rng = np.random.default_rng(0)
        self._noise = rng.standard_normal((BATCH_SIZE, 4, 256, 256), np.float32)

    def launch(self, pixels: np.ndarray, keys: list[str]) -> "ReadyBatch":
        seconds = self.seconds_per_megapixel * pixels.shape[0] * pixels.shape[1] * pixels.shape[2] / 1e6
        time.sleep(seconds)
        self.busy_seconds += seconds
        return ReadyBatch(self._noise[: len(keys), :, : pixels.shape[1] // 8, : pixels.shape[2] // 8])


@dataclass(frozen=True)
class ReadyBatch:
    """A batch that the stand-in device has encoded."""

    latents: np.ndarray

    def wait(self) -> EncodedBatch:
        return EncodedBatch(self.latents)


def main() -> int:
    """Run all measurements and print the result."""
    options = parse_arguments(__doc__ or "")
    torch.set_num_threads(os.cpu_count() or 1)  # for the VAE; the pipeline has threads of its own
    keep_freed_memory()  # as in the job
    figures: dict[str, Figure] = {}

    def note(found: dict[str, Figure]) -> None:
        for name, figure in found.items():
            print(f"{name}: {figure.value:.4f}", file=sys.stderr, flush=True)
        figures.update(found)

    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        images = draw_mixed_set(work / "images", 40 if options.quick else 200)
        note(measure_pipeline(images, work, 1 if options.quick else 5))
        note(measure_plain_pipe(images, work / "plain"))
        note(measure_memory(images, work / "memory", 2 if options.quick else 10))
        note(measure_verify(work / "memory"))
        if not options.quick:
            note(measure_vae(images, work / "vae"))
        if torch.cuda.is_available():
            note(measure_gpu(images, work / "gpu"))
    return print_result("cache", figures)


def draw_mixed_set(folder: Path, count: int) -> list[Path]:
    """Write the images and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        width, height = rng.integers(256, 1537, 2).tolist()
        coarse = rng.integers(0, 256, (max(2, height // 96), max(2, width // 96), 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(image)
        for _ in range(12):
            x, y, size = *rng.integers(0, [width, height]).tolist(), int(rng.integers(20, 200))
            pen.ellipse((x, y, x + size, y + size), fill=tuple(rng.integers(0, 256, 3).tolist()))
        grain = rng.normal(0, 1.5, (height, width, 1))
        image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
        paths.append(folder / f"{number:04d}.{FORMATS[number % len(FORMATS)]}")
        image.save(paths[-1], quality=90)
    return paths


def build_pipeline(
    encoder: StandIn | VaeEncoder, folder: Path, rule: BucketRule, raise_if_stopped: Callable[[], None] = lambda: None
) -> Pipeline:
    """Build the job's data path around an encoder.

    Args:
        raise_if_stopped: called between batches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = BackgroundWriter(NpzStorage(folder, "float32"), ManifestWriter(folder, 0))
    return Pipeline(
        encoder=encoder,
        writer=writer,
        rule=rule,
        identity="benchmark",
        batch_size=BATCH_SIZE,
        num_workers=NUM_WORKERS,
        progress=RankProgress(total=0),
        report_bad=_refuse_bad,
        raise_if_stopped=raise_if_stopped,
    )


class Seconds(NamedTuple):
    """Duration of a measurement."""

    wall: float
    cpu: float


def run_pipeline(pipeline: Pipeline, items: list[WorkItem]) -> Seconds:
    """Measure the encoding of all items, until they are on disk."""
    wall, cpu = time.monotonic(), time.process_time()
    pipeline.run(items)
    pipeline.writer.close()
    return Seconds(time.monotonic() - wall, time.process_time() - cpu)


def list_items(images: list[Path], turn: int = 0) -> list[WorkItem]:
    """Build work items of unknown sizes, as for a folder of images."""
    return [
        WorkItem(key=f"{turn}-{path.stem}", image_path=str(path), file=f"{turn}-{path.stem}.npz") for path in images
    ]


def measure_pipeline(images: list[Path], work: Path, runs: int) -> dict[str, Figure]:
    """Measure the share of the stand-in device's limit and the host CPU time of an image: medians and extremes."""
    shares, cpu_ms = [], []
    for number in range(runs):
        device = StandIn()
        pipeline = build_pipeline(device, work / f"stand-in-{number}", RULE)
        wall, cpu = run_pipeline(pipeline, list_items(images))
        shares.append(device.busy_seconds / wall)
        cpu_ms.append(cpu * 1000 / len(images))
    return {
        "share_of_device_limit": Figure(float(np.median(shares)), ">=", 0.95),
        "share_of_device_limit_least": Figure(min(shares)),
        "share_of_device_limit_most": Figure(max(shares)),
        "host_cpu_ms_per_image": Figure(float(np.median(cpu_ms)), "<=", 10),
        "host_cpu_ms_per_image_least": Figure(min(cpu_ms)),
        "host_cpu_ms_per_image_most": Figure(max(cpu_ms)),
    }


def measure_plain_pipe(images: list[Path], folder: Path) -> dict[str, Figure]:
    """Measure a plain pipe as common scripts have it: one thread decodes, the other encodes one by one and writes.

    It uses Pillow with LANCZOS and `np.savez`, without hashes, checksums or flushing to disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device, ready, buckets = StandIn(), queue.Queue(maxsize=16), list_buckets(RULE)

    def decode() -> None:
        for path in images:
            image = Image.open(path).convert("RGB")
            placement = place_image(image.size, RULE, buckets)
            cut = image.resize(placement.resized, Image.Resampling.LANCZOS).crop(placement.crop)
            ready.put((path, image.size, placement, np.asarray(cut)))
        ready.put(None)

    wall, cpu = time.monotonic(), time.process_time()
    threading.Thread(target=decode).start()
    while (entry := ready.get()) is not None:
        path, size, placement, pixels = entry
        latents = device.launch(pixels[None], [path.stem]).wait().latents[0]
        np.savez(folder / path.stem, latents=latents, original_size=np.array(size), crop_ltrb=np.array(placement.crop))
    return {
        "share_of_plain_two_thread_pipe": Figure(device.busy_seconds / (time.monotonic() - wall)),
        "host_cpu_ms_of_plain_pipe": Figure((time.process_time() - cpu) * 1000 / len(images)),
    }


def measure_memory(images: list[Path], folder: Path, turns: int) -> dict[str, Figure]:
    """Measure the growth of memory from the first tenth of the run to the last, and its peak above the start."""
    before = read_rss_bytes()
    items = [item for turn in range(turns) for item in list_items(images, turn)]
    levels: list[int] = []

    def watch() -> None:
        levels.append(read_rss_bytes())

    run_pipeline(build_pipeline(StandIn(0.0), folder, RULE, watch), items)
    tenth = max(1, len(levels) // 10)
    early, late = max(levels[tenth : 2 * tenth]), max(levels[-tenth:])
    return {
        "memory_growth_mb_over_run": Figure((late - early) / 1e6, "<=", 50),
        "memory_above_start_mb": Figure((max(levels) - before) / 1e6, "<=", 1000),
        "memory_images": Figure(len(items)),
        "peak_rss_mb": Figure(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


def measure_verify(folder: Path) -> dict[str, Figure]:
    """Measure the speed of verification as a share of `sha256sum` on the same files, all in the page cache."""
    entries = read_latest(folder)
    files = b"\0".join(str(folder / entry.file).encode() for entry in entries.values())
    command = ["xargs", "-0", "sha256sum"]
    subprocess.run(command, input=files, check=True, stdout=subprocess.DEVNULL)
    ratios = []
    for _ in range(5):
        bare = time_call(lambda: subprocess.run(command, input=files, check=True, stdout=subprocess.DEVNULL))
        ours = time_call(lambda: _expect_clean(folder, entries))
        ratios.append(bare / ours)
    return {
        "verify_share_of_sha256sum": Figure(float(np.median(ratios)), ">=", 0.8),
        "verify_share_of_sha256sum_least": Figure(min(ratios)),
        "verify_share_of_sha256sum_most": Figure(max(ratios)),
    }


def measure_vae(files: list[Path], folder: Path, count: int = 8) -> dict[str, Figure]:
    """Measure the job as a share of the bare encode loop, with a full-size VAE of random weights at 256 px."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(SDXL_CONFIG_FOLDER / "vae")).eval()
    buckets = list_buckets(SMALL_RULE)
    images = [prepare_image(path, SMALL_RULE, buckets).pixels for path in files[:count]]
    batches = [np.stack(images[start : start + BATCH_SIZE]) for start in range(0, count, BATCH_SIZE)]
    encoder = VaeEncoder(vae, "sample", flip=False)

    def loop() -> None:
        for batch in batches:
            encoder.launch(batch, ["key"] * len(batch)).wait()

    encoder.launch(batches[0], ["key"] * BATCH_SIZE).wait()  # the first batch also plans kernels
    ratios = []
    for turn in range(3):
        bare = time_call(loop)
        pipeline = build_pipeline(encoder, folder / str(turn), SMALL_RULE)
        ratios.append(bare / run_pipeline(pipeline, list_items(files[:count], turn)).wall)
    return {
        "share_of_bare_vae_loop_256px": Figure(float(np.median(ratios)), ">=", 0.98),
        "share_of_bare_vae_loop_256px_least": Figure(min(ratios)),
        "share_of_bare_vae_loop_256px_most": Figure(max(ratios)),
    }


def measure_gpu(images: list[Path], folder: Path) -> dict[str, Figure]:
    """Measure the job as a share of the bare loop on a GPU, with SDXL's VAE in bfloat16 at 1024² (4.88 TFLOP each)."""
    from diffusers import AutoencoderKL

    config = AutoencoderKL.load_config(SDXL_CONFIG_FOLDER / "vae")
    vae = AutoencoderKL.from_config(config).eval().to("cuda", torch.bfloat16).to(memory_format=torch.channels_last)
    encoder = VaeEncoder(vae, "sample", flip=False)
    pixels = np.zeros((BATCH_SIZE, 1024, 1024, 3), np.uint8)
    encoder.launch(pixels, ["warm-up"] * BATCH_SIZE).wait()
    rounds = 50
    bare = time_call(lambda: [encoder.launch(pixels, ["key"] * BATCH_SIZE) for _ in range(rounds)][-1].wait())
    per_pixel = bare / (rounds * pixels.size / 3)
    buckets = list_buckets(RULE)
    total = sum(int(np.prod(prepare_image(path, RULE, buckets).placement.bucket)) for path in images)
    wall = run_pipeline(build_pipeline(encoder, folder, RULE), list_items(images)).wall
    rate = rounds * BATCH_SIZE / bare
    return {
        "gpu_share_of_bare_loop": Figure(per_pixel * total / wall, ">=", 0.95),
        "gpu_bare_images_per_second": Figure(rate),
        "gpu_bare_tflops": Figure(rate * 4.88),
    }


def time_call(work: Callable[[], object]) -> float:
    """Measure the wall seconds of a call."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def read_rss_bytes() -> int:
    """Read the resident memory of this process."""
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize()


def _expect_clean(folder: Path, entries: dict) -> None:
    result = verify_entries(folder, entries)
    assert not result.bad, f"the benchmark's own cache is bad: {result.bad}"


def _refuse_bad(key: str, file: str, reason: str) -> None:
    raise AssertionError(f"the benchmark's own image is bad: {reason}")


if __name__ == "__main__":
    sys.exit(main())
