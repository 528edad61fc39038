"""The cache job's data path on one rank: decode on threads, encode on the device, write on threads, all at once."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np
import orjson

from sdxl_trainer.cache.encode.decoder import Decoder, Prepared, WorkItem
from sdxl_trainer.cache.encode.latent_encoder import Encoded, Encoder, PendingBatch
from sdxl_trainer.cache.encode.progress import RankProgress
from sdxl_trainer.cache.encode.sinks import EncodedItem
from sdxl_trainer.cache.encode.text_encoder import TextEncoder
from sdxl_trainer.cache.encode.writer import LatentWriter
from sdxl_trainer.data.formats.latents import LatentSample
from sdxl_trainer.data.formats.manifest import ManifestEntry, TextPart
from sdxl_trainer.data.formats.text_outputs import TextOutputs
from sdxl_trainer.data.images.bucket import BucketRule
from sdxl_trainer.data.images.image_files import TEXT_OUTPUTS_SUFFIX
from sdxl_trainer.data.images.masks import BadMaskError
from sdxl_trainer.data.text.strategy import StrategyError
from sdxl_trainer.data.text.variants import CaptionVariants, hash_captions

TEXTS_AT_ONCE = 16  # images whose captions are encoded together
WITHDRAWN = ".withdrawn"


@dataclass(frozen=True)
class TextItem:
    """An item of the cache whose captions are to be encoded; its latents stay. `file` is where an npz of them goes."""

    entry: ManifestEntry
    file: str
    record: bytes


@dataclass(frozen=True)
class TextJob:
    """How captions are encoded. `identity` is the name of what decides it."""

    encoder: TextEncoder
    variants: CaptionVariants
    identity: str


@dataclass
class Pipeline:
    """What one rank's data path is made of.

    Args:
        report_bad: told the key and the file of each image that cannot be used, and why; the rest go on.
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
        """Encode images, then captions of images that are encoded already, and hand the results to the writer.

        One batch is on the device while the one before it is handed over, the next ones are decoded and the last ones
        are written. What was launched is handed over also when the work is stopped.
        """
        pending: deque[Callable[[], list[EncodedItem]]] = deque()
        try:
            for finish in chain(self._launch_images(items), self._launch_texts(texts)):
                pending.append(finish)
                if len(pending) > 1:
                    self._hand_over(pending.popleft())
                self.check_stop()
        finally:
            while pending:
                self._hand_over(pending.popleft())

    def _launch_images(self, items: Sequence[WorkItem]) -> Iterator[Callable[[], list[EncodedItem]]]:
        """Start batch after batch, yielding what waits for each and returns it."""
        decoder = Decoder(
            self.rule,
            self.batch_size,
            self.num_workers,
            self.with_alpha,
            self._shape_captions,
            self._pass_over_image,
        )
        batches = decoder.decode(items)
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.progress.wait_seconds += time.monotonic() - asked
            if batch is None:
                return
            pending = self.encoder.launch(batch.pixels, [entry.item.key for entry in batch.entries])
            texts = self._launch_captions([entry.captions for entry in batch.entries])
            yield partial(self._finish_images, batch.entries, pending, texts)

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

    def _pass_over_image(self, item: WorkItem, error: Exception) -> None:
        if isinstance(error, BadMaskError) and item.unmasked is not None:
            self.writer.list_entry(withdraw(item.unmasked, item))
        self._pass_over(item.key, item.image_path, error)

    def _pass_over(self, key: str, file: str, error: Exception) -> None:
        self.progress.bad += 1
        self.report_bad(key, file, str(error))

    def _hand_over(self, finish: Callable[[], list[EncodedItem]]) -> None:
        items = finish()
        for item in items:
            self.writer.submit(item)
        self.progress.done += len(items)
        self.progress.bytes_written = self.writer.bytes_written

    def _finish_images(
        self, batch: list[Prepared], pending: PendingBatch, texts: Callable[[], list[tuple[TextOutputs, ...]]]
    ) -> list[EncodedItem]:
        encoded, items = pending.wait(), []
        for place, (prepared, outputs) in enumerate(zip(batch, texts(), strict=True)):
            item = build_item(prepared, encoded, place, self.identity)
            if outputs:
                entry = self._describe_text(item.entry, choose_text_file(item.entry.file), prepared.captions)
                item = replace(item, entry=entry, texts=outputs)
            items.append(item)
        return items

    def _finish_texts(
        self, batch: list[tuple[TextItem, tuple[str, ...]]], texts: Callable[[], list[tuple[TextOutputs, ...]]]
    ) -> list[EncodedItem]:
        return [
            EncodedItem(self._describe_text(item.entry, item.file, captions), None, outputs, item.record)
            for (item, captions), outputs in zip(batch, texts(), strict=True)
        ]

    def _describe_text(self, entry: ManifestEntry, file: str, captions: tuple[str, ...]) -> ManifestEntry:
        assert self.text is not None, "captions are only encoded with encoders"
        part = TextPart(file, 0, "", self.text.identity, hash_captions(captions), len(captions))
        return replace(entry, text=part)


def choose_text_file(file: str) -> str:
    """Where the text encoder outputs go of an image whose latents go to the npz file `file`, as kohya names them."""
    return file.removesuffix(".npz") + TEXT_OUTPUTS_SUFFIX


def withdraw(entry: ManifestEntry, item: WorkItem) -> ManifestEntry:
    """An entry that holds in place of one whose latents must not be trained on any more: of a file that is not there,
    which training names as a bad sample, and made otherwise than any settings would, so that it is encoded again."""
    file = item.file + WITHDRAWN
    return replace(entry.as_stale(), file=file, offset=None, record_bytes=None, record_sha256=None, text=item.text)


def build_item(prepared: Prepared, encoded: Encoded, place: int, identity: str) -> EncodedItem:
    """One image's latents of a batch, with what the manifest will say of them."""
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
        alpha_mask=None if image.mask is None else image.mask.astype(np.float32) / 255,
    )
    entry = ManifestEntry(
        key=item.key,
        file=item.file,
        bytes=0,
        sha256="",
        bucket=placement.bucket,
        original_size=image.original_size,
        resized=placement.resized,
        crop=placement.crop_ltrb,
        identity=identity,
        source_path=item.image_path,
        source_bytes=image.source_bytes,
        source_mtime_ns=image.source_mtime_ns,
        source_sha256=image.source_sha256,
        flipped=flipped is not None,
        text=item.text,
        mask=image.mask_file,
    )
    return EncodedItem(entry, sample, record=item.record)
