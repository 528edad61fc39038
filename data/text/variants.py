"""The captions whose text encoder outputs are cached: a fixed number of draws of what training would shape each time.

They are keyed to the sample's key alone, so any run with the same caption settings finds the same ones. Caption dropout
is left out: it is drawn when a sample is read, and takes the outputs of the empty caption.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson

from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.data.text.captions import CaptionSettings, shape_caption, shape_text
from sdxl_trainer.data.text.strategy import Strategy


@dataclass(frozen=True)
class CaptionVariants:
    """Shapes the captions of a record that are cached.

    Args:
        count: how many are drawn.
    """

    settings: CaptionSettings
    count: int = 1
    strategy: Strategy | None = None

    def shape(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """`count` captions, or one if all are the same.

        Raises:
            StrategyError: the user's class failed on this record.
        """
        captions = tuple(self._draw(record, number) for number in range(self.count))
        return captions if len(set(captions)) > 1 else captions[:1]

    def _draw(self, record: Mapping[str, Any], number: int) -> str:
        settings = replace(self.settings, dropout_rate=0.0, dropout_every_epochs=0)
        rng = np.random.default_rng(derive_seed(RandomStream.CAPTION_VARIANT, number, *str(record["key"]).encode()))
        if self.strategy is not None and self.strategy.has("caption"):
            return shape_text(self.strategy.caption(dict(record), rng), "", settings, rng)
        return shape_caption(record, settings, rng)


def hash_captions(captions: tuple[str, ...]) -> str:
    """SHA-256 of captions, as JSON: what cached outputs of them are true for."""
    return hashlib.sha256(orjson.dumps(captions)).hexdigest()


def list_random(settings: CaptionSettings) -> list[str]:
    """The caption settings that make a caption another one each time it is shaped; dropout does not count."""
    lists = any(isinstance(new, list) and len(new) > 1 for new in settings.replacements.values())
    random = {
        "shuffle": settings.shuffle,
        "tag_dropout_rate": 0 < settings.tag_dropout_rate < 1,
        "wildcards": settings.wildcards,
        "replacements": lists,
    }
    return [name for name, is_random in random.items() if is_random]
