"""Settings of low-rank adapters, `lora`."""

from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from sdxl_trainer.configs.section import Section


class LoraConfig(Section):
    """Low-rank adapters (LoRA, by peft) instead of the weights themselves: the network stays frozen, and a small file
    with kohya's names is written in place of the model. Text encoders with a learning rate get adapters too."""

    rank: int = Field(0, ge=0)
    """Rank of the adapters; 0 trains the weights themselves."""
    alpha: float | None = Field(None, gt=0)
    """Adapters are scaled by alpha/rank; without it alpha is the rank."""
    targets: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"], min_length=1
    )
    """Layers of the U-Net that get adapters, by the end of their names; by default those of kohya's scripts, all linear
    layers of the attention blocks."""
    text_targets: list[str] = Field(["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], min_length=1)
    """Layers of the text encoders that get adapters."""

    @field_validator("alpha", "targets", "text_targets")
    @classmethod
    def _there_are_adapters(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("rank") == 0 and value != cls.model_fields[info.field_name or ""].default:
            raise ValueError("has no effect: lora.rank is 0; set that, or leave this out")
        return value
