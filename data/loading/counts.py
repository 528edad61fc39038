"""Counts over a set of samples: how many each bucket holds, and how long captions are in tokens."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sdxl_trainer.data.loading.dataset import LatentDataset
from sdxl_trainer.data.order.plan import Plan

NUM_CAPTIONS = 2000  # whose length is measured
LENGTHS = (0, 20, 40, 60, 75, 150, 225)  # tokens: upper ends of the classes, and more
CLASSES = ("0", *(f"{low + 1}-{high}" for low, high in pairwise(LENGTHS)), f"> {LENGTHS[-1]}")


@dataclass(frozen=True)
class TokenCounts:
    """Lengths of captions in tokens, for both tokenizers."""

    num_captions: int  # that were looked at
    max_tokens: int
    num_cut: list[int]  # captions longer than `max_tokens`
    classes: dict[str, list[int]]  # captions of each class of lengths


def count_buckets(plan: Plan) -> dict[str, int]:
    """Samples of each bucket in epoch 0, the fullest first."""
    sizes = plan.count_samples_by_bucket(0)
    ordered = sorted(sizes, key=lambda bucket: -sizes[bucket])
    return {f"{bucket >> 16}x{bucket & 0xFFFF}": sizes[bucket] for bucket in ordered}


def count_tokens(dataset: LatentDataset) -> TokenCounts:
    """How long captions are for both tokenizers, of samples spread over the whole set."""
    rows = spread(len(dataset.index), NUM_CAPTIONS)
    captions = [caption for caption in draw_captions(dataset, rows, epoch=0) if caption is not None]
    lengths = [[tokenizer.count(caption) for caption in captions] for tokenizer in dataset.tokenizers]
    counted = [Counter(np.searchsorted(LENGTHS, column).tolist()) for column in lengths]
    most = dataset.settings.max_tokens
    return TokenCounts(
        len(captions),
        most,
        [sum(length > most for length in column) for column in lengths],
        {name: [column[number] for column in counted] for number, name in enumerate(CLASSES)},
    )


def draw_captions(dataset: LatentDataset, rows: np.ndarray, epoch: int) -> list[str | None]:
    """The captions of samples in an epoch; None where the user's strategy failed."""
    captions = []
    for row in rows.tolist():
        caption, _, failure = dataset.describe(dataset.index.row(row), 0, epoch, row)
        captions.append(caption if failure is None else None)
    return captions


def spread(length: int, number: int) -> np.ndarray:
    """At most `number` different places below `length`, evenly."""
    return np.unique(np.arange(number) * length // number) if length else np.zeros(0, np.int64)
