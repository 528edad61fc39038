"""Tables of docs/SCALE.md, computed from the constants below, each with its source.

`--check` exits with status 1 if a table of docs/SCALE.md differs.
"""

import argparse
import sys
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "SCALE.md"
GPUS, IMAGES = (8, 64, 512), (1e6, 1e7, 1e8)
NODE = 8  # GPUs of a node

# Arithmetic of SDXL: train/estimates/flops.py, configs/sdxl.
WEIGHTS = 2_567_463_684
TFLOP_AN_IMAGE = 20.3  # forward and backward at 1024x1024
LATENT_BYTES = 4 * 128 * 128 * 4 + 1_000  # at 1024x1024 in fp32, the default, with headers
# Vendor's data sheet of a Hopper GPU (H100 SXM, H200), in a node with one 400 Gbit/s adapter for each GPU.
PEAK_TFLOPS, NVLINK_GBS, NETWORK_GBS = 989.5, 450.0, 50.0
# Assumed, not measured: the target of docs/PERFORMANCE.md.
MFU = 0.45
# Measured on two cores of a shared machine without a GPU: docs/DATA.md, docs/CACHE.md, docs/RELIABILITY.md.
FIRST_START_CPU_SECONDS_A_MILLION = 19.6  # of 10 million records; 13.3 of one million
LATER_START_SECONDS_AT_10_MILLION = 1.1
INDEX_GB_A_MILLION = 1.6
SAMPLES_A_SECOND_OF_A_WORKER = 1644  # whole samples, through the pipe to the rank
CACHE_CPU_MS_A_IMAGE = 16.6
MICRO_BATCH = 8
# How often a rank of a ring sends each byte that a collective reduces or gathers, without the factor (N-1)/N for N
# ranks.
TIMES_SENT = {"allreduce": 2, "reduce": 1, "reduce_scatter_base": 1, "allgather_base": 1, "broadcast": 1}
GRADIENT_BYTES = {"fp32": 4, "bf16": 2}
MOST_REDUCING_RANKS = 64  # train/engine/deepspeed_config.py: with more, ZeRO 1 and 2 all-reduce


def main() -> int:
    """Print the tables, or compare them with docs/SCALE.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with docs/SCALE.md instead of printing")
    options = parser.parse_args()
    tables = [tabulate_step(), tabulate_traffic(), tabulate_reading(), tabulate_cache(), tabulate_start()]
    if not options.check:
        print("\n\n".join(tables))
        return 0
    document = DOCUMENT.read_text(encoding="utf-8")
    return int(not all(table in document for table in tables))


def compute_rate() -> float:
    """Return the images a second of one GPU at the assumed MFU."""
    return MFU * PEAK_TFLOPS / TFLOP_AN_IMAGE


def compute_sent_bytes(stage: int, accumulation: int, communication: str, ranks: int = 8) -> float:
    """Return the bytes a weight that a rank sends in a step, equal to those it receives, without the factor (N-1)/N.

    Gradients are reduced once a step by stages 0 and 1, and once a micro batch by stages 2 and 3. Weights in bf16 are
    gathered once a step by stages 1 and 2, and in each forward and backward pass by stage 3.
    `python benchmarks/gradients.py` counts the same.
    """
    reduces = {0: "allreduce", 3: "reduce_scatter_base"}.get(stage, "reduce")
    if ranks > MOST_REDUCING_RANKS and stage in (1, 2):
        reduces = "allreduce"
    reduced = TIMES_SENT[reduces] * GRADIENT_BYTES[communication] * (accumulation if stage >= 2 else 1)
    gathered = {0: 0, 1: 1, 2: 1, 3: 2 * accumulation}[stage]
    return reduced + 2 * gathered


def compute_traffic_gb(stage: int, accumulation: int, communication: str, ranks: int = 8) -> float:
    """Return the GB that a rank sends in a step, without the factor (N-1)/N of N ranks."""
    return compute_sent_bytes(stage, accumulation, communication, ranks) * WEIGHTS / 1e9


def tabulate_step() -> str:
    """Tabulate the step time, and the time of communication if nothing overlapped."""
    seconds = MICRO_BATCH / compute_rate()
    rows = ["| GPUs | global batch | images/s | step | ZeRO 1, 2: fp32 | bf16 | ZeRO 3: fp32 | bf16 | hours |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    for gpus in GPUS:
        bandwidth = NVLINK_GBS if gpus <= NODE else NETWORK_GBS
        cases = [(stage, communication) for stage in (2, 3) for communication in GRADIENT_BYTES]
        sent = [compute_traffic_gb(stage, 1, kind, gpus) * (gpus - 1) / gpus / bandwidth for stage, kind in cases]
        hours = ", ".join(f"{images / (gpus * compute_rate()) / 3600:,.3g}" for images in IMAGES)
        rows.append(
            f"| {gpus} | {gpus * MICRO_BATCH:,} | {gpus * compute_rate():,.0f} | {seconds * 1e3:.0f} ms | "
            f"{' | '.join(f'{one * 1e3:.0f} ms' for one in sent)} | {hours} |"
        )
    return "\n".join(rows)


def tabulate_traffic() -> str:
    """Tabulate bytes by stage, type and accumulation, and the bandwidth that takes as long as the arithmetic."""
    seconds = MICRO_BATCH / compute_rate()
    rows = ["| ZeRO | gradients sent in | bytes a weight | GB a step | 4 micro batches | 16 | limit below, GB/s |"]
    rows.append("|---|---|---|---|---|---|---|")
    for stage in range(4):
        for communication in GRADIENT_BYTES:
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
    for gpus in GPUS:
        rate = gpus * compute_rate()
        share = compute_rate() / SAMPLES_A_SECOND_OF_A_WORKER
        rows.append(f"| {gpus} | {rate:,.0f} | {rate * LATENT_BYTES / 1e6:,.0f} MB/s | {share:.1%} |")
    return "\n".join(rows)


def tabulate_cache() -> str:
    """Tabulate the space and the CPU time of the cache."""
    rows = ["| images | latents | CPU of the cache job | on 64 cores |", "|---|---|---|---|"]
    for images in IMAGES:
        hours = images * CACHE_CPU_MS_A_IMAGE / 1e3 / 3600
        rows.append(f"| {images:,.0f} | {images * LATENT_BYTES / 1e12:.3g} TB | {hours:,.3g} h | {hours / 64:.2g} h |")
    return "\n".join(rows)


def tabulate_start() -> str:
    """Tabulate the start-up of the data; networks and process group take constant time besides."""
    rows = ["| images | first start, on rank 0 | index | later start | a plan's memory, every rank |"]
    rows.append("|---|---|---|---|---|")
    for images in IMAGES:
        later = LATER_START_SECONDS_AT_10_MILLION * images / 1e7
        rows.append(
            f"| {images:,.0f} | {images / 1e6 * FIRST_START_CPU_SECONDS_A_MILLION / 60:.2g} min | "
            f"{images / 1e6 * INDEX_GB_A_MILLION:.3g} GB | {later:.2g} s | "
            f"{images * 8 / 1e6:,.0f} MB, {images * 40 / 1e6:,.0f} MB with uneven repeats |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
