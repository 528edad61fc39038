"""Limits of the preview: how much of a set is looked at, and which images are named."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SurveyLimits:
    """The parts of a set that are looked at, and when an image is worth a look."""

    num_opened: int = 2000  # images to open; 0 opens all, and lifts the other limits on numbers
    max_enlargement: float = 1.5  # of a side, by the resize to the bucket
    max_cropped: float = 0.25  # share of the resized image that the bucket leaves out

    def limit(self, number: int) -> int:
        """Return a number of records or files to look at, unlimited if all images are opened."""
        return number if self.num_opened else 2**62
