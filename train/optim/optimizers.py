"""Builds the optimizer that the settings name."""

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple

import torch
from loguru import logger

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import Problem


class Entry(NamedTuple):
    """Import path of an optimizer's class, and the arguments that make it what its name says."""

    path: str
    kwargs: dict[str, Any] = {}


OPTIMIZERS = {
    "adamw": Entry("torch.optim.AdamW", {"fused": True}),
    "adamw8bit": Entry("bitsandbytes.optim.AdamW8bit"),
    # The recipe of SDXL's authors for it, as kohya's scripts pass it on.
    "adafactor": Entry(
        "transformers.optimization.Adafactor",
        {"relative_step": False, "scale_parameter": False, "warmup_init": False},
    ),
    "lion": Entry("optimi.Lion", {"kahan_sum": False}),
    "prodigy": Entry("prodigyopt.Prodigy"),
    "muon": Entry("deepspeed.runtime.zero.muon.muon_optimizer.MuonWithAuxAdam"),
}
# The same optimizers by other means, for a state that lies in host memory while the weights are on a GPU.
ON_HOST = {
    "adamw": Entry("deepspeed.ops.adam.DeepSpeedCPUAdam", {"adamw_mode": True}),
    "lion": Entry("deepspeed.ops.lion.DeepSpeedCPULion"),
}
# Without fp32 masters, by precision. Optimi's second decay of 0.99 stays: with 0.999 a second moment that is rounded to
# the nearest bf16 would hardly ever fall.
LOW_PRECISION = {
    "bf16_kahan": {
        "adamw": Entry("optimi.AdamW", {"kahan_sum": True, "betas": (0.9, 0.99), "eps": 1e-8}),
        "lion": Entry("optimi.Lion", {"kahan_sum": True}),
    },
    "bf16_stochastic": {
        "adamw": Entry("sdxl_trainer.train.optim.stochastic_rounding.AdamW"),
        "lion": Entry("sdxl_trainer.train.optim.stochastic_rounding.Lion"),
    },
}
DISTRIBUTIONS = {"optimi": "torch-optimi"}  # where a package is called otherwise than what it is imported as
# ZeRO 1 to 3 hand an optimizer flat shards, where these compute something else than on whole tensors.
NEEDS_WHOLE_TENSORS = {
    "Adafactor": "factors each weight's second moment by rows and columns",
    "CAME": "factors each weight's second moment by rows and columns",
    "Prodigy": "finds its step size by sums over all weights",
    "DAdaptAdam": "finds its step size by sums over all weights",
    "Lamb": "measures the norm of each weight",
    "LARS": "measures the norm of each weight",
    "Shampoo": "preconditions each weight by its rows and columns",
    "SOAP": "preconditions each weight by its rows and columns",
    "Muon": "orthogonalises each weight",
}


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, engine: EngineConfig, seed: int = 0
) -> torch.optim.Optimizer:
    """Build the configured optimizer over parameter groups; `seed` is for the rounding of `bf16_stochastic`."""
    entry = choose_entry(config.name, engine)
    if config.name == "muon":
        return build_muon(entry, groups, config)
    kind = import_class(entry.path)
    given = {"lr": config.lr, "betas": config.betas, "eps": config.eps} | config.kwargs
    if engine.precision == "bf16_stochastic":
        given["seed"] = seed
    return kind(groups, **entry.kwargs | {name: value for name, value in given.items() if value is not None})


def build_muon(entry: Entry, groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Muon for matrices, AdamW for all else: convolutions, embeddings, biases and norms.

    `optim.lr` is Muon's; the `adam_lr` of `optim.kwargs`, AdamW's, stands in the same ratio to it in every group.
    """
    kwargs = dict(config.kwargs)
    adam_share = kwargs.pop("adam_lr", config.lr) / config.lr
    adam = {"betas": config.betas or (0.9, 0.999), "eps": config.eps or 1e-8}
    halves: list[dict[str, Any]] = []
    for group in groups:
        rates = {"lr": group["lr"] * adam_share, "lr_scale": group["lr_scale"] * adam_share}
        halves.append({**group, **kwargs, "use_muon": True})
        halves.append({**group, **adam, **rates, "use_muon": False})
    for half in halves:
        half["params"] = [parameter for parameter in half["params"] if parameter.use_muon == half["use_muon"]]
    return import_class(entry.path)([half for half in halves if half["params"]])


def choose_entry(name: str, engine: EngineConfig) -> Entry:
    """The optimizer of a name, in the form that suits precision and offload; a class by its own path otherwise."""
    tables = [OPTIMIZERS]
    if engine.precision in LOW_PRECISION:
        tables.insert(0, LOW_PRECISION[engine.precision])
    elif engine.offload_optimizer:
        tables.insert(0, ON_HOST)
    return next((table[name] for table in tables if name in table), Entry(name))


def find_need_of_whole_tensors(config: OptimConfig, engine: EngineConfig) -> str | None:
    """Why the optimizer must see whole weights; None if flat shards will do."""
    return NEEDS_WHOLE_TENSORS.get(choose_entry(config.name, engine).path.replace(":", ".").rpartition(".")[2])


def import_class(path: str) -> Any:
    """The class at `module.Class` or `module:Class`.

    Raises:
        ImportError, AttributeError: there is none.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    return getattr(importlib.import_module(module), name)


def check_engine(engine: EngineConfig) -> Iterator[Problem]:
    """Whether the packages that the settings of the engine need are there."""
    if engine.attention == "xformers" and importlib.util.find_spec("xformers") is None:
        yield Problem("engine.attention", "xformers", "is not installed", "pip install xformers, or take sdpa")


def check_optimizer(config: OptimConfig, engine: EngineConfig) -> Iterator[Problem]:
    """Whether the optimizer can be had, takes its arguments, and computes what it should under the engine."""
    entry = choose_entry(config.name, engine)
    if config.name not in OPTIMIZERS and "." not in config.name:
        rule = f"is neither one of {', '.join(OPTIMIZERS)} nor an import path"
        yield Problem("optim.name", config.name, rule, "for a class of your own write module.Class")
        return
    try:
        kind = import_class(entry.path)
    except (ImportError, AttributeError, ValueError) as error:
        package = entry.path.partition(".")[0]
        cure = f"pip install {DISTRIBUTIONS.get(package, package)}"
        yield Problem("optim.name", config.name, f"cannot be imported: {error}", cure)
        return
    reason = find_need_of_whole_tensors(config, engine)
    if reason and engine.zero_stage:
        rule = f"{reason}, which it cannot on the flat shards of ZeRO {engine.zero_stage}"
        yield Problem("optim.name", config.name, rule, "set engine.zero_stage: 0, or take another optimizer")
    forms = LOW_PRECISION.get(engine.precision)
    if forms is not None and config.name not in forms:
        cure = f"take {' or '.join(forms)}, or engine.precision: bf16"
        yield Problem("optim.name", config.name, f"has no form for engine.precision {engine.precision}", cure)
    if config.name == "muon" and config.max_grad_norm:
        rule = "would scale down Muon's updates, whose size does not depend on the gradient's"
        yield Problem("optim.max_grad_norm", config.max_grad_norm, rule, "set it to 0")
    if kind.__name__ == "Prodigy":
        yield from check_prodigy(config)
    yield from check_arguments(kind, config)
    if engine.zero_stage and config.name not in OPTIMIZERS:
        logger.warning("ZeRO {} hands {} flat shards: its update must be elementwise", engine.zero_stage, config.name)


def check_arguments(kind: Any, config: OptimConfig) -> Iterator[Problem]:
    """Arguments that the optimizer's class does not take."""
    if config.name == "muon":
        known = {"adam_lr", "momentum", "ns_method", "betas", "eps"}
    else:
        parameters = inspect.signature(kind.__init__).parameters.values()
        if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            return
        known = {parameter.name for parameter in parameters} - {"self", "params"}
    for key in ("betas", "eps"):
        if getattr(config, key) is not None and key not in known:
            yield Problem(f"optim.{key}", getattr(config, key), f"{config.name} takes none", "leave it out")
    for key, value in config.kwargs.items():
        if key not in known:
            yield Problem(
                f"optim.kwargs.{key}",
                value,
                f"{config.name} takes no such argument",
                f"it takes {', '.join(sorted(known))}",
            )


def check_prodigy(config: OptimConfig) -> Iterator[Problem]:
    """Prodigy multiplies what it finds with one learning rate for all, which should be near 1."""
    if config.lr < 0.1:
        yield Problem("optim.lr", config.lr, "is a factor of the rate that Prodigy finds", "set it to 1")
    own = [config.text_encoder_lr, config.text_encoder_2_lr, *(config.block_lrs or [])]
    own += [group.lr for group in config.groups if group.lr is not None]
    if set(own) - {0.0, config.lr}:
        rule = "are different learning rates; Prodigy finds one for all"
        yield Problem("optim", sorted({*own, config.lr}), rule, "give 0 or optim.lr")


def compile_at_first_call(function: Callable) -> Callable:
    """`torch.compile` as a decorator, which brings in the compiler, 1.5 s of a rank's start, only when it is needed."""
    compiled = None

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal compiled
        compiled = compiled or torch.compile(function)
        return compiled(*arguments, **named)

    return call


def guard_updates(optimizer: Any, max_grad_norm: float) -> None:
    """Let a plain torch optimizer, which DeepSpeed uses as it is for fp32 without ZeRO, do what DeepSpeed's own do:
    clip, tell the norm, and make no update of gradients that are not finite (`overflow`, which the engine reads)."""
    update = optimizer.step
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step() -> None:
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
        optimizer._global_grad_norm, optimizer.overflow = norm, not bool(norm.isfinite())
        if not optimizer.overflow:
            update()

    optimizer.step = step


def restore_settings(groups: list[dict[str, Any]], settings: list[dict[str, Any]], optimizer: Any) -> None:
    """Set what the optimizer's constructor takes back to the settings of now; a checkpoint brings those of then.

    What is not an argument of it is memory, such as the step size that Prodigy has found.
    """
    names = set(inspect.signature(type(optimizer).__init__).parameters) - {"self", "params"}
    for group, wanted in zip(groups, settings, strict=True):
        group.update({name: value for name, value in wanted.items() if name in names})
