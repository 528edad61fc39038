"""The copy of a checkpoint's state from the device to host memory: plain memory against page-locked memory."""

import time
from functools import partial

import torch

from gpu_parts.devices import Place
from gpu_parts.report import Case, Cases

NUM_TENSORS, NUM_VALUES = 4, 2**28  # 4.3 GB in fp32


def list_cases(place: Place) -> Cases:
    """List the cases of this module."""
    return {"checkpoint_capture": partial(measure_capture, place)}


def measure_capture(place: Place, case: Case) -> None:
    """Copy state into new pageable memory, and as checkpoints do, into memory that the first copy locks."""
    from sdxl_trainer.train.engine.host_memory import HostMemory
    from sdxl_trainer.train.engine.snapshot import copy_to_host

    num_values = 2**12 if place.tiny else NUM_VALUES
    state = [torch.ones(num_values, device=place.device) for _ in range(NUM_TENSORS)]
    gigabytes = NUM_TENSORS * num_values * 4 / 1e9
    seconds = place.time_call(lambda: copy_to_host(state))
    case.note(gigabytes=gigabytes, new_pageable_memory_gb_per_second=gigabytes / seconds)
    pageable = [torch.zeros(num_values) for _ in state]
    seconds = place.time_calls(lambda: [held.copy_(tensor) for held, tensor in zip(pageable, state, strict=True)], 2)
    case.note(pageable_memory_gb_per_second=gigabytes / seconds)
    memory = HostMemory()
    started = time.perf_counter()
    copies = copy_to_host(state, memory.rewind())
    case.note(first_copy_seconds=time.perf_counter() - started)
    place.require_cuda("locking host memory")
    case.note(is_pinned=copies[0].is_pinned())
    seconds = place.time_calls(lambda: copy_to_host(state, memory.rewind()), 2, warm_up=0)
    case.note(checkpoint_gb_per_second=gigabytes / seconds, seconds_for_36_gb=36 / (gigabytes / seconds))
