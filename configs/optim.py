"""Settings of the optimizer, `optim`: algorithm, learning rates and schedule."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from sdxl_trainer.configs.paths import IS_PATH
from sdxl_trainer.configs.section import KNOWN_NAME, NAME_OR_CODE, OwnCodeName, Section

NUM_BLOCKS = 23
ScheduleName = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "wsd"]
# Setting → the one schedule that uses it.
SCHEDULE_SETTINGS = {"num_cycles": "cosine_with_restarts", "power": "polynomial", "decay_steps": "wsd"}


class GroupConfig(Section):
    """Parameters selected by name, with their own learning rate or weight decay."""

    match: str
    """Regular expression, searched anywhere in names such as `unet.down_blocks.1.attentions.0.proj_in.weight`."""
    lr: float | None = Field(None, ge=0)
    """Peak learning rate; 0 freezes these parameters."""
    weight_decay: float | None = Field(None, ge=0)
    """Decoupled weight decay, also applied to biases and norm weights."""

    @field_validator("match")
    @classmethod
    def _require_pattern(cls, match: str) -> str:
        try:
            re.compile(match)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return match


class OptimConfig(Section):
    """The optimizer, its learning rates and its schedule. A learning rate of 0 freezes parameters; frozen parameters
    take no memory for gradients and optimizer state."""

    name: Annotated[str, IS_PATH] = "adamw"
    """Optimizer: `adamw`, `adamw8bit` (bitsandbytes), `adafactor`, `lion`, `prodigy`, `muon`, `adamw_schedule_free`,
    `prodigy_plus_schedule_free`, `stable_adamw`, `adopt`, `ademamix`, `came`, `soap`, `lamb`, or any class as
    `module.Class` or `path/to/file.py:Class` (docs/OWN_CODE.md). docs/OPTIMIZERS.md lists the requirements of each."""
    kwargs: dict[str, Any] = {}
    """Further keyword arguments for the optimizer's class."""
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate of the U-Net. 1e-5 suits full fine-tuning with `adamw`, 1e-4 adapters (`lora.rank`). Use 1
    with `prodigy`, which finds its own rate."""
    betas: tuple[float, float] | None = None
    """Decay rates of the two moments, for optimizers that have them. The default is the optimizer's own."""
    eps: float | None = Field(None, gt=0)
    """Term added to the denominator for numerical stability. The default is the optimizer's own."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay, not applied to biases and norm weights."""
    text_encoder_lr: float = Field(0.0, ge=0)
    """Peak learning rate of text encoder 1; 0 leaves it frozen."""
    text_encoder_2_lr: float = Field(0.0, ge=0)
    """Peak learning rate of text encoder 2; 0 leaves it frozen."""
    block_lrs: list[Annotated[float, Field(ge=0)]] | None = None
    """Peak learning rates of the U-Net's 23 blocks, counted as in kohya's scripts: time and size embeddings, 9 input
    blocks, 3 middle blocks, 9 output blocks, output layer. Replaces `optim.lr` for the U-Net."""
    groups: list[GroupConfig] = []
    """Groups of parameters with their own learning rate or weight decay: `[{match: regex, lr: ..., weight_decay:
    ...}]`. A parameter belongs to the first group that matches its name; groups override `block_lrs`."""
    schedule: Annotated[Annotated[ScheduleName, KNOWN_NAME] | OwnCodeName, NAME_OR_CODE, IS_PATH] = "constant"
    """Course of the learning rate from the end of the warm-up to the last step of the run: constant, a linear fall,
    half a cosine, several half cosines, a power, or constant with a linear fall over the last `decay_steps` (`wsd`:
    warm-up, stable, decay). `wsd` and `constant` suit runs that you may want to extend. Or your own function, as
    `path/to/file.py:name` or `module:name` (docs/OWN_CODE.md)."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the learning rate rises from 0 to its peak."""
    num_cycles: int = Field(1, ge=1)
    """Number of half cosines of `cosine_with_restarts`."""
    power: float = Field(1.0, gt=0)
    """Exponent of `polynomial`."""
    decay_steps: int = Field(0, ge=0)
    """Optimizer steps over which `wsd` lowers the learning rate at the end."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end of the schedule, as a share of the peak. `constant` does not use it."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Maximum norm of the gradients, which are scaled down to it; 0 turns clipping off."""
    clipping: Literal["global", "parameter"] = "global"
    """Whose norm `optim.max_grad_norm` limits: `global` is that of all gradients together, `parameter` that of each
    weight tensor on its own. `parameter` needs `engine.gradient_release`."""

    @field_validator("block_lrs")
    @classmethod
    def _require_all_blocks(cls, block_lrs: list[float] | None) -> list[float] | None:
        if block_lrs is not None and len(block_lrs) != NUM_BLOCKS:
            raise ValueError(f"needs {NUM_BLOCKS} learning rates, one per block, but has {len(block_lrs)}")
        return block_lrs

    @field_validator("min_lr_ratio")
    @classmethod
    def _require_falling_schedule(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("schedule") == "constant":
            raise ValueError("has no effect: optim.schedule is constant; choose another, or leave this out")
        return value

    @field_validator(*SCHEDULE_SETTINGS)
    @classmethod
    def _require_matching_schedule(cls, value: float, info: ValidationInfo) -> float:
        assert info.field_name is not None
        schedule, needed = info.data.get("schedule"), SCHEDULE_SETTINGS[info.field_name]
        if value != cls.model_fields[info.field_name].default and schedule != needed:
            raise ValueError(f"has no effect: optim.schedule is {schedule}; set that to {needed}, or leave this out")
        if info.field_name == "decay_steps" and schedule == "wsd" and not value:
            raise ValueError("must be above 0 with optim.schedule: wsd")
        return value
