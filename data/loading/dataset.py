"""The dataset reads the rows of a micro batch from the latent cache, and shapes and tokenizes their captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sdxl_trainer.data.formats.latents import SDXL_CHANNELS, BadLatentError, LatentSample
from sdxl_trainer.data.formats.text_outputs import BadTextError, TextOutputs
from sdxl_trainer.data.images.bucket import BucketRule, Size, list_buckets, place_image, split_key
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.schema import BadSample
from sdxl_trainer.data.loading.latent_store import LatentStore
from sdxl_trainer.data.loading.micro_batch import (
    DrawnLatents,
    MicroBatch,
    MicroSpec,
    PendingImage,
    build_time_ids,
    stack_latents,
    stack_masks,
    stack_text_outputs,
)
from sdxl_trainer.data.metadata.records import parse_record
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.data.stores.shard_copies import ShardCopies
from sdxl_trainer.data.text.cached_text import CachedText
from sdxl_trainer.data.text.captions import CaptionSettings, CaptionTexts, build_caption, process_texts
from sdxl_trainer.data.text.strategy import Strategy, StrategyError
from sdxl_trainer.data.text.tokens import WINDOW, TokenIds, Tokenizers, encode_captions, share_vocabulary

if TYPE_CHECKING:
    from sdxl_trainer.data.images.transforms import PreparedImage

    Loaded = LatentSample | PreparedImage | BadLatentError

NO_PIXELS = np.empty((0, 0, 3), np.uint8)
Row = dict[str, Any]  # of the index, as Index.row returns it


@dataclass(frozen=True)
class SampleSettings:
    """Settings for shaping samples when they are read. Every random choice is keyed to (seed, epoch, row)."""

    seed: int
    max_tokens: int
    caption: CaptionSettings
    flip_rate: float = 0.0  # probability of the mirrored image's latents, for samples that have them
    latent_channels: int = SDXL_CHANNELS  # of the VAE; latents of another number are bad samples
    prior_loss_weight: float = 1.0  # loss weight of samples whose record has a true `is_reg` (prior preservation)


class WeightedCaption(NamedTuple):
    """A sample's caption and loss weight in one epoch."""

    text: str
    weight: float


class LatentDataset(torch.utils.data.Dataset):
    """Reads the micro batch of each MicroSpec from the latent cache.

    Images are read only for rows that have no latents yet.

    Args:
        index: records joined with the cache (data/index/index.py).
        cache_folder: the folder that file names in the index are relative to.
        tokenizers: tokenizers of both text encoders.
        strategy: the user's class, which may supply captions and loss weights.
        rules: bucket rules of images without latents, by the prefix of their keys.
        copies: local copies of latents on remote stores.
        text: cached text encoder outputs, read instead of tokenizing captions.
    """

    def __init__(
        self,
        index: Index,
        cache_folder: Path,
        tokenizers: Tokenizers,
        settings: SampleSettings,
        strategy: Strategy | None = None,
        rules: Mapping[str, BucketRule] | None = None,
        copies: ShardCopies | None = None,
        text: CachedText | None = None,
    ):
        self.index = index
        self.cache_folder = cache_folder
        self.store = LatentStore(cache_folder, copies, settings.latent_channels)
        self.tokenizers = share_vocabulary(tokenizers)
        self.settings = settings
        self.strategy = strategy
        self.text = text
        self._rules = {prefix: (rule, list_buckets(rule)) for prefix, rule in (rules or {}).items()}

    def __getitem__(self, spec: MicroSpec) -> MicroBatch:
        """Read one micro batch. A bad sample never raises: it gets weight 0 and is listed in `MicroBatch.bad`."""
        numbers, epochs = spec.rows.tolist(), spec.epochs.tolist()
        rows = [self.index.row(number) for number in numbers]
        self.store.fetch(spec.shards)
        loaded = self._load(rows, spec.bucket)
        samples = [
            self._draw_sample(place, *arguments)
            for place, arguments in enumerate(zip(rows, loaded, epochs, numbers, strict=True))
        ]
        captions = [
            self.draw_caption(row, spec.step, epoch, number)
            for row, epoch, number in zip(rows, epochs, numbers, strict=True)
        ]
        texts = [self._read_text(*arguments) for arguments in zip(rows, epochs, numbers, strict=True)]
        bad = [_find_bad_part(parts) for parts in zip(samples, captions, texts, strict=True)]
        drawn = [sample if isinstance(sample, DrawnLatents) else None for sample in samples]
        token_ids = self._tokenize(["" if isinstance(caption, BadSample) else caption.text for caption in captions])
        weights = [
            0.0 if reason or isinstance(caption, BadSample) else caption.weight
            for caption, reason in zip(captions, bad, strict=True)
        ]
        return MicroBatch(
            latents=stack_latents(drawn, spec.bucket, self.settings.latent_channels),
            input_ids=torch.from_numpy(token_ids.input_ids),
            input_ids_2=torch.from_numpy(token_ids.input_ids_2),
            time_ids=build_time_ids(rows, drawn, spec.bucket),
            weights=torch.from_numpy(np.array(weights, np.float32)),
            positions=torch.from_numpy(spec.positions),
            rows=torch.from_numpy(spec.rows),
            text=self._stack_texts(texts),
            token_weights=None if token_ids.weights is None else torch.from_numpy(token_ids.weights),
            token_weights_2=None if token_ids.weights_2 is None else torch.from_numpy(token_ids.weights_2),
            masks=stack_masks(drawn, spec.bucket),
            bad=list(filter(None, bad)),
            pending=[image for image in samples if isinstance(image, PendingImage) and bad[image.place] is None],
        )

    def _load(self, rows: list[Row], bucket: Size) -> "list[Loaded]":
        """Read each row's latents, or prepare its image if no latents are cached.

        A row whose latents were not cached when the index was built is updated with the sizes of its image.
        """
        is_missing = [row["bytes"] is None and not (self.cache_folder / row["file"]).is_file() for row in rows]
        cached = [row for row, missing in zip(rows, is_missing, strict=True) if not missing]
        stored = iter(self.store.read(cached, bucket))
        loaded = [
            self._prepare_image(row, bucket) if missing else next(stored)
            for row, missing in zip(rows, is_missing, strict=True)
        ]
        for row, item in zip(rows, loaded, strict=True):
            if row["bytes"] is None and not isinstance(item, BadLatentError):
                row |= self._place_image(row["key"], item.original_size)
        return loaded

    def _prepare_image(self, row: Row, bucket: Size) -> "PreparedImage | BadLatentError":
        """Decode and crop an image. It is bad if it is unreadable or if its true size belongs in another bucket."""
        # Imported here, because the module takes several megabytes and cached latents do not need it.
        from sdxl_trainer.data.images.transforms import BadImageError, prepare_image

        path = Path(row["image_path"])
        try:
            image = prepare_image(path, *self._rules[split_key(row["key"])[0]])
        except BadImageError as error:
            return BadLatentError(str(error))
        if image.placement.bucket != bucket:
            (width, height), listed = image.original_size, f"{row['original_width']}x{row['original_height']}"
            return BadLatentError(f"{path}: is {width}x{height} px, but its metadata says {listed}")
        return image

    def _place_image(self, key: str, original_size: Size) -> dict[str, int]:
        """Return the size columns of a row for an image of `original_size`."""
        placement = place_image(original_size, *self._rules[split_key(key)[0]])
        return {
            "original_width": original_size[0],
            "original_height": original_size[1],
            "resized_width": placement.resized[0],
            "crop_left": placement.left,
            "crop_top": placement.top,
        }

    def _draw_sample(
        self, place: int, row: Row, loaded: "Loaded", epoch: int, row_number: int
    ) -> DrawnLatents | PendingImage | BadSample:
        if isinstance(loaded, BadLatentError):
            return BadSample(row["key"], str(loaded))
        if isinstance(loaded, LatentSample):
            return self.draw_latents(loaded, row, epoch, row_number)
        return PendingImage(
            place=place,
            row=row,
            epoch=epoch,
            row_number=row_number,
            pixels=torch.from_numpy(loaded.pixels),
            image=replace(loaded, pixels=NO_PIXELS),
        )

    def draw_latents(self, sample: LatentSample, row: Row, epoch: int, row_number: int) -> DrawnLatents:
        """Apply the keyed flip and posterior sample to latents.

        Args:
            row: row `row_number` of the index.
        """
        latents, std, left, mask = sample.latents, sample.std, row["crop_left"], sample.alpha_mask
        if sample.flipped is not None and self._is_flipped(epoch, row_number):
            latents, std = sample.flipped, sample.flipped_std
            left = row["resized_width"] - left - sample.bucket[0]
            mask = None if mask is None else mask[:, ::-1]
        if std is not None:  # the cache holds both moments, so each epoch samples the posterior anew
            rng = np.random.default_rng(derive_seed(self.settings.seed, RandomStream.POSTERIOR, epoch, row_number))
            latents = latents + std * rng.standard_normal(latents.shape, np.float32)
        return DrawnLatents(latents, left, None if mask is None else mask.astype(np.float32))

    def _is_flipped(self, epoch: int, row_number: int) -> bool:
        rate = self.settings.flip_rate
        return rate > 0 and derive_seed(self.settings.seed, RandomStream.FLIP, epoch, row_number) < rate * 2**63

    def draw_caption(self, row: Row, step: int, epoch: int, row_number: int) -> WeightedCaption | BadSample:
        """Return a sample's caption and loss weight in an epoch, or a bad sample if the user's strategy fails on it.

        Args:
            row: row `row_number` of the index.
            step: optimizer steps done before this one, for the token warm-up.
        """
        settings, strategy, record = self.settings, self.strategy, parse_record(row)
        rng = np.random.default_rng(derive_seed(settings.seed, RandomStream.CAPTION, epoch, row_number))
        try:
            if strategy is not None and strategy.has("caption"):
                caption = process_texts(CaptionTexts(strategy.caption(record, rng)), settings.caption, rng, step, epoch)
            else:
                caption = build_caption(record, settings.caption, rng, step, epoch)
            weight = 1.0 if strategy is None else strategy.loss_weight(record)
        except StrategyError as error:
            return BadSample(row["key"], str(error))
        return WeightedCaption(caption, weight * (settings.prior_loss_weight if record.get("is_reg") else 1.0))

    def _tokenize(self, captions: Sequence[str]) -> TokenIds:
        if self.text is not None:
            empty = np.empty((len(captions), 0, WINDOW + 2), np.int64)
            return TokenIds(empty, empty)
        settings = self.settings
        return encode_captions(self.tokenizers, captions, settings.max_tokens, settings.caption.weighted)

    def _read_text(self, row: Row, epoch: int, row_number: int) -> TextOutputs | BadSample | None:
        """Read a sample's cached text encoder outputs; None if text is not cached."""
        if self.text is None:
            return None
        try:
            return self.text.read(row, parse_record(row), epoch, row_number)
        except (BadTextError, StrategyError) as error:
            return BadSample(row["key"], str(error))

    def _stack_texts(self, texts: Sequence[TextOutputs | BadSample | None]) -> dict[str, torch.Tensor] | None:
        """Stack cached text encoder outputs; bad samples get the outputs of the empty caption."""
        if self.text is None:
            return None
        return stack_text_outputs([text if isinstance(text, TextOutputs) else self.text.empty for text in texts])


def _find_bad_part(parts: Sequence[Any]) -> BadSample | None:
    """Return the first BadSample among the parts of a sample: latents, caption and text."""
    return next((part for part in parts if isinstance(part, BadSample)), None)
