"""diffusers' schedulers for the U-Net's prediction type. Import this module inside functions: it imports diffusers."""

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.samples import DIFFUSERS_SCHEDULERS
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.objective.diffusion import NUM_TIMESTEPS
from sdxl_trainer.train.objective.timesteps import resolve_shift, shift_draws

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction"}
# Settings that are missing in SDXL's scheduler_config.json, which was written for the Euler scheduler.
SETTINGS: dict[str, dict[str, Any]] = {
    "ddim": {"clip_sample": False, "set_alpha_to_one": True},
    "ddpm": {"clip_sample": False},
    "pndm": {"skip_prk_steps": True, "set_alpha_to_one": True},
}


class FlowHeun(diffusers.FlowMatchHeunDiscreteScheduler):
    """Heun's method along a rectified flow: two forward passes a step, but one in the last step.

    The U-Net receives the timestep t = 1000·s and an input that is not scaled.
    """

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        """Return the sample unchanged."""
        return sample

    def set_timesteps(self: Any, num_inference_steps: int, device: Any = None) -> None:
        """Set steps from s = 1 to 0, evenly spaced before the shift; diffusers would end with one from 1/1000 to 0."""
        super().set_timesteps(num_inference_steps, device)
        even = torch.arange(num_inference_steps, 0, -1, dtype=torch.float64) / num_inference_steps
        levels = shift_draws(even, self.config.shift).float()
        # The end of each step but the last is evaluated once more, as the next step's start.
        start, ends = levels[:1], levels[1:].repeat_interleave(self.order)
        self.sigmas = torch.cat([start, ends, torch.zeros(1)]).to(device)
        self.timesteps = self.sigmas[:-1] * NUM_TIMESTEPS


class FlowUniPC(diffusers.UniPCMultistepScheduler):
    """UniPC along a rectified flow, with the U-Net's exact timesteps 1000·s, which diffusers rounds to integers."""

    def set_timesteps(self: Any, num_inference_steps: int, device: Any = None) -> None:
        """Set the solver's own steps."""
        super().set_timesteps(num_inference_steps, device=device)
        self.timesteps = (self.sigmas[:-1] * NUM_TIMESTEPS).to(device)


def build_scheduler(source: ModelSource, objective: ObjectiveConfig, name: str, size: Size) -> Any:
    """Build the scheduler that a sampler's name stands for in configs/samples.py, for the U-Net's prediction type.

    With zero terminal SNR, sampling starts at the last timestep, the only one that is pure noise. Along a rectified
    flow, the timesteps have the shift that training has at the image's size.

    Args:
        name: a sampler that `validate_sampler` (train/sampling/prompts.py) accepts.
        size: of the image, px.
    """
    if objective.prediction == "flow":
        shift = resolve_shift(objective.timestep_shift, objective.timestep_shift_base_px, size.pixels)
        if name == "heun":
            return FlowHeun(shift=shift)
        return FlowUniPC(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler_class: Any = getattr(diffusers, DIFFUSERS_SCHEDULERS[name])
    settings = {"prediction_type": PREDICTION_TYPES[objective.prediction], **SETTINGS.get(name, {})}
    if objective.zero_terminal_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return scheduler_class.from_pretrained(source.folder, subfolder="scheduler", **settings)


def sample_with_scheduler(
    scheduler: Any,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    steps: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Sample with a scheduler of diffusers, from noise [B, C, h, w] to x0 of the same shape.

    Args:
        predict: the U-Net's prediction for (x_t, timestep).
        generator: draws the noise that a sampler adds on its way.
    """
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if takes_generator else {}
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = predict(scheduler.scale_model_input(x, timestep), timestep)
        x = scheduler.step(prediction, timestep, x, return_dict=False, **options)[0]
    return x


def build_exported_scheduler(source: ModelSource, objective: ObjectiveConfig, size: Size) -> dict[str, Any]:
    """Return the `scheduler_config.json` of an exported folder: of Euler's method, and UniPC for a rectified flow.

    diffusers' SDXL pipeline cannot use the Euler scheduler of flows, which lacks `scale_model_input`.

    Args:
        size: size that the shift is for, px; a shift by resolution has no form that the pipeline would apply.
    """
    if objective.prediction != "flow":
        return dict(build_scheduler(source, objective, "euler", size).config)
    return {**build_scheduler(source, objective, "unipc", size).config, "_class_name": "UniPCMultistepScheduler"}
