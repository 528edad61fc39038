"""Weightings: how much the loss counts at each timestep, by its signal-to-noise ratio. Pure.

Every one is a function of the SNR [B] that gives weights [B]. Those of epsilon and of v belong to different errors: v's
squared error is epsilon's times (snr + 1)/snr.
"""

from collections.abc import Callable

import torch

MAX_SNR = 1000.0  # of the weightings that would else follow the SNR without end where there is hardly any noise


def weigh_none(snr: torch.Tensor) -> torch.Tensor:
    """Every timestep counts the same."""
    return torch.ones_like(snr)


def weigh_min_snr(snr: torch.Tensor, prediction: str, gamma: float) -> torch.Tensor:
    """Min-SNR-γ: min(snr, γ)/snr for epsilon, min(snr, γ)/(snr + 1) for v (Hang et al. 2023, arXiv 2303.09556)."""
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)


def weigh_soft_min_snr(snr: torch.Tensor, prediction: str, gamma: float, sigma_data: float) -> torch.Tensor:
    """Min-SNR-γ with (σ·s)²/(σ² + s²)² in the place of the SNR, where σ² = 1/snr and s = `sigma_data`.

    That is at most 1/4 (where σ = s), so a larger γ never bites: with epsilon every weight is then 1. The formula is
    k-diffusion's (Crowson et al. 2024, arXiv 2401.11605).
    """
    scaled = snr * sigma_data**2  # written so that SNR 0, an infinite σ, gives 0
    return weigh_min_snr(scaled / (1 + scaled).square(), prediction, gamma)


def weigh_debiased(snr: torch.Tensor, prediction: str) -> torch.Tensor:
    """Debiased estimation: 1/sqrt(snr) for epsilon, 1/(snr + 1) for v (Yu et al. 2023, arXiv 2310.08442)."""
    clamped = snr.clamp(max=MAX_SNR)
    return clamped.rsqrt() if prediction == "epsilon" else 1 / (clamped + 1)


def weigh_p2(snr: torch.Tensor, gamma: float) -> torch.Tensor:
    """P2: (1 + snr)^-γ (Choi et al. 2022, arXiv 2204.00227)."""
    return (1 + snr) ** -gamma


def weigh_v_like_epsilon(snr: torch.Tensor) -> torch.Tensor:
    """snr/(snr + 1), which makes v's error count as epsilon's does."""
    clamped = snr.clamp(max=MAX_SNR)
    return clamped / (clamped + 1)


def weigh_v_pred_like(snr: torch.Tensor, gamma: float) -> torch.Tensor:
    """1 + γ/(snr/(snr + 1)): epsilon's error, and γ times v's on top."""
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
