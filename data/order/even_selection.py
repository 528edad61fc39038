"""Selections for checks and figures that look at a part of a large set: evenly spaced, or drawn by a key."""

import numpy as np

from sdxl_trainer.data.order.keyed_random import permute


def select_evenly(length: int, number: int) -> np.ndarray:
    """Return at most `number` different, evenly spaced indices below `length`, [K] int64."""
    return np.unique(np.arange(number) * length // number) if length else np.zeros(0, np.int64)


def select_keyed(length: int, number: int, key: int) -> np.ndarray:
    """Return at most `number` different indices below `length` that `key` chooses at random, sorted, [K] int64."""
    if number >= length:
        return np.arange(length)
    return np.sort(permute(np.arange(number), length, key))
