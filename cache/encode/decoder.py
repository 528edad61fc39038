"""Images to batches of one bucket, on threads, a few batches ahead of the device."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdxl_trainer.data.formats.manifest import ManifestEntry, TextPart
from sdxl_trainer.data.images.bucket import BucketRule, Size, list_buckets, place_image
from sdxl_trainer.data.images.masks import add_mask
from sdxl_trainer.data.images.transforms import BadImageError, PreparedImage, prepare_image, read_image_size
from sdxl_trainer.data.text.strategy import StrategyError

PROBED_AT_ONCE = 32  # images whose sizes are read ahead; the first batch waits for twice as many


@dataclass(frozen=True)
class WorkItem:
    """One image to encode. `file` is where its latents go, relative to the cache folder."""

    key: str
    image_path: str
    file: str
    size: Size | None = None  # (width, height) as the metadata tell; a wrong one costs a little time, no more
    record: bytes = b"{}"
    with_text: bool = False  # its captions are encoded too
    text: TextPart | None = None  # that it has and keeps
    mask_path: str | None = None
    unmasked: ManifestEntry | None = None  # its item encoded without a mask, withdrawn if the mask is bad


@dataclass(frozen=True)
class Prepared:
    """A work item with its pixels, and its captions if they are to be encoded."""

    item: WorkItem
    image: PreparedImage
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class DecodedBatch:
    """Images of one bucket: pixels [B, H, W, 3] uint8, and what is known of each."""

    pixels: np.ndarray
    entries: list[Prepared]


@dataclass(frozen=True)
class _Planned:
    """A batch whose images are being decoded into `pixels`, if its bucket is known."""

    pixels: np.ndarray | None
    images: list[tuple[WorkItem, "Future[Prepared]"]]


@dataclass
class Decoder:
    """Decodes images into batches.

    Batches are planned by the sizes that headers or metadata tell, and threads decode straight into them, so that
    nothing is left to copy. Images that turn out to be of another bucket than planned make batches of their own.

    Args:
        shape_captions: the captions to encode of a record.
        pass_over: told of each image that cannot be used, and why.
    """

    rule: BucketRule
    batch_size: int
    num_workers: int
    with_alpha: bool
    shape_captions: Callable[[bytes], tuple[str, ...]]
    pass_over: Callable[[WorkItem, Exception], None]

    def decode(self, items: Sequence[WorkItem]) -> Iterator[DecodedBatch]:
        """Batches of at most `batch_size`, each as soon as it is whole."""
        buckets = list_buckets(self.rule)
        ahead = 2 * self.batch_size + self.num_workers
        planned: deque[_Planned] = deque()
        strays: dict[Size, list[Prepared]] = defaultdict(list)
        with ThreadPoolExecutor(self.num_workers, thread_name_prefix="decoder") as pool:
            try:
                for bucket, group in self._plan(self._probe(items, pool), buckets):
                    planned.append(self._start(bucket, group, buckets, pool))
                    if sum(len(batch.images) for batch in planned) > ahead:
                        yield from self._finish(planned.popleft(), strays)
                while planned:
                    yield from self._finish(planned.popleft(), strays)
            finally:
                pool.shutdown(cancel_futures=True)
        yield from (_stack(group) for group in strays.values() if group)

    def _probe(self, items: Sequence[WorkItem], pool: ThreadPoolExecutor) -> Iterator[tuple[WorkItem, Size | None]]:
        """The items with their sizes as far as they can be told; headers are read before they are asked for."""
        waiting: deque[Sequence[tuple[WorkItem, Future | None]]] = deque()
        for start in range(0, len(items), PROBED_AT_ONCE):
            window = items[start : start + PROBED_AT_ONCE]
            waiting.append([(item, None if item.size else pool.submit(_probe_size, item)) for item in window])
            if len(waiting) > 1:
                yield from _tell_sizes(waiting.popleft())
        while waiting:
            yield from _tell_sizes(waiting.popleft())

    def _plan(
        self, sized: Iterator[tuple[WorkItem, Size | None]], buckets: list[Size]
    ) -> Iterator[tuple[Size | None, list[WorkItem]]]:
        """Groups of one bucket, as large as a batch but for the last ones; None: only decoding can tell."""
        groups: dict[Size | None, list[WorkItem]] = defaultdict(list)
        for item, size in sized:
            bucket = place_image(size, self.rule, buckets).bucket if size else None
            group = groups[bucket]
            group.append(item)
            if len(group) == self.batch_size:
                yield bucket, groups.pop(bucket)
        yield from groups.items()

    def _start(
        self, bucket: Size | None, group: list[WorkItem], buckets: list[Size], pool: ThreadPoolExecutor
    ) -> _Planned:
        pixels = None if bucket is None else np.empty((len(group), bucket[1], bucket[0], 3), np.uint8)
        slots: Sequence[np.ndarray | None] = [None] * len(group) if pixels is None else list(pixels)
        return _Planned(
            pixels,
            [(item, pool.submit(self._prepare, item, buckets, slot)) for item, slot in zip(group, slots, strict=True)],
        )

    def _prepare(self, item: WorkItem, buckets: list[Size], slot: np.ndarray | None) -> Prepared:
        captions = self.shape_captions(item.record) if item.with_text else ()
        return Prepared(item, prepare_item(item, self.rule, buckets, self.with_alpha, slot), captions)

    def _finish(self, batch: _Planned, strays: dict[Size, list[Prepared]]) -> Iterator[DecodedBatch]:
        """Wait for a batch; what of it is of its bucket, and whatever it made whole of the others."""
        entries, places = [], []
        for place, (item, future) in enumerate(batch.images):
            try:
                prepared = future.result()
            except (BadImageError, StrategyError) as error:
                self.pass_over(item, error)
                continue
            if batch.pixels is not None and prepared.image.pixels.shape == batch.pixels.shape[1:]:
                entries.append(prepared)
                places.append(place)
                continue
            bucket = prepared.image.placement.bucket
            strays[bucket].append(prepared)
            if len(strays[bucket]) == self.batch_size:
                yield _stack(strays.pop(bucket))
        if entries:
            assert batch.pixels is not None, "entries of a batch have a bucket"
            whole = len(entries) == len(batch.images)
            yield DecodedBatch(batch.pixels if whole else batch.pixels[places], entries)


def prepare_item(
    item: WorkItem, rule: BucketRule, buckets: list[Size], with_alpha: bool = False, out: np.ndarray | None = None
) -> PreparedImage:
    """An item's image cut to its bucket, with its mask. Arguments as for `prepare_image`.

    Raises:
        BadImageError: one of the two cannot be used.
    """
    image = prepare_image(Path(item.image_path), rule, buckets, with_alpha, out)
    return image if item.mask_path is None else add_mask(image, Path(item.image_path), Path(item.mask_path))


def _tell_sizes(window: Sequence[tuple[WorkItem, Future | None]]) -> Iterator[tuple[WorkItem, Size | None]]:
    for item, future in window:
        yield item, item.size if future is None else future.result()


def _probe_size(item: WorkItem) -> Size | None:
    """Size by the file's header, or None where decoding will say what is wrong. A wrong one costs a little time."""
    try:
        return read_image_size(Path(item.image_path), exact=False)
    except BadImageError:
        return None


def _stack(entries: list[Prepared]) -> DecodedBatch:
    return DecodedBatch(np.stack([entry.image.pixels for entry in entries]), entries)
