"""Weights of the sources of records: how often the samples of each source are used in an epoch."""

from collections.abc import Iterator, Sequence

import numpy as np
from loguru import logger

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import DataConfig
from sdxl_trainer.data.index.index import Index


def check_source_weights(data: DataConfig) -> Iterator[Problem]:
    """Yield a problem if `data.source_weights` is set but does not have one number for each source."""
    name = "metadata" if data.metadata else "image_dirs"
    entries = getattr(data, name)
    if data.source_weights and len(data.source_weights) != len(entries):
        rule = f"holds {len(data.source_weights)} numbers for the {len(entries)} entries of data.{name}"
        cure = "give one number per entry; files that match one entry's pattern share its number"
        yield Problem("data.source_weights", data.source_weights, rule, cure)


def check_weighted_samples(weights: Sequence[float], index: Index) -> Iterator[Problem]:
    """Yield a problem if every source with samples has the weight 0."""
    sources = np.unique(index.column("source")).tolist()
    if weights and not any(source >= len(weights) or weights[source] for source in sources):
        cure = "raise the weight of an entry that has samples with latents"
        yield Problem("data.source_weights", list(weights), "leaves nothing to train on", cure)


def apply_source_weights(index: Index, repeats: np.ndarray | None, weights: Sequence[float]) -> np.ndarray | None:
    """Return each row's repeats times the weight of its source, [N]; None uses each row once.

    Args:
        repeats: how often each row would be used without weights.
        weights: weight of each source. Further sources, which are folders of regularisation images, keep their repeats.
    """
    if all(weight == 1 for weight in weights):
        return repeats
    sources = index.column("source")
    factors = np.ones(max(len(weights), int(sources.max(initial=0)) + 1))
    factors[: len(weights)] = weights
    used = factors[sources] if repeats is None else repeats * factors[sources]
    num_samples = np.bincount(sources, minlength=len(weights))
    num_used = np.bincount(sources, used, minlength=len(weights))
    for number, weight in enumerate(weights):
        text = "source {}: {} samples, weight {:g}, {:.6g} samples an epoch"
        logger.info(text, number, num_samples[number], weight, num_used[number])
    return used
