"""Settings of generated images, `sample`, and the names of diffusers' schedulers."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sdxl_trainer.configs.section import Section

SchedulerName = Literal[
    "euler",
    "euler_a",
    "ddim",
    "ddpm",
    "pndm",
    "heun",
    "dpm_2",
    "dpm_2_a",
    "dpmsolver++",
    "dpmsingle",
    "deis",
    "unipc",
]
# Name in kohya's scripts → diffusers' class. Prompt files accept both.
SCHEDULERS: dict[SchedulerName, str] = {
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm_2": "KDPM2DiscreteScheduler",
    "dpm_2_a": "KDPM2AncestralDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "dpmsingle": "DPMSolverSinglestepScheduler",
    "deis": "DEISMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# Schedulers that can start from pure noise (zero terminal SNR).
ZERO_SNR_SCHEDULERS = frozenset({"euler", "euler_a", "ddim", "ddpm", "dpmsolver++", "unipc"})
# Schedulers that support rectified flow, with diffusers' class for it.
FLOW_SCHEDULERS: dict[SchedulerName, str] = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}

WITHOUT_PROMPTS = {"every_steps": 0, "at_start": False}


class SampleConfig(Section):
    """Images generated from fixed prompts during training and at its end."""

    prompts: list[str] = []
    """Prompts, optionally with the flags of `sample.prompt_file`. Without prompts, no images are generated; an empty
    list turns off `every_steps` and `at_start` too."""
    prompt_file: Path | None = None
    """File with further prompts. A `.txt` file has one prompt per line (lines that begin with `#` are comments). A
    prompt may end in flags: `--n` negative prompt, `--w` width, `--h` height, `--s` steps, `--l` guidance scale, `--d`
    seed, `--ss` scheduler. A `.json` file is a list of prompts, or of objects with `prompt` and any of
    `negative_prompt`, `width`, `height`, `sample_steps` (or `steps`), `scale`, `seed`, `sample_sampler`. A `.toml` file
    of kohya's scripts has these keys in a `[[prompt.subset]]` for each prompt, and defaults in `[prompt]`. The settings
    below are the defaults of all prompts."""
    negative_prompt: str = ""
    """Negative prompt: what the images should not show."""
    every_steps: int = Field(0, ge=0)
    """Optimizer steps between image grids; 0 generates images only at the end."""
    at_start: bool = False
    """Also generate images before the first step, to see what the model generates before training."""
    scheduler: SchedulerName = "euler"
    """Scheduler of diffusers. With `objective.zero_terminal_snr` it must be `euler`, `euler_a`, `ddim`, `ddpm`,
    `dpmsolver++` or `unipc`; with `objective.prediction: flow` it must be `euler`, `heun`, `dpmsolver++` or `unipc`,
    which honour `objective.timestep_shift`."""
    num_inference_steps: int = Field(28, ge=1)
    """Denoising steps per image."""
    guidance_scale: float = Field(6.0, ge=0)
    """Strength of classifier-free guidance; 1 or less turns it off."""
    width_px: int = Field(1024, ge=64, multiple_of=8)
    """Width of the images, in pixels."""
    height_px: int = Field(1024, ge=64, multiple_of=8)
    """Height of the images, in pixels."""
    seed: int = Field(0, ge=0)
    """Seed of the first prompt; the seeds of the next prompts are the numbers that follow."""

    @model_validator(mode="before")
    @classmethod
    def _turn_off(cls, values: Any) -> Any:
        """Let an empty list of prompts turn off the images that a preset asks for."""
        if isinstance(values, dict) and values.get("prompts") == [] and not values.get("prompt_file"):
            return {**values, **{name: off for name, off in WITHOUT_PROMPTS.items() if name in values}}
        return values

    @field_validator("every_steps", "at_start")
    @classmethod
    def _require_prompts(cls, value: Any, info: ValidationInfo) -> Any:
        if value and not any(info.data.get(name, True) for name in ("prompts", "prompt_file")):
            raise ValueError(
                "has no effect: there are no prompts; set sample.prompts or sample.prompt_file, or leave this out"
            )
        return value

    @property
    def has_prompts(self) -> bool:
        """True if there is any prompt."""
        return bool(self.prompts) or self.prompt_file is not None
