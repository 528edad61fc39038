"""The start of a run, from metadata and a manifest to the first batch, in a process of its own. Part of data.py."""

import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orjson

BUCKETS = [(1024, 1024), (832, 1216), (1216, 832), (768, 1344), (896, 1152)]
NUM_TAGS, TAGS_EACH = 5000, 25
NUM_CAPTIONS = 50_000  # different captions; larger sets repeat them


def make_set(folder: Path, number: int) -> None:
    """Make `metadata.json` in the first sdxl-trainer's format, and a manifest in another order, as ranks write it."""
    from sdxl_trainer.data.formats.manifest import ManifestEntry, ManifestWriter

    folder.mkdir(parents=True, exist_ok=True)
    rng, sides = random.Random(0), np.random.default_rng(0).integers(512, 2048, (number, 2)).tolist()
    tags = [f"tag_{tag}" for tag in range(NUM_TAGS)]
    captions = [", ".join(rng.choices(tags, k=TAGS_EACH)) for _ in range(min(number, NUM_CAPTIONS))]
    with open(folder / "metadata.json", "wb") as file:
        file.write(b"{")
        for row in range(number):
            record = {
                "image_path": f"images/{row // 1000:05d}/img_{row:08d}.jpg",
                "tags": captions[row % NUM_CAPTIONS],
                "artist": f"artist {row % 977}",
                "original_size": sides[row],
                "aesthetic_score": round(rng.random() * 10, 3),
            }
            file.write(b"%s\n%s: %s" % (b"," if row else b"", orjson.dumps(f"img_{row:08d}"), orjson.dumps(record)))
        file.write(b"\n}\n")
    writer = ManifestWriter(folder, 0)
    for row in np.random.default_rng(1).permutation(number).tolist():
        bucket = BUCKETS[row % len(BUCKETS)]
        place = {"bucket": bucket, "original_size": (1500, 1000), "resized": bucket, "crop": (0, 0, *bucket)}
        source = {"source_path": f"/x/img_{row:08d}.jpg", "source_bytes": 1, "source_mtime_ns": 1}
        writer.append(
            ManifestEntry(
                key=f"img_{row:08d}",
                file=f"img_{row:08d}.npz",
                bytes=262_600,
                sha256=f"{row:064x}",
                identity="0",
                **place,
                **source,
                source_sha256=f"{row:064x}",
            )
        )
    writer.close()


def start_process(folder: Path) -> dict[str, float]:
    """Measure `start` in a process of its own."""
    command = [sys.executable, __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def start(folder: Path) -> dict[str, float]:
    """Open the index, build the plan and its first micro batch. Return time and memory beyond the imports."""
    from sdxl_trainer.data.index.index import open_record_index, open_sample_index
    from sdxl_trainer.data.loading.loader import build_plan, iterate_specs
    from sdxl_trainer.data.order.plan import Position

    before_mb, began, cpu = _peak_mb(), time.perf_counter(), time.process_time()
    index = open_sample_index(folder, open_record_index(folder, [folder / "metadata.json"], []))
    next(iterate_specs(build_plan(index, 64, 0), Position(0, 0), 0, 1, 4))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak_mb, began = _peak_mb(), time.process_time()
    # A fixed loop shows how fast the machine is at the moment.
    sum(number * number for number in range(5_000_000))
    reference = time.process_time() - began
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mb": peak_mb,
        "added_mb": peak_mb - before_mb,
        "reference_seconds": reference,
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    print(json.dumps(start(Path(sys.argv[1]))))
