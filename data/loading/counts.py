"""Counts over a training set: samples of each bucket, and lengths of captions in tokens."""

import copy
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from sdxl_trainer.data.loading.dataset import LatentDataset, WeightedCaption
from sdxl_trainer.data.order.even_selection import select_evenly
from sdxl_trainer.data.order.plan import Plan

NUM_CAPTIONS = 2000  # captions to measure
LENGTHS = (0, 20, 40, 60, 75, 150, 225)  # tokens, upper ends of the length classes; the last class is open


@dataclass(frozen=True)
class TokenCounts:
    """Lengths of captions in tokens, for both tokenizers."""

    num_captions: int  # captions measured
    max_tokens: int
    num_dropped: int  # captions that caption dropout emptied; those of length 0 besides are empty in the data
    num_cut: list[int]  # captions longer than `max_tokens`, by tokenizer
    classes: dict[str, list[int]]  # captions of each length class, by tokenizer


@dataclass(frozen=True)
class MeasuredCaptions:
    """Captions of samples and their lengths."""

    rows: np.ndarray  # [K] int64 of the index
    lengths: np.ndarray  # [K, 2] int64 tokens, by tokenizer
    num_dropped: int  # captions that caption dropout emptied


def count_buckets(plan: Plan, epoch: int = 0) -> dict[str, int]:
    """Return the number of samples of each bucket in an epoch, fullest bucket first; buckets are named 1024x1024."""
    sizes = plan.count_samples_by_bucket(epoch)
    ordered = sorted(sizes, key=lambda bucket: -sizes[bucket])
    return {f"{bucket >> 16}x{bucket & 0xFFFF}": sizes[bucket] for bucket in ordered}


def count_tokens(dataset: LatentDataset) -> TokenCounts:
    """Measure the captions of evenly spaced samples with both tokenizers."""
    measured = measure_captions(dataset, select_evenly(len(dataset.index), NUM_CAPTIONS))
    return count_lengths(measured, dataset.settings.max_tokens)


def measure_captions(dataset: LatentDataset, rows: np.ndarray) -> MeasuredCaptions:
    """Measure the captions of rows with both tokenizers. Rows on which the user's strategy fails are left out."""
    drawn = zip(rows.tolist(), draw_captions(dataset, rows, epoch=0), strict=True)
    captions = {row: caption for row, caption in drawn if caption is not None}
    empty_rows = np.array([row for row, caption in captions.items() if not caption], np.int64)
    weighted = dataset.settings.caption.weighted
    lengths = [
        [tokenizer.count_tokens(text, weighted) for tokenizer in dataset.tokenizers] for text in captions.values()
    ]
    return MeasuredCaptions(
        rows=np.array(list(captions), np.int64),
        lengths=np.array(lengths, np.int64).reshape(-1, 2),
        num_dropped=sum(map(bool, draw_captions(without_dropout(dataset), empty_rows, epoch=0))),
    )


def count_lengths(measured: MeasuredCaptions, max_tokens: int) -> TokenCounts:
    """Count captions by their lengths in tokens."""
    ends = [*LENGTHS, *([max_tokens] if max_tokens > LENGTHS[-1] else [])]
    names = ("0", *(f"{low + 1}-{high}" for low, high in pairwise(ends)), f"> {ends[-1]}")
    class_counts = [Counter(np.searchsorted(ends, column).tolist()) for column in measured.lengths.T]
    return TokenCounts(
        num_captions=len(measured.rows),
        max_tokens=max_tokens,
        num_dropped=measured.num_dropped,
        num_cut=(measured.lengths > max_tokens).sum(0).tolist(),
        classes={name: [counts[number] for counts in class_counts] for number, name in enumerate(names)},
    )


def without_dropout(dataset: LatentDataset) -> LatentDataset:
    """Return a dataset that draws the same captions, but drops none."""
    kept = copy.copy(dataset)
    caption = replace(dataset.settings.caption, dropout_rate=0.0, dropout_every_epochs=0)
    kept.settings = replace(dataset.settings, caption=caption)
    return kept


def draw_captions(dataset: LatentDataset, rows: np.ndarray, epoch: int) -> list[str | None]:
    """Return the captions of samples in an epoch; None for a sample on which the user's strategy fails."""
    drawn = [dataset.draw_caption(dataset.index.row(row), 0, epoch, row) for row in rows.tolist()]
    return [caption.text if isinstance(caption, WeightedCaption) else None for caption in drawn]
