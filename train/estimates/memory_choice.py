"""Choose gradient checkpointing by the memory estimate, and name the settings that save memory."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from sdxl_trainer.configs.engine import CHECKPOINTING, PURE_BF16, name_checkpointing
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.engine.deepspeed_config import resolve_zero_stage
from sdxl_trainer.train.estimates.memory import estimate_memory
from sdxl_trainer.train.estimates.memory_table import HEADROOM, MemoryLimits, MemoryTable, format_gb
from sdxl_trainer.train.estimates.networks import NetworkSizes

SMALLEST_SAVING = 0.02  # share of the present peak; less is not worth naming
MOST_SAVINGS = 4


class Saving(NamedTuple):
    """A setting that saves memory of the device."""

    setting: str  # such as `ema.decays: []`
    saved_bytes: float  # of the peak


class MemoryPlan(NamedTuple):
    """Settings with gradient checkpointing chosen, the memory that they need, and the reason for the choice."""

    config: Config
    table: MemoryTable
    reason: str  # "" if the settings name the choice


def plan_memory(
    config: Config, sizes: NetworkSizes, world_size: int, limits: MemoryLimits, kept: str = ""
) -> MemoryPlan:
    """Resolve `engine.gradient_checkpointing: auto`, and estimate the memory of a rank.

    Args:
        config: with `engine.zero_stage` chosen.
        kept: the choice in the checkpoint that the run resumes from; "" if there is none.
    """
    asked = config.engine.gradient_checkpointing
    if asked != "auto":
        return MemoryPlan(config, estimate_memory(config, sizes, world_size, limits), "")
    if config.engine.offload_blocks:
        config = replace_settings(config, "engine", gradient_checkpointing="full")
        table = estimate_memory(config, sizes, world_size, limits)
        return MemoryPlan(config, table, "full, which engine.offload_blocks needs")
    plans: dict[str, MemoryPlan] = {}
    for policy in CHECKPOINTING:
        chosen = replace_settings(config, "engine", gradient_checkpointing=policy)
        plans[policy] = MemoryPlan(chosen, estimate_memory(chosen, sizes, world_size, limits), "")
    if kept:
        policy = name_checkpointing(kept)
        return plans[policy]._replace(reason=f"{policy}, as in the checkpoint")
    if limits.rank is None:
        return plans["off"]._replace(reason="off, because the memory of this machine is not known")
    policy = next((policy for policy, plan in plans.items() if plan.table.fits_device), "full")
    room = f"{format_gb(limits.rank * (1 - HEADROOM))} ({1 - HEADROOM:.0%} of {format_gb(limits.rank)})"
    off, selective, full = (format_gb(plan.table.device_peak) for plan in plans.values())
    needed = f"a rank needs {off} with off, {selective} with selective and {full} with full"
    return plans[policy]._replace(reason=f"{policy}, because {needed}, and has {room}")


def replace_settings(config: Config, section: str, **values: Any) -> Config:
    """Return the settings with values of one section replaced. The values are not validated."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def describe_lack(config: Config, sizes: NetworkSizes, world_size: int, limits: MemoryLimits) -> str:
    """Describe in one line what saves how much memory of the device, most first."""
    savings = list_savings(config, sizes, world_size, limits)
    shown = [f"{saving.setting} saves {format_gb(saving.saved_bytes)}" for saving in savings[:MOST_SAVINGS]]
    return "; ".join(shown) or "use more GPUs, or GPUs with more memory"


def list_savings(config: Config, sizes: NetworkSizes, world_size: int, limits: MemoryLimits) -> list[Saving]:
    """List the settings that lower the peak on the device, the largest saving first."""
    peak = estimate_memory(config, sizes, world_size, limits).device_peak
    savings = []
    for setting, changed in iterate_changes(config, world_size, len(sizes.blocks)):
        saved = peak - estimate_memory(changed, sizes, world_size, limits).device_peak
        if saved > SMALLEST_SAVING * peak:
            savings.append(Saving(setting, saved))
    return sorted(savings, key=lambda saving: -saving.saved_bytes)


def iterate_changes(config: Config, world_size: int, num_blocks: int) -> Iterator[tuple[str, Config]]:
    """Yield single settings that may save memory, each with the settings of the run after that change.

    Args:
        num_blocks: of the U-Net, that may wait on the host.
    """
    engine, micro_batch = config.engine, config.train.micro_batch_size
    if engine.gradient_checkpointing == "off":
        name = "engine.gradient_checkpointing: selective"
        yield name, replace_settings(config, "engine", gradient_checkpointing="selective")
    if engine.gradient_checkpointing != "full":
        name = "engine.gradient_checkpointing: full"
        yield name, replace_settings(config, "engine", gradient_checkpointing="full")
    if micro_batch > 1:
        yield "train.micro_batch_size: 1", replace_settings(config, "train", micro_batch_size=1)
    if world_size > 1 and engine.zero_stage != 3 and engine.compile == "none" and not engine.gradient_release:
        yield "engine.zero_stage: 3", replace_settings(config, "engine", zero_stage=3)
    if engine.precision in ("bf16", "fp16") and not engine.offload_optimizer:
        stage = max(2, engine.zero_stage or 0)
        changed = replace_settings(config, "engine", offload_optimizer=True, zero_stage=stage)
        yield "engine.offload_optimizer: true", changed
    if engine.precision not in PURE_BF16 and not engine.offload_optimizer and config.optim.name in ("adamw", "lion"):
        changed = replace_settings(config, "engine", precision="bf16_stochastic", zero_stage=None)
        yield "engine.precision: bf16_stochastic", resolve_zero_stage(changed, world_size)[0]
    has_8_bit = engine.gradient_release or engine.precision not in PURE_BF16
    if config.optim.name == "adamw" and not engine.offload_optimizer and has_8_bit:
        yield "optim.name: adamw8bit", replace_settings(config, "optim", name="adamw8bit")
    if engine.gradient_release and config.optim.name != "adafactor":
        yield "optim.name: adafactor", replace_settings(config, "optim", name="adafactor")
    has_plain_blocks = engine.zero_stage != 3 and engine.compile == "none" and not engine.offload_blocks
    if has_plain_blocks and config.lora.quantised_base == "none":
        if config.lora.rank and config.lora.kind == "lora":
            yield "lora.quantised_base: nf4", replace_settings(config, "lora", quantised_base="nf4")
        number = num_blocks * 2 // 3
        if number and (config.lora.rank or engine.gradient_release):
            values = {"offload_blocks": number, "gradient_checkpointing": "full"}
            yield f"engine.offload_blocks: {number}", replace_settings(config, "engine", **values)
    if config.ema.num_averages and not config.ema.on_host:
        yield "ema.on_host: true", replace_settings(config, "ema", on_host=True)
    if config.ema.decays:
        yield "ema.decays: []", replace_settings(config, "ema", decays=[])
    if config.ema.lengths:
        yield "ema.lengths: []", replace_settings(config, "ema", lengths=[])
    if not config.cache.text:
        yield "cache.text: true", replace_settings(config, "cache", text=True)
