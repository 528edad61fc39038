"""Settings, entries and latents for the tests of the cache job, and functions that run it."""

import hashlib
import os
from pathlib import Path

import numpy as np
import yaml

from sdxl_trainer.cache.main import main
from sdxl_trainer.data.formats.latents import LatentSample
from sdxl_trainer.data.formats.manifest import ManifestEntry, read_latest
from sdxl_trainer.data.images.bucket import BucketRule, list_buckets
from sdxl_trainer.launch.distributed import close_ranks

RULE = BucketRule(resolution_px=128, min_px=64, max_px=256, step_px=32)
BUCKETS = list_buckets(RULE)
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def write_settings(folder: Path, model: Path, metadata: Path | None = None, **cache: object) -> Path:
    """Write a settings file for the images in `folder/images`, or for those of a metadata file."""
    config = {
        "run": {"name": "x", "dir": str(folder / "runs")},
        "model": {"path": str(model)},
        "data": {
            **({"metadata": [str(metadata)]} if metadata else {"image_dirs": [str(folder / "images")]}),
            "resolution_px": 128,
            "min_bucket_px": 64,
            "max_bucket_px": 256,
            "bucket_step_px": 32,
        },
        "cache": {"dir": str(folder / "latents"), "batch_size": 2, **cache},
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_job(settings: Path, *words: object) -> int:
    """Run cache/main.py in this process, which is faster than starting one, and return the exit status."""
    try:
        return main(["--cfg", str(settings), *(str(word) for word in words)])
    finally:
        close_ranks()
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)


def make_entry(key: str = "a", **changes: object) -> ManifestEntry:
    """Build a manifest entry of a 96 x 64 px bucket."""
    fields = {
        "key": key,
        "file": f"{key}.npz",
        "bytes": 0,
        "sha256": "",
        "bucket": (96, 64),
        "original_size": (100, 70),
        "resized": (96, 67),
        "crop": (0, 1, 96, 65),
        "identity": "0123456789abcdef",
        "source_path": f"/images/{key}.jpg",
        "source_bytes": 9,
        "source_mtime_ns": 17,
        "source_sha256": "1" * 64,
    }
    return ManifestEntry(**{**fields, **changes})


def make_sample(number: int = 0, bucket: tuple[int, int] = (96, 64)) -> LatentSample:
    """Build random latents, with `number` as the seed."""
    shape = (4, bucket[1] // 8, bucket[0] // 8)
    latents = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
    return LatentSample(latents=latents, original_size=(100, 70), crop_ltrb=(0, 1, 96, 65))


def hash_items(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each item's npz by the manifest, after comparing it with the bytes on disk."""
    hashes = {}
    for key, entry in read_latest(folder).items():
        content = (folder / entry.file).read_bytes()
        start = entry.offset or 0
        assert entry.offset is not None or len(content) == entry.bytes, key
        assert hashlib.sha256(content[start : start + entry.bytes]).hexdigest() == entry.sha256, key
        hashes[key] = entry.sha256
    return hashes


def list_files(folder: Path) -> dict[str, int]:
    """Return the mtime of every file below a folder that is not hidden."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
