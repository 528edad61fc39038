"""Tables of docs/SCALE.md and of speeds in docs/LOW_MEMORY.md, computed by the model of a step's time.

The constants below are given with their sources. `--check` exits with status 1 if a table of the documents differs.
"""

import argparse
import sys
from functools import cache
from pathlib import Path

from sdxl_trainer.cache.models.source import ModelSource
from sdxl_trainer.configs.load import build_config
from sdxl_trainer.configs.problems import raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.engine.deepspeed_config import resolve_zero_stage
from sdxl_trainer.train.estimates import step_time
from sdxl_trainer.train.estimates.communication import TIMES_SENT, count_sent_bytes
from sdxl_trainer.train.estimates.flops import count_training_flops
from sdxl_trainer.train.estimates.gpus import GPUS
from sdxl_trainer.train.estimates.step_time import StepEstimate, estimate_step

__all__ = ["TIMES_SENT", "WEIGHTS", "compute_sent_bytes"]  # for other benchmarks and tests

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT, CARDS_DOCUMENT = ROOT / "docs" / "SCALE.md", ROOT / "docs" / "LOW_MEMORY.md"
SDXL = ModelSource(ROOT / "configs" / "sdxl")
GPU_COUNTS = (8, 64, 512)
H100 = "NVIDIA H100 80GB HBM3"
# GPU → whether full fine-tuning fits it without gradient release (docs/LOW_MEMORY.md).
SINGLE_GPUS = {
    "NVIDIA H200": True,
    H100: True,
    "NVIDIA A100-SXM4-80GB": True,
    "NVIDIA A100-SXM4-40GB": False,
    "NVIDIA L40S": False,
}
# Cards of docs/LOW_MEMORY.md → GB.
CARDS = {
    **{"RTX 5090": 32, "RTX 4090": 24, "RTX 3090": 24, "RTX 5080": 16, "RTX 4080": 16, "RTX 4060 Ti": 16},
    **{"RTX 5070": 12, "RTX 4070": 12, "RTX 3060": 12, "RTX 4060": 8},
}
# As in configs/sdxl_24gb.yaml.
RELEASED = [
    *("engine.gradient_release=true", "engine.gradient_checkpointing=full", "engine.precision=bf16_stochastic"),
    *("optim.name=adafactor", "optim.clipping=parameter"),
]
MICRO_BATCH, SMALL_MICRO_BATCH = 8, 4

# Arithmetic of SDXL: configs/sdxl.
WEIGHTS = 2_567_463_684
LATENT_BYTES = 4 * 128 * 128 * 4 + 1_000  # at 1024x1024 in fp32, the default, with headers
GRADIENT_TYPES = ("fp32", "bf16")


def main() -> int:
    """Print the tables, or compare them with docs/SCALE.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the documents instead of printing")
    options = parser.parse_args()
    tables, cards = list_tables(), tabulate_cards()
    if not options.check:
        print("\n\n".join([*tables, cards]))
        return 0
    document = DOCUMENT.read_text(encoding="utf-8")
    return int(not all(table in document for table in tables) or cards not in CARDS_DOCUMENT.read_text("utf-8"))


def list_tables() -> list[str]:
    """List the tables of docs/SCALE.md in its order."""
    return [
        *(tabulate_parts(), tabulate_gpus(), tabulate_step(), tabulate_traffic()),
        tabulate_reading(),
    ]


def build_settings(gpus: int, *words: str, micro_batch: int = MICRO_BATCH) -> Config:
    """Build settings of full fine-tuning at 1024² in bf16 with cached text, without accumulation."""
    batch = [f"train.micro_batch_size={micro_batch}", f"train.global_batch_size={gpus * micro_batch}"]
    fast = ["engine.precision=bf16", "engine.gradient_checkpointing=off", "cache.text=true", "data.num_workers=2"]
    config, problems = build_config({}, [*batch, *fast, *words])
    raise_if_any(problems)
    return resolve_zero_stage(config, gpus)[0]


@cache
def estimate(gpus: int, *words: str, gpu: str = H100, micro_batch: int = MICRO_BATCH) -> StepEstimate:
    """Estimate a step of `build_settings`."""
    found = estimate_step(build_settings(gpus, *words, micro_batch=micro_batch), SDXL, gpus, GPUS[gpu])
    assert found is not None, "the settings are known to the model"
    return found


def compute_rate(gpus: int = 1) -> float:
    """Return the images a second of one of some H100."""
    return MICRO_BATCH / estimate(gpus).seconds


def compute_sent_bytes(stage: int, accumulation: int, communication: str, ranks: int = 8) -> float:
    """Return the bytes per weight that a rank sends in a step in bf16, without the factor (N-1)/N for N ranks."""
    return count_sent_bytes(stage, accumulation, communication, ranks).total


def compute_traffic_gb(stage: int, accumulation: int, communication: str, ranks: int = 8) -> float:
    """Return the GB that a rank sends in a step, without the factor (N-1)/N of N ranks."""
    return compute_sent_bytes(stage, accumulation, communication, ranks) * WEIGHTS / 1e9


def compute_mfu(found: StepEstimate, gpu: str, images: int) -> float:
    """Return the share of a GPU's peak that the arithmetic of a step's images is."""
    flops = images * count_training_flops(SDXL.read_config("unet"), 77).compute(128 * 128)
    return flops / found.seconds / GPUS[gpu].peak_flops


def tabulate_parts() -> str:
    """Tabulate the parts of a step on one H100, with and without what costs time."""
    cases = {
        "cached text": [],
        "text encoders": ["cache.text=false"],
        "text encoders, checkpointing": ["cache.text=false", "engine.gradient_checkpointing=full"],
        "the same, micro batch 1": [
            *("cache.text=false", "engine.gradient_checkpointing=full"),
            *("train.micro_batch_size=1", "train.global_batch_size=1"),
        ],
    }
    found = {name: estimate(1, *words) for name, words in cases.items()}
    parts = list(dict.fromkeys(part for one in found.values() for part in one.parts))
    rows = [f"| part, ms | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for part in parts:
        cells = [f"{1e3 * one.parts[part]:.0f}" if part in one.parts else "–" for one in found.values()]
        rows.append(f"| {part} | {' | '.join(cells)} |")
    rows.append(f"| **step** | {' | '.join(f'{1e3 * one.seconds:.0f}' for one in found.values())} |")
    numbers = [1 if "micro batch 1" in name else MICRO_BATCH for name in found]
    shares = [f"{compute_mfu(one, H100, n):.0%}" for one, n in zip(found.values(), numbers, strict=True)]
    rows.append(f"| MFU | {' | '.join(shares)} |")
    return "\n".join(rows)


def tabulate_gpus() -> str:
    """Tabulate the images a second of single GPUs."""
    names = ["GPU", "full fine-tuning", "MFU", "gradient release", "adapters", "largest part"]
    rows = [f"| {' | '.join(names)} |", "|---|---|---|---|---|---|"]
    for gpu, fits in SINGLE_GPUS.items():
        cells = ["–", "–"]
        if fits:
            found = estimate(1, gpu=gpu, micro_batch=SMALL_MICRO_BATCH)
            cells = [f"{SMALL_MICRO_BATCH / found.seconds:.1f}", f"{compute_mfu(found, gpu, SMALL_MICRO_BATCH):.0%}"]
        for words in (RELEASED, ["lora.rank=32"]):
            found = estimate(1, *words, gpu=gpu, micro_batch=SMALL_MICRO_BATCH)
            cells.append(f"{SMALL_MICRO_BATCH / found.seconds:.1f}")
        cells.append(found.largest)
        rows.append(f"| {gpu.removeprefix('NVIDIA ')} | {' | '.join(cells)} |")
    return "\n".join(rows)


def tabulate_cards() -> str:
    """Tabulate the images a second of GeForce cards with the presets for them."""
    adapters = ["lora.rank=32", "engine.gradient_checkpointing=full"]
    heads = ["sdxl_24gb", "sdxl_24gb, two cards", "sdxl_12gb", "sdxl_lora"]
    cases = ((1, 4, RELEASED), (2, 4, RELEASED), (1, 1, RELEASED), (1, 4, adapters))
    rows = [f"| GPU | memory | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for card, gigabytes in CARDS.items():
        cells: list[str] = []
        for head, (gpus, micro_batch, words) in zip(heads, cases, strict=True):
            seconds = estimate(gpus, *words, gpu=f"NVIDIA GeForce {card}", micro_batch=micro_batch).seconds
            fits = gigabytes > 8 or "24gb" not in head
            cells.append(f"{gpus * micro_batch / seconds:.1f}" if fits else "–")
        rows.append(f"| {card} | {gigabytes} GB | {' | '.join(cells)} |")
    return "\n".join(rows)


def tabulate_step() -> str:
    """Tabulate the step of several GPUs, and the time of communication if nothing overlapped."""
    heads = "GPUs | global batch | images/s | step | of it only sending | ZeRO 1, 2: fp32 | bf16 | ZeRO 3: fp32 | bf16"
    rows = [f"| {heads} | hours for a million images |", "|---" * 10 + "|"]
    for gpus in GPU_COUNTS:
        link = GPUS[H100].link_gbs if gpus <= step_time.RANKS_OF_A_NODE else step_time.NETWORK_GBS
        bandwidth = link * step_time.LINK_EFFICIENCY
        cases = [(stage, communication) for stage in (2, 3) for communication in GRADIENT_TYPES]
        sent = [compute_traffic_gb(stage, 1, kind, gpus) * (gpus - 1) / gpus / bandwidth for stage, kind in cases]
        hours = f"{1e6 / (gpus * compute_rate(gpus)) / 3600:,.3g}"
        seconds = [estimate(gpus).seconds, estimate(gpus).parts["communication of ranks"], *sent]
        cells = " | ".join(f"{one * 1e3:.0f} ms" for one in seconds)
        rows.append(f"| {gpus} | {gpus * MICRO_BATCH:,} | {gpus * compute_rate(gpus):,.0f} | {cells} | {hours} |")
    return "\n".join(rows)


def tabulate_traffic() -> str:
    """Tabulate bytes by stage, type and accumulation, and the bandwidth that takes as long as the arithmetic."""
    seconds = estimate(1).seconds
    rows = ["| ZeRO | gradients sent in | bytes per weight | GB per step | 4 micro batches | 16 | limit below, GB/s |"]
    rows.append("|---|---|---|---|---|---|---|")
    for stage in range(4):
        for communication in GRADIENT_TYPES:
            sent = [compute_traffic_gb(stage, steps, communication) for steps in (1, 4, 16)]
            limits = ", ".join(f"{gb / (seconds * n):.0f}" for gb, n in zip(sent, (1, 4, 16), strict=True))
            rows.append(
                f"| {stage} | {communication} | {compute_sent_bytes(stage, 1, communication):.0f} | "
                f"{' | '.join(f'{gb:.1f}' for gb in sent)} | {limits} |"
            )
    return "\n".join(rows)


def tabulate_reading() -> str:
    """Tabulate the rate at which latents must be read."""
    rows = ["| GPUs | latents/s | from storage | of one worker for each GPU |", "|---|---|---|---|"]
    for gpus in GPU_COUNTS:
        rate = gpus * compute_rate(gpus)
        share = compute_rate(gpus) / step_time.SAMPLES_A_SECOND
        rows.append(f"| {gpus} | {rate:,.0f} | {rate * LATENT_BYTES / 1e6:,.0f} MB/s | {share:.1%} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
