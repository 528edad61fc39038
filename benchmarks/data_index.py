"""From metadata to the first batch plan: a first start that builds the index, and later starts that map it.

A million records in the seed's JSON, and as many lines in a manifest, are made by this script. Each start is a process
of its own, measured from the end of its imports. `--records N` measures another number; 10 million have a target too.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import orjson
from harness import Figure, finish

BUCKETS = [(1024, 1024), (832, 1216), (1216, 832), (768, 1344), (896, 1152)]
NUM_TAGS, TAGS_EACH = 5000, 25
MILLION = 1_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 thousand records; the figures are rough")
    parser.add_argument("--records", type=int, default=MILLION, help="how many (a million)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep input and output here (a temporary folder)")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.start)))
        return 0
    number = 20_000 if arguments.quick else arguments.records
    with tempfile.TemporaryDirectory() as temporary:
        return finish("data_index", measure(arguments.work or Path(temporary), number))


def measure(folder: Path, number: int) -> dict[str, Figure]:
    """The figures of `number` records made under `folder`; those without a stated target only inform."""
    make_set(folder, number)
    first, *later = (start_process(folder) for _ in range(4))
    later.sort(key=lambda result: result["seconds"])
    million, tens = number == MILLION, number == 10 * MILLION
    return {
        "first_start_cpu_seconds": Figure(first["cpu_seconds"], "<=", 15 if million else None),
        "first_start_peak_mb": Figure(first["peak_mb"], "<=", 1000 if million else None),
        "later_start_seconds": Figure(later[1]["seconds"], "<=", 1.0 if million else 6.0 if tens else None),
        "later_start_added_mb": Figure(later[1]["added_mb"], "<=", 150 if million else None),
        "later_start_peak_mb": Figure(later[1]["peak_mb"], "<="),
        "reference_loop_cpu_seconds": Figure(first["reference_seconds"], "<="),
    }


def make_set(folder: Path, number: int) -> None:
    """`metadata.json` and a cache's manifest, in another order, as several ranks would write it."""
    from sdxl_trainer.data.manifest import Entry, ManifestWriter

    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    tags = [f"tag_{tag}" for tag in range(NUM_TAGS)]
    with open(folder / "metadata.json", "wb") as file:
        file.write(b"{")
        for row in range(number):
            record = {
                "image_path": f"images/{row // 1000:05d}/img_{row:08d}.jpg",
                "tags": ", ".join(rng.choices(tags, k=TAGS_EACH)),
                "artist": f"artist {row % 977}",
                "original_size": [rng.randrange(512, 2048), rng.randrange(512, 2048)],
                "aesthetic_score": round(rng.random() * 10, 3),
            }
            file.write((b",\n" if row else b"\n") + orjson.dumps(f"img_{row:08d}") + b": " + orjson.dumps(record))
        file.write(b"\n}\n")
    writer = ManifestWriter(folder, 0)
    for row in rng.sample(range(number), number):
        bucket = BUCKETS[row % len(BUCKETS)]
        place = {"bucket": bucket, "original_size": (1500, 1000), "resized": bucket, "crop": (0, 0, *bucket)}
        source = {"source_path": f"/x/img_{row:08d}.jpg", "source_bytes": 1, "source_mtime_ns": 1}
        writer.append(
            Entry(f"img_{row:08d}", f"img_{row:08d}.npz", 262_600, f"{row:064x}", identity="0", **place, **source,
                  source_sha256=f"{row:064x}")
        )  # fmt: skip
    writer.close()


def start_process(folder: Path) -> dict[str, float]:
    """What `start` measures in a process of its own."""
    command = [sys.executable, __file__, "--start", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def start(folder: Path) -> dict[str, float]:
    """Index, plan and first micro batch's spec; times and memory beyond the imports."""
    from sdxl_trainer.data.index import open_latent_index, open_record_index
    from sdxl_trainer.data.loader import build_plan, iterate_specs

    before_mb, began, cpu = _peak_mb(), time.perf_counter(), time.process_time()
    index = open_latent_index(folder, open_record_index(folder, [folder / "metadata.json"], []))
    next(iterate_specs(build_plan(index, 64, 0), (0, 0), 0, 1, 4))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak_mb, began = _peak_mb(), time.process_time()
    sum(number * number for number in range(5_000_000))  # how fast this machine is just now
    reference = time.process_time() - began
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak_mb, "added_mb": peak_mb - before_mb,
            "reference_seconds": reference}  # fmt: skip


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    sys.exit(main())
