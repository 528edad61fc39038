"""The cache job's data path on one rank: decode on threads, encode on the device, write on threads, all at once."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdxl_trainer.cache.latent_encoder import Encoded, Encoder, PendingBatch
from sdxl_trainer.cache.progress import RankProgress
from sdxl_trainer.cache.sinks import EncodedItem
from sdxl_trainer.cache.writer import LatentWriter
from sdxl_trainer.data.bucket import BucketRule, Size, list_buckets, place_image
from sdxl_trainer.data.latents import LatentSample
from sdxl_trainer.data.manifest import Entry
from sdxl_trainer.data.transforms import BadImageError, PreparedImage, prepare_image, read_image_size

# Pictures whose sizes are looked at together to fill batches of one bucket; larger fills better, and starts later.
WINDOW = 1024


@dataclass(frozen=True)
class WorkItem:
    """One picture to encode. `file` is where its latents go, relative to the cache folder."""

    key: str
    image_path: str
    file: str
    size: Size | None = None  # (width, height) as the metadata tell; a wrong one costs a little time, no more
    record: bytes = b"{}"


@dataclass(frozen=True)
class Prepared:
    """A work item with its pixels."""

    item: WorkItem
    image: PreparedImage


@dataclass
class Pipeline:
    """What one rank's data path is made of.

    Args:
        report_bad: told of each picture that cannot be used, and why; the rest go on.
        check_stop: called between batches; raises to end the work with all that was encoded written.
    """

    encoder: Encoder
    writer: LatentWriter
    rule: BucketRule
    identity: str
    batch_size: int
    num_workers: int
    progress: RankProgress
    report_bad: Callable[[WorkItem, str], None]
    check_stop: Callable[[], None]

    def run(self, items: Sequence[WorkItem]) -> None:
        """Encode pictures and hand their latents to the writer.

        One batch is on the device while the one before it is handed over, the next ones are decoded and the last ones
        are written. What was launched is handed over also when the work is stopped.
        """
        batches = self._group(self._prepare_ahead(items))
        pending: deque[tuple[list[Prepared], PendingBatch]] = deque()
        try:
            while True:
                asked = time.monotonic()
                batch = next(batches, None)
                self.progress.wait_seconds += time.monotonic() - asked
                if batch is None:
                    break
                pixels = np.stack([entry.image.pixels for entry in batch])  # [B, H, W, 3]
                pending.append((batch, self.encoder.launch(pixels, [entry.item.key for entry in batch])))
                if len(pending) > 1:
                    self._hand_over(*pending.popleft())
                self.check_stop()
        finally:
            while pending:
                self._hand_over(*pending.popleft())

    def _prepare_ahead(self, items: Sequence[WorkItem]) -> Iterator[Prepared]:
        """Decode pictures on threads, in an order that fills batches, a few batches ahead of the device."""
        buckets = list_buckets(self.rule)
        lookahead = 2 * self.batch_size + self.num_workers
        with ThreadPoolExecutor(self.num_workers, thread_name_prefix="decoder") as pool:
            pending: deque = deque()
            try:
                for item in self._order(items, pool, buckets):
                    pending.append((item, pool.submit(prepare_image, Path(item.image_path), self.rule, buckets)))
                    if len(pending) > lookahead:
                        yield from self._take(pending)
                while pending:
                    yield from self._take(pending)
            finally:
                pool.shutdown(cancel_futures=True)

    def _order(self, items: Sequence[WorkItem], pool: ThreadPoolExecutor, buckets: list[Size]) -> Iterator[WorkItem]:
        """The items, rearranged so that each run of `batch_size` is of one bucket as far as sizes can be told."""
        waiting: dict[Size | None, list[WorkItem]] = defaultdict(list)
        for start in range(0, len(items), WINDOW):
            window = items[start : start + WINDOW]
            unknown = [item for item in window if item.size is None]
            probed = dict(zip((item.key for item in unknown), pool.map(_probe_size, unknown), strict=True))
            for item in window:
                size = item.size or probed[item.key]
                group = waiting[place_image(size, self.rule, buckets).bucket if size else None]
                group.append(item)
                if len(group) == self.batch_size:
                    yield from group
                    group.clear()
        for group in waiting.values():
            yield from group

    def _take(self, pending: deque) -> Iterator[Prepared]:
        item, future = pending.popleft()
        try:
            yield Prepared(item, future.result())
        except BadImageError as error:
            self.progress.bad += 1
            self.report_bad(item, str(error))

    def _group(self, prepared: Iterator[Prepared]) -> Iterator[list[Prepared]]:
        """Batches of one bucket, by the sizes that decoding found, each as soon as it is full."""
        groups: dict[Size, list[Prepared]] = defaultdict(list)
        for entry in prepared:
            group = groups[entry.image.placement.bucket]
            group.append(entry)
            if len(group) == self.batch_size:
                yield groups.pop(entry.image.placement.bucket)
        yield from groups.values()

    def _hand_over(self, batch: list[Prepared], pending: PendingBatch) -> None:
        encoded = pending.wait()
        for place, entry in enumerate(batch):
            self.writer.submit(build_item(entry, encoded, place, self.identity))
        self.progress.done += len(batch)
        self.progress.bytes_written = self.writer.bytes_written


def build_item(prepared: Prepared, encoded: Encoded, place: int, identity: str) -> EncodedItem:
    """One picture's latents of a batch, with what the manifest will say of them."""
    item, image = prepared.item, prepared.image
    placement = image.placement
    std, flipped, flipped_std = (
        None if part is None else part[place] for part in (encoded.std, encoded.flipped, encoded.flipped_std)
    )
    sample = LatentSample(
        encoded.latents[place],
        image.original_size,
        placement.crop_ltrb,
        std=std,
        flipped=flipped,
        flipped_std=flipped_std,
    )
    entry = Entry(
        key=item.key, file=item.file, bytes=0, sha256="", bucket=placement.bucket, original_size=image.original_size,
        resized=placement.resized, crop=placement.crop_ltrb, identity=identity, source_path=item.image_path,
        source_bytes=image.source_bytes, source_mtime_ns=image.source_mtime_ns, source_sha256=image.source_sha256,
        flipped=flipped is not None,
    )  # fmt: skip
    return EncodedItem(sample, entry, item.record)


def _probe_size(item: WorkItem) -> Size | None:
    """Size by the file's header, or None where decoding will say what is wrong."""
    try:
        return read_image_size(Path(item.image_path))
    except BadImageError:
        return None
