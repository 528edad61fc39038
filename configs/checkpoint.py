"""Settings of checkpoints and exported models, `checkpoint`."""

from typing import Literal

from pydantic import Field

from sdxl_trainer.configs.section import Section


class CheckpointConfig(Section):
    """When to save the training state, how many checkpoints to keep, and the form of exported models. `every_steps`,
    `every_minutes` and `every_epochs` can be combined. A checkpoint is also saved at the end of a run and whenever the
    job is asked to stop."""

    every_steps: int = Field(1000, ge=0)
    """Optimizer steps between checkpoints; 0 saves none by steps."""
    every_minutes: float = Field(0.0, ge=0)
    """Minutes between checkpoints, by rank 0's clock; 0 saves none by time."""
    every_epochs: int = Field(0, ge=0)
    """Epochs between checkpoints, saved after an epoch's last step; 0 saves none by epochs."""
    keep_last: int = Field(2, ge=1)
    """Number of checkpoints to keep. Older ones are deleted once a new one is complete."""
    keep_every_steps: int = Field(0, ge=0)
    """Never delete checkpoints whose step is a multiple of this number; 0 protects none."""
    keep_best: int = Field(0, ge=0)
    """Number of best checkpoints to keep besides the others: those with the lowest x0 error on the validation samples,
    of the weights or of a moving average, whichever is lower. Only checkpoints whose step was validated count, so
    `checkpoint.every_steps` must be a multiple of `validation.every_steps`, or the reverse (docs/WHEN_TO_STOP.md)."""
    wait_for_space_minutes: float = Field(30.0, ge=0)
    """Minutes to wait for disk space when the disk is full. The checkpoint stays in host memory and training continues
    meanwhile; after that the job stops with status 1."""
    export_dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Data type of the weights in exported models."""
    export_format: Literal["single", "diffusers"] = "single"
    """Form of exported models in `models/`: one `.safetensors` file in SDXL's layout, or a diffusers folder."""
