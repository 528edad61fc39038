"""Aspect-ratio buckets: which size an image is trained at, and how it is cut to it.

Sizes are (width, height) in pixels. The rules are kohya-ss/sd-scripts', so that caches and habits carry over.
"""

import math
import re
from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True)
class BucketRule:
    """How buckets are made. Two caches with equal rules hold interchangeable latents."""

    resolution_px: int
    min_px: int
    max_px: int
    step_px: int
    no_upscale: bool = False
    fixed: tuple[Size, ...] = ()  # the user's own list; the numbers above are 0 then

    @property
    def area_px(self) -> int:
        """Pixels of the largest bucket."""
        return max((width * height for width, height in self.fixed), default=self.resolution_px**2)


@dataclass(frozen=True)
class Placement:
    """How an image gets into its bucket: resize to `resized`, then cut `bucket` out at (`left`, `top`)."""

    bucket: Size
    resized: Size
    left: int
    top: int

    @property
    def crop_ltrb(self) -> tuple[int, int, int, int]:
        """The cut (left, top, right, bottom) in the pixel grid of the resized image."""
        return (self.left, self.top, self.left + self.bucket[0], self.top + self.bucket[1])


def list_buckets(rule: BucketRule) -> list[Size]:
    """All buckets of a rule, sorted, or the user's in their order: for 1024², min 256, max 2048, step 64 there are 41.

    Limits that are no multiples of the step are moved inwards to the next one. Empty if the area holds no step.
    """
    if rule.fixed:
        return list(rule.fixed)
    area = rule.resolution_px**2
    square = _floor_to_step(rule.resolution_px, rule.step_px)
    shortest, longest = -_floor_to_step(-rule.min_px, rule.step_px), _floor_to_step(rule.max_px, rule.step_px)
    buckets = {(square, square)} if square else set()
    for width in range(shortest, longest + 1, rule.step_px):
        height = min(longest, _floor_to_step(area / width, rule.step_px))
        if height >= rule.min_px:
            buckets |= {(width, height), (height, width)}
    return sorted(buckets)


def place_image(size: Size, rule: BucketRule, buckets: list[Size]) -> Placement:
    """Choose the bucket for an image of `size` and the resize and centred cut that fill it.

    `buckets` is `list_buckets(rule)`, passed in because it is the same for every image.
    """
    if rule.no_upscale:
        resized = _shrink_to_area(size, rule)
        bucket = (_floor_to_step(resized[0], rule.step_px), _floor_to_step(resized[1], rule.step_px))
        if min(bucket) == 0:  # thinner than one step: the only case that must be enlarged
            bucket = (max(bucket[0], rule.step_px), max(bucket[1], rule.step_px))
            resized = _cover(size, bucket)
    else:
        bucket = choose_bucket(size, buckets)
        resized = _cover(size, bucket)
    return Placement(bucket, resized, (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)


def name_prefix(resolution_px: int) -> str:
    """What stands before the keys of latents at a further resolution than the largest: `512px/`."""
    return f"{resolution_px}px/"


def split_key(key: str) -> tuple[str, str]:
    """A key as (prefix of its resolution, the image's key); most have no prefix."""
    match = re.match(r"\d+px/", key)
    return (match[0], key[match.end() :]) if match else ("", key)


def choose_bucket(size: Size, buckets: list[Size]) -> Size:
    """The bucket of exactly this size, else the one nearest in aspect ratio (width / height, absolute difference); of
    several just as near the first."""
    if size in buckets:
        return size
    ratio = size[0] / size[1]
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))


def _cover(size: Size, bucket: Size) -> Size:
    """The smallest size of the image's aspect ratio that covers the bucket; the free side rounds half up."""
    if size[0] / size[1] > bucket[0] / bucket[1]:
        scale = bucket[1] / size[1]
    else:
        scale = bucket[0] / size[0]
    return (max(bucket[0], int(size[0] * scale + 0.5)), max(bucket[1], int(size[1] * scale + 0.5)))


def _shrink_to_area(size: Size, rule: BucketRule) -> Size:
    """The image's size if it fits the area, else about the area with one side on the step.

    Of the two sides that could be put on the step, the one that distorts the aspect ratio less is taken.
    """
    area, step = rule.resolution_px**2, rule.step_px
    if size[0] * size[1] <= area:
        return size
    ratio = size[0] / size[1]
    width = math.sqrt(area * ratio)
    by_width = _floor_to_step(width + 0.5, step)
    by_height = _floor_to_step(area / width + 0.5, step)
    error_by_width = abs(by_width / max(1, _floor_to_step(by_width / ratio + 0.5, step)) - ratio)
    error_by_height = abs(_floor_to_step(by_height * ratio + 0.5, step) / max(1, by_height) - ratio)
    if error_by_width < error_by_height:
        return (by_width, int(by_width / ratio + 0.5))
    return (int(by_height * ratio + 0.5), by_height)


def _floor_to_step(length: float, step: int) -> int:
    return math.floor(length) // step * step
