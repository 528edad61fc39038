"""diffusers' schedulers for what the U-Net was trained to predict. To be imported late: it loads diffusers."""

from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from sdxl_trainer.cache.model_source import ModelSource
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.schema import ModelConfig

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction"}


class FlowEulerScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler's method along the flow from s = 1 to 0, with what diffusers' SDXL pipeline asks of a scheduler.

    The U-Net is told t = 1000·s, and its input is not scaled.
    """

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        """The sample itself."""
        return sample

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, **kwargs: Any
    ) -> None:
        """Even steps that all count; the parent would end in one from 1/1000 to 0."""
        if num_inference_steps is not None and sigmas is None and not kwargs:
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        super().set_timesteps(num_inference_steps, device, sigmas, **kwargs)


def build_scheduler(source: ModelSource, objective: ObjectiveConfig) -> Any:
    """The scheduler for what the U-Net was trained to predict, Euler's method throughout.

    With zero terminal SNR sampling begins at the last timestep, the only one that is pure noise.
    """
    if objective.prediction == "flow":
        return FlowEulerScheduler(shift=objective.timestep_shift)
    settings: dict[str, Any] = {
        "prediction_type": PREDICTION_TYPES[objective.prediction],
        "rescale_betas_zero_snr": objective.zero_terminal_snr,
    }
    if objective.zero_terminal_snr:
        settings["timestep_spacing"] = "trailing"
    return EulerDiscreteScheduler.from_pretrained(source.folder, subfolder="scheduler", **settings)


def set_latent_statistics(vae: Any, model: ModelConfig) -> None:
    """Tell the pipeline's VAE how x0 was made of its latents, if the settings say so rather than its own config."""
    if model.latents_mean and model.latents_std:
        vae.register_to_config(
            latents_mean=list(model.latents_mean), latents_std=list(model.latents_std), scaling_factor=1.0
        )
