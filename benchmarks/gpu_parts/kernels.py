"""Variants of the real step at micro batch 4: attention back ends, `cudnn.benchmark`; and where its time goes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from gpu_parts.devices import Place
from gpu_parts.fit import choose_first_sizes
from gpu_parts.report import Case, Cases
from gpu_parts.steps import RealStep
from sdxl_trainer.launch.kernels import BACKENDS, search_convolutions, use_attention

SHOWN_KERNELS = 40


def list_cases(place: Place) -> Cases:
    """List the cases of this module."""
    return {"profile_and_variants": partial(measure_variants, place)}


def measure_variants(place: Place, case: Case) -> None:
    """Profile a step, then measure it with each variant in turn and without any before and after."""
    step = RealStep(place, choose_first_sizes(place), case)
    case.note(default=step.measure())
    case.note(profile=profile_step(place, step))
    variants: dict[str, AbstractContextManager[None]] = {
        f"attention_{name}": use_attention(name) for name in BACKENDS if name != "math"
    }
    variants["cudnn_benchmark"] = search_convolutions(True, num_sizes=1)
    variants["cudnn_attention_and_benchmark"] = prefer_attention_and_benchmark()
    for name, variant in list(variants.items())[:: 4 if place.tiny else 1]:
        try:
            with variant:
                case.note(**{name: step.measure(times=5)})
        except torch.cuda.OutOfMemoryError as error:
            case.note(**{name: f"{error}"[:200]})
    case.note(default_again=step.measure(times=5))


@contextmanager
def prefer_attention_and_benchmark() -> Iterator[None]:
    """Context of cuDNN's attention and measured convolutions together."""
    with use_attention("cudnn"), search_convolutions(True, num_sizes=1):
        yield


def profile_step(place: Place, step: RealStep) -> dict[str, Any]:
    """Return the kernels (on a CPU: operators) that take the most time in one step, and the sum of all."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if place.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        seconds = place.time_call(step)
    rows: list[tuple[float, int, str]] = []  # ms, calls, name
    for event in profiler.key_averages():
        if not place.is_cuda:
            rows.append((event.self_cpu_time_total / 1e3, event.count, event.key))
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            rows.append((event.self_device_time_total / 1e3, event.count, event.key))
    rows.sort(reverse=True)
    return {
        "step_ms_while_profiled": 1e3 * seconds,
        "sum_ms": sum(row[0] for row in rows),
        "num_calls": sum(row[1] for row in rows),
        "top": [{"ms": ms, "calls": calls, "name": name[:120]} for ms, calls, name in rows[:SHOWN_KERNELS]],
    }
