"""Settings of the engine, `engine`: how state is sharded, in what precision training runs, and how fast."""

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from sdxl_trainer.configs.section import Section

PURE_BF16 = ("bf16_kahan", "bf16_stochastic")  # precisions without fp32 masters
# DeepSpeed's settings that are made from ours, and what sets them. Others would contradict the rest of the program.
OWN_SETTINGS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "zero_optimization.stage": "engine.zero_stage",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
}


class EngineConfig(Section):
    """DeepSpeed: how state is sharded and in what precision training runs."""

    zero_stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage: 0 shards nothing, 1 optimizer state, 2 gradients too, 3 parameters too. If it is not set: 0 for
    optimizers that need whole weights; 3 with `engine.offload_param`; 2 on several ranks or with
    `engine.offload_optimizer`; on a single rank, where nothing can be sharded, 0 in fp32 and else 1, which keeps the
    fp32 masters. What was taken is told at the start."""
    precision: Literal["fp32", "bf16", "fp16", "bf16_kahan", "bf16_stochastic"] = "bf16"
    """`bf16` and `fp16` keep fp32 master weights in the (sharded) optimizer; `fp16` scales the loss, and leaves out the
    steps that overflow. `bf16_kahan` and `bf16_stochastic` have weights and moments in bf16 alone, for `adamw` and
    `lion`: the one carries what an update loses to rounding on to the next (Kahan summation), the other rounds up or
    down by chance, right on average. They take 10 and 8 bytes a weight instead of 14, besides gradients. All but `fp32`
    and `bf16` are for ZeRO 1 to 3."""
    offload_optimizer: bool = False
    """Keep masters and the optimizer's state in host memory and update there; ZeRO 1 to 3, with fp32 masters."""
    offload_param: bool = False
    """Keep the weights in host memory too, and bring each to the device when it is used; ZeRO 3, with
    `engine.offload_optimizer`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """What computes attention: PyTorch's own, or xformers."""
    compile: bool = False
    """Compile the U-Net with `torch.compile`; each bucket's shape is compiled once. Not for ZeRO 3."""
    channels_last: bool = False
    """Lay images out with channels last, which suits convolutions on tensor cores."""
    initial_loss_scale_power: int = Field(16, ge=0, le=32)
    """`fp16` begins with a loss scale of 2 to this power."""
    timeout_minutes: float = Field(60.0, gt=0)
    """How long a rank waits in a collective for one that hangs. Then each of the others saves its part of the state,
    and the job ends with status 1. What a rank does alone, such as its share of the samples or verifying a checkpoint
    at the start, must not take longer; the checks of settings and data, and the index, may."""
    deepspeed: dict[str, Any] = {}
    """Further DeepSpeed settings, merged over the ones this program makes. Batch sizes, optimizer, schedule, precision
    and ZeRO stage are set by settings of their own."""

    @field_validator("precision", "offload_optimizer")
    @classmethod
    def _state_is_sharded(cls, value: Any, info: ValidationInfo) -> Any:
        if value in ("fp16", *PURE_BF16, True) and info.data.get("zero_stage") == 0:
            raise ValueError("needs engine.zero_stage 1, 2 or 3")
        return value

    @field_validator("offload_optimizer")
    @classmethod
    def _masters_are_offloaded(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("precision") in PURE_BF16:
            raise ValueError(f"needs fp32 masters, which {info.data['precision']} has not; set engine.precision: bf16")
        return value

    @field_validator("offload_param")
    @classmethod
    def _parameters_are_sharded(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("zero_stage") not in (3, None):
            raise ValueError("needs engine.zero_stage 3")
        if value and not info.data.get("offload_optimizer", True):
            raise ValueError("leaves the larger optimizer state on the device; set engine.offload_optimizer: true")
        return value

    @field_validator("initial_loss_scale_power")
    @classmethod
    def _loss_is_scaled(cls, value: int, info: ValidationInfo) -> int:
        if value != cls.model_fields["initial_loss_scale_power"].default and info.data.get("precision") != "fp16":
            raise ValueError("has no effect: engine.precision is not fp16; leave this out")
        return value

    @field_validator("deepspeed")
    @classmethod
    def _nothing_is_set_twice(cls, deepspeed: dict[str, Any]) -> dict[str, Any]:
        for path, ours in OWN_SETTINGS.items():
            section, _, key = path.rpartition(".")
            place = deepspeed.get(section, {}) if section else deepspeed
            if not isinstance(place, dict):
                raise ValueError(f"must hold a mapping as {section}")
            if key in place:
                raise ValueError(f"must not hold {path}, which {ours} sets")
        return deepspeed

    @field_validator("compile")
    @classmethod
    def _whole_weights_are_compiled(cls, value: bool, info: ValidationInfo) -> bool:
        if value and (info.data.get("zero_stage") == 3 or info.data.get("offload_param")):
            raise ValueError("needs engine.zero_stage 0, 1 or 2, and so no engine.offload_param")
        return value
