"""Memory while the networks of a run are loaded, compared with what is held afterwards; figures of memory.py.

Every allocation is counted by torch's profiler, which reads them from torch's CPU allocator. Files that are mapped into
memory are left out. The model is the tiny SDXL with a U-Net eight times as wide, 186 million weights in fp32.
Parameter groups are limited so that it falls into as many pieces as SDXL's. Text encoders are tiny.
"""

import gc
import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from harness import Figure, measure_on_ranks
from scale import WEIGHTS

T = TypeVar("T")
WIDTH = 8
LIMIT = 1.1  # peak / held
# Name of a figure → settings, for one rank. The first ZeRO stage of each is the one that is chosen by default.
CASES = {
    "full_bf16": ("engine.precision=bf16",),
    "full_bf16_zero2": ("engine.precision=bf16", "engine.zero_stage=2"),
    "full_fp32": ("engine.precision=fp32",),
    "lora_bf16": ("engine.precision=bf16", "lora.rank=4"),
    "lora_fp32": ("engine.precision=fp32", "lora.rank=4"),
}


def compare_loading(work: Path, quick: bool) -> dict[str, Figure]:
    """Measure each case on a rank of its own."""
    figures: dict[str, Figure] = {}
    model = build_wide_model(work / "wide")
    for name, words in list(CASES.items())[3 * quick :]:
        settings = {"loading": str(model), "words": words}
        found = measure_on_ranks(str(Path(__file__).with_name("memory.py")), settings, 1)
        figures[f"loading_peak_of_held_{name}"] = Figure(found["peak"] / found["held"], "<=", LIMIT)
        figures[f"loading_bytes_a_weight_{name}"] = Figure(found["peak"] / found["weights"])
    return figures


class Allocated(NamedTuple):
    """Bytes of torch's CPU allocator that a call allocated."""

    peak: int
    held: int  # at its end


def build_wide_model(folder: Path) -> Path:
    """Write the tiny SDXL with a wider U-Net, and return its folder."""
    from diffusers import UNet2DConditionModel

    from sdxl_trainer.train.tiny.build import build_tiny_sdxl

    build_tiny_sdxl(folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["block_out_channels"] = [WIDTH * channels for channels in config["block_out_channels"]]
    shutil.rmtree(folder / "unet")
    unet: Any = UNet2DConditionModel.from_config(config)
    unet.save_pretrained(folder / "unet")
    return folder


def measure_loading(model: Path, words: list[str]) -> dict[str, float]:
    """Load the networks of a run on one rank; return bytes at the peak and afterwards, and the number of weights."""
    from sdxl_trainer.cache.models.source import resolve_model
    from sdxl_trainer.configs.load import build_config
    from sdxl_trainer.configs.problems import raise_if_any
    from sdxl_trainer.launch.distributed import init_ranks
    from sdxl_trainer.train.engine.deepspeed_config import resolve_zero_stage
    from sdxl_trainer.train.estimates.networks import count_values
    from sdxl_trainer.train.networks.empty_networks import build_empty_networks
    from sdxl_trainer.train.optim import optimizers
    from sdxl_trainer.train.run.networks import build_networks

    config, problems = build_config({"model": {"path": str(model)}}, words)
    raise_if_any(problems)
    ranks = init_ranks()
    config, _ = resolve_zero_stage(config, ranks.world_size)
    num_weights = count_values(build_empty_networks(resolve_model(config.model), []))
    optimizers.MAX_GROUP_VALUES = optimizers.MAX_GROUP_VALUES * num_weights // WEIGHTS
    mapped = {path.stat().st_size for path in model.rglob("*.safetensors")}
    _, allocated = count_allocated(lambda: build_networks(config, resolve_model(config.model), ranks), mapped)
    return {"peak": allocated.peak, "held": allocated.held, "weights": num_weights}


def count_allocated(call: Callable[[], T], mapped: Collection[int]) -> tuple[T, Allocated]:
    """Count the bytes that a call allocates, and return its result, which holds some of them, with the count.

    Args:
        mapped: sizes of files; what has one of these sizes is a file that is mapped into memory, and not counted.
    """
    activities, events = [torch.profiler.ProfilerActivity.CPU], []
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = call()
        gc.collect()
    for event in profiler.profiler.kineto_results.events():  # pyright: ignore
        num_bytes = event.nbytes()  # pyright: ignore
        if event.name() == "[memory]" and abs(num_bytes) not in mapped:
            events.append((event.start_ns(), num_bytes))
    held = peak = 0
    for _, num_bytes in sorted(events, key=lambda event: event[0]):
        held += num_bytes
        peak = max(peak, held)
    return result, Allocated(peak, held)
