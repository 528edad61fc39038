"""How long the work will take, told before it starts: a few images are decoded and one batch encoded for nothing."""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sdxl_trainer.cache.encode.decoder import WorkItem, prepare_item
from sdxl_trainer.cache.encode.latent_encoder import Encoder
from sdxl_trainer.cache.encode.pipeline import TextJob
from sdxl_trainer.cache.encode.text_encoder import CAPTIONS_AT_ONCE
from sdxl_trainer.cache.encode.work_list import WorkList
from sdxl_trainer.configs.schema import CacheConfig
from sdxl_trainer.data.images.bucket import BucketRule, list_buckets
from sdxl_trainer.data.images.transforms import BadImageError

IMAGES_PER_WORKER = 4  # enough to even out an image that is dearer than the others
SIDE_STEP_PX = 64

Clock = Callable[[], float]


@dataclass(frozen=True)
class Estimate:
    """Seconds of one rank's work. Decoding goes on beside the rest."""

    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    text_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """The whole."""
        return max(self.decode_seconds, self.encode_seconds + self.text_seconds)


def estimate_work(works: Sequence[WorkList], encoder: Encoder, text: TextJob | None, cache: CacheConfig) -> Estimate:
    """What this rank's work will take, by trying a little of it.

    Ranks of one machine should try at the same time, so that each sees what the others leave it.
    """
    decode = encode = captions = 0.0
    for work in works:
        if work.items:
            decode += len(work.items) * time_decoding(work.items, work.rule, cache.num_workers)
            side = math.isqrt(work.num_pixels // len(work.items))
            encode += work.num_pixels * time_encoding(encoder, side, cache.batch_size)
        captions += len(work.texts) + sum(item.with_text for item in work.items)
    if text is None or not captions:
        return Estimate(decode, encode)
    return Estimate(decode, encode, captions * text.variants.count * time_captions(text))


def time_decoding(
    items: Sequence[WorkItem], rule: BucketRule, num_workers: int, clock: Clock = time.monotonic
) -> float:
    """Seconds an image takes with so many threads at work, by a spread of them; broken ones are told of later."""
    buckets = list_buckets(rule)
    count = min(len(items), num_workers * IMAGES_PER_WORKER)
    chosen = [items[place * len(items) // count] for place in range(count)]

    def decode(item: WorkItem) -> None:
        try:
            prepare_item(item, rule, buckets)
        except BadImageError:
            pass

    with ThreadPoolExecutor(num_workers) as pool:
        started = clock()
        list(pool.map(decode, chosen))
        return (clock() - started) / count


def time_encoding(encoder: Encoder, side_px: int, batch_size: int, clock: Clock = time.monotonic) -> float:
    """Seconds a pixel takes, by a batch of half the side in both directions: a CPU is slow enough with that."""
    side = max(SIDE_STEP_PX, side_px // 2 // SIDE_STEP_PX * SIDE_STEP_PX)
    pixels = np.zeros((batch_size, side, side, 3), np.uint8)
    keys = [""] * batch_size
    encoder.launch(pixels, keys).wait()  # the first one also chooses kernels and takes memory
    started = clock()
    encoder.launch(pixels, keys).wait()
    return (clock() - started) / (batch_size * side * side)


def time_captions(text: TextJob, clock: Clock = time.monotonic) -> float:
    """Seconds a caption takes; all are padded to one length."""
    captions = [""] * CAPTIONS_AT_ONCE
    text.encoder.launch(captions).wait()
    started = clock()
    text.encoder.launch(captions).wait()
    return (clock() - started) / CAPTIONS_AT_ONCE


def describe_seconds(seconds: float) -> str:
    """As a person says it: "40 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
