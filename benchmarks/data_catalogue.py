"""Cataloguing of shards that another program wrote: keys, records and places of latents. Part of data.py.

Four readers of the same shards, each in a process of its own: the one that the index uses, the same with the headers of
the latents (as for shards on a store), webdataset's pipeline, which reads all bytes, and webdataset's rules for
grouping alone, over the headers that Python's tarfile finds.
"""

import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import orjson

LATENTS = (4, 128, 128)  # float16: 131 KB, of an image of 1024 px
SAMPLES_A_SHARD = 10


def time_catalogues(folder: Path, number: int) -> dict[str, float]:
    """Measure shards per second and peak memory of each reader, with all files in the page cache."""
    make_shards(folder, number)
    figures = {}
    for name in READERS:
        command = [sys.executable, __file__, name, str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        measured = json.loads(done.stdout.splitlines()[-1])
        assert measured.pop("samples") == number * SAMPLES_A_SHARD
        figures |= {f"{name}_{figure}": value for figure, value in measured.items()}
    return figures


def make_shards(folder: Path, number: int) -> None:
    """Make shards as webdataset's TarWriter does, with a caption, a class and a JSON member beside each latent."""
    import webdataset

    if (folder / f"made-{number}").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    np.savez(file, latents=np.random.default_rng(0).standard_normal(LATENTS).astype(np.float16))
    for shard in range(number):
        with webdataset.TarWriter(str(folder / f"{shard:06d}.tar")) as writer:
            for sample in range(SAMPLES_A_SHARD):
                writer.write(
                    {
                        "__key__": f"{shard:06d}-{sample:04d}",
                        "npz": file.getvalue(),
                        "json": {"width": 1024, "height": 1024, "score": sample / 10},
                        "txt": f"a photo of object {sample}, from shard {shard}",
                        "cls": sample,
                    }
                )
    (folder / f"made-{number}").touch()


def list_by_headers(shards: Sequence[Path], with_headers: bool = False) -> int:
    from sdxl_trainer.data.formats.shard_samples import list_shard_samples

    number = 0
    for shard in shards:
        with open(shard, "rb") as stream:
            number += len(list_shard_samples(str(shard), stream, with_headers))
    return number


def list_by_webdataset(shards: Sequence[Path]) -> int:
    """Read and decode keys, records and captions by webdataset's pipeline."""
    import webdataset

    dataset = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False, empty_check=False)
    return sum(1 for sample in dataset.decode(only=["json", "txt", "cls"]) if sample["json"]["width"] and sample["txt"])


def list_by_grouping(shards: Sequence[Path]) -> int:
    """Group the members that tarfile finds by webdataset's `group_by_keys`, and read all but the latents."""
    from webdataset.tariterators import group_by_keys

    def iterate_files():
        for shard in shards:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    content = tar.extractfile(member)
                    assert content is not None
                    data = member.offset_data if member.name.endswith(".npz") else content.read()
                    yield {"fname": member.name, "data": data, "__url__": str(shard)}
            yield {}

    samples = group_by_keys(iterate_files())
    return sum(1 for sample in samples if orjson.loads(sample["json"])["width"] and sample["txt"].decode())


READERS: dict[str, Callable[[Sequence[Path]], int]] = {
    "catalogue": list_by_headers,
    "catalogue_with_latent_headers": lambda shards: list_by_headers(shards, with_headers=True),
    "catalogue_by_webdataset": list_by_webdataset,
    "catalogue_by_webdatasets_grouping": list_by_grouping,
}


def main() -> None:
    read, folder = READERS[sys.argv[1]], Path(sys.argv[2])
    shards = sorted(folder.glob("*.tar"))
    read(shards[:1])  # imports
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    began, cpu_before = time.perf_counter(), time.process_time()
    samples = read(shards)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_before
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    figures = {"samples": samples, "shards_per_second": len(shards) / seconds}
    figures |= {"peak_mb": peak_mb, "added_mb": peak_mb - before_mb}
    print(json.dumps({**figures, "cpu_ms_a_shard": 1e3 * cpu_seconds / len(shards)}))


if __name__ == "__main__":
    main()
