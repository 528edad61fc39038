"""Table of docs/TRAINING.md: which preset fits which GPU, by the memory estimate that a run makes before its start.

Needs no GPU and no weights: the networks of configs/sdxl are counted on PyTorch's meta device, 5 s of CPU a preset.
`--check` exits with status 1 if the table of docs/TRAINING.md differs.
"""

import argparse
import math
import sys
from pathlib import Path

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.load import load_config
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.train.engine.deepspeed_config import resolve_zero_stage
from sdxl_trainer.train.estimates.memory import estimate_memory
from sdxl_trainer.train.estimates.memory_choice import replace_settings
from sdxl_trainer.train.estimates.memory_table import MemoryLimits
from sdxl_trainer.train.estimates.networks import measure_networks

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "TRAINING.md"
CARDS = (12, 16, 24, 48, 80)  # GiB by name
USABLE = 0.98  # share of the memory by name that the driver reports
CASES = {
    "sdxl_lora": (1,),
    "sdxl_12gb": (1,),
    "sdxl_24gb": (1,),
    "sdxl_lowmem_offload": (1,),
    "sdxl_full": (1, 4),
    "sdxl_vpred_ztsnr": (1, 4),
    "sdxl_8gpu_zero2": (8,),
}
BUCKET = Size(1024, 1024)


def main() -> int:
    """Print the table, or compare it with docs/TRAINING.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with docs/TRAINING.md instead of printing")
    options = parser.parse_args()
    table = tabulate()
    if not options.check:
        print(table)
        return 0
    return int(table not in DOCUMENT.read_text(encoding="utf-8"))


def tabulate() -> str:
    """Tabulate the largest micro batch of each preset on each GPU, and what a machine needs beside its GPUs."""
    rows = [f"| preset | GPUs | {' | '.join(f'{card} GB' for card in CARDS)} | host |", "|---" * (len(CARDS) + 3) + "|"]
    for preset, numbers in CASES.items():
        config, problems = load_config(ROOT / "configs" / f"{preset}.yaml", ["engine.gradient_checkpointing=full"])
        assert not problems, problems
        sizes = measure_networks(config, ModelSource(ROOT / "configs" / "sdxl"), BUCKET)
        for gpus in numbers:
            # One image at a time, so that the batch is divisible on any number of GPUs.
            chosen = replace_settings(config, "train", micro_batch_size=1)
            chosen, _ = resolve_zero_stage(chosen, gpus)
            tables = [
                estimate_memory(
                    chosen,
                    sizes,
                    gpus,
                    MemoryLimits(device=math.floor(card * 2**30 * USABLE), host=None, ranks_per_host=gpus),
                )
                for card in CARDS
            ]
            largest = [str(table.find_largest_micro_batch() or "–") for table in tables]
            rows.append(f"| {preset} | {gpus} | {' | '.join(largest)} | {tables[0].host_peak / 1e9:.0f} GB |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
