"""The cache job's data path on one rank: threads decode, the device encodes and threads write, all at the same time."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import orjson

from sdxl_trainer.cache.encode.background_writer import BackgroundWriter
from sdxl_trainer.cache.encode.decoder import Decoder, PreparedItem, WorkItem
from sdxl_trainer.cache.encode.latent_encoder import EncodedBatch, Encoder, PendingBatch
from sdxl_trainer.cache.encode.progress import RankProgress
from sdxl_trainer.cache.encode.storage import EncodedItem
from sdxl_trainer.cache.encode.text_encoder import CaptionEncoder
from sdxl_trainer.data.formats.latents import LatentSample
from sdxl_trainer.data.formats.manifest import ManifestEntry, TextPart
from sdxl_trainer.data.formats.text_outputs import TextOutputs
from sdxl_trainer.data.images.bucket import BucketRule
from sdxl_trainer.data.images.image_files import TEXT_OUTPUTS_SUFFIX
from sdxl_trainer.data.images.masks import BadMaskError
from sdxl_trainer.data.text.strategy import StrategyError
from sdxl_trainer.data.text.variants import CaptionVariants, hash_captions
from sdxl_trainer.launch.activity import ACTIVITY

TEXT_BATCH = 16  # images whose captions are encoded together
WITHDRAWN_SUFFIX = ".withdrawn"

# Waits for a batch on the device and returns its items.
FinishItems = Callable[[], list[EncodedItem]]
# Waits for captions on the device and returns the outputs of each image's captions.
FinishTexts = Callable[[], list[tuple[TextOutputs, ...]]]


@dataclass(frozen=True)
class TextItem:
    """Cached latents whose captions must be encoded; `file` is the npz file for the text encoder outputs."""

    entry: ManifestEntry
    file: str
    record: bytes


@dataclass(frozen=True)
class TextJob:
    """Encoder and variants of captions; `identity` is the name of the outputs' identity."""

    encoder: CaptionEncoder
    variants: CaptionVariants
    identity: str


class _ShapedText(NamedTuple):
    item: TextItem
    captions: tuple[str, ...]


@dataclass(kw_only=True)
class Pipeline:
    """The data path of one rank.

    Args:
        identity: name of the latents' identity.
        num_workers: decoding threads.
        report_bad: called with the key and the file of each image that cannot be used, and the error.
        raise_if_stopped: called between batches; raises to end the work after everything encoded is written.
        text: encoder and variants of captions; None encodes no captions.
        with_alpha: turn alpha channels into masks.
    """

    encoder: Encoder
    writer: BackgroundWriter
    rule: BucketRule
    identity: str
    batch_size: int
    num_workers: int
    progress: RankProgress
    report_bad: Callable[[str, str, Exception], None]
    raise_if_stopped: Callable[[], None]
    text: TextJob | None = None
    with_alpha: bool = False

    def run(self, items: Sequence[WorkItem], texts: Sequence[TextItem] = ()) -> None:
        """Encode images, then captions of cached latents, and submit the results to the writer.

        While the device encodes a batch, the previous batch is submitted, earlier batches are written, and the next
        batches are decoded. Launched batches are submitted even if the work is stopped.
        """
        pending: deque[FinishItems] = deque()
        try:
            for finish in chain(self._launch_images(items), self._launch_texts(texts)):
                pending.append(finish)
                ACTIVITY.note()
                if len(pending) > 1:
                    self._submit(pending.popleft())
                self.raise_if_stopped()
        finally:
            while pending:
                self._submit(pending.popleft())

    def _launch_images(self, items: Sequence[WorkItem]) -> Iterator[FinishItems]:
        decoder = Decoder(
            rule=self.rule,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            with_alpha=self.with_alpha,
            shape_captions=self._shape_captions,
            skip_item=self._skip_image,
        )
        batches = decoder.decode(items)
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            self.progress.wait_seconds += time.monotonic() - started
            if batch is None:
                return
            pending = self.encoder.launch(batch.pixels, [prepared.item.key for prepared in batch.items])
            texts = self._launch_captions([prepared.captions for prepared in batch.items])
            yield partial(self._finish_images, batch.items, pending, texts)

    def _launch_texts(self, items: Sequence[TextItem]) -> Iterator[FinishItems]:
        for start in range(0, len(items), TEXT_BATCH):
            batch = []
            for item in items[start : start + TEXT_BATCH]:
                try:
                    batch.append(_ShapedText(item, self._shape_captions(item.record)))
                except StrategyError as error:
                    self._skip(item.entry.key, item.entry.source_path, error)
            texts = self._launch_captions([shaped.captions for shaped in batch])
            yield partial(self._finish_texts, batch, texts)

    def _launch_captions(self, captions: list[tuple[str, ...]]) -> FinishTexts:
        """Start encoding the captions of a batch of images."""
        flat = [caption for group in captions for caption in group]
        if not flat:
            return lambda: [() for _ in captions]
        assert self.text is not None, "captions need text encoders"
        pending = self.text.encoder.launch(flat)

        def finish() -> list[tuple[TextOutputs, ...]]:
            outputs = iter(pending.wait())
            return [tuple(next(outputs) for _ in group) for group in captions]

        return finish

    def _shape_captions(self, record: bytes) -> tuple[str, ...]:
        assert self.text is not None, "captions need text encoders"
        return self.text.variants.build(orjson.loads(record))

    def _skip_image(self, item: WorkItem, error: Exception) -> None:
        if item.outdated is not None and (item.refusal or isinstance(error, BadMaskError)):
            self.writer.list_entry(withdraw_entry(item.outdated, item))
        self._skip(item.key, item.image_path, error)

    def _skip(self, key: str, file: str, error: Exception) -> None:
        self.progress.bad += 1
        self.report_bad(key, file, error)

    def _submit(self, finish: FinishItems) -> None:
        items = finish()
        for item in items:
            self.writer.submit(item)
        self.progress.done += len(items)
        self.progress.bytes_written = self.writer.bytes_written

    def _finish_images(self, batch: list[PreparedItem], pending: PendingBatch, texts: FinishTexts) -> list[EncodedItem]:
        encoded, items = pending.wait(), []
        for place, (prepared, outputs) in enumerate(zip(batch, texts(), strict=True)):
            item = build_item(prepared, encoded, place, self.identity)
            if outputs:
                entry = self._describe_text(item.entry, choose_text_file(item.entry.file), prepared.captions)
                item = replace(item, entry=entry, texts=outputs)
            items.append(item)
        return items

    def _finish_texts(self, batch: list[_ShapedText], texts: FinishTexts) -> list[EncodedItem]:
        return [
            EncodedItem(self._describe_text(item.entry, item.file, captions), None, outputs, item.record)
            for (item, captions), outputs in zip(batch, texts(), strict=True)
        ]

    def _describe_text(self, entry: ManifestEntry, file: str, captions: tuple[str, ...]) -> ManifestEntry:
        assert self.text is not None, "captions need text encoders"
        part = TextPart(
            file=file,
            bytes=0,
            sha256="",
            identity=self.text.identity,
            captions_sha256=hash_captions(captions),
            variants=len(captions),
        )
        return replace(entry, text=part)


def choose_text_file(file: str) -> str:
    """Return kohya's name for the text encoder outputs beside the latents' npz file `file`."""
    return file.removesuffix(".npz") + TEXT_OUTPUTS_SUFFIX


def withdraw_entry(entry: ManifestEntry, item: WorkItem) -> ManifestEntry:
    """Return an entry that replaces latents which must no longer be used for training.

    Its file does not exist, so that training reports a bad sample, and its identity matches no settings, so that the
    next cache job encodes the image again.
    """
    file = item.file + WITHDRAWN_SUFFIX
    return replace(entry.as_stale(), file=file, offset=None, record_bytes=None, record_sha256=None, text=item.text)


def build_item(prepared: PreparedItem, encoded: EncodedBatch, place: int, identity: str) -> EncodedItem:
    """Build the item of the image at `place` in a batch, with its latents and its manifest entry."""
    item, image = prepared.item, prepared.image
    placement = image.placement
    std, flipped, flipped_std = (
        None if part is None else part[place] for part in (encoded.std, encoded.flipped, encoded.flipped_std)
    )
    sample = LatentSample(
        latents=encoded.latents[place],
        original_size=image.original_size,
        crop_ltrb=placement.crop,
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
        crop=placement.crop,
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
