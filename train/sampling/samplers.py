"""diffusers' schedulers for what the U-Net was trained to predict. To be imported late: it loads diffusers."""

from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.samples import SCHEDULERS

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction"}
# What SDXL's scheduler_config.json does not say, having been written for Euler's.
SETTINGS: dict[str, dict[str, Any]] = {
    "ddim": {"clip_sample": False, "set_alpha_to_one": True},
    "ddpm": {"clip_sample": False},
    "pndm": {"skip_prk_steps": True, "set_alpha_to_one": True},
}


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


def build_scheduler(source: ModelSource, objective: ObjectiveConfig, name: str = "euler") -> Any:
    """diffusers' scheduler of that name (configs/samples.py), for what the U-Net was trained to predict.

    With zero terminal SNR sampling begins at the last timestep, the only one that is pure noise. The choice is one that
    train/sampling/prompts.py: validate_scheduler lets pass.
    """
    if objective.prediction == "flow" and name == "euler":
        return FlowEulerScheduler(shift=objective.timestep_shift)
    kind: Any = getattr(diffusers, dict(SCHEDULERS)[name])  # pyright: ignore[reportArgumentType]
    if objective.prediction == "flow":
        return kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=objective.timestep_shift)
    settings = {"prediction_type": PREDICTION_TYPES[objective.prediction], **SETTINGS.get(name, {})}
    if objective.zero_terminal_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return kind.from_pretrained(source.folder, subfolder="scheduler", **settings)
