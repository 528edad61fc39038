"""Gradients by ZeRO stage and data type: error of their sum, bytes sent by each collective, and peak memory of a step.

Ranks on this CPU train weights whose gradients are known exactly, so that the sum over micro steps and ranks can be
compared with fp64. Collectives are counted where PyTorch dispatches them, and memory where its allocator hands it out.
Sizes of buckets and parameter groups stand in the same proportion to the weights as SDXL's do.
"""

import json
import os
import sys
import weakref
from collections import Counter
from contextlib import AbstractContextManager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from harness import Figure, measure_on_ranks, run_on_ranks
from scale import TIMES_SENT, WEIGHTS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RANKS, STAGES, STEPS, TYPES = 2, (0, 1, 2, 3), 4, ("fp32", "bf16")
NUM_TENSORS, SIDE, NUM_GROUPS = 100, 64, 10  # SDXL: groups of at most 2^28 of its values
NUM_WEIGHTS = NUM_TENSORS * SIDE * SIDE
BUCKETS = {1: 50_000_000, 2: 200_000_000}  # ranks → values of a bucket, as build_communication_settings has them
MAX_LIVE = 1_000_000_000  # values that ZeRO 3 keeps gathered
LARGEST_ERROR = {"fp32": 1e-6, "bf16": 1e-2}
LARGEST_PEAK = {"ranks1_zero1_steps1": 17.0, f"ranks1_zero2_steps{STEPS}": 18.5}  # of the stages chosen on one rank


def compare(_: Path, quick: bool) -> dict[str, Figure]:
    """Collect the figures of all cases on one rank and on several."""
    figures: dict[str, Figure] = {}
    for ranks in (1, RANKS):
        types = [("auto", "auto")] if ranks == 1 or quick else list(product(TYPES, TYPES))
        measured = measure_on_ranks(__file__, {"types": types}, ranks)
        for name, value in measured.items():
            kind, _, case = name.partition("_")
            limit = LARGEST_PEAK.get(case) if kind == "peak" else None
            if kind == "error":
                limit = LARGEST_ERROR["bf16" if "bf16" in case else "fp32"]
            figures[name] = Figure(value, "<=", limit)
    return figures


def measure(settings: dict[str, Any]) -> int:
    """Run all cases on this rank; rank 0 prints their figures.

    Args:
        settings: `types` holds pairs of `engine.accumulation_dtype` and `engine.communication_dtype`. Two more are for
            less than all: `num_tensors` for the sums, and `peaks`, pairs of a stage and the number of micro steps.
    """
    from sdxl_trainer.launch.distributed import close_ranks, init_ranks
    from sdxl_trainer.launch.logger import init_logger
    from sdxl_trainer.launch.program import end_program

    ranks = init_ranks()
    init_logger(ranks.rank, "WARNING")
    figures: dict[str, float] = {}
    num_tensors = settings.get("num_tensors", NUM_TENSORS)
    for stage, (accumulation, communication) in product(STAGES, settings["types"]):
        name, num_weights = f"ranks{ranks.world_size}_zero{stage}_{accumulation}_{communication}", num_tensors * SIDE**2
        figures[f"error_{name}"], counted = measure_sum(stage, accumulation, communication, num_tensors)
        figures.update({f"bytes_{name}_{collective}": count / num_weights for collective, count in counted.items()})
        figures[f"sent_{name}"] = sum(TIMES_SENT[key] * count for key, count in counted.items()) / num_weights
    for stage, steps in settings.get("peaks", product(STAGES, (1, STEPS))):
        figures[f"peak_ranks{ranks.world_size}_zero{stage}_steps{steps}"] = measure_peak(stage, steps) / NUM_WEIGHTS
    if ranks.is_main:
        print(json.dumps(figures), flush=True)
    close_ranks()
    end_program(0)


def measure_sum(
    stage: int, accumulation: str, communication: str, num_tensors: int = NUM_TENSORS, **more: Any
) -> tuple[float, Counter[str]]:
    """Return the relative error of the sum that one update used, and the bytes of each collective in a later step.

    Args:
        more: further settings of the engine.
    """
    types = {"accumulation_dtype": accumulation, "communication_dtype": communication, **more}
    engine, rank, world_size = build_engine(stage, STEPS, torch.optim.SGD, types, num_tensors)
    train_step(engine, range(STEPS), rank)
    with CollectiveBytes() as counted:
        engine.set_lr(0.0)
        train_step(engine, range(STEPS), rank)
    pairs = list(product(range(world_size), range(STEPS)))
    wrong = total = 0.0
    for number in range(num_tensors):
        expected = sum(draw_gradient(number, rank, step).double() for rank, step in pairs) / len(pairs)
        difference = engine.weights.gather(f"parts.{number}.weight").double() + expected
        wrong, total = wrong + difference.square().sum().item(), total + expected.square().sum().item()
    return (wrong / total) ** 0.5, counted.bytes


def measure_peak(stage: int, steps: int) -> float:
    """Return the most bytes of tensors at once in an update by AdamW, with everything that is held between updates."""
    from memory import add_up_storages

    before = add_up_storages()
    engine, rank, _ = build_engine(stage, steps, partial(torch.optim.AdamW, fused=True), {})
    train_step(engine, range(steps), rank)
    held = add_up_storages() - before
    with PeakBytes() as counted:
        train_step(engine, range(steps), rank)
    return held + counted.peak


def build_engine(
    stage: int, steps: int, kind: Any, types: dict[str, Any], num_tensors: int = NUM_TENSORS
) -> tuple[Any, int, int]:
    """Build an engine in bf16 over weights of zero; return it, this rank and the number of ranks."""
    from sdxl_trainer.configs.engine import EngineConfig
    from sdxl_trainer.launch.distributed import read_environment
    from sdxl_trainer.train.engine.deepspeed_config import BatchSizes
    from sdxl_trainer.train.engine.engine import Engine

    rank, _, world_size = read_environment()
    model = KnownGradients(num_tensors)
    weights, size = list(model.parameters()), num_tensors // NUM_GROUPS
    groups = [{"params": weights[start : start + size]} for start in range(0, num_tensors, size)]
    bucket, live = (int(values * num_tensors * SIDE**2 / WEIGHTS) for values in (BUCKETS[world_size], MAX_LIVE))
    zero = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket, "stage3_prefetch_bucket_size": bucket}
    zero |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
    zero |= {"stage3_param_persistence_threshold": 0}
    config = EngineConfig(zero_stage=stage, precision="bf16", deepspeed={"zero_optimization": zero}, **types)  # pyright: ignore
    batch = BatchSizes(world_size * steps, 1, steps)
    return Engine(model, kind(groups, lr=1.0), config, batch, max_grad_norm=0.0), rank, world_size


def train_step(engine: Any, steps: range, rank: int) -> None:
    """Accumulate the gradients of micro steps, and update."""
    for step in steps:
        engine.backward(engine(rank, step))
        engine.step()


class KnownGradients(torch.nn.Module):
    """Weights whose gradients are `draw_gradient`, whatever their values."""

    def __init__(self, num_tensors: int) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(KnownGradient(number) for number in range(num_tensors))

    def forward(self, rank: int, step: int) -> torch.Tensor:
        """Return a loss."""
        return torch.stack([part(rank, step) for part in self.parts]).sum()


class KnownGradient(torch.nn.Module):
    """A weight in a module of its own, as ZeRO 3 gathers and releases it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.weight = number, torch.nn.Parameter(torch.zeros(SIDE, SIDE))

    def forward(self, rank: int, step: int) -> torch.Tensor:
        """Return this weight's part of the loss."""
        return DrawnGradient.apply(self.weight, self.number, rank, step)  # pyright: ignore


class DrawnGradient(torch.autograd.Function):
    """0, with a gradient from `draw_gradient`; keeps nothing for the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, *place: int) -> torch.Tensor:  # pyright: ignore
        """Return a zero in fp32."""
        ctx.place, ctx.shape = place, weight.shape
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        """Return the gradient, [SIDE, SIDE] bf16."""
        return draw_gradient(*ctx.place) * scale.bfloat16(), None, None, None


def draw_gradient(number: int, rank: int, step: int) -> torch.Tensor:
    """Return the gradient of a weight in a micro step, [SIDE, SIDE] bf16."""
    generator = torch.Generator().manual_seed(number + 1000 * step + 100_000 * rank)
    return torch.randn(SIDE, SIDE, generator=generator).bfloat16()


class CollectiveBytes(TorchDispatchMode, AbstractContextManager):
    """Counts the bytes that each collective reduces or gathers within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operator of torch.distributed, and run it."""
        if func.namespace == "c10d":
            name = func._opname.strip("_")
            # The whole tensor: what is gathered is the first argument, what is scattered the second.
            whole = args[1] if name.startswith("reduce_scatter") else args[0]
            self.bytes[name] += sum(tensor.nbytes for tensor in (whole if isinstance(whole, list) else [whole]))
        return func(*args, **(kwargs or {}))


class PeakBytes(TorchDispatchMode, AbstractContextManager):
    """Counts the bytes of tensors that operators make within the context, and the most that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count its results."""
        results = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in list_storages((args, kwargs))}
        for storage in list_storages(results):
            address, size = storage.data_ptr(), storage.nbytes()
            if size and address not in given and address not in self._known:
                self._known.add(address)
                self._now += size
                weakref.finalize(storage, self._forget, address, size)
        self.peak = max(self.peak, self._now)
        return results

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size


def list_storages(content: Any) -> list[torch.UntypedStorage]:
    """List the storages of all tensors in an operator's arguments or results."""
    return [item.untyped_storage() for item in tree_leaves(content) if isinstance(item, torch.Tensor)]


if __name__ == "__main__":
    sys.exit(run_on_ranks("gradients", __doc__ or "", compare, measure))
