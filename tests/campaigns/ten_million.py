"""Starts a run over ten million records and plans its batches: times and memory.

    python tests/campaigns/ten_million.py [--millions 10] [--work DIR] [--only make|measure]

The records are those of benchmarks/data.py, a million over and over under other keys, each million listed by a manifest
part of its own, as ten ranks would have written them. The set and its index take 4 GB a million and are removed in the
end, unless --work names a folder to keep them in. Every start and the plan is measured in a process of its own, beyond
its imports. `--millions 0` takes 20 thousand records.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

MILLION, FEW = 1_000_000, 20_000
CRC_TAIL = len('"00000000"}\n')
NUM_STARTS, NUM_BATCHES = 3, 2000
GLOBAL_BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=10, choices=range(11), metavar="0..10")
    parser.add_argument("--work", type=Path, metavar="DIR", help="make the set here and keep it (a temporary folder)")
    parser.add_argument("--only", choices=("make", "measure", "plan"), help="just this, in --work")
    arguments = parser.parse_args()
    if arguments.only == "plan":  # how this program starts itself
        print(json.dumps(measure_plan(arguments.work)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        if arguments.only != "measure":
            make_millions(folder, arguments.millions)
        if arguments.only != "make":
            print(json.dumps(measure(folder)))


def make_millions(folder: Path, millions: int) -> None:
    """Metadata and manifest of so many millions of records."""
    from data_start import make_set

    first = folder / "first"
    make_set(first, MILLION if millions else FEW)
    text, lines = (first / "metadata.json").read_bytes(), (first / "manifest" / "part-00000.jsonl").read_bytes()
    (folder / "manifest").mkdir(parents=True)
    with open(folder / "metadata.json", "wb") as file:
        file.write(b"{")
        for number in range(max(1, millions)):
            body = text[1:-3].replace(b"img_00", b"img_0%d" % number)
            file.write((b"," if number else b"") + body)
            part = lines.replace(b"img_00", b"img_0%d" % number)
            with open(folder / "manifest" / f"part-{number:05d}.jsonl", "wb") as listed:
                listed.writelines(map(sign_line, part.splitlines(keepends=True)))
        file.write(b"\n}\n")
    shutil.rmtree(first)


def sign_line(line: bytes) -> bytes:
    """A manifest's line with the checksum of what it says now (data/formats/manifest.py)."""
    before = line[:-CRC_TAIL]
    said = before[: before.rindex(b',"crc32":')] + b"}"
    return before + b'"%08x"}\n' % crc32(said)


def measure(folder: Path) -> dict[str, object]:
    """First start, later starts (each the median), plan."""
    from data_start import start_process

    shutil.rmtree(folder / "index", ignore_errors=True)
    first, *later = (start_process(folder) for _ in range(1 + NUM_STARTS))
    later.sort(key=lambda start: start["seconds"])
    command = [sys.executable, __file__, "--only", "plan", "--work", str(folder)]
    plan = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    spread = [round(start["seconds"], 3) for start in later]
    return {"first": first, "later": later[NUM_STARTS // 2], "later_seconds": spread, "plan": json.loads(plan.stdout)}


def measure_plan(folder: Path) -> dict[str, float]:
    """Seconds and added megabytes of a plan, without repeats and with uneven ones, and what it says of itself."""
    from sdxl_trainer.data.index.index import open_record_index, open_sample_index
    from sdxl_trainer.data.loading.loader import build_plan
    from sdxl_trainer.data.order.plan import Position

    index = open_sample_index(folder, open_record_index(folder, [folder / "metadata.json"], []))
    figures: dict[str, float] = {"samples": len(index)}
    uneven = np.random.default_rng(0).choice([0.25, 1.0, 1.5, 3.0], len(index))
    for name, repeats in (("even", None), ("uneven", uneven)):
        before = _read_rss_mb()
        seconds, plan = _time(lambda repeats=repeats: build_plan(index, GLOBAL_BATCH, 0, repeats))
        figures[f"{name}_build_seconds"] = seconds
        figures[f"{name}_first_batch_seconds"] = _time(lambda plan=plan: plan.batch(Position(0, 0)))[0]
        figures[f"{name}_batches_an_epoch"] = plan.num_batches(0)
        figures[f"{name}_resume_at_epoch_50_seconds"] = _time(lambda plan=plan: plan.batch(Position(50, 1)))[0]
        numbers = np.random.default_rng(1).integers(plan.num_batches(50), size=NUM_BATCHES).tolist()
        seconds, _ = _time(lambda plan=plan, numbers=numbers: [plan.batch(Position(50, number)) for number in numbers])
        figures[f"{name}_microseconds_a_batch"] = 1e6 * seconds / NUM_BATCHES
        figures[f"{name}_carried"] = plan.num_carried(50)
        figures[f"{name}_added_mb"] = _read_rss_mb() - before
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return figures


def _time(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def _read_rss_mb() -> float:
    """Memory of this process that is not a mapped file's."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1e3


if __name__ == "__main__":
    main()
