"""Settings of low-rank adapters, `lora`."""

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from sdxl_trainer.configs.section import Section

QuantisedBase = Literal["none", "int8", "nf4"]


class LoraConfig(Section):
    """Low-rank adapters (LoRA, through peft). The networks stay frozen, and a small file with kohya's tensor names is
    exported instead of a model. Text encoders with a learning rate above 0 get adapters too."""

    rank: int = Field(0, ge=0)
    """Rank of the adapters; 0 trains the weights themselves. 16 to 64 is usual."""
    alpha: float | None = Field(None, gt=0)
    """Adapters are scaled by alpha/rank. Without it alpha equals the rank."""
    targets: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"], min_length=1
    )
    """U-Net layers that get adapters, by the ends of their names. The default is that of kohya's scripts: all linear
    layers of the attention blocks."""
    text_targets: list[str] = Field(["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], min_length=1)
    """Text encoder layers that get adapters, by the ends of their names."""

    quantised_base: QuantisedBase = "none"
    """Precision of the frozen linear layers in the U-Net's attention blocks, by bitsandbytes, to save GPU memory:
    `int8` takes 1.02 bytes a weight and `nf4` 0.52 instead of the 2 of bf16. Products are computed in the type of the
    other weights. Adapters are as exact as without, but they learn beside rounded weights. The exported file is for the
    whole model. Not with ZeRO 3, `engine.compile` or `engine.offload_blocks`."""

    @field_validator("alpha", "targets", "text_targets", "quantised_base")
    @classmethod
    def _require_rank(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("rank") == 0 and value != cls.model_fields[info.field_name or ""].default:
            raise ValueError("has no effect: lora.rank is 0; set that above 0, or leave this out")
        return value
