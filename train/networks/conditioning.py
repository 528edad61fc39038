"""Text conditioning for SDXL's U-Net: the hidden states of both text encoders and the pooled state of the second.

The hidden states are those of the penultimate layer, without the final norm (Podell et al. 2023, arXiv 2307.01952).
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch

from sdxl_trainer.cache.encode.text_encoder import encode_text
from sdxl_trainer.cache.models.encoders import TextEncoders
from sdxl_trainer.data.loading.device_copy import copy_to_device
from sdxl_trainer.data.loading.micro_batch import MicroBatch

# The text inputs of `TrainedNetworks` for a micro batch. For a frozen encoder: its states `hidden` [B, L, C1], or
# `hidden_2` [B, L, C2] and `pooled` [B, P]. For a trained encoder: its token ids `input_ids` or `input_ids_2`
# [B, windows, 77] and, with weighted captions, the factors of its states, `weights` or `weights_2` [B, L].
# L = 75·windows + 2.
TextInputs = dict[str, torch.Tensor]


class TextEmbeddings(NamedTuple):
    """The text conditioning that the U-Net receives."""

    hidden: torch.Tensor  # [B, 75·windows + 2, C], C = C1 + C2
    pooled: torch.Tensor  # [B, P]


class TextConditioner:
    """Text conditioning by SDXL's two text encoders.

    Args:
        encoders: both encoders, on their device.
        trained: names of the encoders that are trained (`text_encoder`, `text_encoder_2`). They run within
            `TrainedNetworks`, so `encode_frozen` returns their token ids.
    """

    # Prompts by their text, on the host; None if encoders stay loaded, or change in training.
    kept_prompts: dict[str, TextEmbeddings] | None = None

    def __init__(self, encoders: TextEncoders, trained: Collection[str] = ()):
        self._encoders: TextEncoders | None = encoders
        self.trained = trained

    @property
    def encoders(self) -> TextEncoders:
        """Both text encoders."""
        assert self._encoders is not None, "only LazyTextConditioner releases its encoders"
        return self._encoders

    def build_inputs(self, batch: MicroBatch, device: torch.device) -> TextInputs:
        """Return the text inputs of a micro batch on the device, from its cached states or its token ids."""
        if batch.text is not None:
            return {name: copy_to_device(states, device) for name, states in batch.text.items()}
        weights, weights_2 = batch.token_weights, batch.token_weights_2
        return self.encode_frozen(
            copy_to_device(batch.input_ids, device),
            copy_to_device(batch.input_ids_2, device),
            None if weights is None else copy_to_device(weights, device),
            None if weights_2 is None else copy_to_device(weights_2, device),
        )

    def release(self) -> None:
        """Do nothing: only `LazyTextConditioner` can load its encoders again."""

    @torch.no_grad()
    def encode_frozen(
        self,
        input_ids: torch.Tensor,
        input_ids_2: torch.Tensor,
        weights: torch.Tensor | None = None,
        weights_2: torch.Tensor | None = None,
    ) -> TextInputs:
        """Encode token ids [B, windows, 77] with the frozen encoders, and keep the ids for the trained encoders.

        Args:
            weights, weights_2: factors of the states of weighted captions, [B, 75·windows + 2] float32.
        """
        text: TextInputs = {}
        if "text_encoder" in self.trained:
            text |= {"input_ids": input_ids} | ({} if weights is None else {"weights": weights})
        else:
            text["hidden"] = encode_text(self.encoders.encoder, input_ids, weights).hidden
        if "text_encoder_2" in self.trained:
            text |= {"input_ids_2": input_ids_2} | ({} if weights_2 is None else {"weights_2": weights_2})
        else:
            text["hidden_2"], text["pooled"] = encode_text(self.encoders.encoder_2, input_ids_2, weights_2)
        return text

    @torch.no_grad()
    def encode(
        self,
        input_ids: torch.Tensor,
        input_ids_2: torch.Tensor,
        weights: torch.Tensor | None = None,
        weights_2: torch.Tensor | None = None,
    ) -> TextEmbeddings:
        """Encode token ids [B, windows, 77] with both encoders, trained or not; arguments as of `encode_frozen`."""
        hidden = encode_text(self.encoders.encoder, input_ids, weights).hidden
        hidden_2, pooled = encode_text(self.encoders.encoder_2, input_ids_2, weights_2)
        return TextEmbeddings(torch.cat([hidden, hidden_2], dim=-1), pooled)


class LazyTextConditioner(TextConditioner):
    """Text conditioning for runs with cached text, which need the encoders only for prompts and model files.

    Prompts are encoded once in a run, because the encoders never change.

    Args:
        load: loads both encoders on their device.
    """

    def __init__(self, load: Callable[[], TextEncoders]):
        self._load = load
        self._encoders = None
        self.trained = ()
        self.kept_prompts = {}

    @property
    def encoders(self) -> TextEncoders:
        """Both text encoders, loaded at the first access and again after `release`."""
        if self._encoders is None:
            self._encoders = self._load()
        return self._encoders

    def release(self) -> None:
        """Free the encoders."""
        self._encoders = None
