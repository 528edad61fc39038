"""The settings of the engine in DeepSpeed's own words."""

from typing import Any

import torch

from sdxl_trainer.configs.engine import PURE_BF16, EngineConfig
from sdxl_trainer.train.engine.defaults import choose_communication

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    **dict.fromkeys(PURE_BF16, torch.bfloat16),
}


def build_deepspeed_config(
    config: EngineConfig, batch: tuple[int, int, int], max_grad_norm: float, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """DeepSpeed's JSON for our settings, with the user's own merged over it."""
    global_batch_size, micro_batch_size, accumulation_steps = batch
    pure_bf16 = config.precision in PURE_BF16
    world_size = global_batch_size // (micro_batch_size * accumulation_steps)
    zero: dict[str, Any] = {"stage": config.zero_stage, **choose_communication(config, world_size)}
    if any("use_muon" in group for group in optimizer.param_groups):
        zero["reduce_scatter"] = False  # it wants whole gradients on every rank
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_param:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "bf16": {
            "enabled": DTYPES[config.precision] == torch.bfloat16,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": pure_bf16,
            "bf16_optimizer_states": pure_bf16,
        },
        "fp16": {"enabled": config.precision == "fp16", "initial_scale_power": config.initial_loss_scale_power},
        # What is unsound on a shard is refused by check_optimizer; the lists of what DeepSpeed allows are shorter.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    return _merge(settings, config.deepspeed)


def spare_work(engine: Any, optimizer: Any, config: EngineConfig) -> None:
    """Keep DeepSpeed from doing at every step what has no use here.

    Args:
        engine, optimizer: what `deepspeed.initialize` returned.
    """
    if config.zero_stage == 0 and engine.world_size == 1:
        engine.enable_backward_allreduce = False  # each gradient would be copied there and back
        weights = list(engine.module.parameters())

        def drop_gradients() -> None:  # DeepSpeed's walks through all modules for it
            for weight in weights:
                weight.grad = None

        engine.zero_grad = drop_gradients
    if config.zero_stage in (1, 2) and not config.offload_optimizer and optimizer.compute_grad_norm:
        # It looks into each gradient for what is not finite. The norm of them all, which every rank has, shows it too.
        optimizer.check_overflow = lambda **_: None


def describe_deepspeed(settings: dict[str, Any]) -> str:
    """The settings that decide on speed and memory, in a line."""
    zero = settings["zero_optimization"]
    parts = [f"ZeRO-{zero['stage']}"]
    parts += [f"{name} {zero[name]:.0e}" for name in ("reduce_bucket_size", "allgather_bucket_size") if zero["stage"]]
    parts += ["gradients are sent beside the backward pass"] if zero.get("overlap_comm") else []
    parts += [f"{name[8:]} in host memory" for name in ("offload_optimizer", "offload_param") if name in zero]
    return ", ".join(parts)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = _merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged
