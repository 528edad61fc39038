"""An example for `data.strategy`: what each method may do with a record. docs/STRATEGY.md explains it."""

import math

QUALITY = ("worst", "low", "normal", "good", "best")
WEIGHTS = {"general": 1.0, "sensitive": 1.0, "questionable": 0.7, "explicit": 0.4}


class Strategy:
    """Better images come more often, frequent artists less; the artist leads the caption; weight by rating."""

    def repeats(self, record, counts):
        """Samples an epoch: 0 to 3 by aesthetic score, less for artists with more than 100 images."""
        score = record.get("aesthetic_score")
        if score is None:
            repeats = 1.0
        elif score < 4:
            return 0  # never used
        else:
            repeats = 1.0 + (score - 4) / 3  # 4 once, 7 twice, 10 three times
        num_images = counts["artist"][record.get("artist")]
        return repeats / math.sqrt(max(1.0, num_images / 100))

    def caption(self, record, rng):
        """The artist and the quality in front, where `keep_tokens_separator: "|||"` keeps them; then all other tags."""
        tags = [tag.strip() for tag in (record.get("caption") or "").split(",")]
        quality = [tag for tag in tags if tag.removesuffix(" quality") in QUALITY]
        others = [tag for tag in tags if tag and tag not in quality]
        front = [f"by {record['artist']}"] if record.get("artist") else []
        if rng.random() < 0.9:  # without, one time in ten, so that the model does not depend on it
            front += quality
        return ", ".join(front) + " ||| " + ", ".join(others)

    def loss_weight(self, record):
        """Sensitive images count less."""
        return WEIGHTS.get(record.get("safe_rating", "general"), 1.0)
