"""DeepSpeed's settings, built from the `engine` section: the default ZeRO stage, buckets, and the JSON."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from sdxl_trainer.configs.engine import PURE_BF16, WEIGHT_TYPES, EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import Config, TrainConfig
from sdxl_trainer.train.optim.optimizers import explain_whole_tensors, find_optimizer_entry

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    **dict.fromkeys(PURE_BF16, torch.bfloat16),
}


BF16_CAPABILITY = (8, 0)  # of NVIDIA's GPUs; older ones emulate bf16, which is very slow
# Whether autograd can add gradients up in another type than the weights', as ZeRO 0 needs: from torch 2.10 on.
CAN_SUM_IN_FP32 = hasattr(torch.Tensor, "grad_dtype")
# Ranks up to which each part of a bucket is reduced to the rank that needs it. That sends half of what an all-reduce of
# the bucket does. More ranks make the parts so small that latency outweighs the saving (estimated, not measured).
MOST_REDUCING_RANKS = 64


class BatchSizes(NamedTuple):
    """Sizes of the global batch and the micro batch."""

    global_batch_size: int  # samples of one optimizer step, over all ranks
    micro_batch_size: int  # samples of one forward pass on one rank
    accumulation_steps: int  # forward passes of each rank in one optimizer step

    @property
    def world_size(self) -> int:
        """Number of ranks that share the global batch."""
        return self.global_batch_size // (self.micro_batch_size * self.accumulation_steps)


def compute_batch_sizes(train: TrainConfig, world_size: int) -> BatchSizes:
    """Return the batch sizes of the settings for a number of ranks."""
    accumulation_steps = train.global_batch_size // (train.micro_batch_size * world_size)
    return BatchSizes(train.global_batch_size, train.micro_batch_size, accumulation_steps)


class GradientTypes(NamedTuple):
    """Data types of gradients: fp32, bf16 or fp16."""

    accumulation: str  # of the sum over micro steps and ranks
    communication: str  # of what ranks send each other


class StageChoice(NamedTuple):
    """A ZeRO stage and the reason for it, a clause after "because"."""

    stage: int
    reason: str


def check_engine(engine: EngineConfig, optim: OptimConfig) -> Iterator[Problem]:
    """Yield a problem for each setting that the installed packages or the optimizer do not support."""
    if engine.attention == "xformers" and not torch.cuda.is_available():
        cure = "set it to sdpa, which works on every machine"
        yield Problem("engine.attention", "xformers", "needs a GPU, and PyTorch finds none", cure)
    elif engine.attention == "xformers" and importlib.util.find_spec("xformers") is None:
        yield Problem("engine.attention", "xformers", "is not installed", "set it to sdpa, or pip install xformers")
    yield from check_precision(engine)
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
        yield from check_triton(engine, optim)
    if engine.compile != "none" and find_c_compiler() is None:
        rule = "needs a C compiler, with which PyTorch builds what it compiles"
        cure = "install one (apt-get install g++), name yours in the environment variable CXX, or set it to none"
        yield Problem("engine.compile", engine.compile, rule, cure)
    if engine.accumulation_dtype != "fp32" or WEIGHT_TYPES[engine.precision] == "fp32":
        return
    if optim.name == "muon":
        rule = f"is impossible with muon, which adds gradients in the type of the weights ({engine.precision})"
        yield Problem("engine.accumulation_dtype", "fp32", rule, "set it to auto, or set engine.precision: fp32")
    elif engine.zero_stage == 0 and not CAN_SUM_IN_FP32:
        rule = f"is impossible in {engine.precision} under ZeRO 0 with PyTorch {torch.__version__}"
        yield Problem("engine.accumulation_dtype", "fp32", rule, "install torch 2.10 or later, or set it to auto")


def check_triton(engine: EngineConfig, optim: OptimConfig) -> Iterator[Problem]:
    """Yield a problem for each setting whose kernels Triton starts, if there is no C compiler, which it needs for that.

    Without it, the first update would fail. optimi's optimizers use Triton on GPUs, unless arguments choose otherwise.
    """
    is_stochastic = engine.precision == "bf16_stochastic"
    of_optimi = find_optimizer_entry(optim.name, engine).path.startswith("optimi")
    triton, foreach = (optim.kwargs.get(name) for name in ("triton", "foreach"))
    chooses_triton = triton or (triton is None and foreach is None)
    if (is_stochastic or (of_optimi and chooses_triton) or optim.name == "muon") and find_c_compiler() is None:
        key, value = ("engine.precision", engine.precision) if is_stochastic else ("optim.name", optim.name)
        rule = "needs a C compiler on a GPU, with which Triton builds what starts its kernels"
        cure = "install one (apt-get install g++ python3-dev), or name yours in the environment variable CC"
        yield Problem(key, value, rule, cure)


def find_c_compiler() -> str | None:
    """Return the path of a C compiler that `torch.compile` finds, or None."""
    names = [os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang++", "clang"]
    return next((path for name in names if name and (path := shutil.which(name.split()[0]))), None)


def check_precision(engine: EngineConfig) -> Iterator[Problem]:
    """Yield a problem if this machine cannot compute in the precision of the weights."""
    kind, has_gpu = WEIGHT_TYPES[engine.precision], torch.cuda.is_available()
    if kind == "bf16" and has_gpu and torch.version.hip is None:
        capability, name = min(
            (torch.cuda.get_device_capability(at), torch.cuda.get_device_name(at))
            for at in range(torch.cuda.device_count())
        )
        if fault := find_bf16_fault(capability, name):
            yield Problem("engine.precision", engine.precision, fault, "set it to fp16, or to fp32")
    if kind == "fp16" and not has_gpu and not can_compute_fp16():
        rule = "is not available on this machine's CPU, and there is no GPU"
        yield Problem("engine.precision", engine.precision, rule, "set it to bf16, or to fp32")


def find_bf16_fault(capability: tuple[int, int], name: str) -> str:
    """Return why a GPU cannot train in bf16, by its compute capability, or an empty string."""
    if capability >= BF16_CAPABILITY:
        return ""
    major, minor = capability
    return f"needs compute capability 8.0 (NVIDIA Ampere or newer), and {name} has {major}.{minor}"


def can_compute_fp16() -> bool:
    """Return whether DeepSpeed computes in fp16 on this machine."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return accelerator is not None and bool(accelerator.is_fp16_supported())


def resolve_zero_stage(config: Config, world_size: int) -> tuple[Config, str]:
    """Return the settings with a ZeRO stage, and a line that explains the choice; "" if the user has set the stage."""
    if config.engine.zero_stage is not None:
        return config, ""
    steps = compute_batch_sizes(config.train, world_size).accumulation_steps
    types = resolve_gradient_types(config.engine, world_size, steps, config.optim.name == "muon")
    choice = choose_default_stage(config.engine, config.optim, world_size, types)
    engine = config.engine.model_copy(update={"zero_stage": choice.stage})
    return config.model_copy(update={"engine": engine}), f"{choice.stage}, chosen because {choice.reason}"


def choose_default_stage(
    engine: EngineConfig, optim: OptimConfig, world_size: int, types: GradientTypes
) -> StageChoice:
    """Choose the lowest ZeRO stage that suits the settings, because each higher stage adds work for each weight.

    ZeRO 2 adds gradients up in this rank's part of an fp32 buffer. ZeRO 1 keeps fp32 gradients of all weights besides.
    """
    if engine.gradient_release:
        return StageChoice(0, "engine.gradient_release shards nothing")
    if engine.offload_param:
        return StageChoice(3, "engine.offload_param needs it")
    if engine.offload_optimizer:
        return StageChoice(2, "engine.offload_optimizer needs it")
    needs_zero = engine.precision in ("fp16", *PURE_BF16)
    if explain_whole_tensors(optim, engine) and not needs_zero:
        return StageChoice(0, f"{optim.name} must see whole weights")
    if world_size > 1:
        return StageChoice(2, f"{world_size} ranks share gradients, masters and optimizer state")
    if engine.precision == "fp32":
        return StageChoice(0, "a single rank in fp32 has nothing to share")
    if types.accumulation == "fp32":
        return StageChoice(2, f"ZeRO 2 accumulates {engine.precision} gradients in fp32 with the least memory")
    return StageChoice(1, f"engine.precision {engine.precision} needs a ZeRO stage, and one rank has nothing to share")


def resolve_gradient_types(
    engine: EngineConfig, world_size: int, accumulation_steps: int, is_muon: bool = False
) -> GradientTypes:
    """Resolve `engine.accumulation_dtype` and `engine.communication_dtype`, of which `auto` depends on the batch.

    Args:
        accumulation_steps: micro steps of each rank in one optimizer step.
        is_muon: the optimizer is DeepSpeed's Muon, which keeps gradients in the type of the weights.
    """
    own = WEIGHT_TYPES[engine.precision]
    accumulation, communication = engine.accumulation_dtype, engine.communication_dtype
    if accumulation == "auto":
        is_possible = not is_muon and (engine.zero_stage != 0 or CAN_SUM_IN_FP32)
        # ZeRO 0 copies gradients to fp32 for the update anyway, so it takes the least memory to have them in fp32.
        is_useful = engine.zero_stage == 0 or world_size > 1 or accumulation_steps > 1
        accumulation = "fp32" if is_possible and is_useful else own
    if world_size == 1:
        # Nothing is sent, but DeepSpeed still casts: from buckets in the type of the weights (ZeRO 2 and 3) or from the
        # sums (ZeRO 1).
        communication = accumulation if engine.zero_stage == 1 else own
    elif communication == "auto":
        communication = "fp32"
    return GradientTypes(accumulation, communication)


def uses_muon(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer is DeepSpeed's Muon."""
    return any("use_muon" in group for group in optimizer.param_groups)


def build_communication_settings(engine: EngineConfig, world_size: int) -> dict[str, object]:
    """Build the `zero_optimization` settings that decide on the memory and the overlap of communication.

    DeepSpeed's default buckets of 5e8 values are buffers of 1 GB each in 16 bit, a fifth of SDXL's weights.
    """
    # A single rank sends nothing, but DeepSpeed still fills a bucket.
    if world_size == 1:
        alone: dict[str, object] = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
        # Without contiguous gradients, DeepSpeed makes no copy of each gradient.
        return alone if engine.zero_stage not in (1, 2) else {**alone, "contiguous_gradients": False}
    settings: dict[str, object] = {"reduce_bucket_size": 200_000_000, "allgather_bucket_size": 200_000_000}
    if world_size <= MOST_REDUCING_RANKS:
        settings["use_multi_rank_bucket_allreduce"] = False
    if torch.cuda.is_available() and engine.zero_stage:
        settings["overlap_comm"] = True
    return settings


def build_deepspeed_config(
    config: EngineConfig, batch: BatchSizes, max_grad_norm: float, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Build DeepSpeed's JSON from the settings, with `engine.deepspeed` merged over it."""
    pure_bf16 = config.precision in PURE_BF16
    is_muon = uses_muon(optimizer)
    types = resolve_gradient_types(config, batch.world_size, batch.accumulation_steps, is_muon)
    zero: dict[str, Any] = {"stage": config.zero_stage, **build_communication_settings(config, batch.world_size)}
    if is_muon:
        # Muon needs whole gradients on every rank.
        zero["reduce_scatter"] = False
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_param:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "bf16": {
            "enabled": DTYPES[config.precision] == torch.bfloat16,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": pure_bf16,
            "bf16_optimizer_states": pure_bf16,
        },
        # Under ZeRO 0 DeepSpeed refuses other types than the weights'; `add_up_at_zero_0` takes its place.
        "data_types": {"grad_accum_dtype": types.accumulation if config.zero_stage else WEIGHT_TYPES[config.precision]},
        "communication_data_type": types.communication,
        "fp16": {"enabled": config.precision == "fp16", "initial_scale_power": config.initial_loss_scale_power},
        # check_optimizer refuses what is unsound on a shard; DeepSpeed's own lists of optimizers are shorter.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        # It would make the host wait for the device before and after every micro step.
        "timers": {"throughput": {"enabled": False}},
    }
    return _merge(settings, config.deepspeed)


def describe_deepspeed_config(settings: dict[str, Any]) -> str:
    """Return the settings that decide on speed and memory as one line."""
    zero = settings["zero_optimization"]
    parts = [f"ZeRO-{zero['stage']}"]
    parts += [f"{name} {zero[name]:.0e}" for name in ("reduce_bucket_size", "allgather_bucket_size") if zero["stage"]]
    parts += ["gradients are sent during the backward pass"] if zero.get("overlap_comm") else []
    parts += [f"{name[8:]} in host memory" for name in ("offload_optimizer", "offload_param") if name in zero]
    return ", ".join(parts)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = _merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged
