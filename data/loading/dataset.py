"""Micro batches: the rows that the plan asks for, read from the latent cache and tokenised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sdxl_trainer.data.formats.latents import VAE_FACTOR, BadLatentError, LatentSample, compute_shape
from sdxl_trainer.data.formats.text_outputs import BadTextError, TextOutputs
from sdxl_trainer.data.images.bucket import BucketRule, list_buckets, place_image, split_key
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.loading.latent_store import LatentStore
from sdxl_trainer.data.metadata.records import parse_record
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.data.stores.shard_copies import ShardCopies
from sdxl_trainer.data.text.cached_text import CachedText
from sdxl_trainer.data.text.captions import CaptionSettings, shape_caption, shape_text
from sdxl_trainer.data.text.strategy import Strategy, StrategyError
from sdxl_trainer.data.text.tokens import WINDOW, Tokenizers, encode_captions, share_vocabulary

if TYPE_CHECKING:
    from sdxl_trainer.data.images.transforms import PreparedImage

    Found = LatentSample | PreparedImage | BadLatentError

CROP_LEFT = 3  # its place among the time ids


@dataclass(frozen=True)
class MicroSpec:
    """What one rank is to read for one forward pass: rows of one bucket and where they stand in the global batch."""

    bucket: tuple[int, int]  # (width, height) px
    rows: np.ndarray  # [B] int64
    epochs: np.ndarray  # [B] int64, the epoch each sample belongs to
    positions: np.ndarray  # [B] int64, place in the global batch
    step: int = 0  # optimizer steps done before the one that this is part of
    shards: tuple[str, ...] = ()  # to be copied from their store, because samples of them are to come


@dataclass
class MicroBatch:
    """One forward pass of one rank."""

    latents: torch.Tensor  # [B, 4, h, w] float32, as the VAE gave them
    input_ids: torch.Tensor  # [B, windows, 77] int64, encoder 1; [B, 0, 77] with cached text
    input_ids_2: torch.Tensor  # [B, windows, 77] int64, encoder 2
    time_ids: torch.Tensor  # [B, 6] float32: original h, w; crop top, left; target h, w
    weights: torch.Tensor  # [B] float32, 0 for a bad sample
    positions: torch.Tensor  # [B] int64
    rows: torch.Tensor  # [B] int64
    text: dict[str, torch.Tensor] | None = None  # cached: hidden [B, L, C1], hidden_2 [B, L, C2], pooled [B, C2]
    masks: torch.Tensor | None = None  # [B, H, W] float32, 0 to 1, where the loss counts; None: everywhere
    bad: list[tuple[str, str]] = field(default_factory=list)  # (key, reason)
    pending: list["PendingImage"] = field(default_factory=list)  # images whose latents are still zeros

    def __getstate__(self) -> dict[str, Any]:
        """For the way from a worker: tensors as arrays, which go through its pipe.

        Each tensor would go by a file of its own in shared memory and by a connection of its own, in twice the time.
        """
        text = self.text and {name: value.numpy() for name, value in self.text.items()}
        parts = vars(self) | {"text": text}
        return {name: part.numpy() if isinstance(part, torch.Tensor) else part for name, part in parts.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, part in state.items():
            setattr(self, name, torch.from_numpy(part) if isinstance(part, np.ndarray) else part)
        self.text = self.text and {name: torch.from_numpy(part) for name, part in state["text"].items()}

    def fill(self, place: int, drawn: "DrawnLatents") -> None:
        """Put latents in where they were pending."""
        self.latents[place] = torch.from_numpy(drawn.latents)
        self.time_ids[place, CROP_LEFT] = drawn.crop_left
        if drawn.mask is not None:
            if self.masks is None:
                height, width = (VAE_FACTOR * side for side in self.latents.shape[2:])
                self.masks = torch.ones(len(self.latents), height, width)
            self.masks[place] = torch.from_numpy(drawn.mask)

    def give_up(self, place: int, key: str, reason: str) -> None:
        """Leave a sample out that turned out bad."""
        self.weights[place] = 0.0
        self.bad.append((key, reason))

    def pin_memory(self) -> "MicroBatch":
        """For DataLoader: page-locked memory, so that copies to a GPU overlap with work."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.pin_memory())
        if self.text is not None:
            self.text = {name: value.pin_memory() for name, value in self.text.items()}
        return self


@dataclass(frozen=True)
class SampleSettings:
    """What is made of a sample when it is read. All that is drawn is keyed to (seed, epoch, row)."""

    seed: int
    max_tokens: int
    caption: CaptionSettings
    flip_rate: float = 0.0  # how often the mirrored image's latents are taken, where there are some
    prior_loss_weight: float = 1.0  # of samples whose record has a true `is_reg` (prior preservation)


@dataclass(frozen=True)
class DrawnLatents:
    """What the networks are given of a latent file this time."""

    latents: np.ndarray  # [4, h, w] floats
    crop_left: int  # px, in the resized image as it is seen: mirrored if the latents are
    mask: np.ndarray | None  # [H, W] float32


@dataclass(frozen=True)
class PendingImage:
    """An image that has no latents yet: what they are made from, and what is then drawn of them."""

    place: int  # in the micro batch
    record: dict[str, Any]  # the index's row, with the sizes that the image really has
    epoch: int
    row: int
    pixels: torch.Tensor  # [H, W, 3] uint8; a tensor, because those come from a worker without being copied
    image: "PreparedImage"  # without its pixels


class LatentDataset(torch.utils.data.Dataset):
    """Reads micro batches from cached latents; the images themselves are not needed, but for what the index says has
    no latents yet.

    Args:
        index: records joined with the cache (data/index/index.py).
        cache_folder: what the index's file names are relative to.
        tokenizers: of text encoder 1 and 2.
        strategy: the user's class, which may give captions and weights.
        rules: how images without latents are cut, by the prefix of their keys.
        copies: where copies are kept of what is read from stores.
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
    ):
        self.index = index
        self.cache_folder = cache_folder
        self.store = LatentStore(cache_folder, copies)
        self.tokenizers = share_vocabulary(tokenizers)
        self.settings = settings
        self.strategy = strategy
        self.text: CachedText | None = None  # reads text encoder outputs instead of tokenising captions
        self.rules = {prefix: (rule, list_buckets(rule)) for prefix, rule in (rules or {}).items()}

    def __getitem__(self, spec: MicroSpec) -> MicroBatch:
        records = [self.index.row(int(row)) for row in spec.rows]
        self.store.fetch(spec.shards)
        stored = self._read(records, spec.bucket)
        samples, bad = zip(
            *(
                self._settle(record, each, (place, int(epoch), int(row)))
                for place, (record, each, epoch, row) in enumerate(
                    zip(records, stored, spec.epochs, spec.rows, strict=True)
                )
            ),
            strict=True,
        )
        images = [sample for sample in samples if isinstance(sample, PendingImage)]
        samples = [sample if isinstance(sample, DrawnLatents) else None for sample in samples]
        captions, weights, failed = zip(
            *(
                self.describe(record, spec.step, int(epoch), int(row))
                for record, epoch, row in zip(records, spec.epochs, spec.rows, strict=True)
            ),
            strict=True,
        )
        texts, untold = self._read_texts(records, spec)
        bad = [next(filter(None, reasons), None) for reasons in zip(bad, failed, untold, strict=True)]
        weights = [weight if item is None else 0.0 for weight, item in zip(weights, bad, strict=True)]
        input_ids, input_ids_2 = self._tokenize(captions)
        width, height = spec.bucket
        time_ids = [
            (
                record["original_height"],
                record["original_width"],
                record["crop_top"],
                record["crop_left"] if sample is None else sample.crop_left,
                height,
                width,
            )
            for record, sample in zip(records, samples, strict=True)
        ]
        return MicroBatch(
            latents=_stack_latents(samples, spec.bucket),
            input_ids=torch.from_numpy(input_ids),
            input_ids_2=torch.from_numpy(input_ids_2),
            time_ids=torch.from_numpy(np.array(time_ids, np.float32)),
            weights=torch.from_numpy(np.array(weights, np.float32)),
            positions=torch.from_numpy(spec.positions),
            rows=torch.from_numpy(spec.rows),
            text=texts,
            masks=_stack_masks(samples, spec.bucket),
            bad=[item for item in bad if item is not None],
            pending=[image for image in images if bad[image.place] is None],
        )

    def _read(
        self, records: list[dict], bucket: tuple[int, int]
    ) -> "list[LatentSample | PreparedImage | BadLatentError]":
        """Read the latents of each of the index's rows, or the image that they are still to be encoded from."""
        missing = [record["bytes"] is None and not (self.cache_folder / record["file"]).is_file() for record in records]
        cached = [record for record, is_missing in zip(records, missing, strict=True) if not is_missing]
        stored = iter(self.store.read(cached, bucket))
        return [
            self._prepare(record, bucket) if is_missing else next(stored)
            for record, is_missing in zip(records, missing, strict=True)
        ]

    def _settle(
        self, record: dict, stored: "Found", number: tuple[int, int, int]
    ) -> tuple[DrawnLatents | PendingImage | None, tuple[str, str] | None]:
        """(latents, None), or (None, (key, reason)) for what cannot be trained on.

        Args:
            record: the index's row; that of an image without latents gets the sizes that the image really has.
            number: place in the micro batch, epoch, row.
        """
        place, epoch, row = number
        if isinstance(stored, BadLatentError):
            return None, (record["key"], str(stored))
        if record["bytes"] is None:
            placement = place_image(stored.original_size, *self.rules[split_key(record["key"])[0]])
            width, height = stored.original_size
            record |= {"original_width": width, "original_height": height, "resized_width": placement.resized[0]}
            record |= {"crop_left": placement.left, "crop_top": placement.top}
        if isinstance(stored, LatentSample):
            return self.draw(stored, record, epoch, row), None
        return PendingImage(
            place, record, epoch, row, torch.from_numpy(stored.pixels), replace(stored, pixels=NO_PIXELS)
        ), None

    def _prepare(self, record: dict, bucket: tuple[int, int]) -> "PreparedImage | BadLatentError":
        """Decode and cut an image, unless it cannot be used, or the metadata's size promised another bucket."""
        from sdxl_trainer.data.images.transforms import (  # megabytes that cached latents spare
            BadImageError,
            prepare_image,
        )

        path = Path(record["image_path"])
        try:
            image = prepare_image(path, *self.rules[split_key(record["key"])[0]])
        except BadImageError as error:
            return BadLatentError(str(error))
        if image.placement.bucket != bucket:
            (width, height), told = image.original_size, f"{record['original_width']}x{record['original_height']}"
            return BadLatentError(f"{path}: is {width}x{height} px, the metadata say {told}")
        return image

    def draw(self, sample: LatentSample, record: dict, epoch: int, row: int) -> DrawnLatents:
        """Settle what is random about latents: mirrored or not, and which sample of the posterior.

        Args:
            record: the index's row `row`.
        """
        latents, std, left, mask = sample.latents, sample.std, record["crop_left"], sample.alpha_mask
        if sample.flipped is not None and self._is_flipped(epoch, row):
            latents, std = sample.flipped, sample.flipped_std
            left = record["resized_width"] - left - sample.bucket[0]
            mask = None if mask is None else mask[:, ::-1]
        if std is not None:  # both moments are kept: a fresh sample of the posterior each time
            rng = np.random.default_rng(derive_seed(self.settings.seed, RandomStream.POSTERIOR, epoch, row))
            latents = latents + std * rng.standard_normal(latents.shape, np.float32)
        return DrawnLatents(latents, left, None if mask is None else mask.astype(np.float32))

    def _is_flipped(self, epoch: int, row: int) -> bool:
        rate = self.settings.flip_rate
        return rate > 0 and derive_seed(self.settings.seed, RandomStream.FLIP, epoch, row) < rate * 2**63

    def describe(self, row: dict, step: int, epoch: int, number: int) -> tuple[str, float, tuple[str, str] | None]:
        """Caption and weight of a sample, and what is wrong with it: the strategy failed on it.

        Args:
            row: the index's row `number`.
        """
        settings, strategy, record = self.settings, self.strategy, parse_record(row)
        rng = np.random.default_rng(derive_seed(settings.seed, RandomStream.CAPTION, epoch, number))
        try:
            if strategy is not None and strategy.has("caption"):
                caption = shape_text(strategy.caption(record, rng), "", settings.caption, rng, step, epoch)
            else:
                caption = shape_caption(record, settings.caption, rng, step, epoch)
            weight = 1.0 if strategy is None else strategy.loss_weight(record)
            return caption, weight * (settings.prior_loss_weight if record.get("is_reg") else 1.0), None
        except StrategyError as error:
            return "", 0.0, (row["key"], str(error))

    def _read_texts(
        self, rows: Sequence[dict[str, Any]], spec: MicroSpec
    ) -> tuple[dict[str, torch.Tensor] | None, list[tuple[str, str] | None]]:
        """(cached text of a micro batch, what is wrong with each sample's); without cached text nothing is."""
        outputs: list[TextOutputs] = []
        bad: list[tuple[str, str] | None] = [None] * len(rows)
        if self.text is None:
            return None, bad
        for place, (row, epoch, number) in enumerate(zip(rows, spec.epochs, spec.rows, strict=True)):
            try:
                outputs.append(self.text.read(row, parse_record(row), int(epoch), int(number)))
            except (BadTextError, StrategyError) as error:
                bad[place] = (row["key"], str(error))
                outputs.append(self.text.empty)
        return stack_outputs(outputs), bad

    def _tokenize(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self.text is not None:
            nothing = np.empty((len(captions), 0, WINDOW + 2), np.int64)
            return nothing, nothing
        return encode_captions(self.tokenizers, captions, self.settings.max_tokens)


NO_PIXELS = np.empty((0, 0, 3), np.uint8)


def stack_outputs(outputs: Sequence[TextOutputs]) -> dict[str, torch.Tensor]:
    """Text encoder outputs of a micro batch, by the names that the networks know them by."""
    names = {"hidden": "hidden_1", "hidden_2": "hidden_2", "pooled": "pooled"}
    return {
        name: torch.from_numpy(np.stack([getattr(each, field) for each in outputs])) for name, field in names.items()
    }


def _stack_latents(samples: Sequence[DrawnLatents | None], bucket: tuple[int, int]) -> torch.Tensor:
    """Return latents [B, 4, h, w] float32. A bad sample keeps its place as zeros, so that shapes stay the same."""
    latents = np.zeros((len(samples), *compute_shape(bucket)), np.float32)
    for place, sample in zip(latents, samples, strict=True):
        if sample is not None:
            place[:] = sample.latents
    return torch.from_numpy(latents)


def _stack_masks(samples: Sequence[DrawnLatents | None], bucket: tuple[int, int]) -> torch.Tensor | None:
    """[B, H, W] float32, ones for samples without a mask; None if no sample has one."""
    masks = [None if sample is None else sample.mask for sample in samples]
    if all(mask is None for mask in masks):
        return None
    whole = np.ones((bucket[1], bucket[0]), np.float32)
    return torch.from_numpy(np.stack([whole if mask is None else mask for mask in masks]))
