"""Loss weightings, as pure functions: the weight of each timestep's loss by its signal-to-noise ratio (SNR).

Each function maps an SNR [B] to weights [B]. A weighting that takes `prediction` has one formula for epsilon prediction
and one for v-prediction, because their squared errors differ: v's is epsilon's times (snr + 1)/snr.
"""

from collections.abc import Callable

import torch

MAX_SNR = 1000.0  # bounds the weightings that would otherwise grow or vanish without limit at the first timesteps


def weigh_none(snr: torch.Tensor) -> torch.Tensor:
    """Return a weight of 1 for every timestep."""
    return torch.ones_like(snr)


def weigh_min_snr(snr: torch.Tensor, prediction: str, gamma: float) -> torch.Tensor:
    """Min-SNR-γ: min(snr, γ)/snr for epsilon, min(snr, γ)/(snr + 1) for v (Hang et al. 2023, arXiv 2303.09556)."""
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)


def weigh_soft_min_snr(snr: torch.Tensor, prediction: str, gamma: float, sigma_data: float) -> torch.Tensor:
    """Soft Min-SNR: Min-SNR-γ of the soft SNR (σ·s)²/(σ² + s²)², with σ² = 1/snr and s = `sigma_data`.

    The soft SNR is at most 1/4, at σ = s. A γ above 1/4 therefore clips nothing, and every weight of epsilon prediction
    is 1. The formula is k-diffusion's (Crowson et al. 2024, arXiv 2401.11605).
    """
    scaled = snr * sigma_data**2  # written in terms of the SNR so that SNR 0, an infinite σ, gives 0
    return weigh_min_snr(scaled / (1 + scaled).square(), prediction, gamma)


def weigh_debiased(snr: torch.Tensor, prediction: str) -> torch.Tensor:
    """Debiased estimation: 1/sqrt(snr) for epsilon, 1/(snr + 1) for v (Yu et al. 2023, arXiv 2310.08442)."""
    clamped = snr.clamp(max=MAX_SNR)
    return clamped.rsqrt() if prediction == "epsilon" else 1 / (clamped + 1)


def weigh_p2(snr: torch.Tensor, gamma: float) -> torch.Tensor:
    """P2 weighting: (1 + snr)^-γ (Choi et al. 2022, arXiv 2204.00227)."""
    return (1 + snr) ** -gamma


def weigh_v_like_epsilon(snr: torch.Tensor) -> torch.Tensor:
    """Weight v's squared error like epsilon's: snr/(snr + 1)."""
    clamped = snr.clamp(max=MAX_SNR)
    return clamped / (clamped + 1)


def weigh_v_pred_like(snr: torch.Tensor, gamma: float) -> torch.Tensor:
    """Add γ times v's squared error to epsilon's: 1 + γ·(snr + 1)/snr."""
    return 1 + gamma / weigh_v_like_epsilon(snr)


WEIGHTINGS: dict[str, Callable[..., torch.Tensor]] = {
    "none": weigh_none,
    "min_snr": weigh_min_snr,
    "soft_min_snr": weigh_soft_min_snr,
    "debiased": weigh_debiased,
    "p2": weigh_p2,
    "v_like_epsilon": weigh_v_like_epsilon,
    "v_pred_like": weigh_v_pred_like,
}
