"""Bytes of an optimizer's state and of its update, by the shapes of the weights."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sdxl_trainer.configs.engine import PURE_BF16, EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.train.engine.quantised import BLOCK, MIN_QUANTISED
from sdxl_trainer.train.optim.optimizers import needs_fp32_copies
from sdxl_trainer.train.optim.stochastic_rounding import CHUNK

FP32_BYTES, BF16_BYTES = 4, 2
# Bytes of the copy that the optimizer updates: fp32 masters, or DeepSpeed's bf16 copy (with Kahan's compensation).
MASTER_BYTES = {"fp32": 4, "bf16": 4, "fp16": 4, "bf16_kahan": 4, "bf16_stochastic": 2}
# Values that an optimizer keeps for each weight. Other optimizers are assumed to keep two, as AdamW does.
NUM_MOMENTS = {"adamw": 2, "lion": 1, "prodigy": 4, "muon": 1, "ademamix": 3}
# Bytes of what an update makes for a value: the change in fp32, or more by other libraries (counted).
UPDATE_BYTES = {
    **{"adamw_schedule_free": 4, "lamb": 4, "adopt": 8, "ademamix": 8, "stable_adamw": 8, "came": 16},
    "soap": 60,  # for the shape of SDXL's weights that needs most
}
UPDATES_GROUPS = ("adamw_schedule_free", "lamb", "adopt", "ademamix", "came")  # all weights of a group at a time
# Of the weight and the gradient in fp32; transformers' Adafactor, which updates weights in fp32, makes four copies.
WIDE_BYTES, COPIES_BYTES_IN_FP32 = 2 * FP32_BYTES, 4 * FP32_BYTES
# Of a value while a part of a weight is rounded: at random, or to the nearest with Kahan's remainder.
ROUNDING_BYTES = {"bf16_stochastic": 48, "bf16_kahan": 3 * FP32_BYTES}


def count_master_bytes(engine: EngineConfig) -> int:
    """Count the bytes per trained weight of the copy that the optimizer updates, besides the weights themselves."""
    if engine.gradient_release:
        return BF16_BYTES if engine.precision == "bf16_kahan" else 0  # of Kahan's compensation
    return 0 if engine.precision == "fp32" and not engine.zero_stage else MASTER_BYTES[engine.precision]


def count_moments(engine: EngineConfig, optim: OptimConfig, shapes: Iterable[Sequence[int]]) -> int:
    """Count the bytes of the moments of trained weights.

    Args:
        shapes: of the weights.
    """
    if optim.name == "adafactor":
        as_matrices = bool(optim.kwargs.get("factor_convolutions"))
        return FP32_BYTES * sum(count_factors(shape, as_matrices) for shape in shapes)
    if optim.name == "adamw8bit":
        return sum(count_eight_bit(math.prod(shape)) for shape in shapes)
    if optim.name in FP32_VALUES:
        return FP32_BYTES * sum(FP32_VALUES[optim.name](shape, optim.kwargs) for shape in shapes)
    in_bf16 = engine.precision in PURE_BF16 and not needs_fp32_copies(optim.name, engine)
    num_values = NUM_MOMENTS.get(optim.name, 2) * sum(math.prod(shape) for shape in shapes)
    return num_values * (BF16_BYTES if in_bf16 else FP32_BYTES)


def count_factors(shape: Sequence[int], as_matrices: bool) -> int:
    """Count the values that Adafactor keeps for a weight: the means of rows and columns.

    Args:
        as_matrices: the weight of a convolution is one matrix, and not one for each place of the kernel's last axis.
    """
    numel = math.prod(shape)
    if len(shape) < 2:
        return numel
    if as_matrices and len(shape) > 2:
        return shape[0] + numel // shape[0]
    return numel // shape[-1] + numel // shape[-2]


def count_came(shape: Sequence[int], kwargs: Mapping[str, Any]) -> int:
    """Count the values that CAME keeps for a weight: a first moment, and two others by rows and columns."""
    return math.prod(shape) + (2 if len(shape) > 1 else 1) * count_factors(shape, as_matrices=False)


def count_soap(shape: Sequence[int], kwargs: Mapping[str, Any]) -> int:
    """Count the values that SOAP keeps for a weight: two moments, and two matrices for each side that is not too long.

    Args:
        kwargs: `optim.kwargs`.
    """
    longest = kwargs.get("max_precondition_dim", 10000)
    sides = [side for side in shape if side <= longest] if len(shape) > 1 else []
    return 2 * math.prod(shape) + 2 * sum(side**2 for side in sides)


def count_prodigy_plus(shape: Sequence[int], kwargs: Mapping[str, Any]) -> int:
    """Count the values that ProdigyPlusScheduleFree keeps for a weight, in units of fp32.

    These are a point of the weights' size, a second moment by the two longest sides if one has 32 values or more, and
    two numbers in bf16 for every 11th value.
    """
    numel, (shorter, longer) = math.prod(shape), sorted((1, *shape))[-2:]
    is_factored = len(shape) > 1 and longer >= 32 and kwargs.get("factored", True)
    moment = numel // longer + numel // shorter if is_factored else numel
    return numel + moment + -(-numel // 11)


# Optimizer → function that counts the values of fp32 that it keeps for a weight of a shape, by `optim.kwargs`.
FP32_VALUES: dict[str, Callable[[Sequence[int], Mapping[str, Any]], int]] = {
    "came": count_came,
    "soap": count_soap,
    "prodigy_plus_schedule_free": count_prodigy_plus,
}


def count_eight_bit(numel: int) -> int:
    """Count the bytes of two moments in 8 bit, with a scale in fp32 for each block; small weights have them in fp32."""
    return 2 * (numel + FP32_BYTES * -(-numel // BLOCK) if numel >= MIN_QUANTISED else FP32_BYTES * numel)


def count_release_copies(engine: EngineConfig, largest: int, name: str = "adamw") -> int:
    """Count the bytes of copies while gradient release updates a weight of `largest` values.

    Args:
        name: of the optimizer, as `optim.name`.
    """
    own = UPDATE_BYTES.get(name, FP32_BYTES)
    if engine.precision == "fp32":
        return max(COPIES_BYTES_IN_FP32, own) * largest
    rounding = ROUNDING_BYTES.get(engine.precision, 0) * min(largest, CHUNK)
    return max((WIDE_BYTES + own) * largest, FP32_BYTES * largest + rounding)


def count_own_copies(name: str, largest: float) -> float:
    """Count the bytes that an optimizer of another library makes while it updates a group of `largest` values.

    Args:
        name: of the optimizer, as `optim.name`.
    """
    return UPDATE_BYTES[name] * largest if name in UPDATES_GROUPS else 0
