"""Forward processes and prediction targets, as pure functions on tensors.

Every forward process mixes a latent x0 with Gaussian noise n:

    x_t = signal·x0 + noise_level·n

- Diffusion (DDPM, Ho et al. 2020, arXiv 2006.11239): signal = sqrt(abar_t) and noise_level = sqrt(1 - abar_t) at the
  integer timesteps t = 0 … 999, where abar_t is the cumulative product of 1 - beta_t over SDXL's schedule.
- Rectified flow (Liu et al. 2022, arXiv 2209.03003): signal = 1 - s and noise_level = s for a real s in [0, 1]. The
  U-Net receives the timestep t = 1000·s.

Symbols used throughout this folder: B samples in a micro batch, T = 1000 timesteps, C latent channels, h x w latent
size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012  # of SDXL's schedule

# (x0, n, signal, noise_level) -> target; the last two broadcast over [B, ...].
Target = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Levels(NamedTuple):
    """The two coefficients of x_t = signal·x0 + noise_level·n for each sample."""

    signal: torch.Tensor  # [B] float32
    noise_level: torch.Tensor  # [B] float32


class CommonErrors(NamedTuple):
    """Errors of a prediction on scales that epsilon, v and flow share, [B] float32. NaN where one is undefined."""

    x0: torch.Tensor
    v: torch.Tensor


class LatentStatistics(NamedTuple):
    """Per-channel statistics that convert latents of the VAE to x0 = (latent - mean)·scale and back."""

    mean: torch.Tensor  # [C], or [1] for all channels
    scale: torch.Tensor  # [C], or [1] for all channels


def compute_alphas_cumprod(zero_terminal_snr: bool = False) -> torch.Tensor:
    """Return abar_t of SDXL's `scaled_linear` schedule, [T] float64.

    sqrt(beta_t) grows linearly from sqrt(0.00085) to sqrt(0.012). With `zero_terminal_snr` the schedule is rescaled so
    that the last abar is 0.
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    return rescale_zero_terminal_snr(alphas_cumprod) if zero_terminal_snr else alphas_cumprod


def rescale_zero_terminal_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Rescale a schedule to zero terminal SNR, [T] in and out (Lin et al. 2023, arXiv 2305.08891, algorithm 1).

    sqrt(abar) is shifted so that its last value becomes 0, then scaled so that its first value does not change. The
    paper also recomputes the betas; training needs only abar.
    """
    roots = alphas_cumprod.sqrt()
    return ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2


def compute_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Return the signal-to-noise ratio abar / (1 - abar) of each timestep, [T] in and out."""
    return alphas_cumprod / (1 - alphas_cumprod)


@dataclass(frozen=True)
class DiffusionProcess:
    """DDPM's forward process, as tables indexed by the timestep."""

    signals: torch.Tensor  # [T] float32, sqrt(abar)
    noise_levels: torch.Tensor  # [T] float32, sqrt(1 - abar)
    snr: torch.Tensor  # [T] float32

    def compute_levels(self, timesteps: torch.Tensor) -> Levels:
        """Return the levels at `timesteps` [B] int64."""
        return Levels(self.signals[timesteps], self.noise_levels[timesteps])

    def compute_snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the SNR [B] at `timesteps` [B] int64."""
        return self.snr[timesteps]


class FlowProcess:
    """Rectified flow's forward process: the straight line from the latent to the noise."""

    def compute_levels(self, timesteps: torch.Tensor) -> Levels:
        """Return the levels 1 - s and s at `timesteps` = 1000·s, [B] float32."""
        noise_levels = timesteps / NUM_TIMESTEPS
        return Levels(1 - noise_levels, noise_levels)

    def compute_snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the SNR ((1 - s) / s)², [B], at `timesteps` = 1000·s, [B] float32."""
        signals, noise_levels = self.compute_levels(timesteps)
        return (signals / noise_levels).square()


def build_diffusion_process(zero_terminal_snr: bool = False, device: torch.device | str = "cpu") -> DiffusionProcess:
    """Build SDXL's diffusion process with its tables on `device`.

    The tables are computed in float64, because 1 - abar cancels in float32 at the first timesteps.
    """
    alphas_cumprod = compute_alphas_cumprod(zero_terminal_snr)
    return DiffusionProcess(
        signals=alphas_cumprod.sqrt().float().to(device),
        noise_levels=(1 - alphas_cumprod).sqrt().float().to(device),
        snr=compute_snr(alphas_cumprod).float().to(device),
    )


def add_noise(x0: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, noise_level: torch.Tensor) -> torch.Tensor:
    """Return x_t = signal·x0 + noise_level·n.

    Shapes: `x0`, `noise` and the result [B, ...]; `signal` and `noise_level` [B].
    """
    return expand_like(signal, x0) * x0 + expand_like(noise_level, x0) * noise


def compute_target(
    prediction: str, x0: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, noise_level: torch.Tensor
) -> torch.Tensor:
    """Return the target that the U-Net's output is compared with, for a prediction type named in `TARGETS`.

    Shapes: `x0`, `noise` and the result [B, ...]; `signal` and `noise_level` [B].
    """
    return TARGETS[prediction](x0, noise, expand_like(signal, x0), expand_like(noise_level, x0))


def target_epsilon(
    x0: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, noise_level: torch.Tensor
) -> torch.Tensor:
    """Return the target of epsilon prediction: the noise n (Ho et al. 2020, arXiv 2006.11239)."""
    return noise


def target_v(x0: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, noise_level: torch.Tensor) -> torch.Tensor:
    """Return the target of v-prediction: sqrt(abar)·n - sqrt(1 - abar)·x0 (Salimans & Ho 2022, arXiv 2202.00512)."""
    return signal * noise - noise_level * x0


def target_flow(x0: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, noise_level: torch.Tensor) -> torch.Tensor:
    """Return the target of rectified flow: the velocity n - x0 of the straight line (arXiv 2209.03003)."""
    return noise - x0


TARGETS: dict[str, Target] = {"epsilon": target_epsilon, "v": target_v, "flow": target_flow}


def convert_errors(
    prediction: str, errors: torch.Tensor, signal: torch.Tensor, noise_level: torch.Tensor
) -> CommonErrors:
    """Convert mean squared errors of the U-Net's output to those of the x0 and the v that follow from it.

    With x_t given, the output fixes x0, and a difference d in the output is a difference c·d in x0:

        epsilon: x0 = (x_t - noise_level·n) / signal, so c = noise_level / signal
        v:       x0 = signal·x_t - noise_level·v,     so c = noise_level
        flow:    x0 = x_t - noise_level·(n - x0),     so c = noise_level

    The v of every process is that of its x_t scaled to signal² + noise_level² = 1. A difference e in x0 is a difference
    e / noise_level in v at the scaled levels, so the squared error of v is that of x0 times 1 + SNR.

    Shapes: all [B]. Both errors of epsilon are NaN where signal is 0: such an x_t shows nothing of x0.
    """
    power = signal.square() + noise_level.square()
    if prediction == "epsilon":
        is_defined = signal > 0
        errors = torch.where(is_defined, errors / torch.where(is_defined, signal, 1).square(), torch.nan)
    return CommonErrors(x0=errors * noise_level.square(), v=errors * power)


def compute_log_snr(signal: torch.Tensor, noise_level: torch.Tensor) -> torch.Tensor:
    """Return ln(signal² / noise_level²), [B]; -inf without a signal, inf without noise."""
    return 2 * (signal.log() - noise_level.log())


def normalize_latents(latents: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return x0 = (latents - mean)·scale for latents of the VAE.

    Shapes: `latents` and the result [B, C, h, w]; `mean` and `scale` [C] or [1].
    """
    return (latents - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)


def denormalize_latents(x0: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return x0/scale + mean, the latents that the VAE decodes: the inverse of `normalize_latents`."""
    return x0 / scale.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)


def expand_like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape one value per sample, [B], to [B, 1, ...] with the number of dimensions of `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))
