"""What SDXL's U-Net is told of a sample: the two encoders' hidden states, the pooled one, and sizes and crop."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Conditioning:
    """Inputs of the U-Net besides the latents."""

    hidden: torch.Tensor  # [B, 75·windows + 2, hidden 1 + hidden 2]
    pooled: torch.Tensor  # [B, pooled]
    time_ids: torch.Tensor  # [B, 6]: original h, w; crop top, left; target h, w


class TextConditioner:
    """SDXL's two frozen text encoders.

    The hidden states are the penultimate layers', without the final norm (Podell et al. 2023, arXiv 2307.01952).
    """

    def __init__(self, encoder: torch.nn.Module, encoder_2: torch.nn.Module):
        self.encoder = encoder
        self.encoder_2 = encoder_2

    @torch.no_grad()
    def encode(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [B, windows, 77] of each encoder to (hidden [B, 75·windows + 2, C], pooled [B, P])."""
        windows = input_ids.shape[1]
        first = self.encoder(input_ids.flatten(0, 1), output_hidden_states=True)
        second = self.encoder_2(input_ids_2.flatten(0, 1), output_hidden_states=True)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)  # [B·windows, 77, C]
        pooled = second.text_embeds.unflatten(0, (-1, windows))[:, 0]  # the first window speaks for the caption
        return join_windows(hidden, windows), pooled


def join_windows(hidden: torch.Tensor, windows: int) -> torch.Tensor:
    """[B·windows, 77, C] to [B, 75·windows + 2, C]: first start mark, every window's 75 states, last end mark."""
    hidden = hidden.unflatten(0, (-1, windows))  # [B, windows, 77, C]
    middle = hidden[:, :, 1:-1].flatten(1, 2)
    return torch.cat([hidden[:, 0, :1], middle, hidden[:, -1, -1:]], dim=1)
