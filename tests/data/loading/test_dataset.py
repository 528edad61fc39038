"""Micro batches are read from the cache alone, hold all network inputs, and do not depend on the workers."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_tokenizers import load_tiny_tokenizers

from sdxl_trainer.data.formats.latents import LatentSample, write_latents
from sdxl_trainer.data.formats.manifest import ManifestEntry, ManifestWriter, read_latest
from sdxl_trainer.data.formats.shards import ShardWriter
from sdxl_trainer.data.index.index import open_record_index, open_sample_index
from sdxl_trainer.data.loading.counts import count_tokens, draw_captions
from sdxl_trainer.data.loading.dataset import LatentDataset, SampleSettings
from sdxl_trainer.data.loading.loader import build_plan, iterate_batches, iterate_specs
from sdxl_trainer.data.loading.micro_batch import MicroBatch, MicroSpec
from sdxl_trainer.data.order.plan import Position
from sdxl_trainer.data.text.captions import CaptionSettings

BUCKETS = [(64, 96), (96, 64)]
NUM_SAMPLES = 12
COLOURS = ["red", "green", "blue", "yellow"]


def get_latents(number: int) -> np.ndarray:
    width, height = BUCKETS[number % 2]
    return np.random.default_rng(number).standard_normal((4, height // 8, width // 8)).astype(np.float16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Build a cache of twelve latents of two buckets with a manifest, and captions in a metadata file."""
    folder = tmp_path_factory.mktemp("cache")
    captions = {f"s{number}": {"caption": f"a {COLOURS[number % 4]} circle {number}"} for number in range(NUM_SAMPLES)}
    captions["s5"] = {}
    (folder / "metadata.json").write_text(json.dumps(captions))
    writer = ManifestWriter(folder, 0)
    for number in range(NUM_SAMPLES):
        bucket, size = BUCKETS[number % 2], (200 + number, 300 + number)
        crop = (number, 2 * number, number + bucket[0], 2 * number + bucket[1])
        content = write_latents(
            folder / f"s{number}.npz", LatentSample(latents=get_latents(number), original_size=size, crop_ltrb=crop)
        )
        place = {"bucket": bucket, "original_size": size, "resized": size, "crop": crop}
        source = {"source_path": "", "source_bytes": 1, "source_mtime_ns": 1, "source_sha256": ""}
        writer.append(
            ManifestEntry(
                key=f"s{number}", file=f"s{number}.npz", bytes=len(content), sha256="", **place, identity="", **source
            )
        )
    writer.close()
    return folder


def build_dataset(
    folder: Path, dropout_rate: float = 0.0, seed: int = 0, max_tokens: int = 75, flip_rate: float = 0.0
) -> LatentDataset:
    tokenizers = load_tiny_tokenizers()
    index = open_sample_index(folder, open_record_index(folder, [folder / "metadata.json"], []))
    caption = CaptionSettings(dropout_rate=dropout_rate)
    return LatentDataset(
        index,
        folder,
        tokenizers,
        SampleSettings(seed=seed, max_tokens=max_tokens, caption=caption, flip_rate=flip_rate),
    )


def make_spec(rows: list[int], bucket: tuple[int, int] = BUCKETS[0], epochs: list[int] | None = None) -> MicroSpec:
    return MicroSpec(
        bucket=bucket,
        rows=np.array(rows),
        epochs=np.array(epochs or [0] * len(rows)),
        positions=np.arange(7, 7 + len(rows)),
    )


def read_batches(dataset: LatentDataset, num_workers: int, count: int) -> list[MicroBatch]:
    specs = iterate_specs(build_plan(dataset.index, 4, seed=3), Position(0, 0), 0, 1, 2)
    return list(islice(iterate_batches(dataset, specs, num_workers), count))


def test_latents_of_other_channels_than_the_vaes_are_bad_samples(cache):
    dataset = build_dataset(cache)
    wide = LatentDataset(dataset.index, cache, dataset.tokenizers, replace(dataset.settings, latent_channels=16))
    spec = next(iter(iterate_specs(build_plan(dataset.index, 4, seed=3), Position(0, 0), 0, 1, 2)))
    good, bad = dataset[spec], wide[spec]
    assert good.bad == [] and good.latents.shape[1] == 4
    assert bad.latents.shape == (2, 16, *good.latents.shape[2:]) and not bad.latents.any()
    assert bad.weights.tolist() == [0, 0]
    assert all("has 4 latent channels, and the VAE of the settings gives 16" in sample.reason for sample in bad.bad)


def test_dropped_captions_are_told_from_empty_ones(cache):
    for rate in (0.0, 0.5):
        dataset = build_dataset(cache, rate)
        counts = count_tokens(dataset)
        num_blank = draw_captions(dataset, np.arange(NUM_SAMPLES), 0).count("")
        # One caption is empty in the data.
        assert counts.num_dropped == num_blank - 1 and counts.classes["0"][0] == num_blank > 3 * rate
    dataset.settings = replace(dataset.settings, caption=replace(dataset.settings.caption, replacements={"": ""}))
    counts = count_tokens(dataset)  # every caption is empty, whether or not it is dropped
    assert counts.num_dropped == 0 and counts.classes["0"][0] == NUM_SAMPLES
    assert list(counts.classes)[-2:] == ["151-225", "> 225"]
    assert list(count_tokens(build_dataset(cache, max_tokens=375)).classes)[-2:] == ["226-375", "> 375"]


def test_a_micro_batch_holds_all_network_inputs(cache):
    dataset = build_dataset(cache, max_tokens=150)
    batch = dataset[make_spec([4, 0, 4])]
    assert batch.latents.dtype == torch.float32 and batch.latents.shape == (3, 4, 12, 8)
    expected = np.stack([get_latents(4), get_latents(0), get_latents(4)]).astype(np.float32)
    assert np.array_equal(batch.latents.numpy(), expected)
    # original h, w; crop top, left; target h, w
    assert batch.time_ids.tolist() == [[304, 204, 8, 4, 96, 64], [300, 200, 0, 0, 96, 64], [304, 204, 8, 4, 96, 64]]
    captions = ["a red circle 4", "a red circle 0", "a red circle 4"]
    for ids, tokenizer in zip((batch.input_ids, batch.input_ids_2), dataset.tokenizers, strict=True):
        assert ids.dtype == torch.int64 and ids.shape == (3, 2, 77)
        assert np.array_equal(ids.numpy(), np.stack([tokenizer.encode(caption, 150) for caption in captions]))
    assert batch.weights.tolist() == [1, 1, 1] and batch.bad == []
    assert (batch.positions.tolist(), batch.rows.tolist()) == ([7, 8, 9], [4, 0, 4])


def test_a_sample_without_a_caption_gets_the_empty_caption(cache):
    dataset = build_dataset(cache)
    batch = dataset[make_spec([5], BUCKETS[1])]
    assert np.array_equal(batch.input_ids[0].numpy(), dataset.tokenizers[0].encode(""))


def test_a_bad_latent_gets_weight_zero_and_is_reported(cache):
    latents, original = get_latents(2), (cache / "s2.npz").read_bytes()
    dataset = build_dataset(cache)
    try:
        for damage, expected in (
            (lambda path: path.write_bytes(original[:100]), "not a readable npz file"),
            (lambda path: path.unlink(), "cannot be read: No such file"),
            (
                lambda path: write_latents(
                    path, LatentSample(latents=latents[:, :8], original_size=(1, 1), crop_ltrb=(0, 0, 1, 1))
                ),
                "encoded at 64x64 px",
            ),
            (
                lambda path: write_latents(
                    path,
                    LatentSample(latents=latents * np.float16("nan"), original_size=(1, 1), crop_ltrb=(0, 0, 1, 1)),
                ),
                "not finite",
            ),
        ):
            damage(cache / "s2.npz")
            batch = dataset[make_spec([0, 2, 4])]
            assert batch.weights.tolist() == [1, 0, 1]
            assert batch.latents[1].eq(0).all() and batch.latents.shape == (3, 4, 12, 8)
            assert np.array_equal(batch.latents[2].numpy(), get_latents(4))
            [(key, reason)] = batch.bad
            assert key == "s2" and reason.startswith(f"{cache / 's2.npz'}: ") and expected in reason
    finally:
        (cache / "s2.npz").write_bytes(original)


def list_dropped(dataset: LatentDataset, rows: list[int], epochs: list[int]) -> list[bool]:
    """Return whether each sample has the empty caption."""
    empty = torch.from_numpy(dataset.tokenizers[0].encode(""))
    return [bool(ids.equal(empty)) for ids in dataset[make_spec(rows, BUCKETS[0], epochs)].input_ids]


def test_caption_dropout_is_keyed_to_sample_and_epoch(cache):
    rows, epochs = [0, 2, 4, 6, 8, 10] * 50, [epoch for epoch in range(50) for _ in range(6)]
    dataset = build_dataset(cache, dropout_rate=0.3)
    dropped = list_dropped(dataset, rows, epochs)
    assert 0.2 < np.mean(dropped) < 0.4
    # The draws do not depend on the order of the samples or on their batches.
    order = np.random.default_rng(0).permutation(len(rows))
    assert list_dropped(dataset, [rows[i] for i in order], [epochs[i] for i in order]) == [dropped[i] for i in order]
    by_row = np.array(dropped).reshape(50, 6)
    assert 0 < by_row.mean(0).min() and by_row.mean(0).max() < 1  # no sample is dropped always or never
    assert list_dropped(build_dataset(cache, dropout_rate=0.3, seed=1), rows, epochs) != dropped
    assert not any(list_dropped(build_dataset(cache), rows, epochs))
    assert all(list_dropped(build_dataset(cache, dropout_rate=1.0), rows, epochs))


def test_any_number_of_workers_reads_the_same_batches(cache):
    dataset = build_dataset(cache, dropout_rate=0.5)
    in_process, in_workers = read_batches(dataset, 0, 9), read_batches(dataset, 2, 9)
    for expected, batch in zip(in_process, in_workers, strict=True):
        for name, value in vars(expected).items():
            found = getattr(batch, name)
            assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found, name
    assert len({tuple(batch.rows.tolist()) for batch in in_process}) > 6  # the batches differ
    empty = torch.from_numpy(dataset.tokenizers[0].encode(""))
    dropped = [ids.equal(empty) for batch in in_process for ids in batch.input_ids]
    assert 3 <= sum(dropped) <= 15


def test_samples_in_shards_equal_samples_in_files(cache, tmp_path):
    """Samples read from a tar by pread give the same batches as npz files."""
    (tmp_path / "metadata.json").write_text((cache / "metadata.json").read_text())
    manifest = ManifestWriter(tmp_path, 0)
    shards = {
        bucket: ShardWriter(tmp_path / "shards" / f"{bucket[0]}x{bucket[1]}-00000-00000.tar") for bucket in BUCKETS
    }
    for entry in read_latest(cache).values():
        place = shards[entry.bucket].append(entry.key, b"{}", (cache / entry.file).read_bytes())
        manifest.append(replace(entry, file=f"shards/{place.shard}", offset=place.offset))
    for writer in shards.values():
        writer.close()
    manifest.close()
    files, packed = build_dataset(cache), build_dataset(tmp_path)
    assert set(packed.index.column("offset")) - {None} and len(packed.index) == NUM_SAMPLES
    for bucket, rows in ((BUCKETS[0], [0, 4, 8]), (BUCKETS[1], [1, 3, 11])):
        left, right = files[make_spec(rows, bucket)], packed[make_spec(rows, bucket)]
        assert (
            right.bad == [] and torch.equal(left.latents, right.latents) and torch.equal(left.time_ids, right.time_ids)
        )
    shard = next((tmp_path / "shards").glob("64x96*.tar"))
    shard.write_bytes(shard.read_bytes()[:1500])
    batch = packed[make_spec([0, 4])]
    assert [key for key, _ in batch.bad] == ["s0", "s4"] and batch.weights.tolist() == [0.0, 0.0]


def test_moments_give_a_fresh_sample_each_epoch(cache, tmp_path):
    """Latents are mean + std · noise, with noise keyed to (seed, epoch, row)."""
    for path in cache.rglob("*"):
        if path.is_file() and "index" not in path.parts:
            (tmp_path / path.relative_to(cache)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(cache)).write_bytes(path.read_bytes())
    mean, std = get_latents(0).astype(np.float32), np.full((4, 12, 8), 0.5, np.float32)
    write_latents(
        tmp_path / "s0.npz", LatentSample(latents=mean, original_size=(200, 300), crop_ltrb=(0, 0, 64, 96), std=std)
    )
    dataset = build_dataset(tmp_path)
    first, again, later = (dataset[make_spec([0], epochs=[epoch])].latents[0].numpy() for epoch in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, later)
    draws = np.stack([dataset[make_spec([0], epochs=[epoch])].latents[0].numpy() for epoch in range(200)])
    assert abs(((draws - mean) / std).mean()) < 0.02 and abs(((draws - mean) / std).std() - 1) < 0.02


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_workers_end_with_the_process_that_started_them(tmp_path, end):
    program = f"""
import os, signal, time
from multiprocessing import get_context
from sdxl_trainer.data.loading import loader

def work(ready):
    loader._init_worker(0)
    ready.set()
    time.sleep(300)

if __name__ == "__main__":
    context = get_context("forkserver")
    ready = context.Event()
    worker = context.Process(target=work, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(60)
    # A terminal or Slurm sends them to the worker too, of which the rank still needs batches.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(worker.pid, number)
    worker.join(0.2)
    print(worker.pid if worker.is_alive() else "ended", flush=True)
    {end}
"""
    (tmp_path / "program.py").write_text(program)
    with open(tmp_path / "output", "wb") as output:  # a worker that stays alive would hold a pipe open
        subprocess.run([sys.executable, str(tmp_path / "program.py")], stdout=output, timeout=100)
    worker = Path("/proc") / (tmp_path / "output").read_text().strip()
    assert worker.name.isdigit()
    for _ in range(100):
        if not worker.exists():
            return
        time.sleep(0.1)
    pytest.fail("the worker outlives the process that started it")


STOPPED_START = """
import os, signal, sys, threading, time
from types import SimpleNamespace
from sdxl_trainer.data.loading.loader import iterate_batches

class Numbers:
    tokenizers, settings = (), SimpleNamespace(caption=SimpleNamespace(rules=None))

    def __getitem__(self, number):
        return number

def send_signals():
    for _ in range(60):
        os.killpg(0, int(sys.argv[1]))
        time.sleep(0.02)

if __name__ == "__main__":
    signal.signal(int(sys.argv[1]), lambda *_: None)
    sender = threading.Thread(target=send_signals)
    sender.start()
    batches = iterate_batches(Numbers(), iter(range(40)), 2)
    sender.join()
    print(*batches)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_workers_start_and_serve_while_their_group_gets_stop_signals(tmp_path: Path, number: int) -> None:
    """A terminal and Slurm send them to all processes of a job, at any time."""
    (tmp_path / "program.py").write_text(STOPPED_START)
    command = [sys.executable, str(tmp_path / "program.py"), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, start_new_session=True)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [*map(str, range(40))], "")
