"""Learning-rate schedules as pure functions of the step, so that a resume needs no scheduler state."""

import math
from collections.abc import Callable, Iterator
from functools import partial

from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.section import is_own_code
from sdxl_trainer.data.own_code import UserCodeError, bind_arguments, call_user_code, load_own_function

KEY = "optim.schedule"
TRIED_STEPS = 100


def compute_lr(step: int, config: OptimConfig, num_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of a run of `num_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    length = max(1, num_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / length)
    share = build_schedule(config, length)(progress)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


def build_schedule(config: OptimConfig, length: int) -> Callable[[float], float]:
    """Build the function from progress (0 to 1) to the share of the peak, which `optim.schedule` names.

    Args:
        length: number of steps after the warm-up.
    """
    if is_own_code(config.schedule):
        return bind_arguments(load_own_function(KEY, config.schedule), {"num_steps": length})
    return SCHEDULES[config.schedule](config, length)


def check_own_schedule(config: OptimConfig) -> Iterator[Problem]:
    """Yield a problem if the user's own schedule cannot be loaded, fails, or returns no number of 0 or more."""
    if not is_own_code(config.schedule):
        return
    try:
        schedule = build_schedule(config, TRIED_STEPS)
        for step in range(TRIED_STEPS + 1):
            share = call_user_code(schedule, step / TRIED_STEPS)
            if not (isinstance(share, (int, float)) and 0 <= share < math.inf):
                rule = f"returned {share!r:.100} at progress {step / TRIED_STEPS:g}, which is not a number of 0 or more"
                yield Problem(KEY, config.schedule, rule, "return the share of the peak learning rate, such as 0.5")
                return
    except UserInputError as error:
        yield from error.problems
    except UserCodeError as error:
        yield Problem(KEY, config.schedule, f"raised {error}", "correct the function (docs/OWN_CODE.md)")


def hold(progress: float) -> float:
    """Return 1 at any progress."""
    return 1.0


def fall_cosine(progress: float, num_cycles: int = 1) -> float:
    """Return half a cosine from 1 to 0, repeated `num_cycles` times."""
    if progress >= 1:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (num_cycles * progress % 1)))


def fall_power(progress: float, power: float = 1.0) -> float:
    """Return (1 - progress) ** power; a power of 1 is a line."""
    return (1 - progress) ** power


def hold_then_fall(progress: float, decay_share: float) -> float:
    """Return 1, and over the last `decay_share` a line to 0 (warm-up, stable, decay: arXiv 2404.06395)."""
    return min(1.0, (1 - progress) / decay_share)


# Name → builder of a function from progress (0 to 1) to the share of the peak. The builder gets the settings and the
# number of steps after the warm-up.
SCHEDULES: dict[str, Callable[[OptimConfig, int], Callable[[float], float]]] = {
    "constant": lambda config, length: hold,
    "linear": lambda config, length: fall_power,
    "cosine": lambda config, length: fall_cosine,
    "cosine_with_restarts": lambda config, length: partial(fall_cosine, num_cycles=config.num_cycles),
    "polynomial": lambda config, length: partial(fall_power, power=config.power),
    "wsd": lambda config, length: partial(hold_then_fall, decay_share=min(1.0, config.decay_steps / length)),
}
