"""Micro batches: the rows that the plan asks for, read from the latent cache and tokenised."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from sdxl_trainer.data.caption import CaptionSettings, shape_caption, shape_text
from sdxl_trainer.data.index import Index
from sdxl_trainer.data.latent_store import LatentStore
from sdxl_trainer.data.latents import VAE_FACTOR, BadLatentError, LatentSample
from sdxl_trainer.data.plan import Stream, mix_keys
from sdxl_trainer.data.records import load_record
from sdxl_trainer.data.strategy import Strategy, StrategyError
from sdxl_trainer.data.tokens import CaptionTokenizer


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
    input_ids: torch.Tensor  # [B, windows, 77] int64, encoder 1
    input_ids_2: torch.Tensor  # [B, windows, 77] int64, encoder 2
    time_ids: torch.Tensor  # [B, 6] float32: original h, w; crop top, left; target h, w
    weights: torch.Tensor  # [B] float32, 0 for a bad sample
    positions: torch.Tensor  # [B] int64
    rows: torch.Tensor  # [B] int64
    masks: torch.Tensor | None = None  # [B, H, W] float32, 0 to 1, where the loss counts; None: everywhere
    bad: list[tuple[str, str]] = field(default_factory=list)  # (key, reason)

    def pin_memory(self) -> "MicroBatch":
        """For DataLoader: page-locked memory, so that copies to a GPU overlap with work."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.pin_memory())
        return self


class LatentDataset(torch.utils.data.Dataset):
    """Reads micro batches from cached latents; the pictures themselves are not needed.

    Args:
        index: records joined with the cache (data/index.py).
        cache_folder: what the index's file names are relative to.
        tokenizers: of text encoder 1 and 2.
        seed: of the captions; what is drawn is keyed to (seed, epoch, row).
        caption: what is done to captions.
        strategy: the user's class, which may give captions and weights.
        prior_loss_weight: of samples whose record has a true `is_reg` (prior preservation).
    """

    def __init__(
        self,
        index: Index,
        cache_folder: Path,
        tokenizers: tuple[CaptionTokenizer, CaptionTokenizer],
        *,
        seed: int,
        max_tokens: int,
        caption: CaptionSettings,
        strategy: Strategy | None = None,
        prior_loss_weight: float = 1.0,
    ):
        self.index = index
        self.store = LatentStore(cache_folder)
        self.tokenizers = tokenizers
        self.seed = seed
        self.max_tokens = max_tokens
        self.caption = caption
        self.strategy = strategy
        self.prior_loss_weight = prior_loss_weight

    def __getitem__(self, spec: MicroSpec) -> MicroBatch:
        records = [self.index.row(int(row)) for row in spec.rows]
        self.store.fetch(spec.shards)
        stored = self.store.read(records, spec.bucket)
        samples, bad = zip(
            *(
                self._settle(record, each, int(epoch), int(row))
                for record, each, epoch, row in zip(records, stored, spec.epochs, spec.rows, strict=True)
            ),
            strict=True,
        )
        captions, weights, failed = zip(
            *(
                self._describe(record, spec.step, int(epoch), int(row))
                for record, epoch, row in zip(records, spec.epochs, spec.rows, strict=True)
            ),
            strict=True,
        )
        bad = [unreadable or failure for unreadable, failure in zip(bad, failed, strict=True)]
        width, height = spec.bucket
        time_ids = [
            (
                record["original_height"],
                record["original_width"],
                record["crop_top"],
                record["crop_left"],
                height,
                width,
            )
            for record in records
        ]
        return MicroBatch(
            latents=torch.stack([_as_tensor(sample, spec.bucket) for sample in samples]),
            input_ids=self._tokenize(0, captions),
            input_ids_2=self._tokenize(1, captions),
            time_ids=torch.tensor(time_ids, dtype=torch.float32),
            weights=torch.tensor([weight if item is None else 0.0 for weight, item in zip(weights, bad, strict=True)]),
            positions=torch.from_numpy(spec.positions),
            rows=torch.from_numpy(spec.rows),
            masks=_stack_masks(samples, spec.bucket),
            bad=[item for item in bad if item is not None],
        )

    def _settle(
        self, record: dict, sample: LatentSample | BadLatentError, epoch: int, row: int
    ) -> tuple[LatentSample | None, tuple[str, str] | None]:
        """(sample, None), or (None, (key, reason)) for one that cannot be trained on."""
        if isinstance(sample, BadLatentError):
            return None, (record["key"], str(sample))
        if sample.std is not None:  # both moments are kept: a fresh sample of the posterior each time
            rng = np.random.default_rng(mix_keys(self.seed, Stream.POSTERIOR, epoch, row))
            noise = rng.standard_normal(sample.latents.shape, np.float32)
            sample = replace(sample, latents=sample.latents + sample.std * noise)
        return sample, None

    def _describe(self, row: dict, step: int, epoch: int, number: int) -> tuple[str, float, tuple[str, str] | None]:
        """Caption and weight of a sample, and what is wrong with it: the strategy failed on it."""
        rng = np.random.default_rng(mix_keys(self.seed, Stream.CAPTION, epoch, number))
        record, strategy = load_record(row), self.strategy
        try:
            if strategy is not None and strategy.has("caption"):
                caption = shape_text(strategy.caption(record, rng), "", self.caption, rng, step, epoch)
            else:
                caption = shape_caption(record, self.caption, rng, step, epoch)
            weight = 1.0 if strategy is None else strategy.loss_weight(record)
            return caption, weight * (self.prior_loss_weight if record.get("is_reg") else 1.0), None
        except StrategyError as error:
            return "", 0.0, (row["key"], str(error))

    def _tokenize(self, encoder: int, captions: Sequence[str]) -> torch.Tensor:
        tokenizer = self.tokenizers[encoder]
        return torch.from_numpy(np.stack([tokenizer.encode(caption, self.max_tokens) for caption in captions]))


def _as_tensor(sample: LatentSample | None, bucket: tuple[int, int]) -> torch.Tensor:
    """[4, h, w] float32. A bad sample keeps its place as zeros and weighs nothing, so shapes stay what they are."""
    if sample is None:
        return torch.zeros(4, bucket[1] // VAE_FACTOR, bucket[0] // VAE_FACTOR)
    return torch.from_numpy(sample.latents.astype(np.float32))


def _stack_masks(samples: Sequence[LatentSample | None], bucket: tuple[int, int]) -> torch.Tensor | None:
    """[B, H, W] float32, ones for samples without a mask; None if no sample has one."""
    masks = [None if sample is None else sample.alpha_mask for sample in samples]
    if all(mask is None for mask in masks):
        return None
    whole = np.ones((bucket[1], bucket[0]), np.float32)
    return torch.from_numpy(np.stack([whole if mask is None else mask.astype(np.float32) for mask in masks]))
