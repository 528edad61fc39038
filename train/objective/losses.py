"""Losses: the error of each value, where it counts, and its mean over each sample. Pure."""

from collections.abc import Callable

import torch
from torch.nn.functional import interpolate

from sdxl_trainer.train.objective.diffusion import NUM_TIMESTEPS, expand

# (difference, c) -> error of each value; c broadcasts over the difference and is used by the Huber losses only.
ElementLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# (c, timesteps [B], SNR [B]) -> c of each sample, [B].
HuberSchedule = Callable[[float, torch.Tensor, torch.Tensor], torch.Tensor]


def compute_sample_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    loss: str = "l2",
    huber_c: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean error of each sample, [B] float32, computed in float32 whatever the prediction's type.

    Args:
        prediction, target: [B, C, h, w].
        loss: a name in `LOSSES`.
        huber_c: [B], for `huber` and `smooth_l1`.
        masks: [B, H, W], 0 to 1, at any size: brought to the latent grid and multiplied into the error before the mean,
            which is not divided by the masks' sum.
    """
    difference = prediction.float() - target.float()
    c = difference.new_ones(len(difference)) if huber_c is None else huber_c
    errors = LOSSES[loss](difference, expand(c, difference))
    if masks is not None:
        errors = errors * resize_masks(masks.float(), (errors.shape[-2], errors.shape[-1]))
    return errors.flatten(1).mean(1)


def resize_masks(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[B, H, W] to [B, 1, h, w], each cell the mean of the area that it covers."""
    return interpolate(masks[:, None], size, mode="area")


def compute_l2(difference: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """d²."""
    return difference.square()


def compute_l1(difference: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """|d|."""
    return difference.abs()


def compute_huber(difference: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Pseudo-Huber 2c(sqrt(d² + c²) - c): like d² for small differences, like 2c|d| for large ones."""
    return 2 * c * ((difference.square() + c.square()).sqrt() - c)


def compute_smooth_l1(difference: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """2(sqrt(d² + c²) - c): like d²/c for small differences, like 2|d| for large ones."""
    return 2 * ((difference.square() + c.square()).sqrt() - c)


LOSSES: dict[str, ElementLoss] = {
    "l2": compute_l2,
    "l1": compute_l1,
    "huber": compute_huber,
    "smooth_l1": compute_smooth_l1,
}


def schedule_constant(c: float, timesteps: torch.Tensor, snr: torch.Tensor) -> torch.Tensor:
    """c at every timestep."""
    return torch.full_like(snr, c)


def schedule_exponential(c: float, timesteps: torch.Tensor, snr: torch.Tensor) -> torch.Tensor:
    """exp(t·ln(c)/T): from 1 without noise down to c."""
    return c ** (timesteps.to(snr) / NUM_TIMESTEPS)


def schedule_snr(c: float, timesteps: torch.Tensor, snr: torch.Tensor) -> torch.Tensor:
    """(1 - c)/(1 + σ)² + c with σ = sqrt((1 - abar)/abar): from 1 without noise down to c, which it has at SNR 0."""
    return (1 - c) / (1 + snr.rsqrt()).square() + c


HUBER_SCHEDULES: dict[str, HuberSchedule] = {
    "constant": schedule_constant,
    "exponential": schedule_exponential,
    "snr": schedule_snr,
}
