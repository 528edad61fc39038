"""Estimate the job's duration before it starts, by decoding a few images and encoding one batch as a trial.

A dry run decodes more images, and reports how many of them cannot be used.
"""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from loguru import logger

from sdxl_trainer.cache.encode.decoder import WorkItem, prepare_item
from sdxl_trainer.cache.encode.encode_plan import EncodePlan
from sdxl_trainer.cache.encode.latent_encoder import Encoder
from sdxl_trainer.cache.encode.pipeline import TextJob
from sdxl_trainer.cache.encode.text_encoder import CAPTION_GROUP
from sdxl_trainer.configs.problems import FailedError, Problem, format_count, join_reasons
from sdxl_trainer.configs.schema import CacheConfig, DataConfig
from sdxl_trainer.data.checks.bad_limit import are_too_many
from sdxl_trainer.data.checks.records import build_source_problem
from sdxl_trainer.data.images.bucket import BucketRule, list_buckets
from sdxl_trainer.data.images.transforms import BadImageError
from sdxl_trainer.data.order.even_selection import select_evenly

IMAGES_PER_WORKER = 4  # enough to even out single slow images
IMAGES_OF_DRY_RUN = 512  # of all ranks and resolutions: half a minute for photos on four cores
MAX_NAMED = 5  # images that cannot be used
SIDE_STEP_PX = 64

Clock = Callable[[], float]


class DecodingTrial(NamedTuple):
    """Result of decoding some of the images to encode."""

    seconds: float  # of the whole trial
    num_images: int
    bad: list[str]  # reasons why images cannot be used


class OpenedImages(NamedTuple):
    """Images that were opened for a trial, before the job."""

    num_tried: int
    num_to_do: int  # images that the job will encode
    bad: list[str]  # reasons why some of those tried cannot be used
    num_known: int = 0  # images that an earlier job could not use, and that this one does not try again

    def would_fail(self, max_bad_fraction: float, num_images: int) -> bool:
        """Return whether the job would end with an error, if its other images are as good as those that were tried.

        Args:
            num_images: images of the set, of which `data.max_bad_fraction` may be bad.
        """
        return are_too_many(self.estimate_num_bad(), max_bad_fraction, num_images)

    def estimate_num_bad(self) -> float:
        """Estimate how many of all images are bad."""
        return self.num_known + len(self.bad) / max(1, self.num_tried) * self.num_to_do

    def choose_fraction(self, num_images: int) -> float:
        """Return a value of `data.max_bad_fraction`, in whole hundredths, with which the job would not fail."""
        return math.ceil(100 * self.estimate_num_bad() / num_images) / 100


@dataclass(frozen=True)
class Estimate:
    """Seconds of one rank's work, and the images of its trial. Decoding runs at the same time as the encoding."""

    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    text_seconds: float = 0.0
    num_images: int = 0  # to encode
    num_tried: int = 0  # images of the trial
    bad: tuple[str, ...] = ()  # reasons why some of these images cannot be used

    @property
    def seconds(self) -> float:
        """Duration of the whole work."""
        return max(self.decode_seconds, self.encode_seconds + self.text_seconds)


def estimate_work(
    plans: Sequence[EncodePlan], encoder: Encoder, text: TextJob | None, cache: CacheConfig, num_images: int = 0
) -> Estimate:
    """Estimate the duration of this rank's work from a small trial.

    Ranks of one machine should run their trials at the same time, because they share its cores and disks.

    Args:
        num_images: images to decode, if these are more than the duration needs.
    """
    decode = encode = captions = 0.0
    num_tried, bad = 0, []
    for plan in plans:
        if plan.items:
            number = max(-(-num_images // len(plans)), cache.num_workers * IMAGES_PER_WORKER)
            trial = try_decoding(plan.items, plan.rule, number, cache.num_workers)
            decode += len(plan.items) * trial.seconds / trial.num_images
            num_tried, bad = num_tried + trial.num_images, bad + trial.bad
            side = math.isqrt(plan.num_pixels // len(plan.items))
            encode += plan.num_pixels * time_encoding(encoder, side, cache.batch_size)
        captions += len(plan.texts) + sum(item.with_text for item in plan.items)
    text_seconds = captions * text.variants.count * time_captions(text) if text is not None and captions else 0.0
    return Estimate(decode, encode, text_seconds, sum(len(plan.items) for plan in plans), num_tried, tuple(bad))


def try_decoding(
    items: Sequence[WorkItem],
    rule: BucketRule,
    num_images: int,
    num_workers: int,
    clock: Clock = time.monotonic,
    max_seconds: float = math.inf,
) -> DecodingTrial:
    """Decode evenly spaced items with `num_workers` threads, and measure the time.

    Args:
        max_seconds: after which no further image is begun.
    """
    buckets = list_buckets(rule)
    chosen = [items[place] for place in select_evenly(len(items), num_images)]

    def decode(item: WorkItem) -> str | None:
        if max_seconds < math.inf and clock() - started > max_seconds:
            return None
        try:
            prepare_item(item, rule, buckets)
        except BadImageError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(num_workers) as pool:
        started = clock()
        reasons = [reason for reason in pool.map(decode, chosen) if reason is not None]
        return DecodingTrial(clock() - started, len(reasons), list(filter(None, reasons)))


def build_image_problem(data: DataConfig, opened: OpenedImages, num_images: int) -> Problem:
    """Build the problem of images that cannot be used: a job that would fail, or that will skip them."""
    num_bad, num_tried, num_to_do = len(opened.bad), opened.num_tried, opened.num_to_do
    if num_tried < num_to_do:
        rule = f"{num_bad:,} of {num_tried:,} images that were opened, of {num_to_do:,} to encode, cannot be used"
    else:
        rule = f"{format_count(num_bad + opened.num_known, 'image')} of {num_images:,} cannot be used"
    reasons = join_reasons(opened.bad, MAX_NAMED)
    cure = "repair or remove these files, or correct their paths"
    if opened.would_fail(data.max_bad_fraction, num_images):
        if reasons:
            rule = f"{rule}, more than data.max_bad_fraction = {data.max_bad_fraction:g} allows:\n      {reasons}"
        else:
            rule = f"{rule}, more than data.max_bad_fraction = {data.max_bad_fraction:g} allows"
        cure = f"{cure}; or raise data.max_bad_fraction to {opened.choose_fraction(num_images):g}"
    else:
        rule = f"{rule}; the job will skip such images:\n      {reasons}"
    return build_source_problem(data, rule, cure)


def report_opened_images(data: DataConfig, estimates: Sequence[Estimate], num_images: int, num_known: int = 0) -> None:
    """Log how many images of all ranks' trials can be used, at the end of a dry run.

    Args:
        estimates: of each rank.
        num_images: images at all resolutions, of which `data.max_bad_fraction` may be bad.
        num_known: images among them that an earlier job could not use.

    Raises:
        FailedError: so many cannot be used that the job would fail.
    """
    num_tried, num_to_do = sum(each.num_tried for each in estimates), sum(each.num_images for each in estimates)
    opened = OpenedImages(num_tried, num_to_do, [text for each in estimates for text in each.bad], num_known)
    if opened.would_fail(data.max_bad_fraction, num_images):
        raise FailedError(f"the job would fail:\n{build_image_problem(data, opened, num_images)}")
    if opened.bad:
        logger.warning("{}", build_image_problem(data, opened, num_images).rule)
    elif num_tried:
        logger.info("opened {:,} of the {:,} images to encode: all can be used", num_tried, num_to_do)
    logger.info("dry run: no problem found up to the first image; nothing was written")


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
