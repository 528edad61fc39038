"""The training objective of a run: the formulas that the settings select, with a seed for every random draw.

The formulas themselves are pure functions in diffusion.py, timesteps.py, noise.py, losses.py and weightings.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.section import is_own_code
from sdxl_trainer.data.loading.device_copy import copy_to_device
from sdxl_trainer.data.order.keyed_random import RandomStream, derive_seed
from sdxl_trainer.data.own_code import bind_arguments, load_own_function
from sdxl_trainer.train.objective import diffusion
from sdxl_trainer.train.objective.diffusion import LatentStatistics
from sdxl_trainer.train.objective.drawn_noise import DrawnNoise
from sdxl_trainer.train.objective.loss_feedback import FeedbackState, LossFeedback, NoiseLevels, build_feedback_state
from sdxl_trainer.train.objective.losses import HUBER_SCHEDULES, compute_sample_loss, rotate_samples
from sdxl_trainer.train.objective.noise import add_offset, add_pyramid, draw_nearest_noise, draw_noise, perturb_noise
from sdxl_trainer.train.objective.timesteps import (
    InverseCdf,
    build_cosmap,
    build_histogram,
    build_logit_normal,
    build_mode,
    build_uniform,
    draw_low_discrepancy,
    draw_uniform,
    resolve_shift,
    scale_to_range,
    shift_draws,
)
from sdxl_trainer.train.objective.weightings import WEIGHTINGS

LOSS_KEY, WEIGHTING_KEY = "objective.loss", "objective.weighting"  # settings that may name the user's own code
NUM_CURVE_POINTS = 201  # of the learned weights in the report


@dataclass(frozen=True)
class SampleKeys:
    """Keys of the random draws of a micro batch. The draws depend only on these keys, so any rank can make them."""

    seed: int
    step: int
    positions: list[int]  # [B] positions of the samples in the global batch

    def derive_seeds(self, stream: RandomStream, part: int = 0) -> list[int]:
        """Return a seed for each sample, [B]. `part` distinguishes several draws from one stream."""
        return [derive_seed(self.seed, stream, self.step, position, part) for position in self.positions]

    def derive_step_seed(self, stream: RandomStream) -> int:
        """Return a seed that all samples of the global batch share."""
        return derive_seed(self.seed, stream, self.step)


class DrawnTimesteps(NamedTuple):
    """Timesteps of a micro batch."""

    values: torch.Tensor  # [B] on the device, as the U-Net receives them: int64, or float32 1000·s for rectified flow
    levels: NoiseLevels | None = None  # None without loss feedback


class Objective:
    """Noise, timesteps, inputs, targets and losses of a run.

    Args:
        config: the `objective` section.
        latent_statistics: per-channel mean and scale of the latents (`resolve_latent_statistics`).
        global_batch_size: number of samples that the low-discrepancy timesteps of a step are spread over.
        device: device of the tensors that the methods return.
        drawn_noise: noise drawn on the CPU ahead of time; None draws on `device`.
        feedback_state: state of the loss feedback; None for a run that has not started.

    Attributes:
        feedback: adaptive timesteps and the learned weighting; None if both are off.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        latent_statistics: LatentStatistics,
        global_batch_size: int,
        device: torch.device | str = "cpu",
        drawn_noise: DrawnNoise | None = None,
        feedback_state: FeedbackState | None = None,
    ):
        self.config = config
        self.global_batch_size = global_batch_size
        self.device = torch.device(device)
        self._drawn_noise = drawn_noise
        self._drawn_on = self.device if drawn_noise is None else torch.device("cpu")
        self._latent_statistics = LatentStatistics(*(values.to(device) for values in latent_statistics))
        self._is_flow = config.prediction == "flow"
        self._process = (
            diffusion.FlowProcess()
            if self._is_flow
            else diffusion.build_diffusion_process(config.zero_terminal_snr, self.device)
        )
        self._invert_cdf = build_inverse_cdf(config)
        self._loss = load_own_function(LOSS_KEY, config.loss) if is_own_code(config.loss) else config.loss
        self._weigh = build_weighting(config)
        has_feedback = config.learned_weighting or config.adaptive_timestep_bins > 0
        state = feedback_state or build_feedback_state(config)
        self.feedback = LossFeedback(config, state, global_batch_size) if has_feedback else None

    def normalize_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Return x0 for latents of the VAE, moved to the device. Shape [B, C, h, w] in and out."""
        latents = copy_to_device(latents, self.device)
        return diffusion.normalize_latents(latents, *self._latent_statistics)

    def sample_timesteps(self, keys: SampleKeys, num_pixels: int) -> DrawnTimesteps:
        """Draw the timesteps of a micro batch.

        Args:
            num_pixels: width·height of the bucket, which the shift may depend on.
        """
        config, feedback = self.config, self.feedback
        if config.low_discrepancy:
            seed = keys.derive_step_seed(RandomStream.TIMESTEP)
            draws = draw_low_discrepancy(seed, keys.positions, self.global_batch_size)
        else:
            draws = draw_uniform(keys.derive_seeds(RandomStream.TIMESTEP))
        shift = resolve_shift(config.timestep_shift, config.timestep_shift_base_px, num_pixels)
        if feedback is None:
            return DrawnTimesteps(copy_to_device(self._scale_draws(draws, shift), self.device))
        changed = feedback.change_draws(draws)
        timesteps = self._scale_draws(changed.draws, shift)
        return DrawnTimesteps(copy_to_device(timesteps, self.device), feedback.weigh(timesteps, changed.bins))

    def _scale_draws(self, draws: torch.Tensor, shift: float) -> torch.Tensor:
        """Map uniform draws to timesteps of the density and the shift, [B] on the host."""
        return self._round(shift_draws(self._invert_cdf(draws), shift))

    def _round(self, draws: torch.Tensor) -> torch.Tensor:
        """Scale draws of the density in [0, 1] to timesteps in the trained range, [B] on the host."""
        values = scale_to_range(draws, self.config.min_timestep, self.config.max_timestep)
        return values.float() if self._is_flow else values.long()

    def convert_to_timesteps(self, draws: torch.Tensor) -> torch.Tensor:
        """Map draws in [0, 1], [B] float64, to timesteps in the trained range, with the dtype of `sample_timesteps`."""
        return copy_to_device(self._round(draws), self.device)

    def describe_noise_levels(self) -> dict[str, list[float]] | None:
        """Return the curves of the loss feedback for the report; None without loss feedback.

        They are the learned `weights` at `timesteps`, and the `frequencies` of bins between `edges`, relative to those
        without adaptive timesteps; with `timestep_shift_base_px`, of an image of that size. Empty for what is off.
        """
        if self.feedback is None:
            return None
        config, probabilities = self.config, self.feedback.probabilities
        timesteps = self._round(torch.linspace(0, 1, NUM_CURVE_POINTS, dtype=torch.float64))
        draws = self._invert_cdf(torch.linspace(0, 1, len(probabilities) + 1, dtype=torch.float64))
        edges = scale_to_range(shift_draws(draws, config.timestep_shift), config.min_timestep, config.max_timestep)
        is_learned = self.feedback.state.weighting is not None
        return {
            "timesteps": timesteps.tolist() if is_learned else [],
            "weights": self.feedback.compute_weights(timesteps).tolist() if is_learned else [],
            "edges": edges.tolist() if len(probabilities) else [],
            "frequencies": (probabilities * len(probabilities)).tolist(),
        }

    def request_noise(self, shape: Sequence[int], keys: SampleKeys) -> None:
        """Draw the noise of a coming micro batch, [B, *shape], ahead of `sample_noise`, if it is drawn on the CPU."""
        if self._drawn_noise is not None and self.config.noise_candidates == 1:  # the choice needs the latents
            self._drawn_noise.request(shape, keys.derive_seeds(RandomStream.NOISE))

    def sample_plain_noise(self, x0: torch.Tensor, keys: SampleKeys) -> torch.Tensor:
        """Draw Gaussian noise with the shape of `x0` [B, C, h, w], whatever noise the settings ask for."""
        shape, seeds = x0.shape[1:], keys.derive_seeds(RandomStream.NOISE)
        noise = None if self._drawn_noise is None else self._drawn_noise.take(shape, seeds, self.device)
        return draw_noise(shape, seeds, self.device, self._drawn_on) if noise is None else noise

    def sample_noise(self, x0: torch.Tensor, keys: SampleKeys) -> torch.Tensor:
        """Draw the noise n of the target, with the shape of `x0` [B, C, h, w]."""
        config = self.config
        if config.noise_candidates > 1:
            seeds = keys.derive_seeds(RandomStream.NOISE)
            noise = draw_nearest_noise(x0, config.noise_candidates, seeds, self._drawn_on)
        else:
            noise = self.sample_plain_noise(x0, keys)
        if config.noise_offset or config.adaptive_noise_scale:
            strength = self._draw_strength(
                config.noise_offset, config.noise_offset_random_strength, RandomStream.NOISE_OFFSET, keys
            )
            seeds = keys.derive_seeds(RandomStream.NOISE_OFFSET)
            noise = add_offset(noise, x0, strength, config.adaptive_noise_scale, seeds, self._drawn_on)
        if config.multires_noise_iterations:
            seeds = keys.derive_seeds(RandomStream.PYRAMID_NOISE)
            levels, discount = config.multires_noise_iterations, config.multires_noise_discount
            noise = add_pyramid(noise, levels, discount, seeds, self._drawn_on)
        return noise

    def add_noise(
        self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, keys: SampleKeys
    ) -> torch.Tensor:
        """Return the U-Net's input x_t = signal·x0 + noise_level·n, [B, C, h, w].

        With input perturbation, n contains more noise here than in the target.
        """
        config = self.config
        if config.ip_noise_gamma:
            strength = self._draw_strength(
                config.ip_noise_gamma, config.ip_noise_gamma_random_strength, RandomStream.INPUT_PERTURBATION, keys
            )
            seeds = keys.derive_seeds(RandomStream.INPUT_PERTURBATION)
            noise = perturb_noise(noise, strength, seeds, self._drawn_on)
        return self.add_plain_noise(x0, noise, timesteps)

    def add_plain_noise(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return x_t = signal·x0 + noise_level·n, [B, C, h, w], without input perturbation."""
        return diffusion.add_noise(x0, noise, *self._process.compute_levels(timesteps))

    def sample_text_keep(self, keys: SampleKeys) -> torch.Tensor | None:
        """Draw which samples keep their text embeddings, [B] float32: 1 keeps them, 0 zeroes them.

        Returns None without text dropout.
        """
        if not self.config.text_dropout_rate:
            return None
        draws = draw_uniform(keys.derive_seeds(RandomStream.TEXT_DROPOUT))
        return copy_to_device((draws >= self.config.text_dropout_rate).float(), self.device)

    def compute_target(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the target of the U-Net's prediction, [B, C, h, w]."""
        levels = self._process.compute_levels(timesteps)
        return diffusion.compute_target(self.config.prediction, x0, noise, *levels)

    def choose_negatives(self, target: torch.Tensor, keys: SampleKeys, weights: torch.Tensor) -> torch.Tensor | None:
        """Return for each sample the target of another sample of the micro batch, [B, C, h, w].

        Returns None without `objective.contrastive_weight`.

        Args:
            weights: [B] on the CPU; samples of weight 0 are nobody's negative (see `rotate_samples`).
        """
        if not self.config.contrastive_weight:
            return None
        # The first position names the micro batch, on whichever rank it is.
        seed = derive_seed(keys.seed, RandomStream.CONTRAST, keys.step, keys.positions[0])
        return target.index_select(0, copy_to_device(rotate_samples(weights, seed), self.device))

    def compute_losses(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        masks: torch.Tensor | None = None,
        negatives: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss of each sample, [B] float32, weighted by its timestep.

        Args:
            prediction, target: [B, C, h, w].
            timesteps: [B], as drawn by `sample_timesteps`.
            masks: [B, H, W]; used only with `objective.masked_loss`.
            negatives: [B, C, h, w] targets of other samples (`choose_negatives`). The error against them is masked and
                weighted like that against the target, and subtracted `objective.contrastive_weight` times.
        """
        config, snr = self.config, self._process.compute_snr(timesteps)
        c = HUBER_SCHEDULES[config.huber_schedule](config.huber_c, timesteps, snr)
        masks = copy_to_device(masks, self.device) if config.masked_loss and masks is not None else None
        losses = compute_sample_loss(prediction, target, self._loss, c, masks)
        if negatives is not None:
            losses = losses - config.contrastive_weight * compute_sample_loss(
                prediction, negatives, self._loss, c, masks
            )
        return losses * self._weigh(snr)

    def compute_common_errors(
        self, prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor
    ) -> diffusion.CommonErrors:
        """Return the mean squared errors of x0 and of v, [B] float32, without mask or weighting.

        They can be compared between all objectives. Shapes as in `compute_losses`; x_t must be of plain noise.
        """
        errors = (prediction.float() - target.float()).square().flatten(1).mean(1)
        return diffusion.convert_errors(self.config.prediction, errors, *self._process.compute_levels(timesteps))

    def compute_log_snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the SNR at each timestep, [B] float32."""
        return diffusion.compute_log_snr(*self._process.compute_levels(timesteps))

    def _draw_strength(self, strength: float, is_random: bool, stream: RandomStream, keys: SampleKeys) -> torch.Tensor:
        """Return the strength for each sample, [B] float32: constant, or with `is_random` uniform in [0, strength)."""
        shares = draw_uniform(keys.derive_seeds(stream, 1)) if is_random else torch.ones(len(keys.positions))
        return copy_to_device((strength * shares).float(), self.device)


def build_inverse_cdf(config: ObjectiveConfig) -> InverseCdf:
    """Build the inverse CDF of `objective.timestep_density`."""
    if isinstance(config.timestep_density, list):
        return build_histogram(config.timestep_density)
    builders: dict[str, Callable[[], InverseCdf]] = {
        "uniform": build_uniform,
        "logit_normal": partial(build_logit_normal, config.logit_mean, config.logit_std),
        "mode": partial(build_mode, config.mode_scale),
        "cosmap": build_cosmap,
    }
    return builders[config.timestep_density]()


def build_weighting(config: ObjectiveConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """Build the function SNR [B] → weights [B] of `objective.weighting`, with its settings bound to it."""
    own = is_own_code(config.weighting)
    weigh = load_own_function(WEIGHTING_KEY, config.weighting) if own else WEIGHTINGS[config.weighting]
    settings = {"prediction": config.prediction, "gamma": config.gamma, "sigma_data": config.sigma_data}
    return bind_arguments(weigh, settings)


def resolve_latent_statistics(vae_config: Mapping[str, Any]) -> LatentStatistics:
    """Return the mean and scale, float32, of x0 = (latent - mean)·scale.

    The mean is `latents_mean` of each channel, or else `shift_factor`, or 0. The scale is `scaling_factor`, divided by
    `latents_std` of each channel if the config has it, as in diffusers.

    Args:
        vae_config: complete, as `read_vae_config` returns it or a loaded VAE holds it.
    """
    factor = torch.tensor([float(vae_config["scaling_factor"])])
    if vae_config.get("latents_mean") and vae_config.get("latents_std"):
        mean, std = (torch.tensor(vae_config[name], dtype=torch.float32) for name in ("latents_mean", "latents_std"))
        return LatentStatistics(mean, factor / std)
    return LatentStatistics(torch.tensor([float(vae_config.get("shift_factor") or 0.0)]), factor)
