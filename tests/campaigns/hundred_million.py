"""Starts a run over a hundred million records: time, memory and disk of the index, and the order of batches.

    python tests/campaigns/hundred_million.py --work DIR [--records 100000000] [--only PHASE] [--keep]

The phases, each in a process of its own, are resumed where a killed campaign stopped:

make     Parquet files of a million records in the order of their keys, and the manifest as columns
first    the first start: index of records, index of samples, plan, first batch
later    three later starts
ranks    8 ranks with 2 workers each, which hold the plan at once: their memory that is not a mapped file's
order    batches a second of the plan, and reads of whole rows
growth   1 % more records and latents: what their start takes beside the first one

The set is removed at the end unless --keep is given; `DIR/figures.json` stays. 100 million records take 45 GB of disk.
"""

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MILLION = 1_000_000
FIGURES = "figures.json"
BUCKETS = np.array([(1024, 1024), (832, 1216), (1216, 832), (768, 1344), (896, 1152)])
NUM_WORDS, WORDS_EACH = 5000, 14
SHARD_SAMPLES, SAMPLE_BYTES = 4000, 263_680
RANKS, WORKERS = 8, 2
GLOBAL_BATCH, NUM_BATCHES, NUM_ROWS = 256, 5000, 2000
NUM_STARTS = 3
# Figures of the whole campaign: (phase, figure, most or least, value).
TARGETS = [
    ("first", "cpu_seconds", "most", 1800),
    ("first", "peak_own_mb", "most", 4096),
    ("first", "index_bytes_a_record", "most", 300),
    ("make", "manifest_bytes_an_item", "most", 100),
    ("later", "seconds", "most", 10),
    ("later", "own_mb", "most", 300),
    ("order", "batches_a_second", "least", 1000),
    ("growth", "share_of_first_start", "most", 0.05),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the set and the figures")
    parser.add_argument("--records", type=int, default=100 * MILLION, metavar="N")
    parser.add_argument("--only", choices=list(PHASES), metavar="PHASE", help="just this phase")
    parser.add_argument("--keep", action="store_true", help="keep the set")
    parser.add_argument("--inside", choices=PHASES, help=argparse.SUPPRESS)  # how the program starts itself
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(PHASES[arguments.inside](arguments.work, arguments.records)))
        return 0
    arguments.work.mkdir(parents=True, exist_ok=True)
    figures = load_figures(arguments.work, arguments.records)
    for phase in [arguments.only] if arguments.only else PHASES:
        if phase not in figures:
            print(f"{time.strftime('%H:%M:%S')} {phase}", file=sys.stderr, flush=True)
            figures[phase] = start_phase(phase, arguments.work, arguments.records)
            (arguments.work / FIGURES).write_text(json.dumps(figures, indent=1))
    if not arguments.keep and not arguments.only:
        for name in ("data", "cache"):
            shutil.rmtree(arguments.work / name, ignore_errors=True)
    missed = list_missed(figures)
    print(json.dumps({"figures": figures, "missed": missed}))
    return 1 if missed else 0


def load_figures(work: Path, records: int) -> dict[str, Any]:
    """The figures of the phases that are done, of a campaign with as many records."""
    file = work / FIGURES
    figures = json.loads(file.read_text()) if file.is_file() else {}
    return figures if figures.get("records") == records else {"records": records}


def list_missed(figures: dict[str, Any]) -> list[str]:
    """The targets that the figures miss."""
    missed = []
    for phase, name, kind, limit in TARGETS:
        value = figures.get(phase, {}).get(name)
        if value is not None and (value > limit if kind == "most" else value < limit):
            missed.append(f"{phase}.{name}: {value:.4g}, at {kind} {limit:g}")
    return missed


def start_phase(phase: str, work: Path, records: int) -> dict[str, Any]:
    """The figures of a phase in a process of its own."""
    command = [sys.executable, __file__, "--work", str(work), "--records", str(records), "--inside", phase]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=build_environment())
    return json.loads(done.stdout.splitlines()[-1])


def build_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def make(work: Path, records: int) -> dict[str, float]:
    """Metadata and manifest. Files that exist are kept."""
    began, cpu = time.perf_counter(), time.process_time()
    for number, start in enumerate(range(0, records, MILLION)):
        make_part(work, number, np.arange(start, min(start + MILLION, records)))
        print(f"{number + 1} of {-(-records // MILLION)} million records made", file=sys.stderr, flush=True)
    metadata, manifest = (measure_folder(work / name) for name in ("data", "cache/manifest"))
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "metadata_bytes_a_record": metadata / records,
        "manifest_bytes_an_item": manifest / records,
    }


def make_part(work: Path, number: int, rows: np.ndarray) -> None:
    """One Parquet file of records and one of the manifest's parts."""
    from sdxl_trainer.data.files import create_folder
    from sdxl_trainer.data.formats.manifest_columns import write_columns

    create_folder(work / "data")
    create_folder(work / "cache" / "manifest")
    rng = np.random.default_rng(number)
    sizes = rng.integers(512, 2048, (len(rows), 2))
    metadata = work / "data" / f"records-{number:05d}.parquet"
    if not metadata.is_file():
        temporary = metadata.with_suffix(".tmp")
        pq.write_table(build_records(rows, sizes, rng), temporary, compression="zstd", row_group_size=1 << 16)
        temporary.rename(metadata)
    part = work / "cache" / "manifest" / f"part-{number:05d}.parquet"
    if not part.is_file():
        write_columns(part, build_manifest(rows, sizes, number).to_batches(1 << 16))


def join_texts(*columns: Any) -> pa.Array:
    """The texts of each row in one, with the last argument between them."""
    return pc.call_function("binary_join_element_wise", [*columns[:-1], pa.scalar(columns[-1])])


def name_rows(pattern: str, rows: np.ndarray, digits: int = 9) -> pa.Array:
    """`pattern` with each row's number in place of `*`."""
    numbers = pc.call_function("utf8_lpad", [pa.array(rows).cast(pa.string())], pc.PadOptions(digits, "0"))
    head, tail = pattern.split("*")
    return join_texts(pa.scalar(head), numbers, pa.scalar(tail), "")


def build_records(rows: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> pa.Table:
    words = pa.array([f"{random.Random(word).choice('bcdfgklmnprst')}ord{word}" for word in range(NUM_WORDS)])
    drawn = [words.take(pa.array(rng.integers(NUM_WORDS, size=len(rows)))) for _ in range(WORDS_EACH)]
    folders = name_rows("images/*/", rows // 1000, 6)
    return pa.table(
        {
            "image_path": join_texts(folders, name_rows("img_*.jpg", rows), ""),
            "caption": join_texts(*drawn, ", "),
            "artist": name_rows("artist *", rows % 977, 3),
            "original_width": sizes[:, 0],
            "original_height": sizes[:, 1],
            "aesthetic_score": rng.random(len(rows)).round(3),
        }
    )


def build_manifest(rows: np.ndarray, sizes: np.ndarray, number: int) -> pa.Table:
    """The manifest's entries in the order in which a rank wrote them: bucket after bucket, shard after shard."""
    from sdxl_trainer.data.formats.manifest import FIRST_NUMBER
    from sdxl_trainer.data.formats.manifest_columns import SCHEMA

    rng = np.random.default_rng([1, number])
    order = rng.permutation(len(rows))
    order = order[np.argsort(rows[order] % len(BUCKETS), kind="stable")]
    rows, sizes = rows[order], sizes[order]
    bucket = BUCKETS[rows % len(BUCKETS)]
    place = np.arange(len(rows)) % SHARD_SAMPLES
    shards = [
        f"shards/{shard:06d}.tar" for shard in range(number * 1000, number * 1000 + 1 + len(rows) // SHARD_SAMPLES)
    ]
    columns: dict[str, Any] = {
        "key": name_rows("img_*", rows),
        "file": pa.array(shards).take(pa.array(np.arange(len(rows)) // SHARD_SAMPLES)),
        "offset": place * SAMPLE_BYTES + 1024,
        "bytes": np.full(len(rows), 262_600),
        "sha256": build_digests(rng, len(rows)),
        "resized_width": bucket[:, 0] + 16,
        "resized_height": bucket[:, 1],
        "identity": pa.array(["0" * 16] * len(rows)),
        "source_path": join_texts(name_rows("/data/images/*/", rows // 1000, 6), name_rows("img_*.jpg", rows), ""),
        "source_bytes": rng.integers(50_000, 3_000_000, len(rows)),
        "source_mtime_ns": 1_700_000_000_000_000_000 + rng.integers(1 << 55, size=len(rows)),
        "source_sha256": build_digests(rng, len(rows)),
        "flipped": pa.array([False] * len(rows)),
        "adopted": pa.array([False] * len(rows)),
        "listed_ns": FIRST_NUMBER + np.arange(len(rows)),
    }
    for side, name in enumerate(("width", "height")):
        columns |= {f"bucket_{name}": bucket[:, side], f"original_size_{name}": sizes[:, side]}
    edges = ("left", np.full(len(rows), 8)), ("top", 0 * rows), ("right", bucket[:, 0] + 8), ("bottom", bucket[:, 1])
    columns |= {f"crop_{name}": edge.astype(float) for name, edge in edges}
    arrays = [
        pa.nulls(len(rows), field.type) if field.name not in columns else pa.array(columns[field.name]).cast(field.type)
        for field in SCHEMA
    ]
    return pa.table(arrays, SCHEMA)


def build_digests(rng: np.random.Generator, number: int) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), number, [None, pa.py_buffer(rng.bytes(32 * number))])


def open_index(work: Path) -> Any:
    from sdxl_trainer.data.index.index import open_record_index, open_sample_index

    return open_sample_index(work / "cache", open_record_index(work / "cache", [work / "data" / "*.parquet"], []))


def open_plan(work: Path) -> Any:
    """The index and its plan, with the first micro batch computed."""
    from sdxl_trainer.data.loading.loader import build_plan, iterate_specs
    from sdxl_trainer.data.order.plan import Position

    index = open_index(work)
    plan = build_plan(index, GLOBAL_BATCH, 0)
    next(iterate_specs(plan, Position(0, 0), 0, 1, 4))
    return index, plan


def start(work: Path) -> dict[str, float]:
    """Time and memory of a start beyond its imports."""
    import sdxl_trainer.data.index.index
    import sdxl_trainer.data.loading.loader  # noqa: F401

    before, began, cpu = read_own_mb(), time.perf_counter(), time.process_time()
    watch = MemoryWatch()
    opened = open_plan(work)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    figures = {"seconds": seconds, "cpu_seconds": cpu, "peak_own_mb": watch.stop() - before}
    figures |= {"own_mb": read_own_mb() - before, "samples": len(opened[0])}
    return figures | {"peak_with_mapped_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


class MemoryWatch:
    """The most memory of this process that is not a mapped file's, looked at 20 times a second."""

    def __init__(self) -> None:
        import threading

        self._peak, self._done = read_own_mb(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self._peak = max(self._peak, read_own_mb())

    def stop(self) -> float:
        """The most megabytes so far."""
        self._done.set()
        self._thread.join()
        return max(self._peak, read_own_mb())


def first(work: Path, records: int) -> dict[str, float]:
    """The first start, and the size of the index."""
    shutil.rmtree(work / "cache" / "index", ignore_errors=True)
    figures = start(work)
    assert figures["samples"] == records, figures
    index_bytes = measure_folder(work / "cache" / "index")
    texts = measure_texts(work)
    return figures | {
        "index_bytes_a_record": (index_bytes - texts) / records,
        "text_bytes_a_record": texts / records,
        "set_gb": measure_folder(work) / 1e9,
    }


def measure_texts(work: Path) -> int:
    """The bytes of the compressed records, which hold the captions."""
    return open_index(work).records.table.column("texts").nbytes


def later(work: Path, records: int) -> dict[str, float]:
    """The median of several later starts."""
    starts = [start_anew(work) for _ in range(NUM_STARTS)]
    return sorted(starts, key=lambda figures: figures["seconds"])[NUM_STARTS // 2]


def start_anew(work: Path) -> dict[str, float]:
    """Figures of `start` in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import json, hundred_million as campaign;"
    code += f" print(json.dumps(campaign.start(campaign.Path({str(work)!r}))))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=build_environment()
    )
    return json.loads(done.stdout.splitlines()[-1])


def ranks(work: Path, records: int) -> dict[str, float]:
    """Memory of 8 ranks with 2 workers, each a process that holds the index; the ranks hold the plan too."""
    import sdxl_trainer.data.index.index
    import sdxl_trainer.data.loading.loader  # noqa: F401

    context = get_context("fork")
    is_read, figures = context.Barrier(RANKS * (1 + WORKERS)), context.Queue()
    kinds = ["rank"] * RANKS + ["worker"] * RANKS * WORKERS
    processes = [context.Process(target=hold_index, args=(kind, work, is_read, figures)) for kind in kinds]
    for process in processes:
        process.start()
    added = [figures.get() for _ in processes]
    for process in processes:
        process.join()
    own = {kind: [megabytes for name, megabytes in added if name == kind] for kind in ("rank", "worker")}
    return {
        "own_mb_of_a_rank": max(own["rank"]),
        "own_mb_of_a_worker": max(own["worker"]),
        "own_mb_of_all": sum(own["rank"] + own["worker"]),
    }


def hold_index(kind: str, work: Path, is_read: Any, figures: Any) -> None:
    """Open the index, and the plan on a rank, read from them, and wait until all processes have."""
    before, rng = read_own_mb(), np.random.default_rng(os.getpid())
    index, plan = open_plan(work)
    if kind == "rank":
        draw_batches(plan, rng, 200)
    else:
        del plan
        index = pickle.loads(pickle.dumps(index))
        for row in rng.integers(len(index), size=500).tolist():
            index.row(row)
    is_read.wait()
    figures.put((kind, read_own_mb() - before))


def order(work: Path, records: int) -> dict[str, float]:
    """Batches a second of a plan, and whole rows a second."""
    index, plan = open_plan(work)
    rng = np.random.default_rng(0)
    batches, batch_cpu = time_calls(lambda: draw_batches(plan, rng, NUM_BATCHES))
    rows = rng.integers(len(index), size=NUM_ROWS).tolist()
    seconds, row_cpu = time_calls(lambda: [index.row(row) for row in rows])
    return {
        "batches_a_second": NUM_BATCHES / batches,
        "microseconds_of_cpu_a_batch": 1e6 * batch_cpu / NUM_BATCHES,
        "rows_a_second": NUM_ROWS / seconds,
        "microseconds_of_cpu_a_row": 1e6 * row_cpu / NUM_ROWS,
    }


def draw_batches(plan: Any, rng: np.random.Generator, number: int) -> None:
    from sdxl_trainer.data.order.plan import Position

    for index in rng.integers(plan.num_batches(3), size=number).tolist():
        plan.batch(Position(3, index))


def time_calls(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds and CPU seconds of a call."""
    began, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - cpu


def growth(work: Path, records: int) -> dict[str, float]:
    """Add 1 % of the records and their latents, and start again."""
    number, added = -(-records // MILLION), max(1, records // 100)
    make_part(work, number, np.arange(records, records + added))
    figures = start_anew(work)
    first_cpu = load_figures(work, records).get("first", {}).get("cpu_seconds")
    return figures | ({"share_of_first_start": figures["cpu_seconds"] / first_cpu} if first_cpu else {})


def measure_folder(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def read_own_mb() -> float:
    """Memory of this process that is not a mapped file's."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1e3


PHASES = {"make": make, "first": first, "later": later, "ranks": ranks, "order": order, "growth": growth}

if __name__ == "__main__":
    sys.exit(main())
