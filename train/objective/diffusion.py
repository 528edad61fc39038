"""The diffusion processes: how a latent becomes noise, and what the U-Net is to predict. Tensors in, tensors out.

Every process is x_t = signal·x0 + noise_level·n. Diffusion (DDPM, Ho et al. 2020, arXiv 2006.11239) takes
signal = sqrt(abar_t) and noise_level = sqrt(1 - abar_t) at whole timesteps, with SDXL's schedule; rectified flow (Liu
et al. 2022, arXiv 2209.03003) takes 1 - s and s, and the U-Net is told t = 1000·s.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012

# Shared by all predictions: (x0, n, signal, noise_level) -> target, the last two broadcast over [B, ...].
Target = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def compute_alphas_cumprod(zero_terminal_snr: bool = False) -> torch.Tensor:
    """abar_t of SDXL's `scaled_linear` schedule, [1000] float64; with zero terminal SNR, abar of the last step is 0."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    return rescale_zero_terminal_snr(alphas_cumprod) if zero_terminal_snr else alphas_cumprod


def rescale_zero_terminal_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Shift sqrt(abar) so that the last is 0 and scale it so that the first stays (Lin et al. 2023, arXiv 2305.08891).

    [T] in and out. The betas that belong to it follow from abar, which is all that training needs.
    """
    roots = alphas_cumprod.sqrt()
    return ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2


def compute_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio abar / (1 - abar) of each timestep, [T] in and out."""
    return alphas_cumprod / (1 - alphas_cumprod)


@dataclass(frozen=True)
class DiffusionProcess:
    """DDPM by tables over its timesteps."""

    signals: torch.Tensor  # [T] float32, sqrt(abar)
    noise_levels: torch.Tensor  # [T] float32, sqrt(1 - abar)
    snr: torch.Tensor  # [T] float32

    def compute_levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(signal, noise level) at `timesteps` [B] int64, each [B]."""
        return self.signals[timesteps], self.noise_levels[timesteps]

    def compute_snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """[B] in and out."""
        return self.snr[timesteps]


class FlowProcess:
    """Rectified flow: a straight line from the latent to the noise."""

    def compute_levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1 - s, s) at `timesteps` [B] float32 = 1000·s, each [B]."""
        levels = timesteps / NUM_TIMESTEPS
        return 1 - levels, levels

    def compute_snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """((1 - s) / s)², [B] in and out."""
        signals, noise_levels = self.compute_levels(timesteps)
        return (signals / noise_levels).square()


def build_diffusion_process(zero_terminal_snr: bool = False, device: torch.device | str = "cpu") -> DiffusionProcess:
    """SDXL's process, its tables computed in float64: 1 - abar cancels where little noise is added."""
    alphas_cumprod = compute_alphas_cumprod(zero_terminal_snr)
    tables = (alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), compute_snr(alphas_cumprod))
    return DiffusionProcess(*(table.float().to(device) for table in tables))


def add_noise(x0: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, noise_level: torch.Tensor) -> torch.Tensor:
    """x_t = signal·x0 + noise_level·n. `x0`, `noise` [B, ...]; levels [B]."""
    return expand(signal, x0) * x0 + expand(noise_level, x0) * noise


def compute_target(
    prediction: str, x0: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, noise_level: torch.Tensor
) -> torch.Tensor:
    """What the U-Net should have said, [B, ...]; `prediction` is a name in `TARGETS`, levels are [B]."""
    return TARGETS[prediction](x0, noise, expand(signal, x0), expand(noise_level, x0))


def target_epsilon(
    x0: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, noise_level: torch.Tensor
) -> torch.Tensor:
    """The noise."""
    return noise


def target_v(x0: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, noise_level: torch.Tensor) -> torch.Tensor:
    """sqrt(abar)·n - sqrt(1 - abar)·x0 (Salimans & Ho 2022, arXiv 2202.00512)."""
    return signal * noise - noise_level * x0


def target_flow(x0: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, noise_level: torch.Tensor) -> torch.Tensor:
    """n - x0, the velocity of the straight line."""
    return noise - x0


TARGETS: dict[str, Target] = {"epsilon": target_epsilon, "v": target_v, "flow": target_flow}


def normalize_latents(latents: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(z - mean)·scale per channel: x0 of what the VAE gave. `latents` [B, C, h, w]; `mean`, `scale` [C] or [1]."""
    return (latents - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)


def expand(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] to [B, 1, ...] with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))
