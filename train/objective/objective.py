"""The objective as it was configured: everything about the loss that varies, behind methods that the step calls.

The formulas are in diffusion.py, timesteps.py, noise.py, losses.py and weightings.py; here they are chosen and keyed.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.schema import ModelConfig
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.train.objective import diffusion
from sdxl_trainer.train.objective.losses import HUBER_SCHEDULES, compute_sample_loss
from sdxl_trainer.train.objective.noise import add_offset, add_pyramid, draw_noise, perturb_noise
from sdxl_trainer.train.objective.timesteps import (
    InverseCdf,
    build_histogram,
    build_logit_normal,
    build_uniform,
    draw_low_discrepancy,
    draw_uniform,
    scale_to_range,
    shift_draws,
)
from sdxl_trainer.train.objective.weightings import WEIGHTINGS

SCALING_FACTOR = 0.13025  # of SDXL's VAE, for configs that do not tell


@dataclass(frozen=True)
class SampleKeys:
    """What the draws of a micro batch are keyed to, whoever computes it."""

    seed: int
    step: int
    positions: list[int]  # [B], of the samples in the global batch

    def make_seeds(self, stream: RandomStream, part: int = 0) -> list[int]:
        """A seed for each sample; `part` tells several draws of one stream apart."""
        return [derive_seed(self.seed, stream, self.step, position, part) for position in self.positions]

    def make_step_seed(self, stream: RandomStream) -> int:
        """A seed that all samples of the global batch share."""
        return derive_seed(self.seed, stream, self.step)


class Objective:
    """Noise, timesteps, targets and losses of a run.

    Args:
        config: the `objective` section.
        latent_statistics: (mean [C], scale [C]) as `resolve_latent_statistics` gives them.
        global_batch_size: how many samples the low-discrepancy timesteps of a step are spread over.
        device: where batches will be.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        latent_statistics: tuple[torch.Tensor, torch.Tensor],
        global_batch_size: int,
        device: torch.device | str = "cpu",
    ):
        self.config = config
        self.global_batch_size = global_batch_size
        self.device = torch.device(device)
        self._mean, self._scale = (values.to(device) for values in latent_statistics)
        self._is_flow = config.prediction == "flow"
        self._process = (
            diffusion.FlowProcess()
            if self._is_flow
            else diffusion.build_diffusion_process(config.zero_terminal_snr, self.device)
        )
        self._invert_cdf = build_inverse_cdf(config)
        self._weigh = build_weighting(config)

    def normalize_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """What the VAE gave to x0, on the device. [B, C, h, w] in and out."""
        latents = latents.to(self.device, non_blocking=True)
        return diffusion.normalize_latents(latents, self._mean, self._scale)

    def sample_timesteps(self, keys: SampleKeys) -> torch.Tensor:
        """[B] timesteps as the U-Net is told them: int64, or for flow float32, as 1000·s is no whole number."""
        config = self.config
        if config.low_discrepancy:
            seed = keys.make_step_seed(RandomStream.TIMESTEP)
            draws = draw_low_discrepancy(seed, keys.positions, self.global_batch_size)
        else:
            draws = draw_uniform(keys.make_seeds(RandomStream.TIMESTEP))
        return self.draws_to_timesteps(shift_draws(self._invert_cdf(draws), config.timestep_shift))

    def draws_to_timesteps(self, draws: torch.Tensor) -> torch.Tensor:
        """Numbers in [0, 1], [B] float64, to timesteps of the trained range, as `sample_timesteps` gives them."""
        values = scale_to_range(draws, self.config.min_timestep, self.config.max_timestep)
        return (values.float() if self._is_flow else values.long()).to(self.device)

    def sample_noise(self, x0: torch.Tensor, keys: SampleKeys) -> torch.Tensor:
        """The noise of the target, like `x0`."""
        config = self.config
        noise = draw_noise(x0.shape[1:], keys.make_seeds(RandomStream.NOISE), self.device)
        if config.noise_offset or config.adaptive_noise_scale:
            strength = self._draw_strength(
                config.noise_offset, config.noise_offset_random_strength, RandomStream.NOISE_OFFSET, keys
            )
            seeds = keys.make_seeds(RandomStream.NOISE_OFFSET)
            noise = add_offset(noise, x0, strength, config.adaptive_noise_scale, seeds)
        if config.multires_noise_iterations:
            seeds = keys.make_seeds(RandomStream.PYRAMID_NOISE)
            noise = add_pyramid(noise, config.multires_noise_iterations, config.multires_noise_discount, seeds)
        return noise

    def add_noise(
        self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, keys: SampleKeys
    ) -> torch.Tensor:
        """x_t, the U-Net's input; with input perturbation from more noise than the target's."""
        config = self.config
        if config.ip_noise_gamma:
            strength = self._draw_strength(
                config.ip_noise_gamma, config.ip_noise_gamma_random_strength, RandomStream.INPUT_PERTURBATION, keys
            )
            noise = perturb_noise(noise, strength, keys.make_seeds(RandomStream.INPUT_PERTURBATION))
        return diffusion.add_noise(x0, noise, *self._process.compute_levels(timesteps))

    def sample_text_keep(self, keys: SampleKeys) -> torch.Tensor | None:
        """[B] float32: 0 for the samples whose text embeddings are to be zeroed, else 1; None keeps all."""
        if not self.config.text_dropout_rate:
            return None
        draws = draw_uniform(keys.make_seeds(RandomStream.TEXT_DROPOUT))
        return (draws >= self.config.text_dropout_rate).float().to(self.device)

    def compute_target(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the U-Net is to predict."""
        levels = self._process.compute_levels(timesteps)
        return diffusion.compute_target(self.config.prediction, x0, noise, *levels)

    def compute_losses(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        masks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B] float32: each sample's loss, weighted by timestep. `masks` [B, H, W] count only with `masked_loss`."""
        config, snr = self.config, self._process.compute_snr(timesteps)
        c = HUBER_SCHEDULES[config.huber_schedule](config.huber_c, timesteps, snr)
        masks = masks.to(self.device) if config.masked_loss and masks is not None else None
        return compute_sample_loss(prediction, target, config.loss, c, masks) * self._weigh(snr)

    def _draw_strength(self, strength: float, is_random: bool, stream: RandomStream, keys: SampleKeys) -> torch.Tensor:
        """[B] float32: the strength itself, or a share of it that is drawn for each sample."""
        shares = draw_uniform(keys.make_seeds(stream, 1)) if is_random else torch.ones(len(keys.positions))
        return (strength * shares).float().to(self.device)


def build_inverse_cdf(config: ObjectiveConfig) -> InverseCdf:
    """The density of timesteps that the settings name."""
    if isinstance(config.timestep_density, list):
        return build_histogram(config.timestep_density)
    builders: dict[str, Callable[[], InverseCdf]] = {
        "uniform": build_uniform,
        "logit_normal": partial(build_logit_normal, config.logit_mean, config.logit_std),
    }
    return builders[config.timestep_density]()


def build_weighting(config: ObjectiveConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """The weighting that the settings name, with what it takes of them."""
    weigh = WEIGHTINGS[config.weighting]
    settings = {"prediction": config.prediction, "gamma": config.gamma, "sigma_data": config.sigma_data}
    wanted = inspect.signature(weigh).parameters
    return partial(weigh, **{name: value for name, value in settings.items() if name in wanted})


def resolve_latent_statistics(model: ModelConfig, vae_config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, scale), [C] or [1] float32 each, so that x0 = (latent - mean)·scale.

    From `model.latents_mean` and `model.latents_std` (scale 1/std), else from the VAE's config as diffusers uses it:
    its scaling factor, divided by its `latents_std` if it has statistics.
    """
    if model.latents_mean and model.latents_std:
        return torch.tensor(model.latents_mean), 1 / torch.tensor(model.latents_std)
    factor = torch.tensor([vae_config.get("scaling_factor") or SCALING_FACTOR])
    if vae_config.get("latents_mean") and vae_config.get("latents_std"):
        return torch.tensor(vae_config["latents_mean"]), factor / torch.tensor(vae_config["latents_std"])
    return torch.zeros(1), factor
