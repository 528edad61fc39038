"""Saved activations of SDXL's U-Net against what it costs to compute them again, for each `gradient_checkpointing`.

Needs no GPU and no weights: the U-Net of configs/sdxl runs on PyTorch's meta device, in bf16 and at 1024² px. One table
has the bytes that the forward pass keeps, by micro batch, and the FLOPs and bytes that the backward pass repeats. The
other has them by kind of region. Bytes moved are those of all inputs and outputs of operations that are no views.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, Figure, parse_arguments, print_result
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.engine import CHECKPOINTING, Checkpointing
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.estimates.networks import FlashAttention, SavedBytes, build_inputs, list_held_storages
from sdxl_trainer.train.networks.checkpointing import set_checkpointing
from sdxl_trainer.train.networks.empty_networks import build_empty_run_networks
from sdxl_trainer.train.networks.trained_networks import TrainedNetworks

BUCKET = Size(1024, 1024)
MICRO_BATCHES = (1, 2, 4, 8)
FORWARD_TFLOP, STEP_PASSES = 6.76, 3  # of an image; forward and backward pass together cost three forward passes
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class Region:
    """Regions of one kind that the backward pass repeats."""

    number: int = 0
    freed: int = 0  # bytes that are not kept
    flops: int = 0
    moved: int = 0  # bytes


@dataclass
class Count:
    """What a pass of one micro batch keeps and repeats."""

    kept: int = 0  # bytes
    regions: dict[str, Region] = field(default_factory=dict)  # by kind

    def sum(self, name: str) -> int:
        """Return the sum of a field over all regions."""
        return sum(getattr(region, name) for region in self.regions.values())


class MovedBytes(TorchDispatchMode):
    """Counts the bytes of inputs and outputs of all operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count."""
        results = func(*args, **(kwargs or {}))
        if not func.is_view:
            outputs = results if isinstance(results, (tuple, list)) else (results,)
            self.total += sum(item.nbytes for item in (*args, *outputs) if isinstance(item, torch.Tensor))
        return results


def count_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of the attention kernel, for which PyTorch's counter has no formula on a CPU."""
    return sdpa_flop_count(query, key, value)


def name_region(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> str:
    """Name a region by its function or block, its channels, and the positions of its latent."""
    name = type(function).__name__ if isinstance(function, torch.nn.Module) else function.__name__
    shape = inputs[0].shape
    channels, positions = (shape[1], shape[2:].numel()) if len(shape) == 4 else (shape[2], shape[1])
    return f"{name}, {channels} x {positions}"


def count_pass(networks: TrainedNetworks, policy: Checkpointing, micro_batch: int) -> Count:
    """Run a forward pass that counts what regions free, and one with its backward pass that counts what is repeated."""
    count, held = Count(), list_held_storages(networks)
    config, _ = build_config({}, [])
    inputs = build_inputs(networks, config, BUCKET, micro_batch)

    def run_once(function: Callable[..., Any], *arguments: Any) -> Any:
        given = [item.untyped_storage() for item in arguments if isinstance(item, torch.Tensor)]
        saved = SavedBytes([*held, *given])
        with saved.hooks():
            output = function(*arguments)
        region = count.regions.setdefault(name_region(function, arguments), Region())
        region.number += 1
        region.freed += saved.total
        return output

    set_checkpointing(networks.unet, policy, run_once)
    with FlashAttention():
        networks(**inputs)
    set_checkpointing(networks.unet, policy, partial(run_twice, count))
    saved = SavedBytes(held)
    with saved.hooks(), FlashAttention():
        prediction = networks(**inputs)
    count.kept = saved.total
    prediction.float().square().mean().backward()
    networks.zero_grad()
    return count


def run_twice(count: Count, function: Callable[..., Any], *inputs: Any) -> Any:
    """Run a region under a checkpoint, and count its repetition in the backward pass."""
    region, is_first = count.regions[name_region(function, inputs)], True

    def run(*again: Any) -> Any:
        nonlocal is_first
        if is_first:
            is_first = False
            return function(*again)
        counter, moved = FlopCounterMode(display=False, custom_mapping={ATTENTION: count_attention}), MovedBytes()
        try:
            with FlashAttention(), moved, counter:
                return function(*again)
        finally:  # PyTorch ends a repetition early by an exception
            region.flops += counter.get_total_flops()
            region.moved += moved.total

    return checkpoint(run, *inputs, use_reentrant=False)


def print_tables(counts: Mapping[Checkpointing, dict[int, Count]]) -> None:
    """Print both tables in Markdown."""
    columns = " | ".join(f"kept at micro batch {number}" for number in MICRO_BATCHES)
    print(f"| policy | {columns} | repeated FLOPs of an image | share of a step | moved again |", file=sys.stderr)
    print("|---" * (len(MICRO_BATCHES) + 4) + "|", file=sys.stderr)
    for policy, by_size in counts.items():
        kept = " | ".join(f"{by_size[number].kept / 1e9:.2f} GB" for number in MICRO_BATCHES)
        tflop, moved = by_size[1].sum("flops") / 1e12, by_size[1].sum("moved") / 1e9
        share = tflop / (STEP_PASSES * FORWARD_TFLOP)
        print(f"| `{policy}` | {kept} | {tflop:.2f} TFLOP | {share:.1%} | {moved:.1f} GB |", file=sys.stderr)
    print(
        "\n| policy | region, channels x positions | number | freed | FLOPs | bytes freed for a kFLOP |",
        file=sys.stderr,
    )
    print("|---|---|---|---|---|---|", file=sys.stderr)
    for policy, by_size in counts.items():
        for name, region in by_size[1].regions.items():
            rate = f"{region.freed / region.flops * 1e3:.2f}" if region.flops else "–"
            numbers = f"{region.number} | {region.freed / 1e9:.3f} GB | {region.flops / 1e12:.3f} TFLOP | {rate}"
            print(f"| `{policy}` | {name} | {numbers} |", file=sys.stderr)


def main() -> int:
    """Count all policies, print the tables, and compare with the targets."""
    parse_arguments(__doc__ or "")
    config, problems = build_config({}, [])
    assert not problems, problems
    networks = build_empty_run_networks(ModelSource(Path(ROOT) / "configs" / "sdxl"), config, torch.bfloat16)
    counts: dict[Checkpointing, dict[int, Count]] = {
        policy: {number: count_pass(networks, policy, number) for number in MICRO_BATCHES} for policy in CHECKPOINTING
    }
    print_tables(counts)
    off, selective, full = (counts[policy][1] for policy in CHECKPOINTING)
    step = STEP_PASSES * FORWARD_TFLOP * 1e12
    return print_result(
        "activations",
        {
            "selective_kept_share": Figure(selective.kept / off.kept, "<=", 0.7),
            "selective_flops_share": Figure(selective.sum("flops") / step, "<=", 0.001),
            "full_kept_share": Figure(full.kept / off.kept, "<=", 0.1),
            "full_flops_share": Figure(full.sum("flops") / step),
        },
    )


if __name__ == "__main__":
    sys.exit(main())
