"""Trial of the user's own loss and weighting before a run. docs/OWN_CODE.md is their guide."""

from collections.abc import Callable, Iterator

import torch

from sdxl_trainer.configs.objective import ObjectiveConfig
from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.configs.section import is_own_code
from sdxl_trainer.data.own_code import UserCodeError, call_user_code, load_own_function
from sdxl_trainer.train.objective.objective import LOSS_KEY, WEIGHTING_KEY, build_weighting

CURE = "correct the function (docs/OWN_CODE.md)"
SHAPE = (3, 4, 8, 16)  # [B, C, h, w] of the trial


def check_own_formulas(config: ObjectiveConfig) -> Iterator[Problem]:
    """Yield a problem for the user's own loss and weighting if it cannot be loaded, fails, or returns wrong values."""
    if is_own_code(config.loss):
        yield from _check_call(LOSS_KEY, config.loss, lambda: _find_fault_of_loss(config.loss))
    if is_own_code(config.weighting):
        yield from _check_call(WEIGHTING_KEY, config.weighting, lambda: _find_fault_of_weighting(config))


def _check_call(key: str, spec: str, find_fault: Callable[[], str]) -> Iterator[Problem]:
    try:
        fault = find_fault()
    except UserInputError as error:
        yield from error.problems
        return
    except UserCodeError as error:
        fault = f"raised {error}"
    if fault:
        yield Problem(key, spec, fault, CURE)


def _find_fault_of_loss(spec: str) -> str:
    """Try a loss on random values; return what is wrong with its result, or an empty string."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    errors = call_user_code(load_own_function(LOSS_KEY, spec), prediction.requires_grad_(), target)
    fault = _find_fault(errors, SHAPE, "the error of each value")
    if not fault and not errors.requires_grad:
        fault = "returned errors that do not depend on the prediction, so nothing can be learnt from them"
    return fault


def _find_fault_of_weighting(config: ObjectiveConfig) -> str:
    """Try a weighting over the range of SNRs; return what is wrong with its result, or an empty string."""
    lowest = [0.0] if config.zero_terminal_snr else []
    snr = torch.tensor([*lowest, *torch.logspace(-5, 3, 17).tolist()])
    weights = call_user_code(build_weighting(config), snr)
    fault = _find_fault(weights, tuple(snr.shape), "the weight of each sample")
    return fault or ("returned a negative weight" if (weights < 0).any() else "")


def _find_fault(result: object, shape: tuple[int, ...], meaning: str) -> str:
    if not isinstance(result, torch.Tensor):
        return f"returned {type(result).__name__}, not a tensor with {meaning}"
    if tuple(result.shape) != shape:
        return f"returned the shape {list(result.shape)} for {list(shape)}; it must return {meaning}"
    return "" if result.isfinite().all() else "returned values that are not finite"
