"""Blocks in host memory: losses equal to those of a run without, and the time and the memory of the copies."""

from functools import partial

from gpu_parts.devices import Place
from gpu_parts.fit import StepSizes
from gpu_parts.report import Case, Cases
from gpu_parts.steps import RealStep

SETTINGS = (
    *("engine.gradient_release=true", "engine.precision=bf16_stochastic", "optim.name=adafactor"),
    *("optim.clipping=parameter", "engine.gradient_checkpointing=full"),
)


def list_cases(place: Place) -> Cases:
    """List the cases of this module."""
    return {"offloaded_blocks": partial(measure_offload, place)}


def measure_offload(place: Place, case: Case) -> None:
    """Measure steps of a micro batch of 1 without offloaded blocks, with some and with most."""
    sizes, found = StepSizes(1), {}
    for number in (0, 10, 30) if place.tiny else (0, 40, 80):
        place.reset_peak()
        step = RealStep(place, sizes, case, [*SETTINGS, f"engine.offload_blocks={number}"])
        found[number] = step.measure()
        case.note(**{f"with_{number}": {**found[number], "held_gb": place.read_held() / 1e9}})
        del step
        place.free_memory()
    plain, *others = found.values()
    case.check("runs_with_other_losses", sum(run["losses"] != plain["losses"] for run in others), "<=", 0)
