"""What SDXL's U-Net is told of a caption: the two encoders' hidden states and the second one's pooled state.

The hidden states are the penultimate layers', without the final norm (Podell et al. 2023, arXiv 2307.01952).
"""

from collections.abc import Callable, Collection
from typing import Any

import torch

from sdxl_trainer.cache.encode.text_encoder import encode_text
from sdxl_trainer.data.loading.dataset import MicroBatch

# hidden [B, L, C1], hidden_2 [B, L, C2], pooled [B, P] of encoders that are frozen; input_ids, input_ids_2
# [B, windows, 77] of those that are trained. L = 75·windows + 2.
TextInputs = dict[str, torch.Tensor]


class TextConditioner:
    """SDXL's two text encoders.

    Args:
        trained: which of `text_encoder` and `text_encoder_2` the engine trains; `prepare` leaves those to it.
    """

    def __init__(self, encoder: torch.nn.Module, encoder_2: torch.nn.Module, trained: Collection[str] = ()):
        self.encoder = encoder
        self.encoder_2 = encoder_2
        self.trained = trained

    def condition(self, batch: MicroBatch, device: torch.device) -> TextInputs:
        """The text of a micro batch on the device: as it was cached, or prepared from its token ids."""
        if batch.text is not None:
            return {name: states.to(device, non_blocking=True) for name, states in batch.text.items()}
        return self.prepare(
            batch.input_ids.to(device, non_blocking=True), batch.input_ids_2.to(device, non_blocking=True)
        )

    def release(self) -> None:
        """Let go of what can be loaded again."""

    @torch.no_grad()
    def prepare(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor) -> TextInputs:
        """Return the text inputs of `TrainedNetworks` for token ids [B, windows, 77] of each encoder."""
        text: TextInputs = {}
        if "text_encoder" in self.trained:
            text["input_ids"] = input_ids
        else:
            text["hidden"], _ = encode_text(self.encoder, input_ids)
        if "text_encoder_2" in self.trained:
            text["input_ids_2"] = input_ids_2
        else:
            text["hidden_2"], text["pooled"] = encode_text(self.encoder_2, input_ids_2)
        return text

    @torch.no_grad()
    def encode(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [B, windows, 77] of each encoder to (hidden [B, 75·windows + 2, C], pooled [B, P])."""
        hidden, _ = encode_text(self.encoder, input_ids)
        hidden_2, pooled = encode_text(self.encoder_2, input_ids_2)
        return torch.cat([hidden, hidden_2], dim=-1), pooled


class LazyTextConditioner(TextConditioner):
    """The same for cached text: the encoders are loaded when prompts or the written model ask for them, not before.

    Args:
        load: gives both encoders on their device.
    """

    def __init__(self, load: Callable[[], tuple[torch.nn.Module, torch.nn.Module]]):
        self._load = load
        self.trained = ()

    def __getattr__(self, name: str) -> Any:  # asked only for what is not there yet
        if name not in ("encoder", "encoder_2"):
            raise AttributeError(name)
        self.encoder, self.encoder_2 = self._load()
        return vars(self)[name]

    def release(self) -> None:
        """Let go of the encoders."""
        vars(self).pop("encoder", None)
        vars(self).pop("encoder_2", None)
