"""Loss-adaptive timesteps, as pure functions on a table of losses (Nichol & Dhariwal 2021, arXiv 2102.09672).

The table lists the last losses of each bin, the oldest first. A bin with large losses is drawn more often, and its
losses are divided by its relative frequency, so the expected loss and gradient stay the same and vary less.
"""

from collections.abc import Iterable, Sequence

import numpy as np

NUM_LOSSES = 10  # that the table keeps of each bin
UNIFORM_SHARE = 0.01  # of the draws, so that no bin is forgotten

LossTable = list[list[float]]


def compute_probabilities(table: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the probability of each bin, [bins] float64.

    It is in proportion to the root of the mean of the bin's squared losses, mixed with 1 % of the uniform distribution;
    uniform until every bin has 10 losses, or if all are 0.
    """
    uniform = np.full(len(table), 1 / len(table))
    if min(map(len, table)) < NUM_LOSSES:
        return uniform
    roots = np.sqrt(np.square(np.array(table, np.float64)).mean(1))
    return (1 - UNIFORM_SHARE) * roots / roots.sum() + UNIFORM_SHARE * uniform if roots.any() else uniform


def add_losses(table: LossTable, bins: Iterable[int], losses: Iterable[float]) -> LossTable:
    """Return the table with further losses, in their order. The given table is unchanged."""
    added = list(table)
    for number, loss in zip(bins, losses, strict=True):
        added[number] = [*added[number], loss][-NUM_LOSSES:]
    return added
