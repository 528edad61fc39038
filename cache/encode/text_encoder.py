"""Captions to what SDXL's text encoders make of them: each one's hidden states, and the second one's pooled state.

The hidden states are the penultimate layers', without the final norm (Podell et al. 2023, arXiv 2307.01952).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from sdxl_trainer.cache.encode.host_copy import HostCopy
from sdxl_trainer.data.formats.text_outputs import TextOutputs
from sdxl_trainer.data.text.tokens import CaptionTokenizer

# Always so many captions at once, the last ones repeated if need be: kernels for another number round differently, and
# encoding again must give the same bytes whatever a caption's company is. More do not make a GPU much faster in fp32.
CAPTIONS_AT_ONCE = 4


class TextNetworks(NamedTuple):
    """Encoder 1 and 2 with their tokenizers."""

    encoder: torch.nn.Module
    encoder_2: torch.nn.Module
    tokenizer: CaptionTokenizer
    tokenizer_2: CaptionTokenizer


class TextEncoder:
    """Both text encoders, frozen, on their device.

    Args:
        max_tokens: longest caption (75, 150 or 225).
    """

    def __init__(self, networks: TextNetworks, max_tokens: int):
        self._networks = networks
        self._max_tokens = max_tokens
        self._device = next(networks.encoder.parameters()).device

    @torch.inference_mode()
    def launch(self, captions: Sequence[str]) -> "PendingText":
        """Start on captions; returns at once where the device can work by itself."""
        networks, parts = self._networks, []
        padded = [*captions, *[captions[-1]] * (-len(captions) % CAPTIONS_AT_ONCE)]
        ids, ids_2 = (
            torch.from_numpy(np.stack([tokenizer.encode(caption, self._max_tokens) for caption in padded]))
            for tokenizer in (networks.tokenizer, networks.tokenizer_2)
        )  # [N, windows, 77]
        for part, part_2 in zip(ids.split(CAPTIONS_AT_ONCE), ids_2.split(CAPTIONS_AT_ONCE), strict=True):
            hidden, _ = encode_text(networks.encoder, part.to(self._device, non_blocking=True))
            hidden_2, pooled = encode_text(networks.encoder_2, part_2.to(self._device, non_blocking=True))
            parts.append((hidden.float(), hidden_2.float(), pooled.float()))
        return PendingText(HostCopy([torch.cat(part)[: len(captions)] for part in zip(*parts, strict=True)]))


class PendingText:
    """Text encoder outputs on their way to the host."""

    def __init__(self, copy: HostCopy):
        self._copy = copy

    def wait(self) -> list[TextOutputs]:
        """The outputs of each caption."""
        return [TextOutputs(*arrays) for arrays in zip(*self._copy.wait(), strict=True)]


def encode_text(encoder: torch.nn.Module, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, windows, 77] to (hidden [B, 75·windows + 2, C], pooled [B, P]).

    The first window speaks for the caption in the pooled state, which of encoder 1 is of no use.
    """
    windows = input_ids.shape[1]
    output = encoder(input_ids.flatten(0, 1), output_hidden_states=True)
    pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
    return join_windows(output.hidden_states[-2], windows), pooled.unflatten(0, (-1, windows))[:, 0]


def join_windows(hidden: torch.Tensor, windows: int) -> torch.Tensor:
    """[B·windows, 77, C] to [B, 75·windows + 2, C]: first start mark, every window's 75 states, last end mark."""
    hidden = hidden.unflatten(0, (-1, windows))  # [B, windows, 77, C]
    middle = hidden[:, :, 1:-1].flatten(1, 2)
    return torch.cat([hidden[:, 0, :1], middle, hidden[:, -1, -1:]], dim=1)
