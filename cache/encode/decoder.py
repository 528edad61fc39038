"""Decode images into batches of one bucket, on threads, a few batches ahead of the device."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdxl_trainer.data.formats.manifest import ManifestEntry, TextPart
from sdxl_trainer.data.images.bucket import BucketRule, Size, is_too_narrow, list_buckets, place_image
from sdxl_trainer.data.images.masks import add_mask
from sdxl_trainer.data.images.transforms import BadImageError, PreparedImage, prepare_image, read_image_size
from sdxl_trainer.data.text.strategy import StrategyError

# Sizes are read ahead in groups of this many images; the first batch waits for two groups.
PROBE_GROUP = 32


class SharedFileError(BadImageError):
    """An image whose latents would replace those of another image. It may have its own once the other is gone."""


@dataclass(frozen=True, kw_only=True)
class WorkItem:
    """One image to encode.

    Args:
        file: file of its latents, relative to the cache folder.
        size: (width, height) in the metadata; a wrong size only costs time.
        record: JSON of the image's record.
        with_text: its captions are encoded too.
        text: cached text encoder outputs that stay valid.
        refusal: the reason why the image cannot be encoded, which decoding reports.
        outdated: entry of latents that are wrong: encoded without the mask, or those of another image. It is withdrawn
            if the mask is bad or the image is refused.
    """

    key: str
    image_path: str
    file: str
    size: Size | None = None
    record: bytes = b"{}"
    with_text: bool = False
    text: TextPart | None = None
    mask_path: str | None = None
    refusal: str = ""
    outdated: ManifestEntry | None = None


@dataclass(frozen=True)
class PreparedItem:
    """A work item with its pixels, and with the captions to encode."""

    item: WorkItem
    image: PreparedImage
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class DecodedBatch:
    """Images of one bucket: pixels [B, H, W, 3] uint8 and the prepared item of each."""

    pixels: np.ndarray
    items: list[PreparedItem]


class _SizedItem(NamedTuple):
    item: WorkItem
    size: Size | None  # None: unknown until the image is decoded


class _DecodingItem(NamedTuple):
    item: WorkItem
    future: "Future[PreparedItem]"


@dataclass(frozen=True)
class _PlannedBatch:
    """A batch whose images are being decoded into `pixels`, which is None if the bucket is unknown."""

    pixels: np.ndarray | None
    images: list[_DecodingItem]


@dataclass(kw_only=True)
class Decoder:
    """Decodes images into batches.

    Batches are planned by the sizes in metadata or file headers, and threads decode directly into their arrays, so
    that nothing is copied. Images whose decoded size belongs in another bucket (strays) form separate batches.

    Args:
        shape_captions: returns the captions to encode for a record.
        skip_item: called with each image that cannot be used and the reason.
    """

    rule: BucketRule
    batch_size: int
    num_workers: int
    with_alpha: bool
    shape_captions: Callable[[bytes], tuple[str, ...]]
    skip_item: Callable[[WorkItem, Exception], None]

    def decode(self, items: Sequence[WorkItem]) -> Iterator[DecodedBatch]:
        """Yield batches of at most `batch_size` images, each as soon as it is complete."""
        buckets = list_buckets(self.rule)
        max_ahead = 2 * self.batch_size + self.num_workers
        planned: deque[_PlannedBatch] = deque()
        strays: dict[Size, list[PreparedItem]] = defaultdict(list)
        with ThreadPoolExecutor(self.num_workers, thread_name_prefix="decoder") as pool:
            try:
                for bucket, group in self._plan(self._probe(items, pool), buckets):
                    planned.append(self._start(bucket, group, buckets, pool))
                    if sum(len(batch.images) for batch in planned) > max_ahead:
                        yield from self._finish(planned.popleft(), strays)
                while planned:
                    yield from self._finish(planned.popleft(), strays)
            finally:
                pool.shutdown(cancel_futures=True)
        yield from (_stack(group) for group in strays.values() if group)

    def _probe(self, items: Sequence[WorkItem], pool: ThreadPoolExecutor) -> Iterator[_SizedItem]:
        """Yield the items with their sizes. Headers of files are read ahead."""
        waiting: deque[Sequence[tuple[WorkItem, Future | None]]] = deque()
        for start in range(0, len(items), PROBE_GROUP):
            group = items[start : start + PROBE_GROUP]
            waiting.append([(item, None if item.size else pool.submit(_probe_size, item)) for item in group])
            if len(waiting) > 1:
                yield from _collect_sizes(waiting.popleft())
        while waiting:
            yield from _collect_sizes(waiting.popleft())

    def _plan(self, sized: Iterator[_SizedItem], buckets: list[Size]) -> Iterator[tuple[Size | None, list[WorkItem]]]:
        """Yield (bucket, items) for each batch; only the last batch of a bucket may be smaller than `batch_size`."""
        groups: dict[Size | None, list[WorkItem]] = defaultdict(list)
        for item, size in sized:
            # The size in metadata may be wrong. Decoding refuses an image that is too narrow.
            is_usable = size is not None and not is_too_narrow(size, self.rule)
            bucket = place_image(size, self.rule, buckets).bucket if size and is_usable else None
            group = groups[bucket]
            group.append(item)
            if len(group) == self.batch_size:
                yield bucket, groups.pop(bucket)
        yield from groups.items()

    def _start(
        self, bucket: Size | None, group: list[WorkItem], buckets: list[Size], pool: ThreadPoolExecutor
    ) -> _PlannedBatch:
        pixels = None if bucket is None else np.empty((len(group), bucket[1], bucket[0], 3), np.uint8)
        slots: Sequence[np.ndarray | None] = [None] * len(group) if pixels is None else list(pixels)
        images = [
            _DecodingItem(item, pool.submit(self._prepare, item, buckets, slot))
            for item, slot in zip(group, slots, strict=True)
        ]
        return _PlannedBatch(pixels, images)

    def _prepare(self, item: WorkItem, buckets: list[Size], slot: np.ndarray | None) -> PreparedItem:
        captions = self.shape_captions(item.record) if item.with_text else ()
        return PreparedItem(item, prepare_item(item, self.rule, buckets, self.with_alpha, slot), captions)

    def _finish(self, batch: _PlannedBatch, strays: dict[Size, list[PreparedItem]]) -> Iterator[DecodedBatch]:
        """Wait for a batch, and yield its images of the planned bucket. Images of other buckets become strays.

        A batch of strays is yielded as soon as it is complete.
        """
        items, places = [], []
        for place, (item, future) in enumerate(batch.images):
            try:
                prepared = future.result()
            except (BadImageError, StrategyError) as error:
                self.skip_item(item, error)
                continue
            if batch.pixels is not None and prepared.image.pixels.shape == batch.pixels.shape[1:]:
                items.append(prepared)
                places.append(place)
                continue
            bucket = prepared.image.placement.bucket
            strays[bucket].append(prepared)
            if len(strays[bucket]) == self.batch_size:
                yield _stack(strays.pop(bucket))
        if items:
            assert batch.pixels is not None, "items of a batch have a bucket"
            is_whole = len(items) == len(batch.images)
            yield DecodedBatch(batch.pixels if is_whole else batch.pixels[places], items)


def prepare_item(
    item: WorkItem, rule: BucketRule, buckets: list[Size], with_alpha: bool = False, out: np.ndarray | None = None
) -> PreparedImage:
    """Decode an item's image, crop it to its bucket, and add its mask. The other arguments are as in `prepare_image`.

    Raises:
        BadImageError: the image or the mask cannot be used.
    """
    if item.refusal:
        raise SharedFileError(item.refusal)
    image = prepare_image(Path(item.image_path), rule, buckets, with_alpha, out)
    return image if item.mask_path is None else add_mask(image, Path(item.image_path), Path(item.mask_path))


def _collect_sizes(group: Sequence[tuple[WorkItem, Future | None]]) -> Iterator[_SizedItem]:
    for item, future in group:
        yield _SizedItem(item, item.size if future is None else future.result())


def _probe_size(item: WorkItem) -> Size | None:
    """Read an image's size from the file's header; None for a bad file, which decoding reports later."""
    try:
        return read_image_size(Path(item.image_path), exact=False)
    except BadImageError:
        return None


def _stack(items: list[PreparedItem]) -> DecodedBatch:
    return DecodedBatch(np.stack([item.image.pixels for item in items]), items)
