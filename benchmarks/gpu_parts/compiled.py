"""Part `compile`: the real step with compiled blocks, and with the whole U-Net compiled.

Results are written as they come, because compiling may outlast the part's time. On a CPU the blocks are traced and not
compiled, which would take minutes.
"""

import time
from functools import partial

from gpu_parts.devices import Place
from gpu_parts.fit import choose_first_sizes
from gpu_parts.report import Case, Cases
from gpu_parts.steps import RealStep

REGIONS = (("transformer_blocks", "BasicTransformerBlock"), ("residual_blocks_too", "ResnetBlock2D"))


def list_cases(place: Place) -> Cases:
    """List the cases of this part."""
    return {"blocks": partial(measure_blocks, place), "whole_unet": partial(measure_whole, place)}


def measure_blocks(place: Place, case: Case) -> None:
    """Measure the step without compilation, then compile one kind of block after the other."""
    step = RealStep(place, choose_first_sizes(place), case)
    case.note(eager=step.measure())
    for name, kind in REGIONS[: 1 if place.tiny else None]:
        blocks = [block for block in step.run.engine.model.unet.modules() if type(block).__name__ == kind]
        for block in blocks:
            block.compile(backend="inductor" if place.is_cuda else "eager")
        case.note(**{f"{name}_count": len(blocks), f"{name}_first_step_seconds": place.time_call(step)})
        case.note(**{name: step.measure()})


def measure_whole(place: Place, case: Case) -> None:
    """Measure the step with `engine.compile`."""
    place.require_cuda("compiling the whole U-Net in little time")
    started = time.perf_counter()
    step = RealStep(place, choose_first_sizes(place), case, ["engine.compile=true"])
    step()
    case.note(first_step_seconds=time.perf_counter() - started)
    case.note(**step.measure())
