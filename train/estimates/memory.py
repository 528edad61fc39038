"""Estimate the memory of a rank before a run, by components.

ZeRO's arithmetic (arXiv 1910.02054) gives weights, gradients and optimizer state; networks.py counts activations. What
PyTorch pins in host memory is counted as its allocator rounds it, up to a power of two.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sdxl_trainer.configs.engine import PURE_BF16, EngineConfig
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.engine.deepspeed_config import (
    build_communication_settings,
    compute_batch_sizes,
    resolve_gradient_types,
)
from sdxl_trainer.train.engine.gradient_release import BUCKET_VALUES
from sdxl_trainer.train.estimates.memory_table import PHASES, MemoryLimits, MemoryLine, MemoryTable, Phase
from sdxl_trainer.train.estimates.networks import NetworkSizes
from sdxl_trainer.train.estimates.optimizer_state import (
    FP32_BYTES,
    count_master_bytes,
    count_moments,
    count_own_copies,
    count_release_copies,
)
from sdxl_trainer.train.networks.checkpointing import resolve_checkpointing
from sdxl_trainer.train.networks.quantised_base import VALUE_BYTES
from sdxl_trainer.train.optim.optimizers import MAX_GROUP_VALUES
from sdxl_trainer.train.optim.schedule_free import has_own_average

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "bf16_kahan": 2, "bf16_stochastic": 2}
AVERAGE_BYTES = 4
# Assumptions, not yet measured on a GPU: the CUDA context with NCCL's buffers, and a process without its tensors.
CUDA_CONTEXT_BYTES, CUDA_PROCESS_BYTES, CPU_PROCESS_BYTES = 800_000_000, 3_000_000_000, 1_000_000_000
ZERO_0_BUCKET_VALUES = 500_000_000  # that DeepSpeed sends at a time without ZeRO
VISITORS = 2  # offloaded blocks on the device at a time: one that runs, and the next
FROZEN_ENCODERS = "frozen text encoders"  # name of the component
PASSES: tuple[Phase, ...] = ("forward pass", "backward pass")


class OffloadedValues(NamedTuple):
    """Numbers of values in blocks that wait on the host, and of those in the largest that visit the device at once."""

    trained: int
    frozen: int
    visiting_trained: int
    visiting_frozen: int


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes of a value of the training state, and the number of ranks that share the state."""

    weight: int  # bytes in which the networks compute
    gradient: int  # of the sum of gradients over micro steps and ranks
    master: int  # of the copy that the optimizer updates; 0 if it updates the weights themselves
    moments: float  # of all moments together
    averages: int  # of all moving averages together
    keeps_gradients: bool  # between the micro steps of an update
    weight_shares: int  # number of ranks among which the weights are divided
    gradient_shares: int
    optimizer_shares: int


def resolve_state_bytes(config: Config, shapes: Sequence[Sequence[int]], world_size: int) -> StateBytes:
    """Return the bytes of a value for the settings, whose `engine.zero_stage` is chosen.

    Args:
        shapes: of the trained weights.
    """
    engine, stage = config.engine, config.engine.zero_stage or 0
    weight = WEIGHT_BYTES[engine.precision]
    shares = {part: world_size if stage >= part else 1 for part in (1, 2, 3)}
    steps = compute_batch_sizes(config.train, world_size).accumulation_steps
    types = resolve_gradient_types(engine, world_size, steps, config.optim.name == "muon")
    return StateBytes(
        weight=weight,
        gradient=WEIGHT_BYTES[types.accumulation],
        master=count_master_bytes(engine),
        moments=count_moments(engine, config.optim, shapes) / max(1, sum(map(math.prod, shapes))),
        averages=AVERAGE_BYTES * config.ema.num_averages,
        # ZeRO 3 keeps its buffer of gradients.
        keeps_gradients=steps > 1 or stage == 3,
        weight_shares=shares[3],
        gradient_shares=shares[2],
        optimizer_shares=shares[1],
    )


def estimate_memory(
    config: Config, sizes: NetworkSizes, world_size: int, limits: MemoryLimits, max_group_values: int = MAX_GROUP_VALUES
) -> MemoryTable:
    """Estimate the memory of one rank.

    Args:
        config: with `engine.zero_stage` and `engine.gradient_checkpointing` chosen.
        max_group_values: weights that the optimizer updates at a time, at most.
    """
    state = resolve_state_bytes(config, sizes.shapes, world_size)
    groups = divide_weights(sizes, max_group_values)
    lines = [
        *list_weights(config, sizes, state, limits.has_gpu),
        *list_gradients(config, sizes, state, world_size),
        *list_optimizer(config, sizes, state, groups, limits.has_gpu),
        *list_activations(config, sizes),
        *list_generation(config, sizes, state),
        *list_averages_in_use(config, sizes, state),
        *list_checkpoint_copy(config, sizes, state),
        list_process(limits.has_gpu),
    ]
    return MemoryTable(
        lines=tuple(line for line in lines if line.device or line.host),
        limits=limits,
        micro_batch_size=config.train.micro_batch_size,
    )


def divide_weights(sizes: NetworkSizes, max_group_values: int) -> list[int]:
    """Divide the trained weights into the groups that the optimizer updates one after the other; their values."""
    number = max(1, math.ceil(sizes.num_trained / max_group_values))
    return [math.ceil(sizes.num_trained / number)] * number


def list_weights(config: Config, sizes: NetworkSizes, state: StateBytes, has_gpu: bool) -> Iterator[MemoryLine]:
    """Yield the lines of weights in the precision of training."""
    bytes_of_value = state.weight / state.weight_shares
    frozen = sizes.frozen * bytes_of_value
    if config.lora.quantised_base != "none":
        frozen -= sizes.base_linears * (bytes_of_value - VALUE_BYTES[config.lora.quantised_base])
    if config.engine.offload_param:
        trained = sum(round_pinned(numel * bytes_of_value, has_gpu) for numel in sizes.trained)
        yield MemoryLine(component="trained weights", host=trained)
        yield MemoryLine(component="frozen weights", host=frozen)
    else:
        away = count_offloaded(config.engine, sizes)
        yield MemoryLine(component="trained weights", device=(sizes.num_trained - away.trained) * bytes_of_value)
        yield MemoryLine(component="frozen weights", device=frozen - away.frozen * bytes_of_value)
        yield MemoryLine(component="offloaded blocks", host=(away.trained + away.frozen) * bytes_of_value)
        visiting = (away.visiting_trained + away.visiting_frozen) * bytes_of_value
        yield MemoryLine(
            component="visiting blocks", device=visiting, phases=(*PASSES, "validation", "image generation")
        )
    # With cached text the encoders are loaded for prompts alone, and freed before images are generated.
    phases: tuple[Phase, ...] = ("encoding of prompts",)
    if not config.cache.text:
        yield MemoryLine(component=FROZEN_ENCODERS, device=sizes.frozen_encoders * state.weight)
    elif sizes.generation:
        yield MemoryLine(component="text encoders", device=sizes.frozen_encoders * state.weight, phases=phases)


def count_offloaded(engine: EngineConfig, sizes: NetworkSizes) -> OffloadedValues:
    """Count what `engine.offload_blocks` keeps on the host: trained weights with gradient release alone."""
    blocks = sizes.blocks[: engine.offload_blocks]
    trained = [block.trained if engine.gradient_release else 0 for block in blocks]
    frozen = [block.frozen for block in blocks]
    return OffloadedValues(sum(trained), sum(frozen), sum(trained[:VISITORS]), sum(frozen[:VISITORS]))


def list_gradients(config: Config, sizes: NetworkSizes, state: StateBytes, world_size: int) -> Iterator[MemoryLine]:
    """Yield the lines of gradients and of the buffers in which ranks send them."""
    engine, numel = config.engine, sizes.num_trained
    if engine.gradient_release:
        # That of one weight, or those of a bucket and their sums in fp32, while the next bucket fills.
        largest = max(sizes.trained)
        bucket = 2 * (BUCKET_VALUES + largest) * (state.weight + FP32_BYTES)
        waiting = bucket if world_size > 1 else largest * state.weight
        yield MemoryLine(component="gradients", device=waiting, phases=("backward pass",))
        return
    phases: tuple[Phase, ...] = ("forward pass", "backward pass", "weight update")
    if engine.zero_stage == 3:
        phases = PHASES
    elif not state.keeps_gradients:
        phases = phases[1:]
    # With offload, ZeRO 2 and 3 keep gradients in the type of the weights on the host, and sums in fp32 on the GPU.
    if not (engine.offload_optimizer and engine.zero_stage in (2, 3) and state.gradient == state.weight):
        yield MemoryLine(component="gradients", device=numel * state.gradient / state.gradient_shares, phases=phases)
    if engine.zero_stage == 1 and state.gradient > state.weight:
        # DeepSpeed's optimizer for fp32 sums keeps this rank's share of them besides.
        share = numel * state.gradient / state.optimizer_shares
        yield MemoryLine(component="gradients of this rank's share", device=share, phases=phases)
    communication = build_communication_settings(engine, world_size) if engine.zero_stage else {}
    default = ZERO_0_BUCKET_VALUES if world_size > 1 else 0
    num_sent = float(str(communication.get("reduce_bucket_size", default)))
    # ZeRO 0 and 1 send the sums, ZeRO 2 and 3 what the backward pass computes.
    sent = state.weight if engine.zero_stage in (2, 3) else state.gradient
    # ZeRO 3 allocates its buffer at the start; the others fill a bucket with the gradients that there are.
    num_sent = num_sent if engine.zero_stage == 3 else min(num_sent, numel)
    buffers = num_sent * sent * (2 if communication.get("overlap_comm") else 1)
    phases = PHASES if engine.zero_stage == 3 else ("backward pass",)
    yield MemoryLine(component="buffers of gradients to send", device=buffers, phases=phases)


def list_optimizer(
    config: Config, sizes: NetworkSizes, state: StateBytes, groups: list[int], has_gpu: bool
) -> Iterator[MemoryLine]:
    """Yield the lines of masters, moments, moving averages, and copies that an update needs for a time."""
    engine, share = config.engine, sizes.num_trained / state.optimizer_shares
    if config.ema.num_averages and config.ema.on_host:
        copied = share * (2 if engine.precision in PURE_BF16 else FP32_BYTES)
        yield MemoryLine(component="copy of the weights for the averages", host=copied)
    if not engine.offload_optimizer:
        away = count_offloaded(engine, sizes)
        of_averages = share if config.ema.on_host else away.trained
        for name, number, on_host in (
            ("master weights", state.master, away.trained),
            ("moments of the optimizer", state.moments, away.trained),
            ("moving averages", state.averages, of_averages),
        ):
            yield MemoryLine(component=name, device=(share - on_host) * number, host=on_host * number)
        visiting = away.visiting_trained * (state.master + state.moments)
        yield MemoryLine(component="state of visiting blocks", device=visiting, phases=("backward pass",))
        copies = count_update_copies(state, groups)
        copies += count_own_copies(config.optim.name, max(groups) / state.optimizer_shares)
        phases: tuple[Phase, ...] = ("weight update",)
        if engine.gradient_release:
            copies = count_release_copies(engine, max(sizes.trained), config.optim.name)
            phases = ("backward pass",)
        yield MemoryLine(component="copies in an update", device=copies, phases=phases)
        return
    parts = [numel / state.optimizer_shares for numel in groups]

    def pin(number: float) -> float:
        return sum(round_pinned(part * number, has_gpu) for part in parts)

    yield MemoryLine(component="master weights", host=pin(state.master))
    yield MemoryLine(component="moments of the optimizer", host=share * state.moments)
    yield MemoryLine(component="moving averages", host=share * state.averages)
    yield MemoryLine(component="gradients in fp32", host=pin(FP32_BYTES))
    yield MemoryLine(component="copy of the weights to send back", host=pin(state.weight))
    if state.keeps_gradients and engine.zero_stage != 3 and state.gradient == state.weight:
        sums = sum(round_pinned(numel * state.gradient, has_gpu) for numel in sizes.trained) / state.gradient_shares
        yield MemoryLine(component="gradients of earlier micro steps", host=sums)


def count_update_copies(state: StateBytes, groups: Iterable[int]) -> float:
    """Count the bytes that an update needs besides gradients and state: those of the largest group.

    DeepSpeed copies the gradients of a group into one flat tensor, and that to the type of the masters. Sums in fp32
    are flat already.
    """
    if not state.master or state.gradient == FP32_BYTES:
        return 0
    converted = state.master if state.master != state.gradient else 0
    return max(groups) / state.optimizer_shares * (state.gradient + converted)


def list_activations(config: Config, sizes: NetworkSizes) -> Iterator[MemoryLine]:
    """Yield the lines of activations of a micro batch.

    Without accumulation the sum of a phase is a close lower bound: the forward pass ends with all activations and no
    gradient, the backward pass with all gradients and the activations of one block.
    """
    activations = sizes.activations[resolve_checkpointing(config.engine)]
    number = config.train.micro_batch_size
    name = f"activations of {number} x {sizes.bucket}"
    yield MemoryLine(component=name, device=number * activations.kept, phases=("forward pass",), grows=True)
    again = "recomputed activations"
    yield MemoryLine(component=again, device=number * activations.recomputed, phases=PASSES, grows=True)
    if activations.fixed_kept:
        name = "weights that adapters compute"
        yield MemoryLine(component=name, device=activations.fixed_kept, phases=("forward pass",))
    if activations.fixed_recomputed:
        name = "recomputed weights that adapters compute"
        yield MemoryLine(component=name, device=activations.fixed_recomputed, phases=PASSES)


def list_generation(config: Config, sizes: NetworkSizes, state: StateBytes) -> Iterator[MemoryLine]:
    """Yield the lines of image generation: the VAE, and its or the U-Net's activations."""
    if not sizes.generation:
        return
    phases: tuple[Phase, ...] = ("image generation",)
    during: tuple[Phase, ...] = ("encoding of prompts", "image generation")
    yield MemoryLine(component="VAE in fp32", device=sizes.vae * FP32_BYTES, phases=during)
    yield MemoryLine(component="activations of an image", device=sizes.generation, phases=phases)


def list_averages_in_use(config: Config, sizes: NetworkSizes, state: StateBytes) -> Iterator[MemoryLine]:
    """Yield the lines of validation, and of the weights put aside while an average takes their place.

    Validation measures the weights and each average; images are generated with the first average.
    """
    phases: list[Phase] = []
    if config.validation.share or config.validation.has_own_set:
        working = config.train.micro_batch_size * sizes.activations["full"].recomputed
        yield MemoryLine(component="activations of a block", device=working, phases=("validation",), grows=True)
        if config.ema.num_averages or has_own_average(config.optim):
            phases.append("validation")
    if sizes.generation and ((config.ema.sample and config.ema.num_averages) or has_own_average(config.optim)):
        phases.extend(("encoding of prompts", "image generation"))
    if phases:
        kept = sizes.num_trained * state.weight / state.weight_shares
        yield MemoryLine(component="weights while an average is used", device=kept, phases=tuple(phases))


def list_checkpoint_copy(config: Config, sizes: NetworkSizes, state: StateBytes) -> Iterator[MemoryLine]:
    """Yield the lines of the copy of the state that is written in the background."""
    # Optimizer state in host memory is written from there; ZeRO 3 has no file of whole weights.
    optimizer = 0 if config.engine.offload_optimizer else state.master + state.moments + state.averages
    share = sizes.num_trained / state.optimizer_shares
    weights = 0 if config.engine.zero_stage == 3 else sizes.num_trained * state.weight
    yield MemoryLine(component="copy of the optimizer for a checkpoint", host=share * optimizer)
    yield MemoryLine(component="copy of the weights for a checkpoint", host=weights, only_rank_0=True)


def list_process(has_gpu: bool) -> MemoryLine:
    """Return the line of the process without its tensors, and of the CUDA context."""
    if not has_gpu:
        return MemoryLine(component="process", host=CPU_PROCESS_BYTES)
    return MemoryLine(component="process, CUDA context", device=CUDA_CONTEXT_BYTES, host=CUDA_PROCESS_BYTES)


def round_pinned(num_bytes: float, is_pinned: bool) -> float:
    """Return what PyTorch's allocator of pinned host memory takes: the next power of two."""
    return 2.0 ** math.ceil(math.log2(num_bytes)) if is_pinned and num_bytes >= 1 else num_bytes
