"""Files written past the page cache: complete for any sizes of writes, with the disk's own errors."""

import errno
import hashlib
import os

import numpy as np
import pytest
import torch

from sdxl_trainer.train.checkpoint import direct_file
from sdxl_trainer.train.checkpoint.direct_file import BLOCK_BYTES, DirectFile
from sdxl_trainer.train.checkpoint.writer import save_hashed

CONTENT = np.random.default_rng(0).integers(0, 256, 2 * BLOCK_BYTES + 12_345, np.uint8).tobytes()


@pytest.mark.parametrize("size", [0, 1, 4096, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, len(CONTENT)])
@pytest.mark.parametrize("piece", [1000, BLOCK_BYTES, len(CONTENT)])
def test_every_byte_is_written_and_hashed(tmp_path, size, piece):
    if size > BLOCK_BYTES + 1 and piece == 1000:
        piece = 100_000
    (tmp_path / "x").write_bytes(b"previous content" * 1_000_000)
    file = DirectFile(tmp_path / "x")
    for start in range(0, size, piece):
        data = memoryview(CONTENT)[start : min(size, start + piece)]
        assert file.write(data) == len(data)
    assert file.close() == hashlib.sha256(CONTENT[:size]).hexdigest() and file.size == size
    assert (tmp_path / "x").read_bytes() == CONTENT[:size]


def test_a_file_system_without_direct_writes_is_written_through_the_cache(tmp_path, monkeypatch):
    """Some file systems refuse O_DIRECT when the file is opened, others at its first write."""
    real_open, real_write, direct = os.open, os.write, direct_file.DIRECT

    def open_plainly(path, flags, mode=0o777):
        if flags & direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    refused = []

    def write_once_refused(descriptor, data):
        if not refused:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, data)

    for name, replaced in (("open", open_plainly), ("write", write_once_refused)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, replaced)
            file = DirectFile(tmp_path / name)
            file.write(CONTENT)
            file.close()
        assert (tmp_path / name).read_bytes() == CONTENT
    assert refused == [BLOCK_BYTES]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_disk_is_not_hidden_by_torch(tmp_path, monkeypatch, code):
    before = len(os.listdir("/proc/self/fd"))

    def fail(descriptor, data):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError) as raised:
        save_hashed(tmp_path / "x.pt", {"x": torch.zeros(3 * BLOCK_BYTES // 4)})
    assert raised.value.errno == code
    assert len(os.listdir("/proc/self/fd")) == before, "a file is left open"


def test_torch_loads_the_file_that_it_saved(tmp_path):
    content = {"weights": torch.randn(1_500_000), "step": 3, "half": torch.randn(7).half()}
    sha256, size = save_hashed(tmp_path / "x.pt", content)
    loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert torch.equal(loaded["weights"], content["weights"]) and torch.equal(loaded["half"], content["half"])
    assert sha256 == hashlib.sha256((tmp_path / "x.pt").read_bytes()).hexdigest()
    assert size == (tmp_path / "x.pt").stat().st_size
