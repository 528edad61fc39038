"""Losses, as pure functions: the error of each latent value, weighted by the mask, averaged over each sample."""

from collections.abc import Callable

import torch
from torch.nn.functional import interpolate

from sdxl_trainer.train.objective.diffusion import NUM_TIMESTEPS, expand_like

# (difference d, c) -> error of each value; c broadcasts over d, and only the Huber losses use it.
ElementLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# (prediction, target), each [B, C, h, w] float32 -> error of each value
OwnLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# (huber_c, timesteps [B], SNR [B]) -> c of each sample, [B].
HuberSchedule = Callable[[float, torch.Tensor, torch.Tensor], torch.Tensor]


def compute_sample_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    loss: str | OwnLoss = "l2",
    huber_c: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mean error of each sample, [B] float32, computed in float32 for a prediction of any dtype.

    Args:
        prediction: [B, C, h, w].
        target: as `prediction`.
        loss: a name in `LOSSES`, or a function of the user.
        huber_c: [B], the c of `huber` and `smooth_l1`; None means 1.
        masks: [B, H, W] values from 0 to 1, at any resolution. They are resized to the latent and multiplied into the
            error before the mean. The mean is over all values; it is not divided by the sum of the mask.
    """
    prediction, target = prediction.float(), target.float()
    if isinstance(loss, str):
        difference = prediction - target
        c = difference.new_ones(len(difference)) if huber_c is None else huber_c
        errors = LOSSES[loss](difference, expand_like(c, difference))
    else:
        errors = loss(prediction, target)
    if masks is not None:
        errors = errors * resize_masks(masks.float(), (errors.shape[-2], errors.shape[-1]))
    return errors.flatten(1).mean(1)


def rotate_samples(weights: torch.Tensor, seed: int) -> torch.Tensor:
    """Choose another sample of the micro batch for each sample, [B] int64 places: a random rotation.

    Samples of weight 0, such as unreadable ones, are left out of the rotation and keep their own place. So does a
    sample that is the only one with a weight.

    Args:
        weights: [B] on the CPU.
    """
    places, others = weights.nonzero().flatten(), torch.arange(len(weights))
    if len(places) > 1:
        others[places] = places.roll(-(1 + seed % (len(places) - 1)))
    return others


def resize_masks(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize masks [B, H, W] to `size` = (h, w) by averaging the area of each cell, and return [B, 1, h, w]."""
    return interpolate(masks[:, None], size, mode="area")


def compute_l2(difference: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return the squared error d²."""
    return difference.square()


def compute_l1(difference: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return the absolute error |d|."""
    return difference.abs()


def compute_huber(difference: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return the pseudo-Huber error 2c(sqrt(d² + c²) - c): about d² for |d| << c, about 2c|d| for |d| >> c."""
    return 2 * c * ((difference.square() + c.square()).sqrt() - c)


def compute_smooth_l1(difference: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return the smooth L1 error 2(sqrt(d² + c²) - c): about d²/c for |d| << c, about 2|d| for |d| >> c."""
    return 2 * ((difference.square() + c.square()).sqrt() - c)


LOSSES: dict[str, ElementLoss] = {
    "l2": compute_l2,
    "l1": compute_l1,
    "huber": compute_huber,
    "smooth_l1": compute_smooth_l1,
}


def schedule_constant(c: float, timesteps: torch.Tensor, snr: torch.Tensor) -> torch.Tensor:
    """Return c at every timestep."""
    return torch.full_like(snr, c)


def schedule_exponential(c: float, timesteps: torch.Tensor, snr: torch.Tensor) -> torch.Tensor:
    """Return exp(t·ln(c)/T), which falls from 1 at t = 0 to c at t = T."""
    return c ** (timesteps.to(snr) / NUM_TIMESTEPS)


def schedule_snr(c: float, timesteps: torch.Tensor, snr: torch.Tensor) -> torch.Tensor:
    """Return (1 - c)/(1 + σ)² + c with σ = 1/sqrt(SNR), which falls from 1 without noise to c at SNR 0."""
    return (1 - c) / (1 + snr.rsqrt()).square() + c


HUBER_SCHEDULES: dict[str, HuberSchedule] = {
    "constant": schedule_constant,
    "exponential": schedule_exponential,
    "snr": schedule_snr,
}
