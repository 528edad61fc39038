"""Noise levels of sampling, in the variables of k-diffusion: pure functions that give the numbers of ComfyUI.

A sampler moves x from sigma_max to 0:

- Diffusion: x = x0 + sigma·n, so that x is x_t/sqrt(abar), and sigma = sqrt((1 - abar)/abar) of the timestep.
- Rectified flow: x = (1 - sigma)·x0 + sigma·n, so that x is x_t, and sigma is s.

Tables are fp32, as in ComfyUI, because a sigma between two timesteps is given to the U-Net as the nearest one.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.objective.diffusion import NUM_TIMESTEPS, compute_alphas_cumprod
from sdxl_trainer.train.objective.timesteps import resolve_shift, shift_draws

# ComfyUI, Forge and A1111 put this abar in place of 0 at the last timestep, where sigma would be infinite.
LAST_ALPHA_CUMPROD = 4.8973451890853435e-08
KARRAS_RHO = 7.0


class Sigmas(Protocol):
    """The noise levels of a model."""

    table: torch.Tensor  # [T] float32, sigma of each timestep, ascending

    def compute_sigma(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return sigma at real timesteps, [N] in and out."""
        ...

    def compute_timestep(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Return the timestep that the U-Net receives at each sigma, [N] in and out."""
        ...

    def scale_noise(self, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """Return the x at which sampling begins."""
        ...

    def scale_input(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """Return the U-Net's input, x_t."""
        ...

    def compute_x0(self, x: torch.Tensor, sigma: float, prediction: torch.Tensor) -> torch.Tensor:
        """Return the x0 that follows from the U-Net's prediction."""
        ...


class DiffusionSigmas:
    """Noise levels of SDXL's diffusion process.

    Args:
        prediction: `epsilon` or `v`.
    """

    def __init__(self, prediction: str, zero_terminal_snr: bool):
        alphas_cumprod = compute_alphas_cumprod(zero_terminal_snr)
        if zero_terminal_snr:
            alphas_cumprod[-1] = LAST_ALPHA_CUMPROD
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        self.table, self._log_table = sigmas.float(), sigmas.log().float()
        self._prediction = prediction

    def compute_sigma(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Interpolate ln(sigma) between the timesteps."""
        lower, share = timesteps.floor().long(), timesteps.frac()
        return ((1 - share) * self._log_table[lower] + share * self._log_table[timesteps.ceil().long()]).exp()

    def compute_timestep(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Return the whole timestep whose ln(sigma) is nearest."""
        return (sigmas.log() - self._log_table[:, None]).abs().argmin(dim=0).float()

    def scale_noise(self, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """Scale noise so that the U-Net's first input has a standard deviation of 1, although its signal is missing."""
        return noise * (1 + sigma**2) ** 0.5

    def scale_input(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """Return x_t = x/sqrt(1 + sigma²)."""
        return x / (1 + sigma**2) ** 0.5

    def compute_x0(self, x: torch.Tensor, sigma: float, prediction: torch.Tensor) -> torch.Tensor:
        """Return x - sigma·epsilon, or x/(1 + sigma²) - v·sigma/sqrt(1 + sigma²)."""
        if self._prediction == "epsilon":
            return x - prediction * sigma
        return x / (1 + sigma**2) - prediction * sigma / (1 + sigma**2) ** 0.5


class FlowSigmas:
    """Noise levels of a rectified flow with a timestep shift, as ComfyUI's node ModelSamplingSD3 sets them."""

    def __init__(self, shift: float):
        self._shift = shift
        self.table = self.compute_sigma(torch.arange(1, NUM_TIMESTEPS + 1).float())

    def compute_sigma(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the shifted s."""
        return shift_draws(timesteps / NUM_TIMESTEPS, self._shift)

    def compute_timestep(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Return 1000·s. ComfyUI spaces steps by it too, so with a shift it is not the inverse of `compute_sigma`."""
        return sigmas * NUM_TIMESTEPS

    def scale_noise(self, noise: torch.Tensor, sigma: float) -> torch.Tensor:
        """Return sigma·n."""
        return noise * sigma

    def scale_input(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """Return x unchanged."""
        return x

    def compute_x0(self, x: torch.Tensor, sigma: float, prediction: torch.Tensor) -> torch.Tensor:
        """Return x - sigma·(n - x0)."""
        return x - prediction * sigma


def build_sigmas(objective: ObjectiveConfig, size: Size) -> Sigmas:
    """Build the noise levels of a model; those of a rectified flow have the shift of training at the image's size."""
    if objective.prediction == "flow":
        return FlowSigmas(resolve_shift(objective.timestep_shift, objective.timestep_shift_base_px, size.pixels))
    return DiffusionSigmas(objective.prediction, objective.zero_terminal_snr)


def space_normal(sigmas: Sigmas, steps: int) -> torch.Tensor:
    """Space the timesteps evenly from the last to the first (A1111 calls this `Normal` or `Uniform`)."""
    last, first = _find_end_timesteps(sigmas)
    return sigmas.compute_sigma(torch.linspace(last, first, steps))


def space_sgm_uniform(sigmas: Sigmas, steps: int) -> torch.Tensor:
    """Space the timesteps as `space_normal` does with one step more, and leave out the first timestep."""
    last, first = _find_end_timesteps(sigmas)
    return sigmas.compute_sigma(torch.linspace(last, first, steps + 1)[:-1])


def space_simple(sigmas: Sigmas, steps: int) -> torch.Tensor:
    """Take every (1000/steps)-th sigma of the table, from its end."""
    stride = len(sigmas.table) / steps
    return torch.stack([sigmas.table[-1 - int(step * stride)] for step in range(steps)])


def space_karras(sigmas: Sigmas, steps: int) -> torch.Tensor:
    """Space sigma^(1/7) evenly (Karras et al. 2022, arXiv 2206.00364, equation 5)."""
    first, last = (float(sigmas.table[end]) ** (1 / KARRAS_RHO) for end in (-1, 0))
    return (first + torch.linspace(0, 1, steps) * (last - first)) ** KARRAS_RHO


def space_exponential(sigmas: Sigmas, steps: int) -> torch.Tensor:
    """Space ln(sigma) evenly."""
    first, last = (float(sigmas.table[end].log()) for end in (-1, 0))
    return torch.linspace(first, last, steps).exp()


def _find_end_timesteps(sigmas: Sigmas) -> list[float]:
    """Return the timesteps of the largest and of the smallest sigma."""
    return [float(sigmas.compute_timestep(sigmas.table[end : end + 1 or None])) for end in (-1, 0)]


SCHEDULE_TYPES: dict[str, Callable[[Sigmas, int], torch.Tensor]] = {
    "normal": space_normal,
    "karras": space_karras,
    "exponential": space_exponential,
    "simple": space_simple,
    "sgm_uniform": space_sgm_uniform,
}


def compute_sigmas(sigmas: Sigmas, schedule_type: str, steps: int) -> list[float]:
    """Return the sigmas that sampling visits: `steps` sigmas from sigma_max on, and 0.

    Args:
        schedule_type: a name in `SCHEDULE_TYPES`.
    """
    return [*SCHEDULE_TYPES[schedule_type](sigmas, steps).tolist(), 0.0]
