"""Estimate the job's duration before it starts, by decoding a few images and encoding one batch as a trial."""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sdxl_trainer.cache.encode.decoder import WorkItem, prepare_item
from sdxl_trainer.cache.encode.encode_plan import EncodePlan
from sdxl_trainer.cache.encode.latent_encoder import Encoder
from sdxl_trainer.cache.encode.pipeline import TextJob
from sdxl_trainer.cache.encode.text_encoder import CAPTION_GROUP
from sdxl_trainer.configs.schema import CacheConfig
from sdxl_trainer.data.images.bucket import BucketRule, list_buckets
from sdxl_trainer.data.images.transforms import BadImageError
from sdxl_trainer.data.order.even_selection import select_evenly

IMAGES_PER_WORKER = 4  # enough to even out single slow images
SIDE_STEP_PX = 64

Clock = Callable[[], float]


@dataclass(frozen=True)
class Estimate:
    """Seconds of one rank's work. Decoding runs at the same time as the encoding."""

    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    text_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Duration of the whole work."""
        return max(self.decode_seconds, self.encode_seconds + self.text_seconds)


def estimate_work(plans: Sequence[EncodePlan], encoder: Encoder, text: TextJob | None, cache: CacheConfig) -> Estimate:
    """Estimate the duration of this rank's work from a small trial.

    Ranks of one machine should run their trials at the same time, because they share its cores and disks.
    """
    decode = encode = captions = 0.0
    for plan in plans:
        if plan.items:
            decode += len(plan.items) * time_decoding(plan.items, plan.rule, cache.num_workers)
            side = math.isqrt(plan.num_pixels // len(plan.items))
            encode += plan.num_pixels * time_encoding(encoder, side, cache.batch_size)
        captions += len(plan.texts) + sum(item.with_text for item in plan.items)
    if text is None or not captions:
        return Estimate(decode, encode)
    return Estimate(decode, encode, captions * text.variants.count * time_captions(text))


def time_decoding(
    items: Sequence[WorkItem], rule: BucketRule, num_workers: int, clock: Clock = time.monotonic
) -> float:
    """Measure the seconds per image with `num_workers` threads, on evenly spaced items."""
    buckets = list_buckets(rule)
    chosen = [items[place] for place in select_evenly(len(items), num_workers * IMAGES_PER_WORKER)]

    def decode(item: WorkItem) -> None:
        try:
            prepare_item(item, rule, buckets)
        except BadImageError:
            pass  # the job itself reports bad images

    with ThreadPoolExecutor(num_workers) as pool:
        started = clock()
        list(pool.map(decode, chosen))
        return (clock() - started) / len(chosen)


def time_encoding(encoder: Encoder, side_px: int, batch_size: int, clock: Clock = time.monotonic) -> float:
    """Measure the seconds per pixel, on a batch with half the side length so that a CPU does not take long."""
    side = max(SIDE_STEP_PX, side_px // 2 // SIDE_STEP_PX * SIDE_STEP_PX)
    pixels = np.zeros((batch_size, side, side, 3), np.uint8)
    keys = [""] * batch_size
    # The first batch also chooses kernels and allocates memory.
    encoder.launch(pixels, keys).wait()
    started = clock()
    encoder.launch(pixels, keys).wait()
    return (clock() - started) / (batch_size * side * side)


def time_captions(text: TextJob, clock: Clock = time.monotonic) -> float:
    """Measure the seconds per caption; all captions are padded to one length."""
    captions = [""] * CAPTION_GROUP
    text.encoder.launch(captions).wait()
    started = clock()
    text.encoder.launch(captions).wait()
    return (clock() - started) / CAPTION_GROUP


def describe_seconds(seconds: float) -> str:
    """Return a duration as text, such as "40 s", "12 min", "3 h 20 min" or "2 d 4 h"."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
