"""Encode captions into the hidden states of both text encoders and the pooled state of the second encoder.

The hidden states are those of the penultimate layers, without the final norm (Podell et al. 2023, arXiv 2307.01952).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sdxl_trainer.cache.encode.latent_encoder import HostCopy
from sdxl_trainer.cache.models.encoders import TextEncoders
from sdxl_trainer.data.formats.text_outputs import TextOutputs
from sdxl_trainer.data.loading.device_copy import copy_to_device
from sdxl_trainer.data.text.tokens import TokenIds, Tokenizers, encode_captions

# Captions are encoded in groups of this size; the last group repeats its last caption. Kernels for other sizes round
# differently, and a caption must give the same bytes in any group. Larger groups are hardly faster on a GPU in fp32.
CAPTION_GROUP = 4


class TextNetworks(NamedTuple):
    """Both text encoders and their tokenizers."""

    encoders: TextEncoders
    tokenizers: Tokenizers


class TokenTensors(NamedTuple):
    """`TokenIds` as tensors."""

    input_ids: torch.Tensor  # [B, windows, 77] int64, encoder 1
    input_ids_2: torch.Tensor  # [B, windows, 77] int64, encoder 2
    weights: torch.Tensor | None = None  # [B, 75·windows + 2] float32; None: all are 1
    weights_2: torch.Tensor | None = None


class TextStates(NamedTuple):
    """Output of one text encoder."""

    hidden: torch.Tensor  # [B, 75·windows + 2, C]
    pooled: torch.Tensor  # [B, P]


class CaptionEncoder:
    """Encodes captions with both text encoders, which are frozen and on their device.

    Args:
        max_tokens: longest caption in tokens, a multiple of 75.
        weighted: brackets in captions are weights.
    """

    def __init__(self, networks: TextNetworks, max_tokens: int, weighted: bool = False):
        self._encoders, self._tokenizers = networks
        self._max_tokens, self._weighted = max_tokens, weighted
        self._device = next(self._encoders.encoder.parameters()).device

    @torch.inference_mode()
    def launch(self, captions: Sequence[str]) -> "PendingText":
        """Start encoding captions; returns at once if the device runs asynchronously."""
        encoders, parts = self._encoders, []
        padded = [*captions, *[captions[-1]] * (-len(captions) % CAPTION_GROUP)]
        tokens = encode_captions(self._tokenizers, padded, self._max_tokens, self._weighted)
        ids, ids_2, weights, weights_2 = move_tokens(tokens, self._device)
        for start in range(0, len(padded), CAPTION_GROUP):
            group = slice(start, start + CAPTION_GROUP)
            hidden, _ = encode_text(encoders.encoder, ids[group], None if weights is None else weights[group])
            hidden_2, pooled = encode_text(
                encoders.encoder_2, ids_2[group], None if weights_2 is None else weights_2[group]
            )
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


def move_tokens(tokens: TokenIds, device: torch.device) -> TokenTensors:
    """Move token ids and their weights to a device."""
    arrays = {name: torch.from_numpy(array) for name, array in tokens._asdict().items() if array is not None}
    return TokenTensors(**{name: copy_to_device(array, device) for name, array in arrays.items()})


def encode_text(encoder: torch.nn.Module, input_ids: torch.Tensor, weights: torch.Tensor | None = None) -> TextStates:
    """Encode token ids [B, windows, 77] with one text encoder.

    The pooled state is that of the caption's first window. SDXL does not use the pooled state of encoder 1.

    Args:
        weights: [B, 75·windows + 2] float32, factors of the hidden states; None for 1. The mean of the states is not
            restored and the pooled state not weighted, as in kohya-ss/sd-scripts.
    """
    windows = input_ids.shape[1]
    output = encoder(input_ids.flatten(0, 1), output_hidden_states=True)
    pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
    hidden = join_windows(output.hidden_states[-2], windows)
    if weights is not None:
        hidden = (hidden * weights[..., None]).to(hidden.dtype)
    return TextStates(hidden, pooled.unflatten(0, (-1, windows))[:, 0])


def join_windows(hidden: torch.Tensor, windows: int) -> torch.Tensor:
    """Join the windows of each caption: [B·windows, 77, C] to [B, 75·windows + 2, C].

    The result holds the first window's start mark, 75 states of every window, and the last window's end mark.
    """
    hidden = hidden.unflatten(0, (-1, windows))  # [B, windows, 77, C]
    middle = hidden[:, :, 1:-1].flatten(1, 2)
    return torch.cat([hidden[:, 0, :1], middle, hidden[:, -1, -1:]], dim=1)
