"""Warnings of bad items that do not flood the console."""

from loguru import logger

MAX_NAMED = 20  # bad items that are named one by one
COUNTED_FACTOR = 10  # between two counts of further bad items


class CountedWarnings:
    """Warnings of bad items: the first ones are named one by one, further ones counted; a file lists all.

    Args:
        text: what is wrong with each item, such as "bad sample skipped".
        file: file that lists all items, or words for it.
        num_ranks: ranks that warn of items of the same kind, and share the number that is named.
    """

    def __init__(self, text: str, file: object, num_ranks: int = 1):
        self.count = 0
        self._text, self._file = text, file
        self._max_named = max(1, MAX_NAMED // num_ranks)
        self._next_count = COUNTED_FACTOR * self._max_named

    def add(self, reason: str) -> None:
        """Warn of an item, or count it."""
        self.count += 1
        log = logger.opt(depth=1)
        if self.count <= self._max_named:
            log.warning("{}: {}", self._text, reason)
            return
        if self.count == self._max_named + 1:
            log.warning("{}: further ones are counted only; {} lists all", self._text, self._file)
        if self.count == self._next_count:
            log.warning("{}: {:,} so far; {} lists all", self._text, self.count, self._file)
            self._next_count *= COUNTED_FACTOR
        log.debug("{}: {}", self._text, reason)

    def close(self) -> None:
        """Log how many items there were, if not all were named."""
        if self.count > self._max_named:
            logger.opt(depth=1).warning("{}: {:,} in all; {} lists them", self._text, self.count, self._file)
