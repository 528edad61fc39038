"""Cost of `data.verify_latents` and `cache.on_missing: encode` at the start, with many files. Part of data.py."""

import os
import time
from pathlib import Path

import numpy as np
import orjson

from sdxl_trainer.data.checks.latent_files import find_bad_latents
from sdxl_trainer.data.formats.latents import LatentSample, pack_latents
from sdxl_trainer.data.formats.manifest import ManifestEntry, ManifestWriter
from sdxl_trainer.data.images.bucket import BucketRule
from sdxl_trainer.data.index.index import open_record_index, open_sample_index
from sdxl_trainer.data.index.missing_latents import BadImage, EncodingSettings, plan_missing_latents

FILES_A_FOLDER = 1000
RULE = BucketRule(resolution_px=1024, min_px=256, max_px=2048, step_px=64, no_upscale=False)
WRITTEN_BYTES = 1024  # at both ends of a file; the values between them are a hole


def time_checks(folder: Path, number: int) -> dict[str, float]:
    """Measure microseconds per file, for files without faults whose folders the system has in memory."""
    make_files(folder, number)
    records = open_record_index(folder, [folder / "metadata.json"], [])
    index = open_sample_index(folder, records)
    assert len(index) == number, len(index)
    seconds: dict[str, float] = {}
    for level in ("stat", "header"):
        began = time.perf_counter()
        assert find_bad_latents(index, folder, level) == []
        seconds[f"check_{level}"] = time.perf_counter() - began
    began = time.perf_counter()
    plans = plan_missing_latents(
        records.table, np.arange(number), "", EncodingSettings((("", RULE),), beside=False, flip=False)
    )
    assert sum(1 for plan in plans if not isinstance(plan, BadImage)) == number
    seconds["on_missing_encode"] = time.perf_counter() - began
    return {f"{name}_microseconds_a_file": 1e6 * value / number for name, value in seconds.items()}


def make_files(folder: Path, number: int) -> None:
    """Make latent files of 1024² px with a hole in place of their values, metadata that name them as images, and a
    manifest."""
    latents = LatentSample(
        latents=np.zeros((4, 128, 128), np.float32), original_size=(1500, 1000), crop_ltrb=(0, 0, 1024, 1024)
    )
    content, records, writer = pack_latents(latents), {}, ManifestWriter(folder, 0)
    for row in range(number):
        key, file = f"img_{row:08d}", f"{row // FILES_A_FOLDER:05d}/img_{row:08d}.npz"
        if row % FILES_A_FOLDER == 0:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / file, os.O_WRONLY | os.O_CREAT, 0o644)
        os.pwrite(descriptor, content[:WRITTEN_BYTES], 0)
        os.pwrite(descriptor, content[-WRITTEN_BYTES:], len(content) - WRITTEN_BYTES)
        os.close(descriptor)
        records[key] = {"caption": key, "image_path": str(folder / file), "original_size": [1500, 1000]}
        place = {
            "bucket": (1024, 1024),
            "original_size": (1500, 1000),
            "resized": (1536, 1024),
            "crop": (256, 0, 1280, 1024),
        }
        source = {"source_path": "", "source_bytes": 1, "source_mtime_ns": 1, "source_sha256": ""}
        writer.append(ManifestEntry(key=key, file=file, bytes=len(content), sha256="", identity="0", **place, **source))
    writer.close()
    (folder / "metadata.json").write_bytes(orjson.dumps(records))
