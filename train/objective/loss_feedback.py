"""Loss feedback: adaptive timesteps and the learned weighting, which learn from the losses of earlier steps.

The ranks share the loss of each sample once a step, in the sum that they share anyway. Each rank then learns from the
whole global batch on the host, in the order of positions, so all ranks and any number of them learn the same.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.data.loading.device_copy import copy_to_device
from sdxl_trainer.train.objective import diffusion
from sdxl_trainer.train.objective.adaptive_timesteps import LossTable, add_losses, compute_probabilities
from sdxl_trainer.train.objective.learned_weighting import (
    LearnedWeighting,
    compute_log_losses,
    limit_log_sigmas,
    update_weighting,
)
from sdxl_trainer.train.objective.timesteps import build_histogram, build_uniform

# Settings that decide on the size of a loss, and those that decide on the timesteps of each bin besides.
LOSS_SETTINGS = {"prediction", "zero_terminal_snr", "loss", "huber_c", "huber_schedule", "masked_loss"}
TABLE_SETTINGS = LOSS_SETTINGS | {
    *("timestep_density", "logit_mean", "logit_std", "mode_scale", "min_timestep", "max_timestep"),
    *("timestep_shift", "timestep_shift_base_px"),
}


@dataclass(frozen=True)
class FeedbackState:
    """State of the loss feedback, which is part of the state of a run."""

    timestep_losses: LossTable = field(default_factory=list)  # by bin; empty without adaptive timesteps
    weighting: LearnedWeighting | None = None  # None if it is not learned

    def fit_to(self, fresh: "FeedbackState", changed: Collection[str] = ()) -> "FeedbackState":
        """Return the parts that a fresh state of the present settings has too, and its own in place of the others.

        A part also begins anew if what it has learned is of other losses or of other timesteps.

        Args:
            changed: settings of `objective` that have changed.
        """
        keeps_table = len(self.timestep_losses) == len(fresh.timestep_losses) and not TABLE_SETTINGS & {*changed}
        weighting = None if LOSS_SETTINGS & {*changed} else self.weighting
        return FeedbackState(
            timestep_losses=self.timestep_losses if keeps_table else fresh.timestep_losses,
            weighting=fresh.weighting and (weighting or fresh.weighting),
        )

    @staticmethod
    def parse(state: dict[str, Any]) -> "FeedbackState":
        """Return the state that was written as JSON."""
        weighting = state["weighting"]
        return FeedbackState(state["timestep_losses"], weighting and LearnedWeighting(**weighting))


def build_feedback_state(config: ObjectiveConfig) -> FeedbackState:
    """Build the state of a run that has not started."""
    return FeedbackState(
        timestep_losses=[[] for _ in range(config.adaptive_timestep_bins)],
        weighting=LearnedWeighting() if config.learned_weighting else None,
    )


class ChangedDraws(NamedTuple):
    """Draws of a micro batch in which bins are as frequent as their probabilities; on the host."""

    draws: torch.Tensor  # [B] float64 in [0, 1)
    bins: torch.Tensor  # [B] int64; 0 without adaptive timesteps


class NoiseLevels(NamedTuple):
    """Noise levels of a micro batch and the weights of their losses; on the host."""

    timesteps: torch.Tensor  # [B]
    bins: torch.Tensor  # [B] int64
    factors: torch.Tensor  # [B] float64, 1 / (probability of the bin x number of bins)
    learned_weights: torch.Tensor  # [B] float64, exp(-u)

    def weigh(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the weights of samples, [B] float32, times those of their noise levels."""
        return (weights * self.factors * self.learned_weights).float()


class MicroLosses(NamedTuple):
    """Losses of a micro batch, with what the feedback needs of its samples."""

    losses: torch.Tensor  # [B] on the device, without weights of samples and noise levels
    positions: torch.Tensor  # [B] int64 on the host, in the global batch
    weights: torch.Tensor  # [B] float32 on the host, of the samples; 0 for a bad one
    levels: NoiseLevels


class StepLosses(NamedTuple):
    """The samples of a global batch, in the order of their positions: arrays [G] float32."""

    factors: np.ndarray
    timesteps: np.ndarray
    bins: np.ndarray
    losses: np.ndarray

    @property
    def mean(self) -> float:
        """Mean loss, without the learned weights."""
        return float((self.factors.astype(np.float64) * self.losses).mean())


class LossFeedback:
    """Adaptive timesteps and the learned weighting of a run, one of them or both.

    Args:
        state: of the steps so far.

    Attributes:
        state: draws and weights follow it; changed by `finish_step` only.
        probabilities: [bins] float64, empty without adaptive timesteps.
    """

    def __init__(self, config: ObjectiveConfig, state: FeedbackState, global_batch_size: int):
        self._lr, self._global_batch_size = config.learned_weighting_lr, global_batch_size
        self._compute_log_sigmas = build_log_sigmas(config)
        self._before = state
        self._read_losses: Callable[[], StepLosses] | None = None
        self._adopt(state)

    def change_draws(self, draws: torch.Tensor) -> ChangedDraws:
        """Map uniform draws, [B] float64 in [0, 1), to draws in which bins are as frequent as their probabilities."""
        num_bins = len(self.probabilities)
        draws = self._invert_cdf(draws)
        return ChangedDraws(draws, (draws * num_bins).long().clamp(0, max(num_bins - 1, 0)))

    def weigh(self, timesteps: torch.Tensor, bins: torch.Tensor) -> NoiseLevels:
        """Return the weights of a micro batch's noise levels."""
        num_bins, factors = len(self.probabilities), torch.ones(len(bins), dtype=torch.float64)
        if num_bins:
            factors = 1 / (torch.from_numpy(self.probabilities)[bins] * num_bins)
        return NoiseLevels(timesteps, bins, factors, self.compute_weights(timesteps))

    def compute_weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the learned weight exp(-u), [B] float64, at timesteps [B] of the host; 1 if it is not learned."""
        weighting = self.state.weighting
        if weighting is None:
            return torch.ones(len(timesteps), dtype=torch.float64)
        return torch.from_numpy(np.exp(-compute_log_losses(weighting, self._compute_log_sigmas(timesteps.numpy()))))

    def collect(self, micro_batches: Sequence[MicroLosses], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's samples of a global batch by position, with zeros for those of other ranks.

        Returns:
            Factors, timesteps and bins on the host, [3·G] float32, and losses on the device, [G] float32.
        """
        positions = torch.cat([batch.positions for batch in micro_batches])
        known = torch.zeros(3, self._global_batch_size)
        for batch in micro_batches:
            levels = batch.levels
            rows = (batch.weights * levels.factors, levels.timesteps, levels.bins)
            known[:, batch.positions] = torch.stack([row.float() for row in rows])
        losses = torch.zeros(self._global_batch_size, device=device)
        own = torch.cat([batch.losses for batch in micro_batches])
        return known.flatten(), losses.index_copy_(0, copy_to_device(positions, device), own)

    def expect(self, read_losses: Callable[[], StepLosses]) -> None:
        """Learn from these losses when the step ends. They are on their way to the host."""
        self._before, self._read_losses = self.state, read_losses

    def read_next_state(self) -> FeedbackState:
        """Return the state after the step whose losses are expected. A save beside the loop may ask for it too."""
        assert self._read_losses is not None, "the losses of a step are expected"
        state, step = self._before, self._read_losses()
        losses = step.losses.astype(np.float64)
        weighting, table = state.weighting, state.timestep_losses
        weighted = losses
        if weighting is not None:
            log_sigmas = self._compute_log_sigmas(step.timesteps)
            weighted = losses * np.exp(-compute_log_losses(weighting, log_sigmas))
            weighting = update_weighting(weighting, log_sigmas, losses, step.factors.astype(np.float64), self._lr)
        if table:
            is_used = np.isfinite(weighted) & (step.factors != 0)
            table = add_losses(table, step.bins[is_used].astype(int).tolist(), weighted[is_used].tolist())
        return replace(state, timestep_losses=table, weighting=weighting)

    def finish_step(self) -> FeedbackState:
        """Learn from the losses of the step, and return the new state."""
        self._adopt(self.read_next_state())
        return self.state

    def _adopt(self, state: FeedbackState) -> None:
        """Draw and weigh by a state from now on."""
        self.state = state
        self.probabilities = compute_probabilities(state.timestep_losses) if state.timestep_losses else np.zeros(0)
        is_uniform = not len(self.probabilities) or (self.probabilities == self.probabilities[0]).all()
        # The inverse CDF of equal bins would change draws by rounding.
        self._invert_cdf = build_uniform() if is_uniform else build_histogram(self.probabilities.tolist())


def build_log_sigmas(config: ObjectiveConfig) -> Callable[[np.ndarray], np.ndarray]:
    """Build the function timesteps [N] → limited ln(sigma) [N] float64.

    sigma is noise_level / signal: sqrt((1 - abar) / abar), or s / (1 - s) of a flow.
    """

    def compute(signals: np.ndarray, noise_levels: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return limit_log_sigmas(np.log(noise_levels) - np.log(signals))

    if config.prediction == "flow":

        def compute_of_flow(timesteps: np.ndarray) -> np.ndarray:
            noise_levels = timesteps.astype(np.float64) / diffusion.NUM_TIMESTEPS
            return compute(1 - noise_levels, noise_levels)

        return compute_of_flow
    alphas_cumprod = diffusion.compute_alphas_cumprod(config.zero_terminal_snr).numpy()
    table = compute(np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod))
    return lambda timesteps: table[timesteps.astype(np.int64)]
