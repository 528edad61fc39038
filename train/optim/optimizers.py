"""Build the optimizer that the settings name, and check its settings."""

import importlib
import importlib.util
import inspect
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from sdxl_trainer.configs.engine import EngineConfig
from sdxl_trainer.configs.optim import OptimConfig
from sdxl_trainer.configs.problems import Problem, UserInputError, suggest_name
from sdxl_trainer.configs.schema import EmaConfig
from sdxl_trainer.configs.section import is_own_code
from sdxl_trainer.data.own_code import UserCodeError, call_user_code, is_missing_module, load_own_code
from sdxl_trainer.data.packages import DISTRIBUTIONS
from sdxl_trainer.launch.logger import warn_once
from sdxl_trainer.train.networks.parameter_groups import split_groups
from sdxl_trainer.train.optim.host_threads import choose_num_threads, use_threads
from sdxl_trainer.train.optim.schedule_free import check_schedule_free, find_average_share, is_schedule_free
from sdxl_trainer.train.optim.wide_updates import widen

KEY = "optim.name"
# Under ZeRO 1 to 3, the optimizer updates the parameters of a group as one tensor. Kernels that count values in int32,
# as optimi's and bitsandbytes' do, fail above 2^31 of them, and SDXL's U-Net has 2.57e9. In 16 bit, DeepSpeed also
# copies the gradients of a whole group before its update, which takes 6 bytes for each value. ZeRO 3 splits groups by
# itself, but only above `sub_group_size`, 1e9 values on a rank.
MAX_GROUP_VALUES = 2**28


class OptimizerEntry(NamedTuple):
    """Import path of an optimizer's class, and this project's defaults for its arguments."""

    path: str
    kwargs: dict[str, Any] = {}
    compiled_module: str = ""  # of an optimizer in C++: DeepSpeed compiles it at first use, unless it is installed


DECOUPLED = {"weight_decouple": True}  # as `optim.weight_decay` is defined
OPTIMIZERS = {
    "adamw": OptimizerEntry("torch.optim.AdamW", {"fused": True}),
    "adamw8bit": OptimizerEntry("bitsandbytes.optim.AdamW8bit"),
    # The recipe of SDXL's authors, which kohya's scripts pass on.
    "adafactor": OptimizerEntry(
        "transformers.optimization.Adafactor",
        {"relative_step": False, "scale_parameter": False, "warmup_init": False},
    ),
    "lion": OptimizerEntry("optimi.Lion", {"kahan_sum": False}),
    "prodigy": OptimizerEntry("prodigyopt.Prodigy"),
    "muon": OptimizerEntry("deepspeed.runtime.zero.muon.muon_optimizer.MuonWithAuxAdam"),
    "adamw_schedule_free": OptimizerEntry("schedulefree.AdamWScheduleFree"),
    # One step size for all groups: weights that decay and those that do not are groups of their own here.
    "prodigy_plus_schedule_free": OptimizerEntry("prodigyplus.ProdigyPlusScheduleFree", {"split_groups": False}),
    "stable_adamw": OptimizerEntry("optimi.StableAdamW", {"kahan_sum": False}),
    "adopt": OptimizerEntry("pytorch_optimizer.ADOPT", DECOUPLED),
    "ademamix": OptimizerEntry("pytorch_optimizer.AdEMAMix", DECOUPLED),
    "came": OptimizerEntry("pytorch_optimizer.CAME"),
    "lamb": OptimizerEntry("pytorch_optimizer.Lamb"),
    "soap": OptimizerEntry("pytorch_optimizer.SOAP"),
}
# Implementations for optimizer state in host memory while the weights are on a GPU.
ON_HOST = {
    "adamw": OptimizerEntry(
        "deepspeed.ops.adam.DeepSpeedCPUAdam", {"adamw_mode": True}, "deepspeed.ops.adam.cpu_adam_op"
    ),
    "lion": OptimizerEntry("deepspeed.ops.lion.DeepSpeedCPULion", {}, "deepspeed.ops.lion.cpu_lion_op"),
}
# Implementations without fp32 masters, by precision; other optimizers update fp32 copies of single weights (`widen`).
# Optimi's second beta of 0.99 stays: with 0.999, a second moment that is rounded to the nearest bf16 would hardly ever
# fall.
LOW_PRECISION = {
    "bf16_kahan": {
        "adamw": OptimizerEntry("optimi.AdamW", {"kahan_sum": True, "betas": (0.9, 0.99), "eps": 1e-8}),
        "lion": OptimizerEntry("optimi.Lion", {"kahan_sum": True}),
        "adafactor": OptimizerEntry("sdxl_trainer.train.optim.adafactor.Adafactor", {"kahan_sum": True}),
    },
    "bf16_stochastic": {
        "adamw": OptimizerEntry("sdxl_trainer.train.optim.stochastic_rounding.AdamW"),
        "lion": OptimizerEntry("sdxl_trainer.train.optim.stochastic_rounding.Lion"),
        "adafactor": OptimizerEntry("sdxl_trainer.train.optim.adafactor.Adafactor"),
    },
}
SUMS = "finds its step size by sums over all weights"
FACTORS = "factors each weight's second moment by rows and columns"
PRECONDITIONS = "preconditions each weight by its rows and columns"
# Class name → reason, for optimizers whose result on the flat shards of ZeRO 1 to 3 differs from that on whole tensors.
NEEDS_WHOLE_TENSORS = {
    **dict.fromkeys(("Adafactor", "AdaFactor", "CAME"), FACTORS),
    **dict.fromkeys(("Prodigy", "ProdigyPlusScheduleFree"), SUMS),
    **dict.fromkeys(
        ("DAdaptAdam", "DAdaptAdamPreprint", "DAdaptAdan", "DAdaptAdaGrad", "DAdaptLion", "DAdaptSGD"), SUMS
    ),
    **dict.fromkeys(("Lamb", "LARS", "Fromage", "Nero", "NovoGrad"), "measures the norm of each weight"),
    **dict.fromkeys(("Shampoo", "ScalableShampoo", "SOAP", "Kron"), PRECONDITIONS),
    **dict.fromkeys(("GaLore", "APOLLO", "Fira", "Conda"), "projects each weight to a lower rank"),
    **dict.fromkeys(("RACS", "SM3"), "scales the rows and columns of each weight"),
    "StableAdamW": "limits the update of each weight by its root mean square",
    **dict.fromkeys(("Muon", "AdaMuon", "DistributedMuon"), "orthogonalises each weight"),
}


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, engine: EngineConfig, seed: int = 0
) -> torch.optim.Optimizer:
    """Build the configured optimizer over parameter groups, in pieces of at most MAX_GROUP_VALUES values.

    Args:
        seed: for the rounding of `bf16_stochastic`.
    """
    if engine.zero_stage and config.name not in OPTIMIZERS:
        warn_once(
            "optim.name: ZeRO {} passes flat shards to {}; its update must be elementwise",
            engine.zero_stage,
            config.name,
        )
    entry = find_optimizer_entry(config.name, engine)
    if config.name == "muon":
        return build_muon(entry, groups, config)
    kind = import_class(entry.path)
    given = list_arguments(config)
    if needs_fp32_copies(config.name, engine):
        kind, given["kahan_sum"] = widen(kind), engine.precision == "bf16_kahan"
    if engine.precision == "bf16_stochastic":
        given["seed"] = seed
    # With `split_groups`, ProdigyPlusScheduleFree finds a step size for each group, and not for its pieces.
    pieces = groups if given.get("split_groups") else split_groups(groups, MAX_GROUP_VALUES)
    optimizer = kind(pieces, **entry.kwargs | given)
    if is_schedule_free(kind, config):
        optimizer.train()
        optimizer.state.clear()  # reading what is not there has made empty entries, of weights that ZeRO replaces
        if find_average_share(optimizer.param_groups) is None:
            warn_once("optim.name: the model is the weights that {} trains; its average is not known", config.name)
    if entry.compiled_module:
        use_threads(choose_num_threads())  # after the module is loaded, and its OpenMP library with it
    return optimizer


def list_arguments(config: OptimConfig) -> dict[str, Any]:
    """List the arguments of the optimizer's class that the settings give, name → value."""
    given = {"lr": config.lr, "betas": config.betas, "eps": config.eps} | config.kwargs
    return {name: value for name, value in given.items() if value is not None}


def build_muon(entry: OptimizerEntry, groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Build Muon for matrices, with AdamW for convolutions, embeddings, biases and norms.

    `optim.lr` is the learning rate of Muon, and `adam_lr` in `optim.kwargs` that of AdamW. Their ratio is the same in
    every group.
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
    pieces = split_groups([half for half in halves if half["params"]], MAX_GROUP_VALUES)
    return import_class(entry.path)(pieces)


def find_optimizer_entry(name: str, engine: EngineConfig) -> OptimizerEntry:
    """Find an optimizer by name, in the form that suits precision and offload; any other name is an import path."""
    tables = [OPTIMIZERS]
    if engine.precision in LOW_PRECISION:
        tables.insert(0, LOW_PRECISION[engine.precision])
    elif engine.offload_optimizer:
        tables.insert(0, ON_HOST)
    return next((table[name] for table in tables if name in table), OptimizerEntry(name))


def needs_fp32_copies(name: str, engine: EngineConfig) -> bool:
    """Return whether an optimizer has no form of its own for weights without fp32 masters, and so updates copies."""
    return engine.precision in LOW_PRECISION and name not in LOW_PRECISION[engine.precision]


def explain_whole_tensors(config: OptimConfig, engine: EngineConfig) -> str | None:
    """Return why the optimizer must see whole weights; None if flat shards suffice."""
    return NEEDS_WHOLE_TENSORS.get(find_optimizer_entry(config.name, engine).path.replace(":", ".").rpartition(".")[2])


def import_class(path: str) -> Any:
    """Import the class at `module.Class`, `module:Class` or `path/to/file.py:Class`.

    Raises:
        ImportError, AttributeError, ValueError: a dotted path leads to no class.
        UserInputError: a path with a colon leads to no class.
    """
    if is_own_code(path):
        return load_own_code(KEY, path).target
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def check_optimizer(config: OptimConfig, engine: EngineConfig, ema: EmaConfig | None = None) -> Iterator[Problem]:
    """Yield a problem if the optimizer is not importable, has wrong arguments, or contradicts other settings."""
    entry = find_optimizer_entry(config.name, engine)
    if config.name not in OPTIMIZERS and not is_own_code(config.name) and "." not in config.name:
        near = suggest_name(config.name, OPTIMIZERS)
        own = "for a class of your own write path/to/file.py:Class"
        rule = f"is neither one of {', '.join(OPTIMIZERS)} nor an import path"
        yield Problem(KEY, config.name, rule, f"did you mean {near}?" if near else own)
        return
    try:
        kind = import_class(entry.path)
    except UserInputError as error:
        yield from error.problems
        return
    except (ImportError, AttributeError, ValueError, OSError, RuntimeError) as error:
        rule = f"cannot be imported: {type(error).__name__}: {error}"
        yield Problem(KEY, config.name, rule, suggest_import(entry.path, error))
        return
    if config.name not in OPTIMIZERS and not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        yield Problem(KEY, config.name, "is no torch.optim.Optimizer", "derive the class from torch.optim.Optimizer")
        return
    problems = [*check_engine_of_optimizer(config, engine, kind), *check_arguments(kind, config)]
    yield from problems
    yield from check_schedule_free(kind, config, ema)
    if is_own_code(config.name) and not problems:
        yield from check_own_optimizer(kind, config)


def suggest_import(path: str, error: Exception) -> str:
    """Return the cure for an import that failed: the package is missing, broken, or has no such class."""
    package, (module, _, name) = path.partition(".")[0], path.rpartition(".")
    to_install = DISTRIBUTIONS.get(package, package)
    if is_missing_module(package):
        return f"pip install {to_install}"
    if isinstance(error, AttributeError):
        near = suggest_name(name, dir(sys.modules.get(module)))
        return f"did you mean {module}.{near}?" if near else f"name a class of {module}"
    if isinstance(error, ModuleNotFoundError) and error.name and not f"{module}.".startswith(f"{error.name}."):
        return f"{package} is installed, but needs {error.name}: pip install {error.name.partition('.')[0]}"
    return f"the package {package} is here: check the name, or install it anew: pip install -U {to_install}"


def check_own_optimizer(kind: Any, config: OptimConfig) -> Iterator[Problem]:
    """Yield a problem if the user's own class cannot be built, or fails in a step on a small weight."""
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    try:
        optimizer = call_user_code(kind, [{"params": [weight], "lr": config.lr}], **list_arguments(config))
        call_user_code(optimizer.step)
    except UserCodeError as error:
        yield Problem(KEY, config.name, f"raised {error}", "correct the class (docs/OWN_CODE.md)")
        return
    if not weight.isfinite().all():
        rule = "gives weights that are not finite in its first step"
        yield Problem(KEY, config.name, rule, "correct the class (docs/OWN_CODE.md)")


def check_engine_of_optimizer(config: OptimConfig, engine: EngineConfig, kind: Any) -> Iterator[Problem]:
    """Yield a problem if the optimizer does not suit the settings of the engine or the other ones of its section."""
    entry = find_optimizer_entry(config.name, engine)
    if entry.compiled_module:
        yield from check_compiler(entry.compiled_module)
    reason = explain_whole_tensors(config, engine)
    if reason and engine.zero_stage:
        rule = f"{reason}, which is impossible on the flat shards of ZeRO {engine.zero_stage}"
        cure = "set engine.zero_stage: 0, or another optim.name"
        if engine.precision in LOW_PRECISION:
            cure = "set engine.gradient_release: true, or another optim.name"
        yield Problem(KEY, config.name, rule, cure)
    needs_all_gradients = config.name == "muon" or reason == SUMS
    if engine.gradient_release and needs_all_gradients:
        rule = "needs the gradients of all weights at once, which engine.gradient_release never has"
        yield Problem(KEY, config.name, rule, "set it to adafactor, adamw, adamw8bit or lion")
    if needs_fp32_copies(config.name, engine) and not engine.gradient_release:
        # Of ZeRO's flat shards, the copies would take as much memory as masters.
        forms = ", ".join(LOW_PRECISION[engine.precision])
        cure = f"set it to one of {forms}, or set engine.gradient_release: true, or engine.precision: bf16"
        yield Problem(KEY, config.name, f"does not support engine.precision {engine.precision}", cure)
    if config.name == "muon" and config.max_grad_norm:
        rule = "would scale down Muon's updates, whose size does not depend on the gradient's"
        yield Problem("optim.max_grad_norm", config.max_grad_norm, rule, "set it to 0")
    if kind.__name__.startswith("Prodigy"):
        yield from check_prodigy(config)


def check_compiler(module: str) -> Iterator[Problem]:
    """Yield a problem for each missing tool that compiles `module`, unless the module is installed."""
    if importlib.util.find_spec(module) is not None:
        return
    rule = "needs {}, with which DeepSpeed compiles the optimizer for host memory"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        cure = "install a C++ compiler (apt-get install g++), or name yours in the environment variable CXX"
        yield Problem("engine.offload_optimizer", True, rule.format(f"the C++ compiler {compiler}"), cure)
    if shutil.which("ninja") is None:
        yield Problem("engine.offload_optimizer", True, rule.format("ninja"), "pip install ninja")


def check_arguments(kind: Any, config: OptimConfig) -> Iterator[Problem]:
    """Yield a problem for each argument that the optimizer's class does not take."""
    if config.name == "muon":
        known = {"adam_lr", "momentum", "ns_method", "betas", "eps"}
    else:
        parameters = inspect.signature(kind.__init__).parameters.values()
        takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
        if takes_any and config.name not in OPTIMIZERS:
            return
        known = {parameter.name for parameter in parameters} - {"self", "params", "kwargs"}
    for key in ("betas", "eps"):
        if getattr(config, key) is not None and key not in known:
            yield Problem(f"optim.{key}", getattr(config, key), f"is no argument of {config.name}", "leave it out")
    yield from check_num_betas(kind, config)
    for key, value in config.kwargs.items():
        if key not in known:
            near = suggest_name(key, known)
            cure = f"did you mean {near}?" if near else f"it takes {', '.join(sorted(known))}"
            yield Problem(f"optim.kwargs.{key}", value, f"is no argument of {config.name}", cure)


def check_num_betas(kind: Any, config: OptimConfig) -> Iterator[Problem]:
    """Yield a problem if the decay rates are more or fewer than those of the optimizer's class."""
    parameter = inspect.signature(kind.__init__).parameters.get("betas")
    given = config.kwargs.get("betas", config.betas)
    if given is None or parameter is None or not isinstance(parameter.default, tuple):
        return
    number = len(parameter.default)
    if not isinstance(given, (list, tuple)) or len(given) != number:
        key = "optim.kwargs.betas" if "betas" in config.kwargs else "optim.betas"
        cure = f"leave {key} out, or set optim.kwargs.betas to a list of {number}"
        yield Problem(key, given, f"must be {number} decay rates for {config.name}", cure)


def check_prodigy(config: OptimConfig) -> Iterator[Problem]:
    """Yield problems of Prodigy's learning rate, one factor near 1 for all groups."""
    if config.lr < 0.1:
        yield Problem(
            "optim.lr", config.lr, "is too low for Prodigy, which multiplies its own step by it", "set it to 1"
        )
    own = [config.text_encoder_lr, config.text_encoder_2_lr, *(config.block_lrs or [])]
    own += [group.lr for group in config.groups if group.lr is not None]
    if set(own) - {0.0, config.lr}:
        rule = "are different learning rates; Prodigy finds one for all groups"
        yield Problem("optim", sorted({*own, config.lr}), rule, "set each to 0 or to optim.lr")
