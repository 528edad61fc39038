"""Capture a live engine's state for checkpoints, and load it back into an engine."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.train.engine.averages import PowerClock, flatten
from sdxl_trainer.train.engine.gradient_release import ReleasingEngine
from sdxl_trainer.train.engine.host_memory import HostMemory
from sdxl_trainer.train.engine.layout import Layout
from sdxl_trainer.train.engine.patches import StateCopies, collect_state_files, count_group_masters
from sdxl_trainer.train.engine.resharding import reshard
from sdxl_trainer.train.engine.saved_state import (
    AVERAGE,
    STATE_TAG,
    ReshardingError,
    SavedState,
    Shard,
    build_shard,
    load_state_file,
    map_state_file,
)
from sdxl_trainer.train.engine.weights import Weights

# DeepSpeed's own checkpoint converter, which users may run, requires this entry in checkpoints of ZeRO 1 and 2.
UNIVERSAL_INFO = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


def copy_to_host(content: Any, memory: HostMemory | None = None, keep_host_tensors: bool = False) -> Any:
    """Return a copy of nested dicts, lists and tuples with all tensors on the CPU, sharing no memory with the original.

    A tensor that is a view is copied alone: torch.save would write the whole buffer behind it.

    Args:
        memory: host memory to reuse.
        keep_host_tensors: return a tensor that is in host memory already, and no view, without copying it.
    """
    if isinstance(content, torch.Tensor):
        tensor = content.detach()
        if keep_host_tensors and is_whole_host_tensor(tensor):
            return tensor
        return memory.copy(tensor) if memory else tensor.to("cpu", copy=True)
    if isinstance(content, dict):
        return type(content)((key, copy_to_host(value, memory, keep_host_tensors)) for key, value in content.items())
    if isinstance(content, (list, tuple)) and type(content) in (list, tuple):
        return type(content)(copy_to_host(value, memory, keep_host_tensors) for value in content)
    return content


def is_whole_host_tensor(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is in host memory and fills its storage, so that torch.save writes nothing else."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def capture_state(
    engine: Any,
    weights: Weights,
    memory: HostMemory | None = None,
    alone: bool = False,
    with_module: bool = False,
    lend: bool = False,
) -> dict[str, Any]:
    """Return this rank's files of a checkpoint: path within it → content, copied to the host.

    The files are in DeepSpeed's own format, without frozen weights. An additional file records the place of each
    parameter (layout.py).

    Args:
        engine: the engine that `deepspeed.initialize` returned, or a ReleasingEngine.
        memory: host memory to reuse.
        alone: take no part in collectives, because other ranks may be dead; training cannot continue afterwards.
        with_module: return the file with the module's weights even if rank 0 alone writes it.
        lend: return optimizer state and moving averages that are in host memory without copying them. The caller
            keeps updates from starting until it has written them.
    """

    def copy(content: Any) -> Any:
        return copy_to_host(content, memory)

    def copy_optimizer(content: Any) -> Any:
        return copy_to_host(content, memory, keep_host_tensors=lend)

    layout, ema = weights.layout, weights.ema
    weights.release_gathered(alone)
    weights.restore_replaced()
    copies = StateCopies(copy, copy_optimizer)
    if isinstance(engine, ReleasingEngine):
        files = engine.collect_state_files(STATE_TAG, {}, copy, with_module)
    else:
        files = collect_state_files(engine, STATE_TAG, UNIVERSAL_INFO, copies, with_module)
    if not alone:
        weights.gather_persistent()
    files[f"{STATE_TAG}/layout_rank_{layout.rank:05d}.pt"] = layout.to_plain()
    if ema and (layout.zero_stage or layout.rank == 0):
        averages = {"num_updates": ema.num_updates, "averages": ema.averages, "power_clock": ema.clock.to_plain()}
        files[f"{STATE_TAG}/ema_rank_{layout.rank:05d}.pt"] = copy_optimizer(averages)
    return files


def load_state(engine: Any, weights: Weights, folder: Path) -> None:
    """Load a checkpoint that any number of ranks has written at any ZeRO stage. All ranks call it together.

    The optimizer keeps its present settings; its moments and counters are the checkpoint's. Frozen weights that the
    checkpoint does not hold keep their present values.

    Raises:
        ReshardingError: these ranks cannot load the checkpoint, or weights that it trained are frozen now.
    """
    saved, layout = SavedState(folder / STATE_TAG, map_state_file), weights.layout
    if lost := [name for name in saved.shapes if name not in layout.shapes]:
        trained = format_count(len(lost), "weight")
        raise ReshardingError(f"it trained {trained} that no later checkpoint would hold, {lost[0]} among them")
    matching = _find_matching_rank(saved, layout, count_group_masters(engine.optimizer))
    if matching is not None:
        shard = SavedState(folder / STATE_TAG, load_state_file).load_shard(matching)
        shard = replace(shard, model=shard.model or saved.load_shard(0).model)
    else:
        logger.info(
            "checkpoint of {} at ZeRO stage {} is resharded for {} at stage {}",
            format_count(saved.world_size, "rank"),
            saved.layouts[0].zero_stage,
            layout.world_size,
            layout.zero_stage,
        )
        shard = build_shard(layout, capture_state(engine, weights, with_module=True))
        reshard(shard, saved)
    groups = engine.optimizer.param_groups
    settings = [dict(group) for group in groups]
    _load_into_engine(engine, weights, shard)
    _restore_settings(engine.optimizer.param_groups, settings, engine.basic_optimizer)
    _load_averages(weights, saved, engine.global_steps)


def _find_matching_rank(saved: SavedState, layout: Layout, group_masters: list[int]) -> int | None:
    """Return the rank whose files can be loaded for a layout as they are; None if there is none.

    Args:
        group_masters: number of tensors in each parameter group, which torch compares with the file's.
    """
    rank = next((rank for rank, other in enumerate(saved.layouts) if layout.matches(other)), None)
    return rank if rank is not None and saved.load_shard(rank).count_group_masters() == group_masters else None


def _load_into_engine(engine: Any, weights: Weights, shard: Shard) -> None:
    """Load a rank's files, which have the engine's layout, into DeepSpeed."""
    assert shard.model is not None
    weights.release_gathered()
    engine.load_module_state_dict(shard.model, custom_load_fn=_load_module)
    if weights.layout.zero_stage:
        shards = [None] * engine.world_size
        shards[engine.global_rank] = shard.optimizer_state
        engine.optimizer.load_state_dict(shards, load_optimizer_states=True, load_from_fp32_weights=True)
    else:
        engine.optimizer.load_state_dict(shard.optimizer_state)
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, shard.model[counter])
    weights.gather_persistent()


def _load_module(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """Load a checkpoint's weights into the module. Older checkpoints hold frozen weights too.

    Raises:
        ReshardingError: the checkpoint lacks a trained weight, or is of another network.
    """
    found = dst.load_state_dict(src, strict=False)
    frozen = {name for name, weight in dst.named_parameters() if not weight.requires_grad}
    lacking = [name for name in found.missing_keys if name not in frozen]
    if lacking or found.unexpected_keys:
        raise ReshardingError(f"it lacks {lacking[:3]} and has unknown {found.unexpected_keys[:3]}")


def _restore_settings(groups: list[dict[str, Any]], settings: list[dict[str, Any]], optimizer: Any) -> None:
    """Set the arguments of the optimizer's constructor back to the present settings; a checkpoint brings its own.

    Other entries of a group are state of the optimizer, such as the step size that Prodigy has found.
    """
    names = set(inspect.signature(type(optimizer).__init__).parameters) - {"self", "params"}
    for group, wanted in zip(groups, settings, strict=True):
        group.update({name: value for name, value in wanted.items() if name in names})


def _load_averages(weights: Weights, saved: SavedState, step: int) -> None:
    """Load the moving averages that the checkpoint holds; any other average starts from the checkpoint's weights.

    Args:
        step: of the checkpoint.
    """
    ema = weights.ema
    if not ema:
        return
    kept = saved.read_averages()
    ema.num_updates = kept["num_updates"]
    ema.clock = PowerClock.from_plain(kept.get("power_clock"), ema.length_names, step)
    for key, averages in ema.averages.items():
        for flat, average, master in zip(weights.layout.flats, averages, weights.list_masters(), strict=True):
            average.copy_(flatten(master))
            for fragment in flat.fragments if key in kept["averages"] else ():
                if saved.has(fragment.name):
                    part = saved.read(fragment.name, AVERAGE + key, fragment.start, fragment.numel)
                    average[fragment.offset : fragment.offset + fragment.numel] = part.to(average.device)
