"""Contrasts of a grid of settings: runs that differ in one setting, over all combinations of the other settings."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Contrast(NamedTuple):
    """Pairs of runs with equal seeds that differ in one setting: its baseline value, and another value.

    Args:
        setting: with the other value, such as `objective.weighting=min_snr`.
        against: the baseline value.
        num_combinations: of the other settings.
        baseline, arm: numbers of the runs of each pair.
    """

    setting: str
    against: str
    num_combinations: int
    baseline: list[int]
    arm: list[int]


def find_contrasts(settings: Mapping[str, Sequence[str]], seeds: Sequence[str]) -> list[Contrast]:
    """Return the contrasts of each setting with the value of the first run, or none if the runs form no grid.

    Settings that always vary together count as one. A setting that follows from another, such as a default that depends
    on it, does not count.

    Args:
        settings: key → value of each run, of settings that differ between runs.
        seeds: of each run.
    """
    factors = _find_factors(settings)
    contrasts = []
    for factor, keys in factors.items():
        others = [settings[key] for key in factors if key != factor]
        cells: dict[tuple, list[int]] = {}
        for number, seed in enumerate(seeds):
            combination = tuple(values[number] for values in others)
            cells.setdefault((settings[factor][number], seed, combination), []).append(number)
        first, *values = dict.fromkeys(settings[factor])
        for value in values:
            pairs = [
                (combination, pair)
                for (own, seed, combination), numbers in cells.items()
                if own == first
                for pair in zip(numbers, cells.get((value, seed, combination), []), strict=False)
            ]
            if pairs:
                baseline, arm = map(list, zip(*(pair for _, pair in pairs), strict=True))
                setting = " ".join(f"{key}={settings[key][arm[0]]}" for key in keys)
                against = " ".join(str(settings[key][baseline[0]]) for key in keys)
                count = len({combination for combination, _ in pairs})
                contrasts.append(Contrast(setting, against, count, baseline, arm))
    return contrasts if any(contrast.num_combinations > 1 for contrast in contrasts) else []


def _find_factors(settings: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the keys that vary freely, each with the keys that always vary together with it, itself included."""

    def decides(key: str, other: str) -> bool:
        return len(set(zip(settings[key], settings[other], strict=True))) == len(set(settings[key]))

    factors: dict[str, list[str]] = {}
    for key in settings:
        deciding = [other for other in settings if other != key and decides(other, key)]
        twins = [other for other in deciding if decides(key, other)]
        if len(twins) == len(deciding):
            factors.setdefault(next((twin for twin in twins if twin in factors), key), []).append(key)
    return factors
