"""Metadata and manifest entries of indexes that tests build."""

import json
from pathlib import Path

from sdxl_trainer.data.formats.manifest import ManifestEntry, ManifestWriter
from sdxl_trainer.data.index.index import Index


def write_metadata(path: Path, content: dict) -> Path:
    path.write_text(json.dumps(content))
    return path


def list_entries(folder: Path, *keys: str, rank: int = 0, bucket: tuple[int, int] = (64, 96)) -> None:
    writer = ManifestWriter(folder, rank)
    for key in keys:
        size = (100 + len(key), 150)
        place = {"bucket": bucket, "original_size": size, "resized": (70, 96), "crop": (3, 0, 67, 96)}
        source = {"source_path": "", "source_bytes": 1, "source_mtime_ns": 1, "source_sha256": ""}
        writer.append(ManifestEntry(key=key, file=f"{key}.npz", bytes=1, sha256="", **place, identity="", **source))
    writer.close()


def get_keys(index: Index) -> list[str]:
    return index.arrow_column("key").to_pylist()
