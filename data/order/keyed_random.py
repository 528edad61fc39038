"""Keyed randomness: seeds and permutations that depend only on the integers they are derived from.

No random draw uses a global generator. Each has a seed of its own, derived from keys such as (seed, stream, epoch,
row). A resumed run, other workers, and another number of ranks therefore draw the same numbers.
"""

from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_MASK = (1 << 64) - 1
FEW_INDICES = 8  # that are permuted one by one


def _build_constant(value: int) -> np.ndarray:
    return np.array(value, np.uint64)


FIRST_FACTOR, SECOND_FACTOR = map(_build_constant, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
FIRST_SHIFT, SECOND_SHIFT = map(_build_constant, (29, 32))


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
    network = _build_network(size, key)
    result = index.astype(np.uint64)
    outside = np.arange(len(result))
    while outside.size > FEW_INDICES:
        walked = network.permute(result[outside])
        result[outside] = walked
        outside = outside[walked >= network.size]
    for place in outside.tolist():
        value = network.permute_one(int(result[place]))
        while value >= size:
            value = network.permute_one(value)
        result[place] = value
    return result.astype(np.int64)


def _splitmix(value: int) -> int:
    """Return 64 well-mixed bits: the finaliser of splitmix64 (Steele et al., 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class _FeistelNetwork(NamedTuple):
    """A permutation of numbers of 2·half bits: each round mixes one half into the other, which is always invertible.

    Constants are arrays without dimensions, which numpy reads twice as fast as its scalars.
    """

    size: np.ndarray  # numbers in the permuted range
    half: np.ndarray  # bits
    mask: np.ndarray  # of the lower half
    keys: list[np.ndarray]  # of the rounds
    key_numbers: list[int]  # the same

    def permute(self, values: np.ndarray) -> np.ndarray:
        """Permute values, [N] uint64."""
        left, right = values >> self.half, values & self.mask
        mixed, shifted = np.empty_like(values), np.empty_like(values)
        for key in self.keys:
            np.add(right, key, mixed)
            np.multiply(mixed, FIRST_FACTOR, mixed)
            np.bitwise_xor(mixed, np.right_shift(mixed, FIRST_SHIFT, shifted), mixed)
            np.multiply(mixed, SECOND_FACTOR, mixed)
            np.bitwise_xor(mixed, np.right_shift(mixed, SECOND_SHIFT, shifted), mixed)
            np.bitwise_and(mixed, self.mask, mixed)
            np.bitwise_xor(left, mixed, left)
            left, right = right, left
        return (left << self.half) | right

    def permute_one(self, value: int) -> int:
        """Permute one value, which is faster for a few of them."""
        half, mask = int(self.half), int(self.mask)
        left, right = value >> half, value & mask
        for key in self.key_numbers:
            mixed = (right + key) * 0xBF58476D1CE4E5B9 & _MASK
            mixed = (mixed ^ (mixed >> 29)) * 0x94D049BB133111EB & _MASK
            left, right = right, left ^ ((mixed ^ (mixed >> 32)) & mask)
        return (left << half) | right


@lru_cache(maxsize=256)
def _build_network(size: int, key: int) -> _FeistelNetwork:
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    numbers = [derive_seed(key, number) for number in range(6)]
    return _FeistelNetwork(
        size=_build_constant(size),
        half=_build_constant(half),
        mask=_build_constant((1 << half) - 1),
        keys=list(map(_build_constant, numbers)),
        key_numbers=numbers,
    )
