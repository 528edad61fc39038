"""The cache job's data path on one rank: decode on threads, encode on the device, write on threads, all at once."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import orjson

from sdxl_trainer.cache.latent_encoder import Encoded, Encoder, PendingBatch
from sdxl_trainer.cache.progress import RankProgress
from sdxl_trainer.cache.sinks import EncodedItem
from sdxl_trainer.cache.text_encoder import TextEncoder
from sdxl_trainer.cache.writer import LatentWriter
from sdxl_trainer.data.bucket import BucketRule, Size, list_buckets, place_image
from sdxl_trainer.data.folders import TEXT_CACHE
from sdxl_trainer.data.latents import LatentSample
from sdxl_trainer.data.manifest import Entry, TextPart
from sdxl_trainer.data.strategy import StrategyError
from sdxl_trainer.data.text_outputs import TextOutputs
from sdxl_trainer.data.transforms import BadImageError, PreparedImage, prepare_image, read_image_size
from sdxl_trainer.data.variants import CaptionVariants, hash_captions

# Pictures whose sizes are looked at together to fill batches of one bucket; larger fills better, and starts later.
WINDOW = 1024
TEXTS_AT_ONCE = 16  # pictures whose captions are encoded together


@dataclass(frozen=True)
class WorkItem:
    """One picture to encode. `file` is where its latents go, relative to the cache folder."""

    key: str
    image_path: str
    file: str
    size: Size | None = None  # (width, height) as the metadata tell; a wrong one costs a little time, no more
    record: bytes = b"{}"
    with_text: bool = False  # its captions are encoded too
    text: TextPart | None = None  # that it has and keeps


@dataclass(frozen=True)
class TextItem:
    """An item of the cache whose captions are to be encoded; its latents stay. `file` is where an npz of them goes."""

    entry: Entry
    file: str
    record: bytes


@dataclass(frozen=True)
class TextJob:
    """How captions are encoded. `identity` is the name of what decides it."""

    encoder: TextEncoder
    variants: CaptionVariants
    identity: str


@dataclass(frozen=True)
class Prepared:
    """A work item with its pixels, and its captions if they are to be encoded."""

    item: WorkItem
    image: PreparedImage
    captions: tuple[str, ...] = ()


@dataclass
class Pipeline:
    """What one rank's data path is made of.

    Args:
        report_bad: told the key and the file of each picture that cannot be used, and why; the rest go on.
        check_stop: called between batches; raises to end the work with all that was encoded written.
    """

    encoder: Encoder
    writer: LatentWriter
    rule: BucketRule
    identity: str
    batch_size: int
    num_workers: int
    progress: RankProgress
    report_bad: Callable[[str, str, str], None]
    check_stop: Callable[[], None]
    text: TextJob | None = None
    with_alpha: bool = False

    def run(self, items: Sequence[WorkItem], texts: Sequence[TextItem] = ()) -> None:
        """Encode pictures, then captions of pictures that are encoded already, and hand the results to the writer.

        One batch is on the device while the one before it is handed over, the next ones are decoded and the last ones
        are written. What was launched is handed over also when the work is stopped.
        """
        pending: deque[Callable[[], list[EncodedItem]]] = deque()
        try:
            for finish in chain(self._launch_pictures(items), self._launch_texts(texts)):
                pending.append(finish)
                if len(pending) > 1:
                    self._hand_over(pending.popleft())
                self.check_stop()
        finally:
            while pending:
                self._hand_over(pending.popleft())

    def _launch_pictures(self, items: Sequence[WorkItem]) -> Iterator[Callable[[], list[EncodedItem]]]:
        """Start batch after batch, yielding what waits for each and returns it."""
        batches = self._group(self._prepare_ahead(items))
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.progress.wait_seconds += time.monotonic() - asked
            if batch is None:
                return
            pixels = np.stack([entry.image.pixels for entry in batch])  # [B, H, W, 3]
            pending = self.encoder.launch(pixels, [entry.item.key for entry in batch])
            texts = self._launch_captions([entry.captions for entry in batch])
            yield partial(self._finish_pictures, batch, pending, texts)

    def _launch_texts(self, items: Sequence[TextItem]) -> Iterator[Callable[[], list[EncodedItem]]]:
        for start in range(0, len(items), TEXTS_AT_ONCE):
            batch = []
            for item in items[start : start + TEXTS_AT_ONCE]:
                try:
                    batch.append((item, self._shape_captions(item.record)))
                except StrategyError as error:
                    self._pass_over(item.entry.key, item.entry.source_path, error)
            texts = self._launch_captions([captions for _, captions in batch])
            yield partial(self._finish_texts, batch, texts)

    def _launch_captions(self, captions: list[tuple[str, ...]]) -> Callable[[], list[tuple[TextOutputs, ...]]]:
        """Start on the captions of a batch; what it returns waits for them and deals them out again."""
        flat = [caption for group in captions for caption in group]
        if not flat:
            return lambda: [() for _ in captions]
        assert self.text is not None, "captions are only asked for with encoders"
        pending = self.text.encoder.launch(flat)

        def finish() -> list[tuple[TextOutputs, ...]]:
            outputs = iter(pending.wait())
            return [tuple(next(outputs) for _ in group) for group in captions]

        return finish

    def _shape_captions(self, record: bytes) -> tuple[str, ...]:
        assert self.text is not None, "captions are only asked for with encoders"
        return self.text.variants.shape(orjson.loads(record))

    def _prepare_ahead(self, items: Sequence[WorkItem]) -> Iterator[Prepared]:
        """Decode pictures on threads, in an order that fills batches, a few batches ahead of the device."""
        buckets = list_buckets(self.rule)
        lookahead = 2 * self.batch_size + self.num_workers
        with ThreadPoolExecutor(self.num_workers, thread_name_prefix="decoder") as pool:
            pending: deque = deque()
            try:
                for item in self._order(items, pool, buckets):
                    pending.append((item, pool.submit(self._prepare, item, buckets)))
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

    def _prepare(self, item: WorkItem, buckets: list[Size]) -> Prepared:
        captions = self._shape_captions(item.record) if item.with_text else ()
        return Prepared(item, prepare_image(Path(item.image_path), self.rule, buckets, self.with_alpha), captions)

    def _take(self, pending: deque) -> Iterator[Prepared]:
        item, future = pending.popleft()
        try:
            yield future.result()
        except (BadImageError, StrategyError) as error:
            self._pass_over(item.key, item.image_path, error)

    def _pass_over(self, key: str, file: str, error: Exception) -> None:
        self.progress.bad += 1
        self.report_bad(key, file, str(error))

    def _group(self, prepared: Iterator[Prepared]) -> Iterator[list[Prepared]]:
        """Batches of one bucket, by the sizes that decoding found, each as soon as it is full."""
        groups: dict[Size, list[Prepared]] = defaultdict(list)
        for entry in prepared:
            group = groups[entry.image.placement.bucket]
            group.append(entry)
            if len(group) == self.batch_size:
                yield groups.pop(entry.image.placement.bucket)
        yield from groups.values()

    def _hand_over(self, finish: Callable[[], list[EncodedItem]]) -> None:
        items = finish()
        for item in items:
            self.writer.submit(item)
        self.progress.done += len(items)
        self.progress.bytes_written = self.writer.bytes_written

    def _finish_pictures(self, batch: list[Prepared], pending: PendingBatch,
                         texts: Callable[[], list[tuple[TextOutputs, ...]]]) -> list[EncodedItem]:  # fmt: skip
        encoded, items = pending.wait(), []
        for place, (prepared, outputs) in enumerate(zip(batch, texts(), strict=True)):
            item = build_item(prepared, encoded, place, self.identity)
            if outputs:
                entry = self._describe_text(item.entry, choose_text_file(item.entry.file), prepared.captions)
                item = replace(item, entry=entry, texts=outputs)
            items.append(item)
        return items

    def _finish_texts(self, batch: list[tuple[TextItem, tuple[str, ...]]],
                      texts: Callable[[], list[tuple[TextOutputs, ...]]]) -> list[EncodedItem]:  # fmt: skip
        return [
            EncodedItem(self._describe_text(item.entry, item.file, captions), None, outputs, item.record)
            for (item, captions), outputs in zip(batch, texts(), strict=True)
        ]

    def _describe_text(self, entry: Entry, file: str, captions: tuple[str, ...]) -> Entry:
        assert self.text is not None, "captions are only encoded with encoders"
        part = TextPart(file, 0, "", self.text.identity, hash_captions(captions), len(captions))
        return replace(entry, text=part)


def choose_text_file(file: str) -> str:
    """Where the text encoder outputs go of a picture whose latents go to the npz file `file`, as kohya names them."""
    return file.removesuffix(".npz") + TEXT_CACHE


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
        alpha_mask=None if image.alpha is None else image.alpha.astype(np.float32) / 255,
    )
    entry = Entry(
        key=item.key, file=item.file, bytes=0, sha256="", bucket=placement.bucket, original_size=image.original_size,
        resized=placement.resized, crop=placement.crop_ltrb, identity=identity, source_path=item.image_path,
        source_bytes=image.source_bytes, source_mtime_ns=image.source_mtime_ns, source_sha256=image.source_sha256,
        flipped=flipped is not None, text=item.text,
    )  # fmt: skip
    return EncodedItem(entry, sample, record=item.record)


def _probe_size(item: WorkItem) -> Size | None:
    """Size by the file's header, or None where decoding will say what is wrong."""
    try:
        return read_image_size(Path(item.image_path))
    except BadImageError:
        return None
