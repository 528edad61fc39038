"""Classifier-free guidance: the U-Net's predictions with and without the prompt, combined."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.networks.conditioning import TextEmbeddings


@dataclass(frozen=True, kw_only=True)
class GuidedPrediction:
    """The U-Net's prediction for one prompt, with SDXL's size conditions of an uncropped image.

    It is combined in fp32, because guidance multiplies a small difference of two predictions.
    """

    unet: Any
    dtype: torch.dtype  # of the U-Net
    positive: TextEmbeddings
    negative: TextEmbeddings | None  # None turns guidance off
    size: Size
    scale: float
    rescale: float
    break_off_if_stopped: Callable[[], None]  # called after each forward pass; raises to end the work

    def __call__(self, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return the prediction in fp32, [1, C, h, w], for `x_t` [1, C, h, w] and a timestep, [] or [1]."""
        texts = [self.positive] if self.negative is None else [self.negative, self.positive]
        height, width = self.size.height, self.size.width
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=x_t.device)
        predictions = self.unet(
            x_t.to(self.dtype).repeat(len(texts), 1, 1, 1),
            timestep,
            torch.cat([text.hidden for text in texts]),
            added_cond_kwargs={
                "text_embeds": torch.cat([text.pooled for text in texts]),
                "time_ids": time_ids.repeat(len(texts), 1),
            },
            return_dict=False,
        )[0].float()
        self.break_off_if_stopped()
        if self.negative is None:
            return predictions
        negative, positive = predictions.chunk(2)
        return guide(negative, positive, self.scale, self.rescale)


def guide(negative: torch.Tensor, positive: torch.Tensor, scale: float, rescale: float = 0.0) -> torch.Tensor:
    """Return negative + scale·(positive - negative) (Ho & Salimans 2022, arXiv 2207.12598), [B, C, h, w] all.

    Args:
        rescale: share of the result that gets the standard deviation of `positive` (Lin et al. 2023, arXiv 2305.08891,
            section 3.4).
    """
    guided = negative + scale * (positive - negative)
    if not rescale:
        return guided
    stds = [values.std(dim=(1, 2, 3), keepdim=True) for values in (positive, guided)]
    return guided * (rescale * stds[0] / stds[1] + 1 - rescale)
