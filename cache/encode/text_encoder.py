"""Encode captions into the hidden states of both text encoders and the pooled state of the second encoder.

The hidden states are those of the penultimate layers, without the final norm (Podell et al. 2023, arXiv 2307.01952).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sdxl_trainer.cache.encode.latent_encoder import HostCopy
from sdxl_trainer.cache.models.encoders import TextEncoders
from sdxl_trainer.data.formats.text_outputs import TextOutputs
from sdxl_trainer.data.text.tokens import Tokenizers, encode_captions

# Captions are encoded in groups of this size; the last group repeats its last caption. Kernels for other sizes round
# differently, and a caption must give the same bytes in any group. Larger groups are hardly faster on a GPU in fp32.
CAPTION_GROUP = 4


class TextNetworks(NamedTuple):
    """Both text encoders and their tokenizers."""

    encoders: TextEncoders
    tokenizers: Tokenizers


class TextStates(NamedTuple):
    """Output of one text encoder."""

    hidden: torch.Tensor  # [B, 75·windows + 2, C]
    pooled: torch.Tensor  # [B, P]


class CaptionEncoder:
    """Encodes captions with both text encoders, which are frozen and on their device.

    Args:
        max_tokens: longest caption in tokens (75, 150 or 225).
    """

    def __init__(self, networks: TextNetworks, max_tokens: int):
        self._encoders, self._tokenizers = networks
        self._max_tokens = max_tokens
        self._device = next(self._encoders.encoder.parameters()).device

    @torch.inference_mode()
    def launch(self, captions: Sequence[str]) -> "PendingText":
        """Start encoding captions; returns at once if the device runs asynchronously."""
        encoders, parts = self._encoders, []
        padded = [*captions, *[captions[-1]] * (-len(captions) % CAPTION_GROUP)]
        tokens = encode_captions(self._tokenizers, padded, self._max_tokens)
        ids, ids_2 = torch.from_numpy(tokens.input_ids), torch.from_numpy(tokens.input_ids_2)  # [N, windows, 77]
        for part, part_2 in zip(ids.split(CAPTION_GROUP), ids_2.split(CAPTION_GROUP), strict=True):
            hidden, _ = encode_text(encoders.encoder, part.to(self._device, non_blocking=True))
            hidden_2, pooled = encode_text(encoders.encoder_2, part_2.to(self._device, non_blocking=True))
            parts.append((hidden.float(), hidden_2.float(), pooled.float()))
        return PendingText(HostCopy([torch.cat(part)[: len(captions)] for part in zip(*parts, strict=True)]))


class PendingText:
    """Text encoder outputs that the device is computing."""

    def __init__(self, copy: HostCopy):
        self._copy = copy

    def wait(self) -> list[TextOutputs]:
        """Wait for the outputs and return them by caption."""
        hidden, hidden_2, pooled = self._copy.wait()
        return [TextOutputs(*arrays) for arrays in zip(hidden, hidden_2, pooled, strict=True)]


def encode_text(encoder: torch.nn.Module, input_ids: torch.Tensor) -> TextStates:
    """Encode token ids [B, windows, 77] with one text encoder.

    The pooled state is that of the caption's first window. SDXL does not use the pooled state of encoder 1.
    """
    windows = input_ids.shape[1]
    output = encoder(input_ids.flatten(0, 1), output_hidden_states=True)
    pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
    hidden = join_windows(output.hidden_states[-2], windows)
    return TextStates(hidden, pooled.unflatten(0, (-1, windows))[:, 0])


def join_windows(hidden: torch.Tensor, windows: int) -> torch.Tensor:
    """Join the windows of each caption: [B·windows, 77, C] to [B, 75·windows + 2, C].

    The result holds the first window's start mark, 75 states of every window, and the last window's end mark.
    """
    hidden = hidden.unflatten(0, (-1, windows))  # [B, windows, 77, C]
    middle = hidden[:, :, 1:-1].flatten(1, 2)
    return torch.cat([hidden[:, 0, :1], middle, hidden[:, -1, -1:]], dim=1)
