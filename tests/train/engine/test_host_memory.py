"""Host memory of checkpoint copies: reused, and page-locked once where tensors come from a GPU."""

import itertools
import mmap
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from loguru import logger

from sdxl_trainer.train.engine import host_memory
from sdxl_trainer.train.engine.host_memory import REGISTERED_BYTES, HostMemory, allocate_pages
from sdxl_trainer.train.engine.snapshot import copy_to_host


class CudaRuntime:
    """Stands in for CUDA's runtime, which this machine may lack; it records the ranges that are locked."""

    def __init__(self, code: int = 0):
        self.code, self.calls, self.locked = code, Counter(), {}

    def cudaHostRegister(self, pointer: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        self.calls["register"] += 1
        first, last = pointer // mmap.PAGESIZE, (pointer + num_bytes - 1) // mmap.PAGESIZE
        if any(first <= end and start <= last for start, end in self.locked.values()):
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        self.locked[pointer] = first, last
        return self.code

    def cudaHostUnregister(self, pointer: int) -> int:  # noqa: N802
        del self.locked[pointer]
        return 0


@pytest.fixture
def runtime(monkeypatch):
    found = CudaRuntime()
    monkeypatch.setattr(host_memory, "_get_cuda_runtime", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in found.locked)
    return found


def allocate(memory: HostMemory, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [memory._allocate(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]


def test_copies_reuse_their_memory() -> None:
    memory = HostMemory()
    state = {"a": torch.arange(6.0).view(2, 3), "b": [torch.ones(4, dtype=torch.bfloat16)]}
    first = copy_to_host(state, memory.rewind())
    state["a"] += 1
    second = copy_to_host(state, memory.rewind())
    assert second["a"].data_ptr() == first["a"].data_ptr() and second["a"].equal(state["a"])
    assert second["b"][0].dtype == torch.bfloat16 and second["b"][0].data_ptr() == first["b"][0].data_ptr()
    state["a"] = torch.zeros(5)
    assert copy_to_host(state, memory.rewind())["a"].equal(torch.zeros(5))


def test_no_two_tensors_share_a_locked_page(runtime):
    """CUDA locks a page once, so the second of two tensors on one page would stay unlocked."""
    odd = REGISTERED_BYTES // 2 + 1
    tensors = allocate(HostMemory(), (odd,), (3, odd), (odd,), dtype=torch.bfloat16)
    assert [tensor.shape for tensor in tensors] == [(odd,), (3, odd), (odd,)]
    assert all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
    assert len(runtime.locked) == 3
    assert all(tensor.data_ptr() % mmap.PAGESIZE == 0 for tensor in tensors), "a part of a page may be shared"
    assert allocate(HostMemory(), (REGISTERED_BYTES // 4 - 1,)) and runtime.calls["register"] == 3  # too small
    assert HostMemory().copy(torch.zeros(REGISTERED_BYTES)).sum() == 0 and runtime.calls["register"] == 3  # no GPU's


def test_pages_are_unlocked_before_they_are_given_back(runtime):
    """The next memory of this size gets the same address, which CUDA would still take for locked."""
    memory = HostMemory()
    (held,) = allocate(memory, (REGISTERED_BYTES,))
    memory._tensors.append(held)
    assert len(runtime.locked) == 1
    del memory
    assert runtime.locked == {} and held.sum() == 0


def test_locked_memory_has_huge_pages():
    """Touching small pages would take half a second a GB at the first checkpoint."""
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no huge pages")
    held = allocate_pages(torch.empty(4 << 20, dtype=torch.uint8, device="meta"))
    held.fill_(1)
    maps = Path("/proc/self/smaps").read_text().split("VmFlags:")
    (own,) = (part for part, flags in itertools.pairwise(maps) if holds(part, held.data_ptr()))
    flags = maps[maps.index(own) + 1].splitlines()[0].split()
    assert "hg" in flags and "sh" not in flags


def holds(part: str, address: int) -> bool:
    """Return whether a part of smaps, up to its flags, is of the mapping at an address."""
    ranges = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", part, re.MULTILINE)
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


def test_memory_that_cannot_be_locked_is_tried_once(runtime):
    runtime.code, lines, memory = 2, [], HostMemory()
    sink = logger.add(lambda message: lines.append(message.record["message"]))
    tensors = allocate(memory, (REGISTERED_BYTES,), (REGISTERED_BYTES,))
    logger.remove(sink)
    assert [tensor.fill_(3.0).mean().item() for tensor in tensors] == [3.0, 3.0]
    assert lines == ["CUDA cannot lock host memory (error 2); copies of checkpoints take longer"]
    assert runtime.calls["register"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_from_a_gpu_are_locked():
    memory, state = HostMemory(), torch.ones(REGISTERED_BYTES, device="cuda")
    held = memory.rewind().copy(state)
    assert held.is_pinned() and held.equal(state.cpu())
    replaced = memory.rewind().copy(state[:-1])
    assert replaced.is_pinned() and len(replaced) == REGISTERED_BYTES - 1
