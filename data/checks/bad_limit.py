"""The limit of bad images, latents and samples, `data.max_bad_fraction`."""

ROUNDING = 1e-9  # 0.29 * 100 is less than 29
MIN_FAILING = 3  # bad items of a set that has others: 1 % of a small set is less than one item


def are_too_many(num_bad: float, max_bad_fraction: float, number: int) -> bool:
    """Return whether a job fails that cannot use `num_bad` items of a set, by `data.max_bad_fraction`.

    One or two bad items do not fail it while others are left, unless the fraction is 0.

    Args:
        number: items of the set.
    """
    return num_bad > max_bad_fraction * number * (1 + ROUNDING) and int(num_bad) > count_few(max_bad_fraction, number)


def count_few(max_bad_fraction: float, number: int) -> int:
    """Return how many items of a set may be bad, however small it is."""
    return max(min(MIN_FAILING, number) - 1, 0) if max_bad_fraction > 0 else 0
