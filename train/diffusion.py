"""The diffusion objective: tensors and numbers in, tensors out.

x_t = sqrt(abar_t)·x0 + sqrt(1 - abar_t)·n  (DDPM, Ho et al. 2020, arXiv 2006.11239), with SDXL's schedule.
"""

import torch

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


def compute_alphas_cumprod() -> torch.Tensor:
    """abar_t of SDXL's `scaled_linear` schedule, [1000] float32."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0).float()


def sample_timesteps(seeds: list[int]) -> torch.Tensor:
    """A timestep for each seed, uniform over the schedule, [B] int64."""
    return torch.cat([torch.randint(0, NUM_TIMESTEPS, (1,), generator=_generator(seed)) for seed in seeds])


def sample_noise(shape: tuple[int, ...], seeds: list[int], device: torch.device) -> torch.Tensor:
    """Unit Gaussian noise, [B, *shape] float32, each sample drawn from its own seed.

    So a sample's noise does not depend on which rank or micro batch it lands in.
    """
    return torch.stack([torch.randn(shape, generator=_generator(seed, device), device=device) for seed in seeds])


def add_noise(
    x0: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """x_t for each sample. `x0`, `noise` [B, ...]; `alphas_cumprod` [T]; `timesteps` [B]."""
    abar = alphas_cumprod[timesteps].view(-1, *[1] * (x0.dim() - 1))
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def compute_sample_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, [B] float32, computed in float32 whatever the prediction's type."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def _generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
