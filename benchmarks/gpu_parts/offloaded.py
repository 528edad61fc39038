"""Blocks in host memory: losses near those of a run without, and the time and the memory of the copies."""

import json
from functools import partial

from gpu_parts.devices import Place
from gpu_parts.fit import StepSizes
from gpu_parts.report import Case, Cases
from gpu_parts.steps import RealStep

SETTINGS = (
    *("engine.gradient_release=true", "engine.precision=bf16_stochastic", "optim.name=adafactor"),
    *("optim.clipping=parameter", "engine.gradient_checkpointing=full"),
)
# Kernels of attention and convolutions add up in an order that varies, and updates enlarge the difference.
LARGEST_DIFFERENCE = 0.01


def list_cases(place: Place) -> Cases:
    """List the cases of this module. Each has little memory left of the one before."""
    numbers = (0, 10, 30) if place.tiny else (0, 40, 80)
    return {f"offloaded_blocks_{number}": partial(measure_offload, place, number) for number in numbers}


def measure_offload(place: Place, number: int, case: Case) -> None:
    """Measure steps of a micro batch of 1 with so many offloaded blocks."""
    step = RealStep(place, StepSizes(1), case, [*SETTINGS, f"engine.offload_blocks={number}"])
    place.reset_peak()
    found = step.measure()
    case.note(**found, peak_gb=place.read_peak() / 1e9, held_gb=place.read_held() / 1e9)
    losses, file = found["losses"], place.work / "losses-without-offload.json"
    if number == 0:
        file.write_text(json.dumps(losses))
    elif file.exists():
        pairs = zip(json.loads(file.read_text()), losses, strict=True)
        difference = max(abs(loss / plain - 1) for plain, loss in pairs)
        case.check("largest_difference_of_losses", difference, "<=", LARGEST_DIFFERENCE)
