"""Caption variants: a fixed number of captions per sample, whose text encoder outputs are cached.

Their random choices are keyed to the sample's key alone, so all runs with the same caption settings build the same
variants. They exclude caption dropout, which is drawn when a sample is read and selects the outputs of the empty
caption.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson

from sdxl_trainer.configs.captions import CaptionConfig
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.data.text.captions import CaptionSettings, CaptionTexts, build_caption, process_texts
from sdxl_trainer.data.text.strategy import Strategy


@dataclass(frozen=True)
class CaptionVariants:
    """Builds the captions of a record whose text encoder outputs are cached.

    Args:
        settings: settings of the caption pipeline.
        count: number of variants of each caption.
        strategy: the user's class, which may supply the text.
    """

    settings: CaptionSettings
    count: int = 1
    strategy: Strategy | None = None

    def build(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """Build `count` captions of a record, or one if all are equal.

        Raises:
            StrategyError: the user's class failed on the record.
        """
        captions = tuple(self._build_variant(record, number) for number in range(self.count))
        return captions if len(set(captions)) > 1 else captions[:1]

    def _build_variant(self, record: Mapping[str, Any], number: int) -> str:
        settings = replace(self.settings, dropout_rate=0.0, dropout_every_epochs=0)
        rng = np.random.default_rng(derive_seed(RandomStream.CAPTION_VARIANT, number, *str(record["key"]).encode()))
        if self.strategy is not None and self.strategy.has("caption"):
            return process_texts(CaptionTexts(self.strategy.caption(dict(record), rng)), settings, rng)
        return build_caption(record, settings, rng)


def hash_captions(captions: tuple[str, ...]) -> str:
    """Return the SHA-256 of captions as JSON, which matches cached outputs to their captions."""
    return hashlib.sha256(orjson.dumps(captions)).hexdigest()


def is_choice_random(settings: CaptionSettings | CaptionConfig) -> bool:
    """Return whether the text of a record with both tags and a description is chosen at random."""
    return settings.source == "pick" and 0 < settings.description_rate < 1


def list_random_settings(settings: CaptionSettings | CaptionConfig, has_both_texts: bool = False) -> list[str]:
    """Return the names of the settings that make a caption differ each time it is built, except dropout.

    Args:
        has_both_texts: some records have both tags and a description, of which `source: pick` chooses one at random.
    """
    has_choices = any(isinstance(new, list) and len(new) > 1 for new in settings.replacements.values())
    random = {
        "source": has_both_texts and is_choice_random(settings),
        "shuffle": settings.shuffle,
        "tag_dropout_rate": 0 < settings.tag_dropout_rate < 1,
        "wildcards": settings.wildcards,
        "replacements": has_choices,
    }
    return [name for name, is_random in random.items() if is_random]
