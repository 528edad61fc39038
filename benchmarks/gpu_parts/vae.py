"""Part `vae`: SDXL's VAE at 1024², with random weights: images a second, errors, and the cache pipeline around it."""

from copy import deepcopy
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

# benchmarks/cache.py, not the folder
from cache import BATCH_SIZE, build_pipeline, list_items, run_pipeline
from gpu_parts.devices import Place
from gpu_parts.full_size import get_model_folder, get_side_px
from gpu_parts.report import Case, Cases
from sdxl_trainer.cache.encode.latent_encoder import VaeEncoder, build_vae_encoder
from sdxl_trainer.configs.schema import CacheConfig
from sdxl_trainer.data.images.bucket import BucketRule

TFLOP_PER_IMAGE = 4.88  # of encoding at 1024²
BATCHES = (4, 1, 8)
NUM_FILES, TURNS = 16, 16
GRAIN_PX = 32


def list_cases(place: Place) -> Cases:
    """List the cases of this part, the most wanted first."""
    vae = FullVae(place)
    cases: Cases = {}
    for precision in ("bf16", "tf32", "fp32"):
        for batch in BATCHES[: 1 if place.tiny else None]:
            cases[f"{precision}_batch_{batch}"] = partial(vae.measure_encoder, precision, batch)
        if precision == "bf16":
            cases["pipeline"] = vae.measure_pipeline
    return cases


class FullVae:
    """The VAE with random weights from a seed, and what is measured with it."""

    def __init__(self, place: Place):
        self._place = place
        self._side_px = get_side_px(place)

    @cached_property
    def _vae(self) -> Any:
        """The VAE in fp32 on the device."""
        from diffusers import AutoencoderKL

        torch.manual_seed(0)
        with torch.device(self._place.device):
            vae: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(get_model_folder(self._place) / "vae"))
        return vae.eval().requires_grad_(False)

    @cached_property
    def _exact(self) -> np.ndarray:
        """Latents of the first image in strict fp32, [1, 4, h, w]."""
        return self._encode(self._build_encoder("fp32"), 1)

    def measure_encoder(self, precision: str, batch_size: int, case: Case) -> None:
        """Measure the cache job's encoder in a precision, and its error relative to strict fp32."""
        encoder = self._build_encoder(precision)
        self._place.reset_peak()
        seconds = self._time_bare_loop(encoder, batch_size, 1 if self._place.tiny else 4)
        rate = batch_size / seconds
        case.note(images_per_second=rate, peak_gb=self._place.read_peak() / 1e9)
        if not self._place.tiny:
            case.note(tflops=rate * TFLOP_PER_IMAGE)
        first = self._encode(encoder, batch_size)[:1]
        case.note(relative_error=float(np.linalg.norm(first - self._exact) / np.linalg.norm(self._exact)))
        case.note(largest_error=float(np.abs(first - self._exact).max()))

    def measure_pipeline(self, case: Case) -> None:
        """Measure the cache pipeline, from JPEG files to latents on disk, as a share of the bare loop in bf16."""
        place, side = self._place, self._side_px
        encoder = self._build_encoder("bf16")
        files = self._write_images(place.work / "images", 4 if place.tiny else NUM_FILES)
        items = [item for turn in range(1 if place.tiny else TURNS) for item in list_items(files, turn)]
        bare = self._time_bare_loop(encoder, BATCH_SIZE, 1 if place.tiny else 8) / BATCH_SIZE
        rule = BucketRule(resolution_px=side, min_px=side, max_px=side, step_px=64)
        wall = run_pipeline(build_pipeline(encoder, place.work / "encoded", rule), items).wall
        case.note(bare_images_per_second=1 / bare, images_per_second=len(items) / wall)
        share = bare * len(items) / wall
        if place.is_cuda:
            case.check("share_of_bare_loop", share, ">=", 0.95)
        else:
            case.note(share_of_bare_loop=share)

    def _build_encoder(self, precision: Any) -> VaeEncoder:
        settings = CacheConfig(vae_precision=precision, posterior="mean")
        return build_vae_encoder(settings, deepcopy(self._vae), torch.device(self._place.device))

    def _encode(self, encoder: VaeEncoder, batch_size: int) -> np.ndarray:
        return encoder.launch(self._draw_pixels(batch_size), ["key"] * batch_size).wait().latents

    def _time_bare_loop(self, encoder: VaeEncoder, batch_size: int, rounds: int) -> float:
        """Return the seconds of a batch, with `rounds` of them launched before the last is waited for."""
        pixels, keys = self._draw_pixels(batch_size), ["key"] * batch_size

        def encode() -> None:
            for pending in [encoder.launch(pixels, keys) for _ in range(rounds)]:
                pending.wait()

        return self._place.time_calls(encode, times=1 if self._place.tiny else 2, warm_up=1) / rounds

    def _draw_pixels(self, batch_size: int) -> np.ndarray:
        """Draw smooth images, [B, H, W, 3] uint8. The first image is the same in every batch."""
        rng, small = np.random.default_rng(0), self._side_px // GRAIN_PX
        return np.stack([draw_smooth_image(rng, small, self._side_px) for _ in range(batch_size)])

    def _write_images(self, folder: Path, count: int) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        rng, side = np.random.default_rng(1), self._side_px * 6 // 5
        paths = [folder / f"{number:03d}.jpg" for number in range(count)]
        for path in paths:
            Image.fromarray(draw_smooth_image(rng, side // GRAIN_PX, side)).save(path, quality=90)
        return paths


def draw_smooth_image(rng: np.random.Generator, small: int, side_px: int) -> np.ndarray:
    """Draw an image of soft colours with some grain, [H, W, 3] uint8.

    Args:
        small: side of the random colours that are enlarged, px.
    """
    colours = Image.fromarray(rng.integers(0, 256, (small, small, 3), dtype=np.uint8))
    soft = np.asarray(colours.resize((side_px, side_px), Image.Resampling.BICUBIC))
    return np.clip(soft + rng.normal(0, 4, (side_px, side_px, 1)), 0, 255).astype(np.uint8)
