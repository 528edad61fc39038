"""The real training step at full size: time, MFU, and the peak of memory of each phase."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gpu_parts.bare_loop import build_bare_step
from gpu_parts.devices import Place
from gpu_parts.fit import StepSizes, choose_first_sizes, require_room
from gpu_parts.full_size import build_random_run, get_batch_file, get_side_px, keep_batch
from gpu_parts.report import Case, Cases

WARM_UP, STEPS = 3, 8
NUM_TEXT_TOKENS = 77
OTHERS = (
    *(StepSizes(4, accumulation_steps=4), StepSizes(4, checkpointing=True), StepSizes(8)),
    *(StepSizes(8, checkpointing=True), StepSizes(16), StepSizes(16, checkpointing=True)),
    *(StepSizes(8, accumulation_steps=2), StepSizes(16, checkpointing=True, accumulation_steps=4)),
)


def list_cases(place: Place) -> Cases:
    """List the cases of part `step`: the real step and the bare loop at micro batch 4."""
    sizes = choose_first_sizes(place)
    return {
        f"ours_{sizes.name}": partial(measure_step, place, sizes),
        f"bare_{sizes.name}": partial(measure_bare_step, place, sizes),
    }


def list_other_cases(place: Place) -> Cases:
    """List the steps of other sizes."""
    first = choose_first_sizes(place)
    others = [sizes for sizes in OTHERS if sizes != first]
    return {f"ours_{sizes.name}": partial(measure_step, place, sizes) for sizes in others[: 1 if place.tiny else None]}


class RealStep:
    """The training step of a run with random weights, with its data and logging; a call takes one step.

    Args:
        words: further settings.
    """

    def __init__(self, place: Place, sizes: StepSizes, case: Case, words: Sequence[str] = ()):
        self._place, self._sizes = place, sizes
        started = time.perf_counter()
        name = f"{case.name}-{time.time_ns()}"
        self.run, batches = build_random_run(place, name, [*sizes.list_words(), *words])
        self._batches = keep_batch(batches, get_batch_file(place, sizes.micro_batch_size))
        self._waits: list[float] = []
        self._losses: list[float] = []
        case.note(build_seconds=time.perf_counter() - started, zero_stage=self.run.engine.zero_stage)
        case.note(held_gb=place.read_held() / 1e9)

    def __call__(self) -> None:
        self.take(self.run)

    def take(self, run: Any) -> None:
        """Take a step of a run that differs in its engine alone."""
        from sdxl_trainer.train.run.loop import log_step, record_step, train_step

        started, lr = time.perf_counter(), run.config.optim.lr
        result = train_step(run, self._batches, lr)
        record_step(run, result)
        log_step(run, result, lr, time.perf_counter() - started)
        self._waits.append(result.data_wait_seconds)
        self._losses.append(result.loss)

    def measure(self, times: int = STEPS, warm_up: int = WARM_UP) -> dict[str, Any]:
        """Return the time and the speed of a step: medians of some steps, after others that are not counted."""
        if self._place.tiny:
            times, warm_up = 1, 1
        for _ in range(warm_up):
            self()
        self._waits.clear()
        spent = [self._place.time_call(self) for _ in range(times)]
        seconds = statistics.median(spent)
        return {
            **describe_speed(self._place, self.run, self._sizes.num_images, seconds),
            "least_ms": 1e3 * min(spent),
            "most_ms": 1e3 * max(spent),
            "data_wait_ms": 1e3 * statistics.median(self._waits),
            "losses": self._losses[-times:],
        }

    def probe_phases(self) -> dict[str, Any]:
        """Take steps that wait for the device between phases; return time and peak of each phase of the last."""
        for _ in range(1 if self._place.tiny else 2):
            probe = PhaseProbe(self.run.engine, self._place)
            self.take(replace(self.run, engine=probe))
        return {
            "phases_ms": {name: 1e3 * seconds for name, seconds in probe.seconds.items()},
            "phases_peak_gb": {name: peak / 1e9 for name, peak in probe.peaks.items()},
        }


class PhaseProbe:
    """An engine that measures its forward passes, backward passes and updates, and waits for the device after each."""

    def __init__(self, engine: Any, place: Place):
        self._engine, self._place = engine, place
        self.seconds: dict[str, float] = {}  # phase → sum over micro steps
        self.peaks: dict[str, int] = {}  # phase → bytes on the GPU; 0 on a CPU

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *arguments: Any) -> Any:
        """Forward pass."""
        return self._measure("forward", partial(self._engine, *arguments))

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass."""
        self._measure("backward", partial(self._engine.backward, loss))

    def step(self) -> bool:
        """Close a micro step."""
        return self._measure("update", self._engine.step)

    def _measure(self, phase: str, call: Callable[[], Any]) -> Any:
        self._place.synchronize()
        self._place.reset_peak()
        started = time.perf_counter()
        result = call()
        self._place.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
        self.peaks[phase] = max(self.peaks.get(phase, 0), self._place.read_peak())
        return result


def measure_step(place: Place, sizes: StepSizes, case: Case) -> None:
    """Measure the real step, and then its phases."""
    require_room(place, sizes, case)
    step = RealStep(place, sizes, case)
    case.note(**step.measure())
    case.note(**step.probe_phases())


def measure_bare_step(place: Place, sizes: StepSizes, case: Case) -> None:
    """Measure the bare loop on the micro batch of the real step."""
    require_room(place, sizes, case)
    step = build_bare_step(place, sizes)
    place.reset_peak()
    seconds = place.time_calls(step, 2 if place.tiny else STEPS, WARM_UP)
    case.note(ms=1e3 * seconds, images_per_second=sizes.num_images / seconds, peak_gb=place.read_peak() / 1e9)


def describe_speed(place: Place, run: Any, num_images: int, seconds: float) -> dict[str, Any]:
    """Return the speed of a step; MFU and the estimated time are there for devices whose speed is known."""
    from sdxl_trainer.train.estimates.flops import count_training_flops
    from sdxl_trainer.train.estimates.gpus import find_gpu_of

    side = get_side_px(place) // 8
    flops = count_training_flops(run.source.read_config("unet"), NUM_TEXT_TOKENS).compute(side * side) * num_images
    speed = {"ms": 1e3 * seconds, "images_per_second": num_images / seconds, "tflops": flops / seconds / 1e12}
    gpu = find_gpu_of(run.ranks.device)
    if gpu is None:
        return speed
    return {**speed, "mfu": flops / seconds / gpu.peak_flops, **describe_estimate(run, gpu, seconds)}


def describe_estimate(run: Any, gpu: Any, seconds: float) -> dict[str, Any]:
    """Return the estimated time of a run's step, by parts, and what the step took of it.

    Args:
        gpu: whose speed is known.
        seconds: that a step took.
    """
    from sdxl_trainer.train.estimates.step_time import estimate_step

    estimate = estimate_step(run.config, run.source, run.ranks.world_size, gpu)
    if estimate is None:
        return {}
    parts = {name: 1e3 * part for name, part in estimate.parts.items()}
    total = estimate.seconds
    return {"estimated_ms": parts, "estimated_step_ms": 1e3 * total, "step_of_estimate": seconds / total}
