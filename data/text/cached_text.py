"""Cached text encoder outputs for training: of a variant of a sample's caption, or of the empty caption."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_trainer.data.formats.text_cache import read_empty_text, read_text_state
from sdxl_trainer.data.formats.text_outputs import BadTextError, TextOutputs, parse_text_outputs, read_text_variant
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.data.stores.remote import RemoteSpan, is_remote, read_spans
from sdxl_trainer.data.text.captions import choose_texts, draw_dropout
from sdxl_trainer.data.text.variants import CaptionVariants, hash_captions


class CachedText:
    """Reader of samples' text encoder outputs in the cache.

    Args:
        folder: the cache folder.
        variants: builds the captions that the outputs must belong to.
        seed: random choices are keyed to (seed, epoch, row).
    """

    def __init__(self, folder: Path, variants: CaptionVariants, seed: int):
        self.folder = folder
        self.variants = variants
        self.seed = seed

    @cached_property
    def empty(self) -> TextOutputs:
        """Outputs for the empty caption.

        Raises:
            BadTextError: the outputs are missing or damaged.
        """
        state = read_text_state(self.folder)
        if state is None:
            raise BadTextError("text.json is missing or damaged")
        return read_empty_text(self.folder, state)

    def read(self, row: Mapping[str, Any], record: Mapping[str, Any], epoch: int, row_number: int) -> TextOutputs:
        """Read the outputs for a sample's caption, or for the empty caption if this epoch drops it.

        Args:
            row: row `row_number` of the index.
            record: the row's record.

        Raises:
            BadTextError: the outputs cannot be read, or belong to other captions than the record's.
            StrategyError: the user's class failed on the record.
        """
        self.verify(row, record)
        if self._is_dropped(record, epoch, row_number):
            return self.empty
        text = row["text"]
        variant = derive_seed(self.seed, RandomStream.TEXT_VARIANT, epoch, row_number) % text["variants"]
        if is_remote(text["file"]):
            return self._read_remote(text, variant)
        return read_text_variant(self.folder / text["file"], text["offset"], text["bytes"], variant, text["variants"])

    def _read_remote(self, text: Mapping[str, Any], variant: int) -> TextOutputs:
        """Read outputs in a shard of a cache on a store, by one range. Raises like `read`, and StoreError."""
        [content] = read_spans([RemoteSpan(text["file"], text["offset"], text["bytes"])])
        try:
            if isinstance(content, FileNotFoundError):
                raise BadTextError(f"cannot be read: {content}")
            return parse_text_outputs(content, text["variants"])[variant]
        except BadTextError as error:
            raise BadTextError(f"{text['file']} at byte {text['offset']}: {error}") from None

    def verify(self, row: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Verify that a row has cached outputs, and that they belong to the captions that the settings build.

        Raises:
            BadTextError: the row has no outputs, or they belong to other captions.
            StrategyError: the user's class failed on the record.
        """
        if row["text"] is None:
            raise BadTextError("its text is not cached: run bash launch/cache.sh")
        if hash_captions(self.variants.build(record)) != row["text"]["captions_sha256"]:
            raise BadTextError("its captions have changed since its text was cached: run bash launch/cache.sh again")

    def _is_dropped(self, record: Mapping[str, Any], epoch: int, row_number: int) -> bool:
        """Draw caption dropout, with the result that a caption encoded during training would have."""
        settings = self.variants.settings
        rng = np.random.default_rng(derive_seed(self.seed, RandomStream.CAPTION, epoch, row_number))
        # The choice of texts comes before dropout in the caption pipeline and uses the same generator.
        if self.variants.strategy is None or not self.variants.strategy.has("caption"):
            choose_texts(record, settings, rng)
        return draw_dropout(settings, rng, epoch)
