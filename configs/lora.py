"""Settings of low-rank adapters, `lora`."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from sdxl_trainer.configs.section import Section

AdapterKind = Literal["lora", "dora", "loha", "lokr"]
QuantisedBase = Literal["none", "int8", "nf4"]
# Setting → the kinds of adapters that have it.
KINDS_WITH: dict[str, tuple[AdapterKind, ...]] = {
    "factor": ("lokr",),
    "decompose_both": ("lokr",),
    "b_lr_ratio": ("lora", "dora"),
    "quantised_base": ("lora",),
}


class LoraConfig(Section):
    """Low-rank adapters (through peft). The networks stay frozen, and a small file with the tensor names of kohya's
    scripts and LyCORIS is exported instead of a model. Text encoders with a learning rate above 0 get adapters too."""

    rank: int = Field(0, ge=0)
    """Rank of the adapters; 0 trains the weights themselves. 16 to 64 is usual."""
    kind: AdapterKind = "lora"
    """What is added to a weight W: `lora` adds B·A; `dora` also trains the norm of each row of W + B·A; `loha` adds
    (A1·B1) ⊙ (A2·B2), whose rank is up to rank²; `lokr` adds the Kronecker product of a small matrix and a matrix of
    low rank, which takes the least space."""
    alpha: float | None = Field(None, gt=0)
    """Adapters are scaled by alpha/rank. Without it alpha equals the rank. With `kind: lokr`, a layer with two whole
    matrices is not scaled, as in LyCORIS."""
    targets: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"], min_length=1
    )
    """U-Net layers that get adapters, by the ends of their names: linear layers and convolutions. The default is that
    of kohya's scripts: all linear layers of the attention blocks."""
    text_targets: list[str] = Field(["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], min_length=1)
    """Text encoder layers that get adapters, by the ends of their names."""
    conv_rank: int = Field(0, ge=0)
    """Rank of the adapters of convolutions larger than 1×1. Above 0, all layers of the U-Net's residual blocks,
    downsamplers and upsamplers get adapters besides `lora.targets`, as with kohya's `conv_dim`; their linear layers and
    1×1 convolutions use `lora.rank`. At 0, convolutions that `lora.targets` names use `lora.rank`."""
    conv_alpha: float | None = Field(None, gt=0)
    """The alpha that belongs to `lora.conv_rank`. Without it, that alpha equals the rank."""
    rank_pattern: dict[str, Annotated[int, Field(ge=0)]] = {}
    """Ranks of single layers: `{regex: rank}`, matched as in peft, with the end of names such as
    `unet.down_blocks.1.attentions.0.proj_in`, from a dot on. The first match counts. Rank 0 leaves layers out."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Alphas of single layers, `{regex: alpha}`, matched like `lora.rank_pattern`."""
    factor: int | None = Field(None, ge=1)
    """Size of the small matrix of `kind: lokr`, where it divides the size of the layer. Without it, both matrices are
    about equally large."""
    decompose_both: bool = False
    """Gives the small matrix of `kind: lokr` the low rank too, where that makes it smaller."""
    b_lr_ratio: float = Field(1.0, gt=0)
    """Learning rate of B divided by that of A (LoRA+, arXiv 2402.12354; 16 there). Not for `loha` and `lokr`, which
    have no such pair."""

    quantised_base: QuantisedBase = "none"
    """Precision of the frozen linear layers in the U-Net's attention blocks, by bitsandbytes, to save GPU memory:
    `int8` takes 1.02 bytes a weight and `nf4` 0.52 instead of the 2 of bf16. Products are computed in the type of the
    other weights. Adapters are as exact as without, but they learn beside rounded weights. The exported file is for the
    whole model. Only with `kind: lora`, and not with ZeRO 3, `engine.compile` or `engine.offload_blocks`."""

    @field_validator("*")
    @classmethod
    def _require_rank(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        if value == cls.model_fields[name].default or name == "rank":
            return value
        if info.data.get("rank") == 0:
            raise ValueError("has no effect: lora.rank is 0; set that above 0, or leave this out")
        kinds = KINDS_WITH.get(name)
        if kinds and info.data.get("kind", kinds[0]) not in kinds:
            wanted = " or ".join(kinds)
            raise ValueError(f"does not work with lora.kind {info.data['kind']}; set that to {wanted}, or leave it out")
        return value

    @field_validator("conv_alpha")
    @classmethod
    def _require_conv_rank(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("conv_rank") == 0:
            raise ValueError("has no effect: lora.conv_rank is 0; set that above 0, or leave this out")
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _require_patterns(cls, patterns: dict[str, Any]) -> dict[str, Any]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns
