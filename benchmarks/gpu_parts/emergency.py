"""Part `emergency`: the emergency save of a real run while other work blocks the GPU's default stream.

A collective that hangs blocks the stream in the same way. The save must not wait for it, and the next start must find
the weights as they were.
"""

import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_parts.devices import Place
from gpu_parts.full_size import build_random_run
from gpu_parts.report import Case, Cases
from gpu_parts.tiny_model import write_tiny_set

STEPS = 3
BLOCKED_SECONDS, PATIENCE_SECONDS = 9.0, 6.0
TRIAL_CYCLES = 200_000_000


def list_cases(place: Place) -> Cases:
    """List the cases of this part."""
    return {f"zero_{stage}": partial(save_and_resume, replace(place, tiny=True), stage) for stage in (1, 2)}


def save_and_resume(place: Place, stage: int, case: Case) -> None:
    """Train some steps, block the default stream, save from another thread, and resume in a second run."""
    from sdxl_trainer.train.run.job import build_emergency_saver
    from sdxl_trainer.train.run.loop import record_step, train_step

    folder = place.work / "tiny"
    write_tiny_set(folder)
    words = [f"model.path={folder / 'model'}", "train.micro_batch_size=4", "train.global_batch_size=4"]
    words += [f"engine.zero_stage={stage}", "optim.lr=1e-3"]
    name = f"emergency-{stage}-{time.time_ns()}"
    run, batches = build_random_run(place, name, words)
    saver = build_emergency_saver(run)
    for _ in range(STEPS):
        record_step(run, train_step(run, batches, run.config.optim.lr))
    expected = gather_weights(run)
    place.synchronize()
    blocked = block_default_stream(BLOCKED_SECONDS) if place.is_cuda else None
    started, saved = time.monotonic(), []
    thread = threading.Thread(target=lambda: saved.append(saver.save("trial of the emergency save")), daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    case.check("seconds", time.monotonic() - started, "<=", PATIENCE_SECONDS - 1)
    if blocked is None:
        case.note(blocked_stream="skipped: needs CUDA")
    else:
        case.check("stream_was_blocked_until_the_end", float(not blocked.query()), ">=", 1)
    assert saved and isinstance(saved[0], Path), "the save wrote nothing, or waited for the stream"
    place.synchronize()
    resumed, _ = build_random_run(place, name, words)
    case.check("steps_lost", abs(STEPS - resumed.state.step), "<=", 0)
    found = gather_weights(resumed)
    case.check("largest_difference", max(map(measure_difference, expected, found)), "<=", 0)


def gather_weights(run: Any) -> list[torch.Tensor]:
    """Return copies of all trained weights on the host."""
    return [run.engine.weights.gather(name).to("cpu", copy=True) for name in run.engine.weights.trained_names]


def measure_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the largest difference of two tensors."""
    return (first.float() - second.float()).abs().max().item()


def block_default_stream(seconds: float) -> torch.cuda.Event:
    """Block the default stream for about some seconds, and return an event behind the block."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch.cuda._sleep(TRIAL_CYCLES)
    end.record()
    end.synchronize()
    cycles_per_second = TRIAL_CYCLES / (start.elapsed_time(end) / 1e3)
    blocked = torch.cuda.Event()
    torch.cuda._sleep(int(seconds * cycles_per_second))
    blocked.record()
    return blocked
