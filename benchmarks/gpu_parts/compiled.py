"""Part `compile`: the real step with `engine.compile` regional and full, and with fp8 in compiled blocks.

Results are written as they come, because compiling may outlast the part's time. On a CPU the blocks are traced and not
compiled, which would take minutes.
"""

import time
from functools import partial

from gpu_parts.devices import Place
from gpu_parts.fit import choose_first_sizes
from gpu_parts.report import Case, Cases, SkippedCase
from gpu_parts.steps import RealStep
from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.train.networks.fp8_linears import check_fp8


def list_cases(place: Place) -> Cases:
    """List the cases of this part."""
    return {
        "blocks": partial(measure_blocks, place),
        "fp8_blocks": partial(measure_fp8, place),
        "whole_unet": partial(measure_whole, place),
    }


def measure_blocks(place: Place, case: Case) -> None:
    """Measure the step without compilation, and then with compiled blocks."""
    from sdxl_trainer.train.networks.compilation import compile_unet

    step = RealStep(place, choose_first_sizes(place), case)
    case.note(eager=step.measure())
    compilation = compile_unet(step.run.engine.model.unet, "regional", "inductor" if place.is_cuda else "eager")
    assert compilation is not None
    case.note(first_step_seconds=place.time_call(step))
    case.note(regional=step.measure())
    case.note(compiling_seconds=compilation.seconds, graphs=compilation.num_graphs)
    case.check("graphs_beyond_kinds", compilation.num_graphs - len(compilation.expected), "<=", 0)


def measure_fp8(place: Place, case: Case) -> None:
    """Measure the step with compiled blocks whose linear layers multiply in fp8."""
    place.require_cuda("multiplying in fp8")
    problems = [problem.rule for problem in check_fp8(EngineConfig.model_validate({"fp8": "linear"}), False)]
    if problems:
        raise SkippedCase(f"engine.fp8 {'; '.join(problems)}")
    step = RealStep(place, choose_first_sizes(place), case, ["engine.compile=regional", "engine.fp8=linear"])
    case.note(first_step_seconds=place.time_call(step))
    case.note(**step.measure())


def measure_whole(place: Place, case: Case) -> None:
    """Measure the step with the whole U-Net compiled."""
    place.require_cuda("compiling the whole U-Net in little time")
    started = time.perf_counter()
    step = RealStep(place, choose_first_sizes(place), case, ["engine.compile=full"])
    step()
    case.note(first_step_seconds=time.perf_counter() - started)
    case.note(**step.measure())
