"""From metadata to batches: the time until the first batch is planned, and the rate of samples after it.

Start: a million records in the first sdxl-trainer's JSON, and as many lines in a manifest. Each start is a process of
its own, measured from the end of its imports. `--records N` measures another number; 10 million have a target too.

Samples: latents of 1024² px in float32, as npz files and in shards, with captions of 20 tags, one of them unique, which
are shuffled and tokenised for both encoders. The vocabulary is an installed open_clip_torch's, or else the tiny
model's, which splits words into three times as many tokens. All files lie in the page cache. Measured in the same run:
bare reads of the same bytes, `np.load`, and webdataset's reader.

Catalogue: the time and memory to list the samples of 10 thousand shards of another program (14 GB).

Store: eight ranks at 22 images/s each on shards of a store that answers after 20 ms: the share of the time that they
wait for data, and the cores that they take (data_store.py).

Checks: the time to check 200 thousand latent files at the start, and to plan as many images without latents.
"""

import argparse
import io
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from data_catalogue import time_catalogues
from data_checks import time_checks
from data_start import make_set, start_process
from data_store import MAX_WAIT_SHARE, measure_store
from harness import ROOT, Figure, print_result

from sdxl_trainer.data.formats.latents import LatentSample, pack_latents
from sdxl_trainer.data.formats.shards import ShardWriter
from sdxl_trainer.data.index.index import Index, open_record_index, open_sample_index
from sdxl_trainer.data.loading.dataset import LatentDataset, SampleSettings
from sdxl_trainer.data.loading.latent_store import LatentStore
from sdxl_trainer.data.loading.loader import build_plan, iterate_batches, iterate_specs
from sdxl_trainer.data.loading.micro_batch import MicroBatch
from sdxl_trainer.data.order.plan import Position
from sdxl_trainer.data.text.captions import CaptionSettings
from sdxl_trainer.data.text.tokens import END, Tokenizers, find_installed_vocabulary, load_tokenizer

MILLION = 1_000_000
BUCKET = (1024, 1024)
NUM_SAMPLES, QUICK_SAMPLES, SAMPLES_A_SHARD = 4000, 600, 500
NUM_FILES, QUICK_FILES = 200_000, 5000
NUM_SHARDS, QUICK_SHARDS = 10_000, 100
MICRO_BATCH, GLOBAL_BATCH = 4, 64
TURNS = 3  # of each measurement, of which the best counts
WORDS = (
    "1girl solo long hair blue eyes smile open mouth blonde school uniform outdoors sky cloud day standing full "
    "body white shirt skirt tree water flower night city street window light shadow hand hat bag ribbon dress black "
    "red rain green masterpiece best quality looking at viewer sitting holding"
).split()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="end within a minute: 20 thousand records, 600 samples")
    parser.add_argument("--records", type=int, default=MILLION, help="number of records of the start (1 million)")
    parser.add_argument(
        "--only", choices=("start", "samples", "checks", "catalogue", "store"), help="measure only this part"
    )
    parser.add_argument("--shards", type=int, default=NUM_SHARDS, help="shards of the catalogue (10 thousand)")
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="make the input here and keep it for the next run (default: a temporary folder)",
    )
    arguments = parser.parse_args()
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        if arguments.only in (None, "start"):
            figures |= measure_start(work / "start", 20_000 if arguments.quick else arguments.records)
        if arguments.only in (None, "samples"):
            figures |= measure_samples(work / "samples", QUICK_SAMPLES if arguments.quick else NUM_SAMPLES)
        if arguments.only in (None, "checks"):
            times = time_checks(work / "checks", QUICK_FILES if arguments.quick else NUM_FILES)
            figures |= {name: Figure(value, "<=") for name, value in times.items()}
        if arguments.only in (None, "catalogue"):
            number = QUICK_SHARDS if arguments.quick else arguments.shards
            figures |= measure_catalogue(work / f"catalogue-{number}", number)
        if arguments.only in (None, "store"):
            figures |= measure_ranks(work / "samples", work / "store", arguments.quick)
    return print_result("data", figures)


def measure_start(folder: Path, number: int) -> dict[str, Figure]:
    """Measure starts with `number` records made under `folder`. Numbers other than 1 and 10 million have no targets."""
    done = folder / f"made-{number}"
    if not done.exists():
        make_set(folder, number)
        done.touch()
    shutil.rmtree(folder / "index", ignore_errors=True)
    first, *later = (start_process(folder) for _ in range(4))
    later.sort(key=lambda result: result["seconds"])
    million, tens = number == MILLION, number == 10 * MILLION
    return {
        "first_start_cpu_seconds": Figure(first["cpu_seconds"], "<=", 15 if million else None),
        "first_start_seconds": Figure(first["seconds"], "<="),
        "first_start_peak_mb": Figure(first["peak_mb"], "<=", 1000 if million else None),
        "later_start_seconds": Figure(later[1]["seconds"], "<=", 1.0 if million else 6.0 if tens else None),
        "later_start_added_mb": Figure(later[1]["added_mb"], "<=", 150 if million else None),
        "later_start_peak_mb": Figure(later[1]["peak_mb"], "<="),
        "reference_loop_cpu_seconds": Figure(first["reference_seconds"], "<="),
    }


def measure_catalogue(folder: Path, number: int) -> dict[str, Figure]:
    """Measure the readers of foreign shards. The index's reader must be no slower than webdataset's pipeline."""
    measured = time_catalogues(folder, number)
    figures = {name: Figure(value, ">=" if "per_second" in name else "<=") for name, value in measured.items()}
    ratio = measured["catalogue_shards_per_second"] / measured["catalogue_by_webdataset_shards_per_second"]
    return figures | {"catalogue_over_webdataset": Figure(ratio, ">=", 1.0)}


def measure_ranks(folder: Path, work: Path, quick: bool) -> dict[str, Figure]:
    """Measure eight ranks that read from a store with latency, and from a disk."""
    number = QUICK_SAMPLES if quick else NUM_SAMPLES
    shards = [Path(shard) for shard in make_samples(folder, number)]
    targets = {"store_wait_share_of_slowest_rank": MAX_WAIT_SHARE}
    found = measure_store(shards, work, 5.0 if quick else 60.0)
    return {name: Figure(value, "<=", targets.get(name)) for name, value in found.items()}


def measure_samples(folder: Path, number: int) -> dict[str, Figure]:
    """Measure samples per second in one process, in workers, and of other readers."""
    shards = make_samples(folder, number)
    files = sorted((folder / "npz").glob("*.npz"))
    indexes = {
        "shards": open_sample_index(folder / "packed", open_record_index(folder / "packed", shards, [])),
        "npz": open_sample_index(folder, open_record_index(folder, [folder / "metadata.json"], [])),
    }
    tokenizers = load_tokenizers()
    dataset = build_dataset(indexes["shards"], folder / "packed", tokenizers)
    rates = {
        "latents_from_shards": rate(lambda: read_latents(indexes["shards"], folder / "packed"), number),
        "latents_from_npz": rate(lambda: read_latents(indexes["npz"], folder), number),
        "whole_samples": rate(lambda: drain(iterate(dataset, 0), number), number),
        "bare_reads_of_shards": rate(lambda: read_bare(indexes["shards"], folder / "packed"), number),
        "bare_reads_of_npz": rate(lambda: [path.read_bytes() for path in files], number),
        "np_load": rate(lambda: [np.load(path)["latents"] for path in files], number),
        "webdataset_in_order": rate(lambda: read_webdataset(shards), number),
    }
    one, four = (read_by_workers(dataset, workers, number) for workers in (1, 4))
    spare_cores = (os.cpu_count() or 1) > 4
    targets = {"latents_from_npz": 4000, "whole_samples": 2500}
    return {
        **{f"{name}_per_second": Figure(value, ">=", targets.get(name)) for name, value in rates.items()},
        "tokens_per_caption": Figure(float(np.mean([tokenizers[0].count_tokens(text) for text in make_captions(100)]))),
        "whole_samples_per_second_1_worker": Figure(one["rate"]),
        "whole_samples_per_second_4_workers": Figure(four["rate"]),
        "4_workers_over_1": Figure(four["rate"] / one["rate"], ">=", 1.0 if spare_cores else None),
        "worker_private_mb": Figure(four["private_mb"], "<=", 30),
        "worker_shared_and_private_mb": Figure(four["pss_mb"], "<="),
    }


def make_captions(number: int) -> list[str]:
    """Make captions of 20 tags: 10 of two frequent words, 9 of a rarer word, and a unique one, as names are."""
    rng, rarer = random.Random(0), [first + second for first in WORDS for second in WORDS]
    weights = [1 / rank for rank in range(1, len(rarer) + 1)]
    captions = []
    for row in range(number):
        tags = [" ".join(rng.sample(WORDS, 2)) for _ in range(10)] + rng.choices(rarer, weights, k=9)
        captions.append(", ".join([*tags, f"artist{row:06d}"]))
    return captions


def make_samples(folder: Path, number: int) -> list[Path | str]:
    """Make latents as npz files with metadata, and the same latents in shards. Return the shards."""
    import orjson

    rng, shards = np.random.default_rng(0), []
    (folder / "npz").mkdir(parents=True, exist_ok=True)
    records = {
        f"s{row:06d}": {"caption": text, "image_path": f"npz/s{row:06d}.npz"}
        for row, text in enumerate(make_captions(number))
    }
    (folder / "metadata.json").write_bytes(orjson.dumps(records))
    writer = None
    for row, (key, record) in enumerate(records.items()):
        if row % SAMPLES_A_SHARD == 0:
            if writer:
                writer.close()
            shards.append(folder / "packed" / f"{row // SAMPLES_A_SHARD:05d}.tar")
            writer = ShardWriter(shards[-1])
        sample = LatentSample(
            latents=rng.standard_normal((4, 128, 128), np.float32),
            original_size=(1500, 1000),
            crop_ltrb=(0, 0, *BUCKET),
        )
        content = pack_latents(sample)
        (folder / "npz" / f"{key}.npz").write_bytes(content)
        assert writer is not None, "the first row opens a shard"
        writer.append(key, orjson.dumps({"caption": record["caption"]}), content)
    if writer:
        writer.close()
    return shards


def load_tokenizers() -> Tokenizers:
    folder = ROOT / "configs" / "tiny"
    sources = [find_installed_vocabulary() or folder / name for name in ("tokenizer", "tokenizer_2")]
    return Tokenizers(load_tokenizer(sources[0], END), load_tokenizer(sources[1], "!"))


def build_dataset(index: Index, folder: Path, tokenizers: Tokenizers) -> LatentDataset:
    settings = SampleSettings(seed=0, max_tokens=75, caption=CaptionSettings(shuffle=True))
    return LatentDataset(index, folder, tokenizers, settings)


def iterate(dataset: LatentDataset, num_workers: int) -> Iterator[MicroBatch]:
    """Yield shuffled micro batches, as training gets them."""
    specs = iterate_specs(build_plan(dataset.index, GLOBAL_BATCH, 0), Position(0, 0), 0, 1, MICRO_BATCH)
    return iterate_batches(dataset, specs, num_workers)


def drain(batches: Iterator[MicroBatch], number: int) -> None:
    for batch in islice(batches, number // MICRO_BATCH):
        assert not batch.bad, batch.bad


def list_rows(index: Index) -> Iterator[list[int]]:
    """Yield the rows of each micro batch of one epoch, in the plan's order."""
    specs = iterate_specs(build_plan(index, GLOBAL_BATCH, 0), Position(0, 0), 0, 1, MICRO_BATCH)
    return (spec.rows.tolist() for spec in islice(specs, len(index) // MICRO_BATCH))


def read_latents(index: Index, folder: Path) -> None:
    """Read and check the latents of an epoch in shuffled order, without captions."""
    store = LatentStore(folder)
    for rows in list_rows(index):
        for sample in store.read([index.row(row) for row in rows], BUCKET):
            assert isinstance(sample, LatentSample), sample


def read_bare(index: Index, folder: Path) -> None:
    """Read the bytes of the same latents in the same order, without checking them."""
    descriptors: dict[str, int] = {}
    places = [index.row(row) for rows in list_rows(index) for row in rows]
    for place in places:
        if place["file"] not in descriptors:
            descriptors[place["file"]] = os.open(folder / place["file"], os.O_RDONLY)
        os.pread(descriptors[place["file"]], place["bytes"], place["offset"])
    for descriptor in descriptors.values():
        os.close(descriptor)


def read_webdataset(shards: Sequence[Path | str]) -> None:
    """Read latents by webdataset's pipeline, which reads shards from end to end."""
    # Workers import this file too, and their memory is measured.
    import webdataset

    for sample in webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False):
        assert np.load(io.BytesIO(sample["npz"]))["latents"].shape == (4, 128, 128)


def read_by_workers(dataset: LatentDataset, num_workers: int, number: int) -> dict[str, float]:
    """Measure whole samples per second once the workers run, and the mean memory of a worker in MB."""
    batches: Any = iterate(dataset, num_workers)
    drain(batches, 8 * num_workers * MICRO_BATCH)
    began = time.perf_counter()
    drain(batches, number)
    seconds = time.perf_counter() - began
    memory = [_read_memory(worker.pid) for worker in batches._workers]
    return {"rate": number / seconds, **{name: float(np.mean([one[name] for one in memory])) for name in memory[0]}}


def rate(read: Callable[[], object], number: int) -> float:
    """Return the samples per second of the best of some turns."""
    best = float("inf")
    for _ in range(TURNS):
        began = time.perf_counter()
        read()
        best = min(best, time.perf_counter() - began)
    return number / best


def _read_memory(pid: int) -> dict[str, float]:
    fields = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kilobytes = {words[0]: int(words[1]) for words in fields}
    private = kilobytes["Private_Clean:"] + kilobytes["Private_Dirty:"]
    return {"private_mb": private / 1e3, "pss_mb": kilobytes["Pss:"] / 1e3}


if __name__ == "__main__":
    sys.exit(main())
