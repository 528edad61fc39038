"""Conversions of the precision, and of updates within the backward pass, which save memory."""

from typing import Any

from sdxl_trainer.configs.kohya.optimizers import needs_whole_weights
from sdxl_trainer.configs.kohya.values import Given, UnsupportedError, look_up, read_number

RELEASING = ("fused_backward_pass", "fused_optimizer_groups")


def convert_release(value: Any, given: Given) -> dict[str, Any]:
    """Convert updates within the backward pass. They clip the gradient of each weight, as kohya's scripts do then."""
    if not value:
        return {}
    norm = given.get("max_grad_norm")
    clipping = {"optim.clipping": "parameter"} if norm is None or read_number(norm) else {}
    return {"engine.gradient_release": True, **clipping}


def convert_precision(value: Any, given: Given) -> str:
    """Convert the precision. fp16 needs ZeRO 1 to 3 here, which optimizers that need whole weights do not have.

    Updates within the backward pass keep no fp32 weights beside those of the network. kohya's scripts then have fp32
    weights alone, which `bf16_kahan` comes close to with as many bytes.

    Raises:
        UnsupportedError: the precision is unknown, or is replaced by another.
    """
    precision = look_up({"no": "fp32", "float": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8": "bf16"})(value, given)
    if precision != "fp32" and any(given.get(option) for option in RELEASING):
        reason = "becomes bf16_kahan, whose weights in bf16 keep the remainders of their rounding"
        raise UnsupportedError(reason, {"engine.precision": "bf16_kahan"})
    if precision == "fp16" and needs_whole_weights(str(given.get("optimizer_type"))):
        reason = f"needs ZeRO 1 to 3 here, which {given['optimizer_type']} does not have; engine.precision is bf16"
        raise UnsupportedError(reason, {"engine.precision": "bf16"})
    return precision


def convert_full_bf16(value: Any, given: Given) -> str:
    """Convert weights and moments in bf16 only to `bf16_stochastic`, for the optimizers that support it."""
    name = str(given.get("optimizer_type") or "adamw").lower()
    if name not in ("adamw", "lion") and not any(given.get(option) for option in RELEASING):
        raise UnsupportedError(
            "needs adamw or lion here, or fused_backward_pass; engine.precision is bf16, with fp32 master weights"
        )
    return "bf16_stochastic"
