"""diffusers' schedulers for the U-Net's prediction type. Import this module inside functions: it imports diffusers."""

from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.samples import SCHEDULERS

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction"}
# Settings that are missing in SDXL's scheduler_config.json, which was written for the Euler scheduler.
SETTINGS: dict[str, dict[str, Any]] = {
    "ddim": {"clip_sample": False, "set_alpha_to_one": True},
    "ddpm": {"clip_sample": False},
    "pndm": {"skip_prk_steps": True, "set_alpha_to_one": True},
}


class FlowEulerScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler's method along a rectified flow from s = 1 to 0, with the interface that diffusers' SDXL pipeline expects.

    The U-Net receives the timestep t = 1000·s and an input that is not scaled.
    """

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        """Return the sample unchanged."""
        return sample

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, **kwargs: Any
    ) -> None:
        """Set evenly spaced steps from 1 to 0; the parent class would make the last step from 1/1000 to 0."""
        if num_inference_steps is not None and sigmas is None and not kwargs:
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        super().set_timesteps(num_inference_steps, device, sigmas, **kwargs)


def build_scheduler(source: ModelSource, objective: ObjectiveConfig, name: str = "euler") -> Any:
    """Build the scheduler that `name` stands for in configs/samples.py, for the prediction type of the U-Net.

    With zero terminal SNR, sampling starts at the last timestep, the only one that is pure noise.

    Args:
        name: name of a scheduler that `validate_scheduler` (train/sampling/prompts.py) accepts.
    """
    if objective.prediction == "flow" and name == "euler":
        return FlowEulerScheduler(shift=objective.timestep_shift)
    scheduler_class: Any = getattr(diffusers, dict(SCHEDULERS)[name])  # pyright: ignore[reportArgumentType]
    if objective.prediction == "flow":
        shift = objective.timestep_shift
        return scheduler_class(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    settings = {"prediction_type": PREDICTION_TYPES[objective.prediction], **SETTINGS.get(name, {})}
    if objective.zero_terminal_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return scheduler_class.from_pretrained(source.folder, subfolder="scheduler", **settings)
