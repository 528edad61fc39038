"""What SDXL's U-Net is told of a caption: the two encoders' hidden states and the second one's pooled state.

The hidden states are the penultimate layers', without the final norm (Podell et al. 2023, arXiv 2307.01952).
"""

from collections.abc import Collection

import torch

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

    @torch.no_grad()
    def prepare(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor) -> TextInputs:
        """Token ids [B, windows, 77] of each encoder to what `Networks` takes: states, or ids of what is trained."""
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
