"""Schedule-free optimizers (Defazio et al. 2024, arXiv 2405.15682), which average the weights in place of a schedule.

They keep two points besides the average x: z, which plain updates move, and y = beta x + (1 - beta) z, at which
gradients are computed. The weights of a run are y, and z is state of the optimizer. Whatever uses the trained model
(validation, generated images, model files) takes x, which is computed from both. The optimizer itself stays in its
training mode: its own switch between y and x rounds, so the steps of validations would change the weights.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import EmaConfig

Z = "z"  # name of z in the state of each weight
MODE = "train_mode"  # entry of a group: whether its weights are y


def is_schedule_free(kind: Any, config: OptimConfig) -> bool:
    """Return whether a class of optimizers averages the weights by itself, with the arguments of the settings."""
    return hasattr(kind, "train") and hasattr(kind, "eval") and bool(config.kwargs.get("use_schedulefree", True))


def has_own_average(config: OptimConfig) -> bool:
    """Return whether the settings name a schedule-free optimizer; `is_schedule_free` looks at the class instead."""
    name = config.name.lower().replace("_", "")
    return "schedulefree" in name and bool(config.kwargs.get("use_schedulefree", True))


def find_average_share(groups: list[dict[str, Any]]) -> float | None:
    """Return the share of the way from y to z at which x is; None if the optimizer is not schedule-free.

    Args:
        groups: of an optimizer, which all have the same beta.
    """
    group = groups[0]
    if MODE not in group:
        return None
    beta = group["betas"][0] if "betas" in group else group["momentum"]
    return 1 - 1 / beta


def compute_average(weights: torch.Tensor, state: Mapping[str, Any], share: float | None) -> torch.Tensor:
    """Compute x of a weight; before the first update, and for other optimizers, the weight itself.

    Args:
        weights: y, or a part of it.
        state: of the weight, or of the same part.
        share: as `find_average_share` returns it.
    """
    if share is None or Z not in state:
        return weights
    return torch.lerp(weights.float(), state[Z].to(weights.device).float(), share)


def check_beta(config: OptimConfig) -> Iterator[Problem]:
    """Yield a problem if y is z itself: x, which is found from both, would be unknown."""
    betas = config.kwargs.get("betas", config.betas)
    found = {
        "optim.kwargs.betas" if "betas" in config.kwargs else "optim.betas": betas[0] if betas else None,
        "optim.kwargs.momentum": config.kwargs.get("momentum"),
    }
    for key, beta in found.items():
        if beta is not None and not beta > 0:
            rule = f"must be above 0 for {config.name}, which averages by it"
            yield Problem(key, beta, rule, "set it to 0.9")


def check_schedule_free(kind: Any, config: OptimConfig, ema: EmaConfig | None) -> Iterator[Problem]:
    """Yield a problem for each setting that contradicts an optimizer with its own average."""
    if not is_schedule_free(kind, config):
        return
    yield from check_beta(config)
    if config.schedule != "constant":
        rule = f"contradicts {config.name}, which averages the weights in place of a schedule"
        yield Problem("optim.schedule", config.schedule, rule, "set it to constant; optim.warmup_steps may stay")
    for key, numbers in (("decays", ema.decays), ("lengths", ema.lengths)) if ema is not None else ():
        if numbers:
            rule = f"contradicts {config.name}, which keeps an average of its own and uses it for every model file"
            yield Problem(f"ema.{key}", numbers, rule, "set it to []")
