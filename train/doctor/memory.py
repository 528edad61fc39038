"""Findings about the memory of a run: the estimate, whether it fits this machine, and which usual GPU it would fit."""

from collections.abc import Generator, Iterator

from sdxl_trainer.cache.models.model_pair import resolve_pair
from sdxl_trainer.cache.models.source import is_local, may_be_hub_id
from sdxl_trainer.configs.language.translate import join_label, translate, translate_label
from sdxl_trainer.configs.problems import UserInputError
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.launch.machine import Finding, announce_stage, convert_problem, read_host_memory_bytes
from sdxl_trainer.train.estimates.memory_choice import describe_lack, plan_memory
from sdxl_trainer.train.estimates.memory_table import MemoryLimits, MemoryTable, describe_micro_batch, format_gb
from sdxl_trainer.train.estimates.networks import NetworkSizes, measure_networks
from sdxl_trainer.train.estimates.preset_choice import add_preset, choose_preset
from sdxl_trainer.train.estimates.text_encoders import describe_text_encoders

USUAL_GPUS_GB = (12, 16, 24, 48, 80)
INDENT = "         "  # of further lines of a finding


def examine_memory(config: Config, world_size: int, gpu_bytes: list[int]) -> Generator[Finding, None, Config]:
    """Yield the estimated memory of a rank by components, and whether it suffices on this machine's GPUs and host.

    Args:
        gpu_bytes: memory of each GPU; empty without GPUs.

    Returns:
        The settings, with gradient checkpointing chosen if the memory is known.
    """
    # Imported here like the checks above.
    from sdxl_trainer.train.run.memory_plan import check_device, check_room, list_largest_bucket

    bucket = list_largest_bucket(config)
    if not is_local(config.model) and not may_be_hub_id(config.model.path):
        yield Finding("memory", "unknown as long as the settings or the model are wrong")
        return config
    if not is_local(config.model) or bucket is None:
        yield Finding("memory", "the size of the model is not known before its download")
        return config
    announce_stage("estimating the memory of a rank")
    try:
        source = resolve_pair(config)
        sizes = measure_networks(config, source, bucket)
    except (UserInputError, OSError, ValueError, KeyError):
        yield Finding("memory", "unknown as long as the settings or the model are wrong")
        return config
    ranks_per_host = min(world_size, len(gpu_bytes) or world_size)
    device, host = min(gpu_bytes, default=None), read_host_memory_bytes()
    limits = MemoryLimits(device=device, host=host, ranks_per_host=ranks_per_host)
    config, table, reason = plan_memory(config, sizes, world_size, limits)
    if reason:
        yield Finding("engine.gradient_checkpointing", reason)
    yield Finding("memory", describe_memory(table))
    if cost := describe_text_encoders(config, source, table):
        yield Finding("text encoders", cost, is_note=True)
    if not gpu_bytes:
        yield Finding("GPU to choose", "\n".join(describe_fits(config, sizes, world_size, host)), is_note=True)
    cure = ""
    if not table.fits_device:
        lack = describe_lack(config, sizes, world_size, limits)
        cure = add_preset(lack, limits, world_size, source, bucket)
    yield from map(convert_problem, list(check_device(table, cure)) or check_room(table, cure))
    return config


def examine_presets(world_size: int, gpu_bytes: list[int]) -> Iterator[Finding]:
    """Yield the preset that suits the smallest GPU, and why; nothing without GPUs.

    Args:
        gpu_bytes: memory of each GPU.
    """
    if not gpu_bytes:
        return
    announce_stage("comparing the presets with the memory of the GPU")
    limits = MemoryLimits(device=min(gpu_bytes), host=read_host_memory_bytes(), ranks_per_host=len(gpu_bytes))
    choice = choose_preset(limits, world_size)
    if choice is None:
        yield Finding("preset", f"none fits this card of {format_gb(min(gpu_bytes))}", is_note=True)
    else:
        yield Finding("preset", f"this card: {choice.describe()}")


def describe_memory(table: MemoryTable) -> str:
    """Return the peak of a rank in a line, and a line below it for each component."""
    rows = table.describe()
    peaks = [name for name in rows if name.endswith(", peak")]
    names = {name: translate_label(name.removeprefix("memory, ").replace(",", "")) for name in peaks}
    first = "; ".join(f"{shown} {translate(rows.pop(name))}" for name, shown in names.items())
    return "\n".join(
        [first, *(INDENT + join_label(translate_label(name), translate(text)) for name, text in rows.items())]
    )


def describe_fits(config: Config, sizes: NetworkSizes, world_size: int, host: int | None) -> Iterator[str]:
    """Yield a line for each usual size of GPUs: the largest micro batch that fits, or what saves memory."""
    yield "the estimate for usual sizes"
    for size in USUAL_GPUS_GB:
        limits = MemoryLimits(device=size * 10**9, host=host, ranks_per_host=world_size)
        planned = plan_memory(config, sizes, world_size, limits)
        needed, largest = format_gb(planned.table.device_peak), planned.table.find_largest_micro_batch()
        if planned.table.fits_device:
            text = f"fits with {needed}; largest micro batch {describe_micro_batch(largest)}"
        else:
            text = f"{needed} are too much; {describe_lack(planned.config, sizes, world_size, limits)}"
        yield f"{INDENT}{size} GB: {text}"
