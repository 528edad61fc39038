"""Settings of the optimizer, `optim`: what updates the weights, how fast, and which of them."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from sdxl_trainer.configs.section import Section

NUM_BLOCKS = 23
# Settings that mean something with one schedule only.
SCHEDULE_SETTINGS = {"num_cycles": "cosine_with_restarts", "power": "polynomial", "decay_steps": "wsd"}


class GroupConfig(Section):
    """Parameters whose name a regular expression finds, and what is different for them."""

    match: str
    """Regular expression, looked for anywhere in names such as `unet.down_blocks.1.attentions.0.proj_in.weight`."""
    lr: float | None = Field(None, ge=0)
    """Peak learning rate; 0 freezes them."""
    weight_decay: float | None = Field(None, ge=0)
    """Decoupled weight decay, of biases and norm weights too."""

    @field_validator("match")
    @classmethod
    def _is_a_pattern(cls, match: str) -> str:
        try:
            re.compile(match)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return match


class OptimConfig(Section):
    """What updates the weights, how fast, and which of them. A learning rate of 0 freezes: what is frozen has neither
    gradient nor optimizer state."""

    name: str = "adamw"
    """`adamw`, `adamw8bit` (bitsandbytes), `adafactor`, `lion`, `prodigy`, `muon`, or any class as `module.Class`.
    docs/TRAINING.md says what each needs."""
    kwargs: dict[str, Any] = {}
    """Further arguments of the optimizer's class."""
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate. Prodigy finds its own: leave 1 there."""
    betas: tuple[float, float] | None = None
    """Decay rates of the moments, for optimizers that take two; without it the optimizer's own."""
    eps: float | None = Field(None, gt=0)
    """Epsilon; without it the optimizer's own."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay; biases and norm weights get none."""
    text_encoder_lr: float = Field(0.0, ge=0)
    """Peak learning rate of text encoder 1; 0 leaves it frozen."""
    text_encoder_2_lr: float = Field(0.0, ge=0)
    """Peak learning rate of text encoder 2; 0 leaves it frozen."""
    block_lrs: list[Annotated[float, Field(ge=0)]] | None = None
    """Peak learning rates of the U-Net's 23 blocks as kohya's scripts count them: time and size embeddings, 9 input
    blocks, 3 middle blocks, 9 output blocks, output."""
    groups: list[GroupConfig] = []
    """Parameters with a learning rate or decay of their own, `[{match: regex, lr: ..., weight_decay: ...}]`: the first
    that matches a name counts, before `block_lrs`."""
    schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "wsd"] = "constant"
    """Learning rate after the warm-up, up to `train.max_steps`: held, lowered along a line, half a cosine, several of
    them or a power, or held and then lowered along a line over the last `decay_steps` (warm-up, stable, decay)."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    num_cycles: int = Field(1, ge=1)
    """Half cosines of `cosine_with_restarts`."""
    power: float = Field(1.0, gt=0)
    """Exponent of `polynomial`."""
    decay_steps: int = Field(0, ge=0)
    """Steps over which `wsd` lowers the learning rate at the end."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """What a schedule ends at, as a share of the peak; `constant` ends where it began."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this global norm; 0 leaves them."""

    @field_validator("block_lrs")
    @classmethod
    def _blocks_are_all_there(cls, block_lrs: list[float] | None) -> list[float] | None:
        if block_lrs is not None and len(block_lrs) != NUM_BLOCKS:
            raise ValueError(f"must hold {NUM_BLOCKS} learning rates, one for each block; it holds {len(block_lrs)}")
        return block_lrs

    @field_validator("min_lr_ratio")
    @classmethod
    def _rate_falls(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("schedule") == "constant":
            raise ValueError("has no effect: optim.schedule is constant; choose another, or leave this out")
        return value

    @field_validator(*SCHEDULE_SETTINGS)
    @classmethod
    def _schedule_uses_it(cls, value: float, info: ValidationInfo) -> float:
        assert info.field_name is not None
        schedule, needed = info.data.get("schedule"), SCHEDULE_SETTINGS[info.field_name]
        if value != cls.model_fields[info.field_name].default and schedule != needed:
            raise ValueError(f"has no effect: optim.schedule is {schedule}; set that to {needed}, or leave this out")
        if info.field_name == "decay_steps" and schedule == "wsd" and not value:
            raise ValueError("must be above 0 for the schedule wsd")
        return value
