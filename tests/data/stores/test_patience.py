"""Storage that fails for a moment: read again, anew where a handle may be stale, and not for what will not pass."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from sdxl_trainer.data import files
from sdxl_trainer.data.formats.latents import BadLatentError, LatentSample, pack_latents
from sdxl_trainer.data.formats.shards import OpenFile
from sdxl_trainer.data.loading.latent_store import LatentStore

BUCKET = (64, 64)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited for, without waiting."""
    slept: list[float] = []
    monkeypatch.setattr(files.time, "sleep", slept.append)
    return slept


def spoil(monkeypatch: pytest.MonkeyPatch, codes: list[int]) -> list[int]:
    """Let reads fail with these errors, one after the other, then work. Returns the descriptors that were read from."""
    read, seen = OpenFile.read, []

    def fail_first(self: OpenFile, *span: int) -> memoryview:
        seen.append(id(self))
        if codes:
            code = codes.pop(0)
            raise OSError(code, os.strerror(code))
        return read(self, *span)

    monkeypatch.setattr(OpenFile, "read", fail_first)
    return seen


@pytest.mark.parametrize("offset", [None, 512])
@pytest.mark.parametrize(
    ("codes", "tries"),
    [([], 1), ([errno.EIO, errno.ESTALE], 3), ([errno.ESTALE] * 3, 3), ([errno.EACCES], 1)],
)
def test_latents(
    offset: int | None,
    codes: list[int],
    tries: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
) -> None:
    latents = np.arange(256, dtype=np.float32).reshape(4, 8, 8)
    content = pack_latents(LatentSample(latents=latents, original_size=BUCKET, crop_ltrb=(0, 0, *BUCKET)))
    (tmp_path / "x").write_bytes(b"-" * (offset or 0) + content)
    fine = len(codes) < tries
    spoil(monkeypatch, list(codes))
    row = {"file": "x", "offset": offset, "bytes": len(content)}
    found = LatentStore(tmp_path).read([row], BUCKET)[0]
    assert len(waits) == tries - 1
    if fine:
        assert isinstance(found, LatentSample) and np.array_equal(found.latents, latents)
    else:
        assert isinstance(found, BadLatentError) and os.strerror((codes or [0])[-1]) in str(found)


def test_a_shard_is_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    content = pack_latents(
        LatentSample(latents=np.ones((4, 8, 8), np.float32), original_size=BUCKET, crop_ltrb=(0, 0, *BUCKET))
    )
    path, store = tmp_path / "x.tar", LatentStore(tmp_path)
    path.write_bytes(content)
    row = {"file": path.name, "offset": 0, "bytes": len(content)}
    held = store._shards.open(str(path))
    seen = spoil(monkeypatch, [errno.ESTALE])
    assert isinstance(store.read([row], BUCKET)[0], LatentSample)
    assert seen[0] == id(held) and seen[-1] != id(held)
