"""Settings of checkpoints and exported models, `checkpoint` and `about`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from sdxl_trainer.configs.section import Section

Text = Annotated[str, Field(min_length=1)]


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


class AboutConfig(Section):
    """Description of the model in model files (modelspec 1.0.1) and in the model card. Everything here becomes public
    with the model."""

    title: Text | None = None
    """Title of the model. The default is `run.name`."""
    author: Text | None = None
    """Who made the model: a name, or the address of a profile."""
    description: Text | None = None
    """What the model is for, in plain text or Markdown."""
    license: Text | None = None
    """Licence of the model: its identifier, such as `openrail++` or `cc-by-4.0`, or the address of its text."""
    trigger_phrase: Text | None = None
    """Words that a prompt needs for the model to have its effect, above all for adapters. Interfaces may add them to
    the prompt."""
    usage_hint: Text | None = None
    """Short hint for those who use the model, such as a guidance scale."""
    tags: list[Text] = []
    """Tags by which interfaces and the hub find the model, such as `[style, watercolour]`."""
    merged_from: list[Text] = []
    """Titles of the models that the model to train was merged from. `train/convert.py --adapter` fills it with the
    names of the files that it merges."""
    thumbnail: Path | None = None
    """Image that interfaces show for the model. It is stored in the model file as a JPEG of at most 256 px."""
    base_model: Text | None = Field(None, pattern=r"^[\w\-.]+/[\w\-.]+$")
    """Hub id of the model that training started from, for the model card. The default is `model.path` if that is a
    hub id; the path of a file is never published."""

    @field_validator("tags", "merged_from")
    @classmethod
    def _refuse_commas(cls, names: list[str]) -> list[str]:
        # The standard separates them by commas.
        wrong = [name for name in names if "," in name]
        if wrong:
            raise ValueError(f"must have one name an entry, but {wrong[0]!r} contains a comma; make it two entries")
        return names
