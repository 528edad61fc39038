"""Storage that fails for a moment: transient errors are retried, stale handles reopened, permanent errors reported."""

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
    """Record the seconds of each wait instead of waiting."""
    slept: list[float] = []
    monkeypatch.setattr(files.time, "sleep", slept.append)
    return slept


def fail_reads(monkeypatch: pytest.MonkeyPatch, codes: list[int]) -> list[int]:
    """Make one read after the other fail with these errors. Return a list that records the id of each file read."""
    read, file_ids = OpenFile.read, []

    def fail_first(self: OpenFile, *span: int) -> memoryview:
        file_ids.append(id(self))
        if codes:
            code = codes.pop(0)
            raise OSError(code, os.strerror(code))
        return read(self, *span)

    monkeypatch.setattr(OpenFile, "read", fail_first)
    return file_ids


@pytest.mark.parametrize("offset", [None, 512])
@pytest.mark.parametrize(
    ("codes", "attempts"),
    [([], 1), ([errno.EIO, errno.ESTALE], 3), ([errno.ESTALE] * 3, 3), ([errno.EACCES], 1)],
)
def test_reads_of_latents_are_retried_after_transient_errors(
    offset: int | None,
    codes: list[int],
    attempts: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
) -> None:
    latents = np.arange(256, dtype=np.float32).reshape(4, 8, 8)
    content = pack_latents(LatentSample(latents=latents, original_size=BUCKET, crop_ltrb=(0, 0, *BUCKET)))
    (tmp_path / "x").write_bytes(b"-" * (offset or 0) + content)
    fail_reads(monkeypatch, list(codes))
    row = {"file": "x", "offset": offset, "bytes": len(content)}
    found = LatentStore(tmp_path).read([row], BUCKET)[0]
    assert len(waits) == attempts - 1
    if len(codes) < attempts:
        assert isinstance(found, LatentSample) and np.array_equal(found.latents, latents)
    else:
        assert isinstance(found, BadLatentError) and os.strerror((codes or [0])[-1]) in str(found)


def test_a_shard_with_a_stale_handle_is_reopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    content = pack_latents(
        LatentSample(latents=np.ones((4, 8, 8), np.float32), original_size=BUCKET, crop_ltrb=(0, 0, *BUCKET))
    )
    path, store = tmp_path / "x.tar", LatentStore(tmp_path)
    path.write_bytes(content)
    row = {"file": path.name, "offset": 0, "bytes": len(content)}
    stale = store._shards.open(str(path))
    file_ids = fail_reads(monkeypatch, [errno.ESTALE])
    assert isinstance(store.read([row], BUCKET)[0], LatentSample)
    assert file_ids[0] == id(stale) and file_ids[-1] != id(stale)
