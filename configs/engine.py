"""Settings of the engine, `engine`: sharding, precision, offload and speed."""

from typing import Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator

from sdxl_trainer.configs.paths import expand_path
from sdxl_trainer.configs.section import Section

PATH_ENDINGS = ("_path", "_file", "_dir")  # of the names of DeepSpeed's settings that are paths
# Precisions without fp32 master weights.
PURE_BF16 = ("bf16_kahan", "bf16_stochastic")
# Precision → data type of the weights in forward and backward passes, and so of the gradients that these compute.
WEIGHT_TYPES = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16", **dict.fromkeys(PURE_BF16, "bf16")}
Checkpointing = Literal["off", "selective", "full"]
CHECKPOINTING: tuple[Checkpointing, ...] = get_args(Checkpointing)  # the fastest first, which takes the most memory
Compile = Literal["none", "regional", "full"]
# DeepSpeed's setting → the setting here that determines it.
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
    "data_types.grad_accum_dtype": "engine.accumulation_dtype",
    "communication_data_type": "engine.communication_dtype",
}


class EngineConfig(Section):
    """Sharding, precision and offload through DeepSpeed, and speed."""

    zero_stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage: 0 shards nothing, 1 the optimizer state, 2 also the gradients, 3 also the parameters. Without it, a
    stage is chosen and logged at the start: 0 for optimizers that need whole weights; 3 with `engine.offload_param`; 2
    on several ranks, with `engine.offload_optimizer`, or if one rank accumulates gradients in 16 bit (ZeRO 2 adds them
    in fp32 in the least memory); otherwise 0 in fp32 and 1 (which keeps fp32 master weights) in 16 bit. Set 3 if the
    weights do not fit on one GPU."""
    gradient_release: bool = False
    """Update each weight as soon as its gradient is computed, and free the gradient, so that no gradients of all
    weights exist at the same time. With `precision: bf16_stochastic` all of SDXL can be trained on one card. Needs
    `bf16_stochastic`, `bf16_kahan` or `fp32`, one micro step a step, and no clipping by the global norm (see
    `optim.clipping`); not with ZeRO, offload, or optimizers that need all gradients. An error in a backward pass leaves
    nothing that could be saved: the next start resumes from the newest checkpoint."""
    precision: Literal["fp32", "bf16", "fp16", "bf16_kahan", "bf16_stochastic"] = "bf16"
    """Precision of the weights in training. `bf16` and `fp16` keep fp32 master weights in the (sharded) optimizer;
    `fp16` scales the loss and skips steps that overflow. `bf16_kahan` and `bf16_stochastic` save memory by keeping
    weights and moments in bf16 only, for `adamw` and `lion`: `bf16_kahan` adds the rounding error of each update to the
    next (Kahan summation), `bf16_stochastic` rounds up or down at random, correct on average. They take 10 and 8 bytes
    per weight instead of 14, plus gradients. All but `fp32` and `bf16` need ZeRO 1 to 3, or
    `engine.gradient_release`, with which they work for every optimizer that it allows."""
    tf32: bool = False
    """Let convolutions and matrix products in fp32 round their inputs to TF32 (10 bits) on NVIDIA GPUs. It makes
    `precision: fp32` faster and less accurate. The cache job's VAE has `cache.vae_precision` for this."""
    accumulation_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type in which the gradients of micro steps and ranks are added up. `auto` is `fp32` if there is anything to
    add, that is with several micro steps in a global batch or several ranks, and otherwise the type of the weights,
    which takes no further memory. A sum of 4 micro steps in bf16 is off by 0.3 %, of 64 by 1 %. fp32 takes 4 bytes
    per weight instead of 2 (divided by the ranks under ZeRO 2 and 3), on the GPU under ZeRO 2 even with
    `engine.offload_optimizer`. Muon adds in the type of the weights."""
    communication_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type in which ranks send each other gradients to add up. `auto` is `fp32`. On a slow network the type of
    the weights (`bf16` or `fp16`) halves what is sent; docs/SCALE.md has the bytes of each."""
    offload_optimizer: bool = False
    """Keep master weights and optimizer state in host memory and update them there. Saves GPU memory, and makes
    updates slower. An update runs on the rank's share of the CPU cores; `OMP_NUM_THREADS` above 1 sets another number
    of threads. Needs ZeRO 1 to 3 and fp32 master weights."""
    offload_param: bool = False
    """Also keep the weights in host memory, and copy each to the GPU when it is used. Saves the most GPU memory and is
    the slowest. Needs ZeRO 3 and `engine.offload_optimizer`."""
    gradient_checkpointing: Literal["auto", "off", "selective", "full"] = "auto"
    """Recompute activations in the backward pass instead of keeping them, which takes less memory and more time. `off`
    keeps all activations. `selective` recomputes the norms and activation functions before convolutions and matrix
    products, a third of the memory at little cost. `full` recomputes every block; it needs the least memory and repeats
    most of the forward pass. `auto` estimates the memory of the run before it starts and chooses the first of the three
    that fits on the smallest GPU of all ranks. The choice is logged and kept in checkpoints, so a resumed run makes it
    no second time; losses are the same with each. `true` means `full`, `false` means `off`, as does `none`."""
    attention: Literal["auto", "sdpa", "cudnn", "flash", "efficient", "xformers"] = "auto"
    """Implementation of attention on GPUs. `cudnn`, `flash` and `efficient` are PyTorch's back ends: the one you name
    is tried first, and the others serve calls that it does not support. `auto` tries cuDNN's first on Hopper and later,
    elsewhere flash attention. `sdpa` leaves the order to PyTorch, and `xformers` needs that package."""
    compile: Compile = "none"
    """Compile the U-Net with `torch.compile`. `regional` compiles one graph for each kind of block, which serves all
    buckets: 14 graphs for SDXL, compiled in the first step. `full` compiles the whole U-Net, which takes longer: for
    the first bucket, and twice more for all others. The log has the number of graphs and the time. Needs a C compiler.
    Not for ZeRO 3. `true` means `full`, `false` means `none`."""
    offload_blocks: int = Field(0, ge=0)
    """Number of the U-Net's residual and transformer blocks that wait in host memory. Each is copied to the GPU ahead
    of its forward and its backward pass, beside the computing, and freed afterwards. Saves GPU memory: 69 MB or more
    for each of the 63 largest of SDXL's 86 blocks in bf16, and what the optimizer keeps for it. Losses are the same to
    the bit. Needs `engine.gradient_release`, or adapters (`lora.rank`), whose frozen weights wait;
    `gradient_checkpointing` is `full` then. Not with ZeRO 3 or `engine.compile`."""
    channels_last: bool = False
    """Use the channels_last memory format, which can speed up convolutions on tensor cores."""
    fp8: Literal["none", "linear"] = "none"
    """`linear` lets the linear layers of the U-Net's transformer blocks multiply in fp8 (torchao, one scale a tensor).
    Weights and optimizer stay as they are. Experimental: no GPU has shown its gain or its losses yet. Needs Hopper or
    newer, torchao, weights in bf16, and ZeRO 0 to 2; not for adapters. Without `engine.compile` it is slower than bf16.
    Validation and images during training use it, the sampling program does not."""
    cudnn_benchmark: bool = False
    """Let cuDNN try its algorithms for each convolution when a bucket first comes, and keep the fastest. The choice may
    differ between runs, so losses agree to rounding only. Switched off, with a warning, if the training set has more
    than 20 buckets."""
    initial_loss_scale_power: int = Field(16, ge=0, le=32)
    """Exponent of the first loss scale of `fp16`, which is 2 to this power."""
    timeout_minutes: float = Field(60.0, gt=0)
    """Minutes that a rank may spend without progress, that is without a finished batch, image, file or step. Then all
    ranks save their parts of the state, and the job ends with status 1. Ranks wait longer for a rank that makes
    progress. Raise it if a single piece of work takes longer, such as compiling the first step or downloading a model.
    The first checks of settings and data, and building the index, are not limited."""
    deepspeed: dict[str, Any] = {}
    """Further DeepSpeed settings, merged into the configuration that is built from the other settings. Batch sizes,
    optimizer, schedule, gradient clipping, precision and ZeRO stage have their own settings and are rejected here."""

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _name_choice(cls, value: Any) -> Any:
        return name_checkpointing(value)

    @field_validator("compile", mode="before")
    @classmethod
    def _name_compilation(cls, value: Any) -> Any:
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value

    @field_validator("gradient_release")
    @classmethod
    def _require_no_sharding(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("zero_stage"):
            raise ValueError("does not work with ZeRO, which shards gradients; leave engine.zero_stage out")
        return value

    @field_validator("precision")
    @classmethod
    def _require_no_masters(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("gradient_release") and value not in ("fp32", *PURE_BF16):
            allowed = " or ".join((*PURE_BF16, "fp32"))
            raise ValueError(
                f"does not work with engine.gradient_release, which has no master weights; set it to {allowed}"
            )
        return value

    @field_validator("precision", "offload_optimizer")
    @classmethod
    def _require_sharding(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("gradient_release"):
            if value is True:
                raise ValueError("does not work with engine.gradient_release; leave one of them out")
            return value
        if value in ("fp16", *PURE_BF16, True) and info.data.get("zero_stage") == 0:
            raise ValueError("needs engine.zero_stage 1, 2 or 3")
        return value

    @field_validator("accumulation_dtype", "communication_dtype")
    @classmethod
    def _require_type_of_weights(cls, value: str, info: ValidationInfo) -> str:
        precision = info.data.get("precision", "fp32")
        allowed = ["fp32", WEIGHT_TYPES[precision]]
        if info.field_name == "communication_dtype" and precision == "fp32":
            allowed.append("bf16")
        if value not in ("auto", *allowed):
            allowed = list(dict.fromkeys(allowed))
            raise ValueError(f"does not suit engine.precision {precision}; set it to auto or {' or '.join(allowed)}")
        return value

    @field_validator("offload_optimizer")
    @classmethod
    def _require_masters(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("precision") in PURE_BF16:
            precision = info.data["precision"]
            raise ValueError(f"needs fp32 master weights, but engine.precision is {precision}; set that to bf16")
        return value

    @field_validator("offload_param")
    @classmethod
    def _require_offloaded_optimizer(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("zero_stage") not in (3, None):
            raise ValueError("needs engine.zero_stage 3")
        if value and not info.data.get("offload_optimizer", True):
            raise ValueError("leaves the larger optimizer state on the GPU; set engine.offload_optimizer: true")
        return value

    @field_validator("initial_loss_scale_power")
    @classmethod
    def _require_fp16(cls, value: int, info: ValidationInfo) -> int:
        if value != cls.model_fields["initial_loss_scale_power"].default and info.data.get("precision") != "fp16":
            raise ValueError("has no effect: engine.precision is not fp16; leave this out")
        return value

    @field_validator("deepspeed")
    @classmethod
    def _expand_paths(cls, deepspeed: dict[str, Any]) -> dict[str, Any]:
        return _expand_nested(deepspeed)

    @field_validator("deepspeed")
    @classmethod
    def _reject_own_settings(cls, deepspeed: dict[str, Any]) -> dict[str, Any]:
        for path, ours in OWN_SETTINGS.items():
            section, _, key = path.rpartition(".")
            settings = deepspeed.get(section, {}) if section else deepspeed
            if not isinstance(settings, dict):
                raise ValueError(f"must contain a mapping under {section}")
            if key in settings:
                raise ValueError(f"must not contain {path}; set {ours} instead")
        return deepspeed

    @field_validator("offload_blocks")
    @classmethod
    def _require_repeated_blocks(cls, value: int, info: ValidationInfo) -> int:
        if not value:
            return value
        if info.data.get("zero_stage") == 3 or info.data.get("offload_param"):
            raise ValueError("does not work with ZeRO 3, which moves weights itself; leave engine.offload_blocks out")
        if info.data.get("gradient_checkpointing", "auto") not in ("auto", "full"):
            raise ValueError("needs every block computed again; set engine.gradient_checkpointing: full")
        if info.data.get("compile", "none") != "none":
            raise ValueError("does not work with engine.compile; set that to none")
        return value

    @field_validator("fp8", mode="before")
    @classmethod
    def _name_layers(cls, value: Any) -> Any:
        return {True: "linear", False: "none"}[value] if isinstance(value, bool) else value

    @field_validator("fp8")
    @classmethod
    def _require_whole_matrices(cls, value: str, info: ValidationInfo) -> str:
        if value != "none" and (info.data.get("zero_stage") == 3 or info.data.get("offload_param")):
            raise ValueError("needs engine.zero_stage 0, 1 or 2, without engine.offload_param")
        return value

    @field_validator("compile")
    @classmethod
    def _require_whole_weights(cls, value: str, info: ValidationInfo) -> str:
        if value != "none" and (info.data.get("zero_stage") == 3 or info.data.get("offload_param")):
            raise ValueError("needs engine.zero_stage 0, 1 or 2, without engine.offload_param")
        if value == "full" and info.data.get("gradient_release"):
            raise ValueError(
                "computes all gradients in one graph, which engine.gradient_release frees one by one; "
                "set it to regional"
            )
        return value


def name_checkpointing(value: Any) -> Any:
    """Return the present name of a value of `engine.gradient_checkpointing`; others are returned as they are."""
    if isinstance(value, bool):
        return "full" if value else "off"
    return "off" if value == "none" else value


def _expand_nested(value: Any, is_path: bool = False) -> Any:
    """Return DeepSpeed's settings with the paths among them expanded, such as `nvme_path` and `output_file`."""
    if isinstance(value, dict):
        return {key: _expand_nested(item, str(key).endswith(PATH_ENDINGS)) for key, item in value.items()}
    return expand_path(value) if is_path and isinstance(value, str) and value else value
