"""Keyed randomness: seeds and permutations that depend only on the integers they are derived from.

No random draw uses a global generator. Each has a seed of its own, derived from keys such as (seed, stream, epoch,
row). A resumed run, other workers, and another number of ranks therefore draw the same numbers.
"""

from enum import IntEnum

import numpy as np

_MASK = (1 << 64) - 1


class RandomStream(IntEnum):
    """The uses of random numbers. Each is the second key of its draws, after the seed, so that no two share draws."""

    BATCH_ORDER = 0
    SAMPLE_ORDER = 1
    REPEATS = 2
    CAPTION = 3
    NOISE = 4
    TIMESTEP = 5
    NOISE_OFFSET = 6
    PYRAMID_NOISE = 7
    INPUT_PERTURBATION = 8
    TEXT_DROPOUT = 9
    POSTERIOR = 10
    FLIP = 11
    VALIDATION = 12
    SHARD_ORDER = 14
    ADAPTER = 15
    CAPTION_VARIANT = 16
    TEXT_VARIANT = 17
    ROUNDING = 18
    PREVIEW = 19
    CONTRAST = 20
    FOURIER_FEATURES = 21
    ADAPTED_LAYER = 22
    QUALITY = 23


def derive_seed(*keys: int) -> int:
    """Hash integers into a seed of 63 bits. Their order matters, and the seeds of similar keys are unrelated."""
    state = 0x9E3779B97F4A7C15
    for key in keys:
        state = _splitmix((state ^ (key & _MASK)) & _MASK)
    return state >> 1


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Permute indices by the random permutation of range(size) that `key` chooses.

    Each index is permuted on its own, so a permutation of any size costs no memory. A Feistel network permutes the next
    power of four. An index that leaves the range is permuted again until it is back (on average at most four times),
    so that the result is a permutation of the range.

    Args:
        index: [N] int64.

    Returns:
        [N] int64.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    round_keys = [np.uint64(derive_seed(key, number)) for number in range(6)]
    result = _feistel(index.astype(np.uint64), half, mask, round_keys)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = _feistel(result[outside], half, mask, round_keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _splitmix(value: int) -> int:
    """Return 64 well-mixed bits: the finaliser of splitmix64 (Steele et al., 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _feistel(values: np.ndarray, half: int, mask: np.uint64, round_keys: list[np.uint64]) -> np.ndarray:
    """Permute values of 2·half bits: each round mixes one half into the other, which is always invertible."""
    left, right = values >> np.uint64(half), values & mask
    for key in round_keys:
        mixed = (right + key) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
    return (left << np.uint64(half)) | right
