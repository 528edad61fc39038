"""Every planned sample is either trained or reported bad, over whole epochs."""

import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
from tiny_tokenizers import load_tiny_tokenizers

from sdxl_trainer.data.formats.latents import LatentSample, pack_latents
from sdxl_trainer.data.formats.manifest import ManifestEntry, ManifestWriter
from sdxl_trainer.data.formats.shards import ShardWriter
from sdxl_trainer.data.index.index import open_record_index, open_sample_index
from sdxl_trainer.data.loading.dataset import LatentDataset, SampleSettings
from sdxl_trainer.data.loading.loader import build_plan, iterate_batches, iterate_specs
from sdxl_trainer.data.order.plan import Position
from sdxl_trainer.data.text.captions import CaptionSettings
from sdxl_trainer.data.text.strategy import load_strategy

BUCKETS = [(64, 96), (96, 64)]
SHAPE = (4, 12, 8)
NUM_SAMPLES, NUM_EPOCHS, GLOBAL_BATCH, MICRO_BATCH = 41, 3, 8, 2
STRATEGY = """
class Fails:
    def caption(self, record, rng):
        if record["key"] in ("s30", "s31"):
            raise KeyError("no artist")
        return record["caption"]
    def loss_weight(self, record):
        return -1 if record["key"] == "s32" else 1
"""


def save_arrays(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def pack_bomb(_: bytes) -> bytes:
    """Compress 160 MB of zeros to 160 KB."""
    buffer = io.BytesIO()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (4, 4096, 2560)})
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("latents.npy", "w") as member:
        member.write(header.getvalue())
        for _ in range(160):
            member.write(bytes(1 << 20))
    return buffer.getvalue()


def flip_bit(content: bytes) -> bytes:
    return content[:400] + bytes([content[400] ^ 1]) + content[401:]


# Damage to an intact file of bucket (64, 96), and the reason that must be reported.
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "s0": (lambda content: b"", "not a readable npz file"),
    "s2": (lambda content: content[:700], "not a readable npz file"),
    "s4": (flip_bit, "CRC-32"),
    "s6": (lambda content: save_arrays(latents=np.full(SHAPE, np.nan, np.float32)), "not finite"),
    "s8": (lambda content: save_arrays(latents=np.zeros((4, 8, 8), np.float32)), "encoded at 64x64 px"),
    "s10": (lambda content: save_arrays(latents=np.zeros(SHAPE, np.int32)), "not floats"),
    "s12": (lambda content: save_arrays(latents=np.array([{}] * 4)), "pickled"),
    "s14": (pack_bomb, "decompression bomb"),
    "s16": (lambda content: save_arrays(latents_12x8=np.zeros((16, 12, 8), np.float32)), "has 16 latent channels"),
    "s18": (lambda content: b"<html>not found</html>" * 30, "not a readable npz file"),
}
REASONS = {
    **{key: reason for key, (_, reason) in DAMAGES.items()},
    "s20": "cannot be read",
    "s21": "not a readable npz file",
}
REASONS |= {"s30": "Fails.caption", "s31": "KeyError", "s32": "loss_weight"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> LatentDataset:
    """Build a dataset of two buckets, then damage its files in every way after the index is built.

    Samples with odd numbers from 21 on are in a shard, all others are npz files.
    """
    folder = tmp_path_factory.mktemp("cache")
    captions = {f"s{number}": {"caption": f"a red circle {number}"} for number in range(NUM_SAMPLES)}
    (folder / "metadata.json").write_text(json.dumps(captions))
    (folder / "fails.py").write_text(STRATEGY)
    manifest, shard, places = ManifestWriter(folder, 0), ShardWriter(folder / "a.tar"), {}
    for number, key in enumerate(captions):
        bucket = BUCKETS[number % 2]
        latents = np.random.default_rng(number).standard_normal((4, bucket[1] // 8, bucket[0] // 8)).astype(np.float32)
        content = pack_latents(LatentSample(latents=latents, original_size=bucket, crop_ltrb=(0, 0, *bucket)))
        file, offset = f"{key}.npz", None
        if number > 20 and number % 2:
            file, offset = "a.tar", shard.append(key, b"{}", content).offset
            places[key] = offset
        else:
            (folder / file).write_bytes(content)
        place = {"bucket": bucket, "original_size": bucket, "resized": bucket, "crop": (0, 0, *bucket)}
        source = {"source_path": "", "source_bytes": 1, "source_mtime_ns": 1, "source_sha256": ""}
        manifest.append(
            ManifestEntry(
                key=key, file=file, bytes=len(content), sha256="", **place, identity="", **source, offset=offset
            )
        )
    shard.close()
    manifest.close()
    index = open_sample_index(folder, open_record_index(folder, [folder / "metadata.json"], []))
    assert len(index) == NUM_SAMPLES
    for key, (damage, _) in DAMAGES.items():
        (folder / f"{key}.npz").write_bytes(damage((folder / f"{key}.npz").read_bytes()))
    (folder / "s20.npz").unlink()
    content = bytearray((folder / "a.tar").read_bytes())
    content[places["s21"] : places["s21"] + 4] = b"junk"
    (folder / "a.tar").write_bytes(content)
    tokenizers = load_tiny_tokenizers()
    strategy = load_strategy(f"{folder / 'fails.py'}:Fails")
    return LatentDataset(
        index, folder, tokenizers, SampleSettings(seed=0, max_tokens=75, caption=CaptionSettings()), strategy
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_planned_sample_is_trained_or_reported_bad(dataset, num_workers):
    plan = build_plan(dataset.index, GLOBAL_BATCH, seed=1)
    num_batches = sum(plan.num_batches(epoch) for epoch in range(NUM_EPOCHS))
    num_micro = num_batches * GLOBAL_BATCH // MICRO_BATCH
    keys = dataset.index.arrow_column("key").to_pylist()
    planned, trained, reported, reasons = Counter(), Counter(), Counter(), {}
    for spec in islice(iterate_specs(plan, Position(0, 0), 0, 1, MICRO_BATCH), num_micro):
        planned.update(keys[row] for row in spec.rows)
    for batch in islice(
        iterate_batches(dataset, iterate_specs(plan, Position(0, 0), 0, 1, MICRO_BATCH), num_workers), num_micro
    ):
        used = batch.weights > 0
        trained.update(keys[row] for row in batch.rows[used].tolist())
        reported.update(key for key, _ in batch.bad)
        reasons |= dict(batch.bad)
        assert not batch.latents[~used].any() or {key for key, _ in batch.bad} & {"s30", "s31", "s32"}
    assert planned == trained + reported
    assert planned.total() == NUM_EPOCHS * NUM_SAMPLES - plan.num_carried(NUM_EPOCHS - 1)
    assert set(reported) == set(REASONS) and not set(trained) & set(REASONS)
    assert {key: reason for key, reason in REASONS.items() if reason not in reasons[key]} == {}
    assert max(planned.values()) == NUM_EPOCHS and min(planned.values()) >= NUM_EPOCHS - 1
