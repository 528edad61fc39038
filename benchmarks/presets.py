"""Tables of docs/LOW_MEMORY.md: which preset and optimizer fit which GPU, by the memory estimate of a run's start.

Needs no GPU and no weights: the networks of configs/sdxl are counted on PyTorch's meta device, 5 s of CPU a preset.
`--check` exits with status 1 if a table of docs/LOW_MEMORY.md differs.
"""

import argparse
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.engine.deepspeed_config import resolve_zero_stage
from sdxl_trainer.train.estimates.memory import estimate_memory
from sdxl_trainer.train.estimates.memory_choice import replace_settings
from sdxl_trainer.train.estimates.memory_table import MemoryLimits
from sdxl_trainer.train.estimates.networks import NetworkSizes, measure_networks
from sdxl_trainer.train.estimates.preset_choice import SDXL_BUCKET, compute_usable_bytes, set_micro_batch

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "LOW_MEMORY.md"
CARDS = (8, 12, 16, 24, 48, 80)  # GiB by name
MORE_CARDS = (8, 12, 16, 24, 32, 48, 80)
NO_IMAGES = "sample.prompts=[]"
# Preset and overrides → numbers of GPUs.
CASES = {
    ("sdxl_lora", NO_IMAGES, "engine.offload_blocks=40"): (1,),
    ("sdxl_12gb", NO_IMAGES): (1,),
    ("sdxl_lora",): (1,),
    ("sdxl_24gb",): (1,),
    ("sdxl_lowmem_offload",): (1,),
    ("sdxl_full",): (1, 4),
    ("sdxl_8gpu_zero2",): (8,),
}
RELEASED = {"bf16_stochastic": ("adafactor", "adamw8bit", "lion", "adamw"), "bf16_kahan": ("adafactor", "adamw8bit")}
RELEASED["fp32"] = ("adafactor",)
AS_MATRICES = "optim.kwargs={factor_convolutions: true}"
WITH_IMAGES = "U-Net, with generated images"  # in no other row
# Preset and overrides → what is trained.
COMBINATIONS = {
    ("sdxl_lora", ""): "adapters",
    ("sdxl_12gb", AS_MATRICES): "U-Net",
    **{
        ("sdxl_12gb", f"engine.precision={precision} optim.name={name}"): "U-Net"
        for precision, names in RELEASED.items()
        for name in names
    },
    ("sdxl_24gb", ""): WITH_IMAGES,
    ("sdxl_full", ""): "U-Net",
}
MICRO_BATCHES = (1, 4)


def main() -> int:
    """Print the table, or compare it with docs/LOW_MEMORY.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with docs/LOW_MEMORY.md instead of printing")
    options = parser.parse_args()
    tables = tabulate_presets(), tabulate_combinations()
    if not options.check:
        print("\n\n".join(tables))
        return 0
    text = DOCUMENT.read_text(encoding="utf-8")
    return int(any(table not in text for table in tables))


def load(preset: str, *words: str) -> Config:
    """Load a preset with gradient checkpointing, and with further settings."""
    config, problems = load_config(ROOT / "configs" / f"{preset}.yaml", ["engine.gradient_checkpointing=full", *words])
    assert not problems, problems
    return config


@cache
def measure(preset: str, precision: str) -> NetworkSizes:
    """Measure the networks of a preset for images of 1024 px."""
    config = load(preset, f"engine.precision={precision}")
    return measure_networks(config, ModelSource(ROOT / "configs" / "sdxl"), SDXL_BUCKET)


def tabulate_combinations() -> str:
    """Tabulate what each optimizer and precision needs on one GPU, and the smallest GPU that has so much."""
    rows: list[tuple[float, str]] = []
    for (preset, words), trained in COMBINATIONS.items():
        changes = [words] if words == AS_MATRICES else words.split()
        config = load(preset, *changes, *([NO_IMAGES] if trained == "U-Net" else []))
        config, _ = resolve_zero_stage(config, 1)
        sizes = measure(preset, config.engine.precision)
        sizes = sizes if trained == WITH_IMAGES else replace(sizes, generation=0)
        needs = [find_card(set_micro_batch(config, micro_batch, 1), sizes) for micro_batch in MICRO_BATCHES]
        name = config.optim.name + (", matrices" if words == AS_MATRICES else "")
        cells = " | ".join(f"{peak:.1f} GB | {card}" for peak, card in needs)
        rows.append((needs[0][0], f"| {trained} | {config.engine.precision} | {name} | {cells} |"))
    heads = " | ".join(f"micro batch {micro_batch} | card" for micro_batch in MICRO_BATCHES)
    columns = 3 + 2 * len(MICRO_BATCHES)
    return "\n".join(
        [f"| trained | precision | optimizer | {heads} |", "|---" * columns + "|", *(row for _, row in sorted(rows))]
    )


def find_card(config: Config, sizes: NetworkSizes) -> tuple[float, str]:
    """Return the peak memory of one GPU in GB, and the smallest card that has so much."""
    tables = {
        card: estimate_memory(config, sizes, 1, MemoryLimits(device=compute_usable_bytes(card), host=None))
        for card in MORE_CARDS
    }
    card = next((f"{card} GB" for card, table in tables.items() if table.fits_device), "–")
    return tables[MORE_CARDS[0]].device_peak / 1e9, card


def tabulate_presets() -> str:
    """Tabulate the largest micro batch of each preset on each GPU, and what a machine needs beside its GPUs."""
    rows = [f"| preset | GPUs | {' | '.join(f'{card} GB' for card in CARDS)} | host |", "|---" * (len(CARDS) + 3) + "|"]
    for (preset, *words), numbers in CASES.items():
        config = load(preset, *words)
        sizes = measure(preset, config.engine.precision)
        sizes = replace(sizes, generation=0) if NO_IMAGES in words else sizes
        name = ", ".join([preset, *(f"`{word}`" for word in words)])
        for gpus in numbers:
            # One image at a time, so that the batch is divisible on any number of GPUs.
            chosen = replace_settings(config, "train", micro_batch_size=1)
            chosen, _ = resolve_zero_stage(chosen, gpus)
            tables = [
                estimate_memory(
                    chosen,
                    sizes,
                    gpus,
                    MemoryLimits(device=compute_usable_bytes(card), host=None, ranks_per_host=gpus),
                )
                for card in CARDS
            ]
            largest = [str(table.find_largest_micro_batch() or "–") for table in tables]
            rows.append(f"| {name} | {gpus} | {' | '.join(largest)} | {tables[0].host_peak / 1e9:.0f} GB |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
