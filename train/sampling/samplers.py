"""diffusers' schedulers for the U-Net's prediction type. Import this module inside functions: it imports diffusers."""

from typing import Any

import diffusers
import torch

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.samples import SCHEDULERS
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


class StraightFlow:
    """Adds the interface of diffusers' SDXL pipeline to a scheduler of rectified flow, with evenly spaced steps.

    The U-Net receives the timestep t = 1000·s and an input that is not scaled.
    """

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        """Return the sample unchanged."""
        return sample

    def set_timesteps(self: Any, num_inference_steps: int, device: Any = None) -> None:
        """Set steps from s = 1 to 0, evenly spaced before the shift; diffusers would end with one from 1/1000 to 0."""
        scheduler: Any = super()
        scheduler.set_timesteps(num_inference_steps, device)
        even = torch.arange(num_inference_steps, 0, -1, dtype=torch.float64) / num_inference_steps
        levels = shift_draws(even, self.config.shift).float()
        # A method of order 2 evaluates the end of each step but the last, which is the next step's start, once more.
        start, ends = levels[:1], levels[1:].repeat_interleave(self.order)
        self.sigmas = torch.cat([start, ends, torch.zeros(1)]).to(device)
        self.timesteps = self.sigmas[:-1] * NUM_TIMESTEPS


class FlowEuler(StraightFlow, diffusers.FlowMatchEulerDiscreteScheduler):
    """Euler's method along a rectified flow."""


class FlowHeun(StraightFlow, diffusers.FlowMatchHeunDiscreteScheduler):
    """Heun's method along a rectified flow: two forward passes a step, but one in the last step."""


class FractionalTimesteps:
    """Gives the U-Net the exact timesteps 1000·s of a rectified flow, which diffusers' solvers round to integers."""

    def set_timesteps(self: Any, num_inference_steps: int, device: Any = None) -> None:
        """Set the solver's own steps."""
        scheduler: Any = super()
        scheduler.set_timesteps(num_inference_steps, device=device)
        self.timesteps = (self.sigmas[:-1] * NUM_TIMESTEPS).to(device)


class FlowMultistep(FractionalTimesteps, diffusers.DPMSolverMultistepScheduler):
    """DPM-Solver++ with several steps' predictions along a rectified flow."""


class FlowUniPC(FractionalTimesteps, diffusers.UniPCMultistepScheduler):
    """UniPC along a rectified flow."""


FLOW_CLASSES: dict[str, Any] = {
    "euler": FlowEuler,
    "heun": FlowHeun,
    "dpmsolver++": FlowMultistep,
    "unipc": FlowUniPC,
}


def build_scheduler(source: ModelSource, objective: ObjectiveConfig, name: str, size: Size) -> Any:
    """Build the scheduler that `name` stands for in configs/samples.py, for the prediction type of the U-Net.

    With zero terminal SNR, sampling starts at the last timestep, the only one that is pure noise. Along a rectified
    flow, the timesteps have the shift that training has at the image's size.

    Args:
        name: name of a scheduler that `validate_scheduler` (train/sampling/prompts.py) accepts.
        size: of the image, px.
    """
    if objective.prediction == "flow":
        shift = resolve_shift(objective.timestep_shift, objective.timestep_shift_base_px, size.pixels)
        if issubclass(FLOW_CLASSES[name], StraightFlow):
            return FLOW_CLASSES[name](shift=shift)
        return FLOW_CLASSES[name](prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler_class: Any = getattr(diffusers, dict(SCHEDULERS)[name])  # pyright: ignore[reportArgumentType]
    settings = {"prediction_type": PREDICTION_TYPES[objective.prediction], **SETTINGS.get(name, {})}
    if objective.zero_terminal_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return scheduler_class.from_pretrained(source.folder, subfolder="scheduler", **settings)


def build_exported_scheduler(source: ModelSource, objective: ObjectiveConfig, size: Size) -> dict[str, Any]:
    """Return the `scheduler_config.json` of an exported folder.

    For a rectified flow it names UniPC: diffusers' SDXL pipeline cannot use the Euler scheduler of flows, which lacks
    `scale_model_input`.

    Args:
        size: size that the shift is for, px; a shift by resolution has no form that the pipeline would apply.
    """
    if objective.prediction != "flow":
        return dict(build_scheduler(source, objective, "euler", size).config)
    return {**build_scheduler(source, objective, "unipc", size).config, "_class_name": "UniPCMultistepScheduler"}
