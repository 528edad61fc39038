"""Settings of what is saved, when, and in which form the model leaves the run: `checkpoint`."""

from typing import Literal

from pydantic import Field

from sdxl_trainer.configs.section import Section


class CheckpointConfig(Section):
    """What is saved of the training state, and when. `every_steps`, `every_minutes` and `every_epochs` add up. The
    state is also saved at the end, and whenever the job is asked to stop."""

    every_steps: int = Field(1000, ge=0)
    """Steps between checkpoints; 0 for none by steps."""
    every_minutes: float = Field(0.0, ge=0)
    """Minutes from one checkpoint to the next, by rank 0's clock; 0 for none by time."""
    every_epochs: int = Field(0, ge=0)
    """Epochs between checkpoints, saved after the last step of an epoch; 0 for none by epochs."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept; older ones are deleted once the next one is whole."""
    keep_every_steps: int = Field(0, ge=0)
    """Checkpoints of steps that are multiples of this are kept for good; 0 keeps none of them."""
    wait_for_space_minutes: float = Field(30.0, ge=0)
    """How long a checkpoint that finds the disk full waits for space, in host memory, while training goes on. After
    that the job stops with status 1."""
    export_dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Type of the exported weights."""
    export_format: Literal["single", "diffusers"] = "single"
    """Form of what is written into `models/`: one `.safetensors` file in SDXL's layout, or a diffusers folder."""
