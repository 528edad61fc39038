"""What training reads of cached text: a variant of a sample's caption, or the empty caption, drawn as captions are."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_trainer.data.formats.text_cache import read_empty_text, read_text_state
from sdxl_trainer.data.formats.text_outputs import BadTextError, TextOutputs, read_text_variant
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.data.text.captions import draw_dropout, pick_texts
from sdxl_trainer.data.text.variants import CaptionVariants, hash_captions


class CachedText:
    """Text encoder outputs of samples, read from the cache.

    Args:
        folder: of the cache.
        variants: shapes the captions that the outputs must be of.
        seed: what is drawn is keyed to (seed, epoch, row).
    """

    def __init__(self, folder: Path, variants: CaptionVariants, seed: int):
        self.folder = folder
        self.variants = variants
        self.seed = seed

    @cached_property
    def empty(self) -> TextOutputs:
        """Of the empty caption. Raises BadTextError."""
        state = read_text_state(self.folder)
        if state is None:
            raise BadTextError("text.json is missing or damaged")
        return read_empty_text(self.folder, state)

    def read(self, row: Mapping[str, Any], record: Mapping[str, Any], epoch: int, number: int) -> TextOutputs:
        """What the encoders made of a sample's caption, or of the empty one if the caption is dropped this time.

        Args:
            row: the index's row `number`, `record` its record.

        Raises:
            BadTextError: it cannot be read, or is of other captions than the record's.
            StrategyError: the user's class failed on the record.
        """
        self.check(row, record)
        if self._is_dropped(record, epoch, number):
            return self.empty
        text = row["text"]
        variant = derive_seed(self.seed, RandomStream.TEXT_VARIANT, epoch, number) % text["variants"]
        return read_text_variant(self.folder / text["file"], (text["offset"], text["bytes"]), variant, text["variants"])

    def check(self, row: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Raises BadTextError if the outputs are of other captions than these settings shape of the record."""
        if row["text"] is None:
            raise BadTextError("its text is not cached")
        if hash_captions(self.variants.shape(record)) != row["text"]["captions_sha256"]:
            raise BadTextError("its captions are not those whose text is cached: run bash launch/cache.sh again")

    def _is_dropped(self, record: Mapping[str, Any], epoch: int, number: int) -> bool:
        """Drawn as for a caption that is encoded while training, so that the same samples go without."""
        settings = self.variants.settings
        rng = np.random.default_rng(derive_seed(self.seed, RandomStream.CAPTION, epoch, number))
        if self.variants.strategy is None or not self.variants.strategy.has("caption"):
            pick_texts(record, settings, rng)
        return draw_dropout(settings, rng, epoch)
