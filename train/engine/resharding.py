"""Resharding: load the saved state into another number of ranks or another ZeRO stage.

A rank that resumes with another layout maps the old files into memory and reads the parts that it needs. No conversion
runs beforehand, and no space on disk is needed.

DeepSpeed's universal checkpoints serve the same purpose. They are not used because their converter first writes the
whole state a second time, supports only the two moments of Adam, has no stage 0, and under stage 3 gives every
parameter group the settings of the first one.
"""

from dataclasses import replace
from typing import Any

import torch
from loguru import logger

from sdxl_trainer.train.engine.layout import FlatTensor
from sdxl_trainer.train.engine.quantised import MIN_QUANTISED, QuantisedMoment, quantise, split_moment
from sdxl_trainer.train.engine.saved_state import MASTER, ReshardingError, SavedState, Shard
from sdxl_trainer.train.optim.schedule_free import Z

# Entries of the optimizer's state dict that are progress of the run and not settings.
LOSS_SCALING = ("loss_scaler", "dynamic_loss_scale", "overflow", "cur_scale", "cur_iter", "last_overflow_iter")


def reshard(template: Shard, saved: SavedState) -> None:
    """Fill a fresh rank's own files with the state that other ranks have saved.

    A parameter that is trained now and was not trained by the saving run keeps its fresh weights, and starts without
    optimizer state.

    Args:
        template: the files that this rank would save now; changed in place.

    Raises:
        ReshardingError: the optimizer's state is not one value per weight, or the network is another.
    """
    for name, shape in template.layout.shapes.items():
        if saved.shapes.get(name, shape) != shape:
            raise ReshardingError(f"{name} has shape {shape} instead of {saved.shapes[name]} in the checkpoint")
    fresh = [name for name in template.layout.shapes if not saved.has(name)]
    if fresh:
        logger.warning(
            "{} parameters were not trained before and start without optimizer state, {} among them",
            len(fresh),
            fresh[0],
        )
    for number, (flat, master) in enumerate(zip(template.layout.flats, template.masters, strict=True)):
        values = master.detach().reshape(-1).clone()
        for fragment in flat.fragments:
            if saved.has(fragment.name):
                part = saved.read(fragment.name, MASTER, fragment.start, fragment.numel)
                values[fragment.offset : fragment.offset + fragment.numel] = part
        master.detach().copy_(values.view(master.shape))
        _fill_state(template, number, saved)
    _fill_module(template, saved)
    origin = saved.load_shard(0)
    for key in LOSS_SCALING:
        if key in template.optimizer_state and key in origin.optimizer_state:
            template.optimizer_state[key] = origin.optimizer_state[key]


def _fill_state(template: Shard, number: int, saved: SavedState) -> None:
    """Fill the optimizer's state of one flat tensor, and the settings of its group."""
    flat = template.layout.flats[number]
    found = saved.find_flat(fragment.name for fragment in flat.fragments)
    if found is None:
        return
    shard, origin = found
    template.find_group(number).update(
        {key: value for key, value in shard.find_group(origin).items() if key != "params"}
    )
    master = template.masters[number]
    # Flat tensors are saved without the padding at their end.
    shape = master.shape if master.dim() > 1 else torch.Size([flat.numel])
    numel = shard.layout.flats[origin].numel
    state: dict[str, Any] = {}
    for key, value in shard.read_state(origin).items():
        is_tensor = isinstance(value, torch.Tensor)
        if isinstance(value, QuantisedMoment) or (is_tensor and value.dim() and value.numel() == numel):
            # A weight that was not trained before has no moments, but is a point z of its own.
            begun = master.detach().reshape(-1) if key == Z else None
            state |= _gather_state(flat, key, saved, shape, begun)
        elif not is_tensor:
            state[key] = value
        elif value.numel() == 1:
            # A counter, such as the number of steps, equal for all weights.
            state[key] = value.clone()
        else:
            raise ReshardingError(
                f"the optimizer's state {key!r} has {value.numel()} values for {numel} weights, and can be loaded only "
                f"by {saved.world_size} ranks at ZeRO stage {shard.layout.zero_stage}"
            )
    template.base["state"][number] = state


def _gather_state(
    flat: FlatTensor, key: str, saved: SavedState, shape: torch.Size, begun: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Gather an optimizer state of one value per weight, in 8 bit if it was saved so and the tensor is large enough.

    Args:
        begun: values of weights that were not trained before, without the padding; 0 if it is None.
    """
    values = None
    for fragment in flat.fragments:
        if saved.has(fragment.name):
            part = saved.read(fragment.name, key, fragment.start, fragment.numel)
            if values is None:
                values = torch.zeros(flat.numel, dtype=part.dtype)
                if begun is not None:
                    values[: len(begun)] = begun
            values[fragment.offset : fragment.offset + fragment.numel] = part
    assert values is not None, "the state was found by one of the fragments"
    names = (fragment.name for fragment in flat.fragments)
    table = saved.find_table(names, key) if flat.numel >= MIN_QUANTISED else None
    if table is None:
        return {key: values.reshape(shape)}
    moment = quantise(values, table)
    return split_moment(key, replace(moment, codes=moment.codes.reshape(shape)))


def _fill_module(template: Shard, saved: SavedState) -> None:
    """Fill the model's weights and the step counters. Under stage 3, no rank holds a whole weight."""
    model, origin = template.model, saved.load_shard(0).model
    assert model is not None and origin is not None, "rank 0 saves the module, and a template holds it on every rank"
    for key in ("global_steps", "global_samples", "skipped_steps"):
        model[key] = origin[key]
    for name, value in model["module"].items():
        if saved.has(name) and tuple(value.shape) == saved.shapes[name]:
            value.copy_(saved.read_whole(name))
