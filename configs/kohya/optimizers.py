"""Conversions of the optimizer and its schedule."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from sdxl_trainer.configs.kohya.values import (
    Convert,
    Given,
    NoEffectError,
    UnsupportedError,
    look_up,
    read_numbers,
    read_pairs,
)


class KnownOptimizer(NamedTuple):
    """An optimizer of kohya's scripts: `optim.name` here, default weight decay, and fixed arguments."""

    name: str
    weight_decay: float
    kwargs: Mapping[str, Any] = MappingProxyType({})


KOHYA_OPTIMIZERS = {
    "adamw": KnownOptimizer("adamw", 0.01),
    "adamw8bit": KnownOptimizer("adamw8bit", 0.01),
    "pagedadamw": KnownOptimizer("bitsandbytes.optim.PagedAdamW", 0.01),
    "pagedadamw8bit": KnownOptimizer("bitsandbytes.optim.PagedAdamW8bit", 0.01),
    "pagedadamw32bit": KnownOptimizer("bitsandbytes.optim.PagedAdamW32bit", 0.01),
    "lion": KnownOptimizer("lion", 0.0),
    "lion8bit": KnownOptimizer("bitsandbytes.optim.Lion8bit", 0.0),
    "pagedlion8bit": KnownOptimizer("bitsandbytes.optim.PagedLion8bit", 0.0),
    "adafactor": KnownOptimizer("adafactor", 0.0),
    "prodigy": KnownOptimizer("prodigy", 0.0),
    **dict.fromkeys(
        ("adamwschedulefree", "schedulefree.adamwschedulefree"), KnownOptimizer("adamw_schedule_free", 0.0)
    ),
    "radamschedulefree": KnownOptimizer("schedulefree.RAdamScheduleFree", 0.0),
    "sgdschedulefree": KnownOptimizer("schedulefree.SGDScheduleFree", 0.0),
    "prodigyplus.prodigyplusschedulefree": KnownOptimizer("prodigy_plus_schedule_free", 0.0),
    "optimi.stableadamw": KnownOptimizer("stable_adamw", 0.01),
    **{f"pytorch_optimizer.{name}": KnownOptimizer(name, 0.0) for name in ("came", "lamb")},
    "pytorch_optimizer.soap": KnownOptimizer("soap", 0.01),
    "dadaptation": KnownOptimizer("dadaptation.experimental.DAdaptAdamPreprint", 0.0),
    "dadaptadampreprint": KnownOptimizer("dadaptation.experimental.DAdaptAdamPreprint", 0.0),
    "dadaptadagrad": KnownOptimizer("dadaptation.DAdaptAdaGrad", 0.0),
    "dadaptadam": KnownOptimizer("dadaptation.DAdaptAdam", 0.0),
    "dadaptadan": KnownOptimizer("dadaptation.DAdaptAdan", 0.0),
    "dadaptlion": KnownOptimizer("dadaptation.DAdaptLion", 0.0),
    "dadaptsgd": KnownOptimizer("dadaptation.DAdaptSGD", 0.0),
    "sgdnesterov": KnownOptimizer("torch.optim.SGD", 0.0, {"momentum": 0.9, "nesterov": True}),
    "sgdnesterov8bit": KnownOptimizer("bitsandbytes.optim.SGD8bit", 0.0, {"momentum": 0.9, "nesterov": True}),
}
# Name prefixes of optimizers that need whole weights, which ZeRO would shard.
WHOLE_WEIGHTS = ("adafactor", "prodigy", "dadapt", "came", "soap", "stableadamw", "lamb")
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
    "cosine_with_min_lr": "cosine",
    "warmup_stable_decay": "wsd",
}
# Arguments of Adafactor that are not copied to `optim.kwargs`.
ADAFACTOR_ARGUMENTS = ("relative_step", "warmup_init", "scale_parameter")


def needs_whole_weights(optimizer: str) -> bool:
    """Return whether an optimizer needs whole weights, which ZeRO would shard."""
    return optimizer.lower().rpartition(".")[2].startswith(WHOLE_WEIGHTS)


def convert_optimizer(value: Any, given: Given) -> dict[str, Any]:
    """Convert an optimizer to its name, default weight decay, fixed arguments and a ZeRO stage that suits it."""
    name = str(value)
    unknown = KnownOptimizer(name if "." in name else f"torch.optim.{name}", 0.01 if "adamw" in name.lower() else 0.0)
    optimizer = KOHYA_OPTIMIZERS.get(name.lower(), unknown)
    settings: dict[str, Any] = {"optim.name": optimizer.name, "optim.weight_decay": optimizer.weight_decay}
    if optimizer.kwargs:
        settings["optim.kwargs"] = dict(optimizer.kwargs)
    if needs_whole_weights(name):
        settings["engine.zero_stage"] = 0
    if optimizer.name == "adafactor" and _has_relative_steps(read_pairs(given.get("optimizer_args") or {})):
        reason = "uses relative steps unless relative_step=False; here optim.lr and optim.schedule apply"
        raise UnsupportedError(reason, settings)
    return settings


def _has_relative_steps(kwargs: Mapping[str, Any]) -> bool:
    return bool(kwargs.get("relative_step", True) or kwargs.get("warmup_init", False))


def convert_optimizer_args(value: Any, given: Given) -> dict[str, Any]:
    """Convert arguments to their own settings, and the others to `optim.kwargs`."""
    kwargs = read_pairs(value)
    settings: dict[str, Any] = {}
    if "weight_decay" in kwargs:
        settings["optim.weight_decay"] = kwargs.pop("weight_decay")
    if "betas" in kwargs and len(read_numbers(kwargs["betas"])) == 2:  # Prodigy and CAME may have three betas
        settings["optim.betas"] = read_numbers(kwargs.pop("betas"))
    if isinstance(kwargs.get("eps"), (int, float)):  # Adafactor has two values
        settings["optim.eps"] = kwargs.pop("eps")
    if str(given.get("optimizer_type")).lower() == "adafactor":
        if not _has_relative_steps(kwargs) and kwargs.get("scale_parameter", True):
            settings["optim.kwargs"] = {"scale_parameter": True}  # the default of its class, which is off here
        kwargs = {name: item for name, item in kwargs.items() if name not in ADAFACTOR_ARGUMENTS}
    kwargs = {name: list(item) if isinstance(item, tuple) else item for name, item in kwargs.items()}
    if kwargs:
        known = KOHYA_OPTIMIZERS.get(str(given.get("optimizer_type")).lower())
        settings["optim.kwargs"] = dict(known.kwargs if known else {}) | settings.get("optim.kwargs", {}) | kwargs
    return settings


def needs_schedule(convert: Convert) -> Convert:
    """Return the conversion of an option of the schedule, which schedule-free optimizers do not use."""

    def convert_unless_free(value: Any, given: Given) -> Any:
        if str(given.get("optimizer_type")).lower().endswith("schedulefree"):
            raise NoEffectError("has no effect with a schedule-free optimizer")
        return convert(value, given)

    return convert_unless_free


convert_schedule = needs_schedule(look_up(SCHEDULES))
