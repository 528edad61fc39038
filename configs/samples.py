"""Settings of generated images, `sample`, and the names of samplers and of their noise levels."""

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sdxl_trainer.configs.section import Section

SamplerName = Literal[
    "euler", "dpmpp_2m", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsingle", "ddim", "ddpm", "pndm", "deis", "unipc"
]
ScheduleType = Literal["normal", "karras", "exponential", "simple", "sgm_uniform"]
# Samplers of train/sampling/samplers.py, which take the same steps as those of ComfyUI; the others are diffusers'.
OWN_SAMPLERS = ("euler", "dpmpp_2m")
# The class in diffusers of each sampler. Exported folders name that of `euler`.
DIFFUSERS_SCHEDULERS: dict[str, str] = {
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm_2": "KDPM2DiscreteScheduler",
    "dpm_2_a": "KDPM2AncestralDiscreteScheduler",
    "dpmsingle": "DPMSolverSinglestepScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "deis": "DEISMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# Other names of samplers: in kohya's scripts, in ComfyUI, and diffusers' classes.
SAMPLER_ALIASES: dict[str, str] = {
    **{class_name: name for name, class_name in DIFFUSERS_SCHEDULERS.items()},
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    **{f"k_{name}": name for name in ("euler", "euler_a", "heun", "dpm_2", "dpm_2_a")},
    "dpmsolver": "dpmpp_2m",
    "dpmsolver++": "dpmpp_2m",
    "euler_ancestral": "euler_a",
    "dpm_2_ancestral": "dpm_2_a",
    "uni_pc": "unipc",
}
# Samplers that can start from pure noise (zero terminal SNR), and those that can follow a rectified flow.
ZERO_SNR_SAMPLERS = ("euler", "dpmpp_2m", "euler_a", "ddim", "ddpm", "unipc")
FLOW_SAMPLERS = ("euler", "dpmpp_2m", "heun", "unipc")
MAX_STEPS = 1000  # timesteps of the model

WITHOUT_PROMPTS = {"every_steps": 0, "at_start": False}


class SampleConfig(Section):
    """Images generated from fixed prompts during training and at its end."""

    prompts: list[str] = []
    """Prompts, optionally with the flags of `sample.prompt_file`. Without prompts, no images are generated; an empty
    list turns off `every_steps` and `at_start` too."""
    prompt_file: Path | None = None
    """File with further prompts. A `.txt` file has one prompt per line (lines that begin with `#` are comments). A
    prompt may end in flags: `--n` negative prompt, `--w` width, `--h` height, `--s` steps, `--l` guidance scale, `--d`
    seed, `--ss` sampler, `--st` schedule type. A `.json` file is a list of prompts, or of objects with `prompt` and any
    of `negative_prompt`, `width`, `height`, `sample_steps` (or `steps`), `scale`, `seed`, `sample_sampler`,
    `schedule_type`. A `.toml` file of kohya's scripts has these keys in a `[[prompt.subset]]` for each prompt, and
    defaults in `[prompt]`. The settings below are the defaults of all prompts."""
    negative_prompt: str = ""
    """Negative prompt: what the images should not show."""
    every_steps: int = Field(0, ge=0)
    """Optimizer steps between image grids; 0 generates images only at the end."""
    at_start: bool = False
    """Also generate images before the first step, to see what the model generates before training."""
    sampler: SamplerName = "euler"
    """Sampler. `euler` and `dpmpp_2m` (DPM-Solver++ 2M) take the same steps as in ComfyUI, Forge and A1111; the others
    are diffusers'. Names of kohya's scripts, of ComfyUI (`euler_ancestral`, `uni_pc`) and of diffusers' classes are
    understood too. With `objective.zero_terminal_snr` it must be `euler`, `dpmpp_2m`, `euler_a`, `ddim`, `ddpm` or
    `unipc`; with `objective.prediction: flow` it must be `euler`, `dpmpp_2m`, `heun` or `unipc`, which honour
    `objective.timestep_shift`."""
    schedule_type: ScheduleType = "normal"
    """Noise levels that `euler` and `dpmpp_2m` visit, which ComfyUI calls scheduler and A1111 schedule type: `normal`
    spaces timesteps evenly from the last to the first, `sgm_uniform` leaves out the first, `simple` takes every n-th
    timestep, `karras` and `exponential` space the noise levels themselves. All work with every objective, as in
    ComfyUI; choose `simple` or `sgm_uniform` for rectified flow, above all with `dpmpp_2m`. The other samplers have
    diffusers' own spacing."""
    num_inference_steps: int = Field(28, ge=1, le=MAX_STEPS)
    """Denoising steps per image."""
    guidance_scale: float = Field(6.0, ge=0)
    """Strength of classifier-free guidance; 1 or less turns it off."""
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    """Share of the guided prediction that is scaled to the standard deviation of the prediction for the prompt (arXiv
    2305.08891, section 3.4), as ComfyUI's node RescaleCFG does for `v`. 0.7 counters the glaring colours of models with
    zero terminal SNR."""
    width_px: int = Field(1024, ge=64, multiple_of=8)
    """Width of the images, in pixels."""
    height_px: int = Field(1024, ge=64, multiple_of=8)
    """Height of the images, in pixels."""
    seed: int = Field(0, ge=0)
    """Seed of the first prompt; the seeds of the next prompts are the numbers that follow."""

    @field_validator("sampler", mode="before")
    @classmethod
    def _resolve_sampler(cls, value: Any) -> Any:
        """Replace another name of a sampler."""
        if value in get_args(ScheduleType):
            raise ValueError(f"is no sampler but a schedule type; set sample.schedule_type to {value}")
        return SAMPLER_ALIASES.get(value, value) if isinstance(value, str) else value

    @field_validator("schedule_type")
    @classmethod
    def _require_own_sampler(cls, value: str, info: ValidationInfo) -> str:
        sampler = info.data.get("sampler", "euler")
        if value != "normal" and sampler not in OWN_SAMPLERS:
            own = " or ".join(OWN_SAMPLERS)
            raise ValueError(f"has no effect: sample.sampler is {sampler}; set that to {own}, or leave this out")
        return value

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
