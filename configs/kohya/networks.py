"""Conversions of the options of adapters: kohya's own network modules, and those of LyCORIS."""

from typing import Any

from sdxl_trainer.configs.kohya.values import (
    TRAINER,
    Given,
    UnsupportedError,
    WrongValueError,
    name_rates,
    read_number,
    read_numbers,
    read_option,
    read_pairs,
    read_whole,
)

PLAIN_LORA = "networks.lora"
LYCORIS = "kohya"  # the last part of `lycoris.kohya`, whose algorithm is an argument of the network
# Algorithms of LyCORIS as their documents write them.
NAMES = {
    "loha": "LoHa",
    "lokr": "LoKr",
    "ia3": "(IA)^3",
    "dylora": "DyLoRA",
    "diag-oft": "Diag-OFT",
    "boft": "BOFT",
    "lora_fa": "LoRA-FA",
    "oft": "OFT",
}
# LyCORIS takes a dimension above this, such as 100000, for "whole matrices".
MAX_RANK = 1024
USUAL_RANK = 16


def convert_network(value: Any, given: Given) -> dict[str, Any]:
    """Convert rank and alpha of adapters, and the learning rates of the text encoders' adapters.

    Raises:
        UnsupportedError: the module trains something else than LoRA in linear layers.
    """
    settings: dict[str, Any] = {"lora.rank": fit_rank(given), "lora.alpha": given.get("network_alpha") or 1}
    if not given.get("network_train_unet_only"):
        settings |= name_rates([given["learning_rate"]] * 2)
    if value == PLAIN_LORA:
        return settings
    algorithm = find_algorithm(given)
    if algorithm == "full":
        settings = {key: rate for key, rate in settings.items() if not key.startswith("lora.")}
        reason = (
            "WARNING: trains whole matrices (algo=full); so does this YAML, for all layers of the U-Net, and it saves "
            "whole models"
        )
    elif algorithm in ("lora", "locon"):
        reason = "WARNING: trains LoRA in linear and convolution layers; this YAML trains it in linear layers only"
    else:
        reason = (
            f"WARNING: trains {NAMES.get(algorithm, algorithm)} adapters, which are not available here; this YAML "
            "trains plain LoRA in linear layers instead: other weights in another number, saved in another form. "
            f"Choose rank and learning rate anew, or keep {TRAINER} for this run"
        )
    raise UnsupportedError(reason, settings, is_other_training=True)


def convert_rank(value: Any, given: Given) -> Any:
    """Convert the rank of adapters.

    Raises:
        UnsupportedError: there are none, or the number is not the rank of one.
    """
    if not given.get("network_module"):
        raise UnsupportedError(f"has no effect without network_module, as in {TRAINER}")
    if _trains_whole_matrices(given):
        return None
    if fit_rank(given) != read_whole(value):
        rank = fit_rank(given)
        raise UnsupportedError(f"stands for whole matrices in LyCORIS; lora.rank is {rank}", {"lora.rank": rank})
    return read_whole(value)


def convert_alpha(value: Any, given: Given) -> Any:
    """Convert the alpha of adapters; one of a rank that is not imported has no meaning.

    Raises:
        UnsupportedError: there are no adapters, or their rank is not imported.
    """
    if not given.get("network_module"):
        raise UnsupportedError(f"has no effect without network_module, as in {TRAINER}")
    if _trains_whole_matrices(given):
        return None
    rank = fit_rank(given)
    if rank != read_option(given, "network_dim", 4):
        raise UnsupportedError(f"belongs to network_dim; lora.alpha is {rank}", {"lora.alpha": rank})
    return read_number(value)


def convert_text_encoder_lr(value: Any, given: Given) -> dict[str, Any]:
    """Convert one learning rate for the adapters of both text encoders, or one for each.

    Raises:
        UnsupportedError: there are no such adapters.
    """
    if not given.get("network_module") or given.get("network_train_unet_only"):
        raise UnsupportedError(f"has no effect without adapters for the text encoders, as in {TRAINER}")
    rates = read_numbers(value)
    return name_rates([rates[0], rates[-1]])


def fit_rank(given: Given) -> int:
    """Return the rank of the adapters here, a usual one in place of a number that is not a rank."""
    rank = read_option(given, "network_dim", 4)
    return rank if given.get("network_module") == PLAIN_LORA or rank <= MAX_RANK else USUAL_RANK


def find_algorithm(given: Given) -> str:
    """Return the kind of adapters that the network module trains, in lower case."""
    module = str(given["network_module"]).rpartition(".")[2].lower()
    if module != LYCORIS:  # networks.oft, networks.dylora, ...
        return module
    try:
        return str(read_pairs(given.get("network_args") or {}).get("algo", "lora")).lower()
    except WrongValueError:
        return "lora"  # LyCORIS' default


def _trains_whole_matrices(given: Given) -> bool:
    return given["network_module"] != PLAIN_LORA and find_algorithm(given) == "full"
