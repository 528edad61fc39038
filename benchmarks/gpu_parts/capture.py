"""The copy of a checkpoint's state from the device to host memory: plain memory against registered memory."""

import time
from functools import partial

import torch

from gpu_parts.devices import Place
from gpu_parts.report import Case, Cases

NUM_TENSORS, NUM_VALUES = 4, 2**28  # 4.3 GB in fp32
PORTABLE = 1  # cudaHostRegisterPortable


def list_cases(place: Place) -> Cases:
    """List the cases of this module."""
    return {"checkpoint_capture": partial(measure_capture, place)}


def measure_capture(place: Place, case: Case) -> None:
    """Copy state as checkpoints do, into new and into reused memory, and then into the same memory registered."""
    from sdxl_trainer.train.engine.snapshot import HostMemory, copy_to_host

    num_values = 2**12 if place.tiny else NUM_VALUES
    state = [torch.ones(num_values, device=place.device) for _ in range(NUM_TENSORS)]
    gigabytes = NUM_TENSORS * num_values * 4 / 1e9
    memory = HostMemory()
    seconds = place.time_call(lambda: copy_to_host(state, memory.rewind()))
    case.note(gigabytes=gigabytes, new_memory_gb_per_second=gigabytes / seconds)
    copies = copy_to_host(state, memory.rewind())
    seconds = place.time_calls(lambda: copy_to_host(state, memory.rewind()), 2, warm_up=0)
    case.note(reused_memory_gb_per_second=gigabytes / seconds)
    place.require_cuda("registering host memory")
    started = time.perf_counter()
    for tensor in copies:
        register(tensor)
    case.note(register_seconds=time.perf_counter() - started, is_pinned=copies[0].is_pinned())
    seconds = place.time_calls(lambda: copy_to_host(state, memory.rewind()), 2, warm_up=1)
    case.note(registered_memory_gb_per_second=gigabytes / seconds)
    started = time.perf_counter()
    for tensor in copies:
        require_success(int(torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())))
    case.note(unregister_seconds=time.perf_counter() - started)


def register(tensor: torch.Tensor) -> None:
    """Page-lock the memory of a host tensor, without a copy.

    Raises:
        RuntimeError: CUDA refuses.
    """
    num_bytes = tensor.numel() * tensor.element_size()
    require_success(int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), num_bytes, PORTABLE)))


def require_success(code: int) -> None:
    """Raise RuntimeError unless a call of CUDA's runtime returned 0."""
    if code != 0:
        raise RuntimeError(f"CUDA's runtime returned {code}")
