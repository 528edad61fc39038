"""Evenly spaced selections, for checks and figures that look at a part of a large set."""

import numpy as np


def select_evenly(length: int, number: int) -> np.ndarray:
    """Return at most `number` different, evenly spaced indices below `length`, [K] int64."""
    return np.unique(np.arange(number) * length // number) if length else np.zeros(0, np.int64)
