"""Settings of the images drawn while training, `sample`, and the names of diffusers' schedulers."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

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
# The names that kohya's scripts use → diffusers' classes, whose own names are understood as well.
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
# Those that can begin at a timestep without any signal, and those that can follow a flow.
ZERO_SNR_SCHEDULERS = frozenset({"euler", "euler_a", "ddim", "ddpm", "dpmsolver++", "unipc"})
FLOW_SCHEDULERS = frozenset({"euler", "dpmsolver++", "unipc"})


class SampleConfig(Section):
    """Images drawn from fixed prompts during and after training."""

    prompts: list[str] = []
    """Prompts, which may carry the flags that `sample.prompt_file` explains. None at all draws nothing."""
    prompt_file: Path | None = None
    """Further prompts. A text file with a prompt a line (`#` begins a comment line), which flags may follow: `--n`
    negative prompt, `--w` width, `--h` height, `--s` steps, `--l` guidance scale, `--d` seed, `--ss` scheduler. Or a
    `.json` list of prompts or of objects with `prompt` and any of `negative_prompt`, `width`, `height`, `sample_steps`,
    `scale`, `seed`, `sample_sampler`. The settings below hold for what a prompt does not say."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    every_steps: int = Field(0, ge=0)
    """Steps between sample grids; 0 draws at the end only."""
    at_start: bool = False
    """Also draw before the first step, to see what the model was able to do."""
    scheduler: SchedulerName = "euler"
    """diffusers' scheduler. With `objective.zero_terminal_snr` one of `euler`, `euler_a`, `ddim`, `ddpm`,
    `dpmsolver++`, `unipc`; for `flow` one of `euler`, `dpmsolver++`, `unipc`."""
    num_inference_steps: int = Field(28, ge=1)
    """Denoising steps of a sample."""
    guidance_scale: float = Field(6.0, ge=0)
    """Strength of classifier-free guidance; 1 or less turns it off."""
    width_px: int = Field(1024, ge=64, multiple_of=8)
    """Width of a sample."""
    height_px: int = Field(1024, ge=64, multiple_of=8)
    """Height of a sample."""
    seed: int = Field(0, ge=0)
    """Seed of the first prompt; the others follow it."""

    @field_validator("every_steps", "at_start")
    @classmethod
    def _there_are_prompts(cls, value: Any, info: ValidationInfo) -> Any:
        if value and not any(info.data.get(name, True) for name in ("prompts", "prompt_file")):
            raise ValueError(
                "has no effect: there are no prompts; set sample.prompts or sample.prompt_file, or leave this out"
            )
        return value

    @property
    def draws(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.prompts) or self.prompt_file is not None
