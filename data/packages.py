"""Packages that some settings need besides those that the project itself installs."""

import importlib.util
from collections.abc import Iterator

from sdxl_trainer.configs.engine import PURE_BF16
from sdxl_trainer.configs.schema import Config

# Import name → name to install, where they differ.
DISTRIBUTIONS = {
    "optimi": "torch-optimi",
    "prodigyplus": "prodigy-plus-schedule-free",
    "pytorch_optimizer": "pytorch-optimizer",
}
OPTIMIZER_PACKAGES = {
    "adamw8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "adamw_schedule_free": "schedulefree",
    "prodigy_plus_schedule_free": "prodigyplus",
    **dict.fromkeys(("lion", "stable_adamw"), "optimi"),
    **dict.fromkeys(("adopt", "ademamix", "came", "lamb", "soap"), "pytorch_optimizer"),
}


def list_missing_packages(config: Config) -> dict[str, str]:
    """List the packages that training with these settings needs and that are not installed: setting → package."""
    return {
        setting: DISTRIBUTIONS.get(package, package)
        for setting, package in _iterate_needed(config)
        if importlib.util.find_spec(package) is None
    }


def _iterate_needed(config: Config) -> Iterator[tuple[str, str]]:
    name, precision = config.optim.name, config.engine.precision
    if config.lora.rank:
        yield f"lora.rank: {config.lora.rank}", "peft"
    if precision == "bf16_kahan" and name in ("adamw", "lion"):
        yield f"engine.precision: {precision}", "optimi"
    elif name in OPTIMIZER_PACKAGES and not (precision in PURE_BF16 and name == "lion"):
        yield f"optim.name: {name}", OPTIMIZER_PACKAGES[name]
    if config.engine.attention == "xformers":
        yield "engine.attention: xformers", "xformers"
    if config.log.wandb is not None:
        yield f"log.wandb: {config.log.wandb}", "wandb"
