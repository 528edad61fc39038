"""Aspect-ratio buckets: the size that an image is trained at, and the resize and crop to that size.

The rules are those of kohya-ss/sd-scripts, so that caches and settings carry over.
"""

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Size(NamedTuple):
    """A size in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.width * self.height


class CropBox(NamedTuple):
    """The edges of a crop, in pixels of the resized image."""

    left: float
    top: float
    right: float
    bottom: float


class ImageKey(NamedTuple):
    """The two parts of a cache item's key."""

    prefix: str  # of the resolution, such as `512px/`; empty for the largest
    name: str  # the image's key


@dataclass(frozen=True)
class BucketRule:
    """The settings that determine the buckets. Two caches with equal rules hold interchangeable latents."""

    resolution_px: int
    min_px: int
    max_px: int
    step_px: int
    no_upscale: bool = False
    fixed: tuple[Size, ...] = ()  # the user's own list; the numbers above are 0 then
    max_aspect_ratio: float = field(default=20, compare=False)  # narrower images have no bucket

    @property
    def area_px(self) -> int:
        """Number of pixels of the largest bucket."""
        return max((width * height for width, height in self.fixed), default=self.resolution_px**2)


@dataclass(frozen=True)
class Placement:
    """The resize and crop of an image: resize it to `resized`, then crop it to `bucket` at (`left`, `top`)."""

    bucket: Size
    resized: Size
    left: int
    top: int

    @property
    def crop(self) -> CropBox:
        """The crop box in the pixel grid of the resized image. Its edges are integers."""
        return CropBox(self.left, self.top, self.left + self.bucket[0], self.top + self.bucket[1])


def list_buckets(rule: BucketRule) -> list[Size]:
    """Return all buckets of a rule, sorted. The user's own buckets keep their order.

    A rule of 1024² px, sides of 256 to 2048 px and a step of 64 px gives 41 buckets. Limits are rounded inwards to
    multiples of the step. The list is empty if the resolution is smaller than the step.
    """
    if rule.fixed:
        return [Size(*bucket) for bucket in rule.fixed]
    area = rule.resolution_px**2
    square = _floor_to_step(rule.resolution_px, rule.step_px)
    shortest, longest = -_floor_to_step(-rule.min_px, rule.step_px), _floor_to_step(rule.max_px, rule.step_px)
    buckets = {Size(square, square)} if square else set()
    for width in range(shortest, longest + 1, rule.step_px):
        height = min(longest, _floor_to_step(area / width, rule.step_px))
        if height >= rule.min_px:
            buckets |= {Size(width, height), Size(height, width)}
    return sorted(buckets)


def place_image(size: Size, rule: BucketRule, buckets: list[Size]) -> Placement:
    """Choose the bucket of an image, and the resize and centred crop that fill the bucket.

    Args:
        size: size of the image.
        buckets: `list_buckets(rule)`, computed once for all images.
    """
    if rule.no_upscale:
        resized = _shrink_to_area(size, rule)
        bucket = Size(*(_floor_to_step(side, rule.step_px) for side in resized))
        if min(bucket) == 0:  # thinner than one step: the only case that must be enlarged
            bucket = Size(*(max(side, rule.step_px) for side in bucket))
            resized = _cover(size, bucket)
    else:
        bucket = choose_bucket(size, buckets)
        resized = _cover(size, bucket)
    return Placement(bucket, resized, (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)


def is_too_narrow(size: Size, rule: BucketRule) -> bool:
    """Return whether an image's aspect ratio is beyond the rule's limit."""
    return max(size) > rule.max_aspect_ratio * min(size)


def build_key_prefix(resolution_px: int) -> str:
    """Return the key prefix for latents at a resolution below the largest one, such as `512px/`."""
    return f"{resolution_px}px/"


def split_key(key: str) -> ImageKey:
    """Split a cache item's key into the prefix of its resolution and the image's key."""
    match = re.match(r"\d+px/", key)
    return ImageKey(match[0], key[match.end() :]) if match else ImageKey("", key)


def choose_bucket(size: Size, buckets: list[Size]) -> Size:
    """Return the bucket of exactly this size, or else the first of the buckets with the nearest aspect ratio.

    The distance is the absolute difference of width / height.
    """
    if size in buckets:
        return Size(*size)
    ratio = size[0] / size[1]
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))


def _cover(size: Size, bucket: Size) -> Size:
    """Return the smallest size of the image's aspect ratio that covers the bucket; the free side rounds half up."""
    if size[0] / size[1] > bucket[0] / bucket[1]:
        scale = bucket[1] / size[1]
    else:
        scale = bucket[0] / size[0]
    return Size(max(bucket[0], int(size[0] * scale + 0.5)), max(bucket[1], int(size[1] * scale + 0.5)))


def _shrink_to_area(size: Size, rule: BucketRule) -> Size:
    """Return the image's size if it fits the area, or else a size of about that area.

    One side of the smaller size is a multiple of the step: the side that distorts the aspect ratio less.
    """
    area, step = rule.resolution_px**2, rule.step_px
    if size[0] * size[1] <= area:
        return Size(*size)
    ratio = size[0] / size[1]
    width = math.sqrt(area * ratio)
    by_width = _floor_to_step(width + 0.5, step)
    by_height = _floor_to_step(area / width + 0.5, step)
    error_by_width = abs(by_width / max(1, _floor_to_step(by_width / ratio + 0.5, step)) - ratio)
    error_by_height = abs(_floor_to_step(by_height * ratio + 0.5, step) / max(1, by_height) - ratio)
    if error_by_width < error_by_height:
        return Size(by_width, int(by_width / ratio + 0.5))
    return Size(int(by_height * ratio + 0.5), by_height)


def _floor_to_step(length: float, step: int) -> int:
    return math.floor(length) // step * step
