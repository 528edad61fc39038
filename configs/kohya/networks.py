"""Options of adapters: their table, and conversions for kohya's own network modules and those of LyCORIS."""

from collections.abc import Mapping
from typing import Any

from sdxl_trainer.configs.kohya.entries import (
    ENCODERS,
    FREEZES,
    FROZEN_UNET,
    MODEL_NOTES,
    WHOLE,
    converted,
    unsupported,
)
from sdxl_trainer.configs.kohya.values import (
    TRAINER,
    Given,
    UnsupportedError,
    WrongValueError,
    constant,
    name_rates,
    read_number,
    read_numbers,
    read_option,
    read_pairs,
    read_whole,
)

PLAIN_LORA = "networks.lora"
LYCORIS = "kohya"  # the last part of `lycoris.kohya`, whose algorithm is an argument of the network
# Algorithm of LyCORIS, or module of kohya's scripts → kind of adapters here.
KINDS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr"}
# Algorithms of LyCORIS as their documents write them.
NAMES = {
    "ia3": "(IA)^3",
    "dylora": "DyLoRA",
    "diag-oft": "Diag-OFT",
    "boft": "BOFT",
    "lora_fa": "LoRA-FA",
    "oft": "OFT",
}
# LyCORIS takes a dimension above this, such as 100000, for "whole matrices".
MAX_RANK, WHOLE_MATRICES = 1024, 100_000
USUAL_RANK = 16
# Layers of LyCORIS' presets: whether convolutions have adapters, and the targets if they are not the usual ones.
PRESETS: dict[str, tuple[bool, dict[str, Any]]] = {
    "full": (True, {}),
    "attn-mlp": (False, {}),
    "attn-only": (
        False,
        {
            "lora.targets": ["to_q", "to_k", "to_v", "to_out.0"],
            "lora.text_targets": ["q_proj", "k_proj", "v_proj", "out_proj"],
        },
    ),
}
PLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
USED_ARGUMENTS = {"algo", "preset", "conv_dim", "conv_alpha", "dora_wd", "wd_on_output", "full_matrix", *PLUS}


def convert_network(value: Any, given: Given) -> dict[str, Any]:
    """Convert kind, layers, ranks and alphas of adapters, and the learning rates of the text encoders' adapters.

    Raises:
        UnsupportedError: the module trains another kind of adapters than those here.
    """
    rates = {} if given.get("network_train_unet_only") else name_rates([given["learning_rate"]] * 2)
    algorithm = find_algorithm(given)
    if algorithm == "full":
        reason = (
            "WARNING: trains whole matrices (algo=full); so does this YAML, for all layers of the U-Net, and it saves "
            "whole models"
        )
        raise UnsupportedError(reason, rates, is_other_training=True)
    settings: dict[str, Any] = {"lora.rank": fit_rank(given), "lora.alpha": given.get("network_alpha") or 1, **rates}
    settings |= convert_convolutions(given)
    kind = KINDS.get(algorithm)
    if kind is None:
        reason = (
            f"WARNING: trains {NAMES.get(algorithm, algorithm)} adapters, which are not available here; this YAML "
            "trains plain LoRA instead: other weights in another number, saved in another form. "
            f"Choose rank and learning rate anew, or keep {TRAINER} for this run"
        )
        raise UnsupportedError(reason, settings, is_other_training=True)
    if is_on(read_arguments(given).get("dora_wd")):
        if kind != "lora":
            reason = f"WARNING: trains norms of rows besides (dora_wd); this YAML trains {kind} without them"
            raise UnsupportedError(reason, settings | {"lora.kind": kind}, is_other_training=True)
        kind = "dora"
    return settings if kind == "lora" else settings | {"lora.kind": kind}


def convert_convolutions(given: Given) -> dict[str, Any]:
    """Return the settings of convolutions, and of the layers that a preset of LyCORIS chooses.

    LyCORIS trains convolutions unless a preset leaves them out, with the rank of the other layers by default. Kohya's
    own modules train them if `conv_dim` is given, with alpha 1 by default.
    """
    arguments, is_lycoris = read_arguments(given), is_lycoris_module(given)
    has_convolutions, settings = PRESETS.get(str(arguments.get("preset")), PRESETS["full"])
    if not is_lycoris:
        has_convolutions, settings = bool(arguments.get("conv_dim")), {}
    if not has_convolutions:
        return settings
    rank = limit_rank(read_whole(arguments.get("conv_dim") or read_option(given, "network_dim", 4)), given)
    alpha = arguments.get("conv_alpha") or (given.get("network_alpha") if is_lycoris else None) or 1
    return settings | {"lora.conv_rank": rank, "lora.conv_alpha": read_number(alpha)}


def convert_network_args(value: Any, given: Given) -> dict[str, Any]:
    """Convert the arguments that kind, rank and convolutions do not depend on.

    Raises:
        UnsupportedError: there are no adapters, or some arguments have no setting here.
    """
    if not given.get("network_module"):
        raise UnsupportedError(f"has no effect without network_module, as in {TRAINER}")
    arguments, algorithm = read_pairs(value), find_algorithm(given)
    settings: dict[str, Any] = {}
    used = set(USED_ARGUMENTS)
    if str(arguments.get("preset", "full")) not in PRESETS:
        used.discard("preset")
    if not is_on(arguments.get("wd_on_output", True)):
        used.discard("wd_on_output")
    if algorithm == "lokr":
        used |= {"factor", "decompose_both"}
        factor = read_whole(arguments.get("factor", -1))
        settings |= {"lora.factor": factor} if factor > 0 else {}
        settings |= {"lora.decompose_both": True} if is_on(arguments.get("decompose_both")) else {}
    ratios = [read_number(arguments[name]) for name in PLUS if is_set(arguments.get(name))]
    if ratios and KINDS.get(algorithm) == "lora":
        settings["lora.b_lr_ratio"] = ratios[0]
        used -= set(PLUS) if len(set(ratios)) > 1 else set()
    else:
        used -= set(PLUS)
    left = [f"{name}={item}" for name, item in arguments.items() if name not in used and is_set(item)]
    if left and algorithm != "full":
        raise UnsupportedError(f"is used without {', '.join(left)}, which have no setting here", settings)
    return settings


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
    return limit_rank(rank, given) if given.get("network_module") else rank


def limit_rank(rank: int, given: Given) -> int:
    """Return a rank, or a usual one in place of a number that is none. LoKr's matrices may be whole here too."""
    is_lokr = find_algorithm(given) == "lokr"
    if is_lokr and is_on(read_arguments(given).get("full_matrix")):
        return max(rank, WHOLE_MATRICES)
    return rank if is_lokr or rank <= MAX_RANK or given["network_module"] == PLAIN_LORA else USUAL_RANK


def find_algorithm(given: Given) -> str:
    """Return the kind of adapters that the network module trains, in lower case."""
    if not is_lycoris_module(given):  # networks.oft, networks.dylora, ...
        return str(given["network_module"]).rpartition(".")[2].lower()
    return str(read_arguments(given).get("algo", "lora")).lower()


def is_lycoris_module(given: Given) -> bool:
    """Return whether the network module is that of LyCORIS."""
    return str(given["network_module"]).rpartition(".")[2].lower() == LYCORIS


def read_arguments(given: Given) -> Mapping[str, Any]:
    """Return the arguments of the network; none if they cannot be read, which `network_args` reports."""
    try:
        return read_pairs(given.get("network_args") or {})
    except WrongValueError:
        return {}


def is_on(value: Any) -> bool:
    """Return whether an argument of the network is true, as a value or as a word."""
    return str(value).lower() in ("true", "1")


def is_set(value: Any) -> bool:
    """Return whether an argument of the network is neither empty nor 0 nor false, as values or as words."""
    return bool(value) and str(value).lower() not in ("false", "none", "0")


def _trains_whole_matrices(given: Given) -> bool:
    return given["network_module"] != PLAIN_LORA and find_algorithm(given) == "full"


MERGED = "merge adapters into the model before training (`train/convert.py --adapter`)"
ADAPTERS = {
    "network_module": converted(
        convert_network,
        "lora.rank",
        "lora.alpha",
        "lora.kind",
        "lora.conv_rank",
        "lora.conv_alpha",
        "lora.targets",
        "lora.text_targets",
        *ENCODERS,
        note="`networks.lora`, and `lycoris.kohya` with `algo` lora, locon, loha or lokr, `dora_wd`, and `preset` "
        "full, attn-mlp or attn-only; rank 4 and alpha 1 by default, as in kohya's scripts",
    ),
    "network_dim": converted(convert_rank, "lora.rank", expects=WHOLE),
    "network_alpha": converted(convert_alpha, "lora.alpha"),
    "text_encoder_lr": converted(convert_text_encoder_lr, *ENCODERS, note="`learning_rate` by default"),
    "network_train_unet_only": converted(
        constant(None), *ENCODERS, note="text encoders keep learning rate 0, which freezes them"
    ),
    "network_train_text_encoder_only": converted(constant([FROZEN_UNET]), "optim.groups", note=FREEZES),
    "stop_text_encoder_training": unsupported("text encoders with a learning rate are trained to the end"),
    "network_args": converted(
        convert_network_args,
        "lora.conv_rank",
        "lora.conv_alpha",
        "lora.b_lr_ratio",
        "lora.factor",
        "lora.decompose_both",
        note="`conv_dim`, `conv_alpha`, `loraplus_lr_ratio`, `factor`, `decompose_both`; not dropout, learning rates "
        "by block and Tucker decomposition. LyCORIS trains convolutions by default",
        expects="words such as conv_dim=8",
    ),
    "network_weights": unsupported("adapters start at zero; resuming continues the run's own adapters"),
    "network_dropout": unsupported("adapters have no dropout; use a lower rank or weight decay against overfitting"),
    "dim_from_weights": unsupported("adapters start at zero"),
    "scale_weight_norms": unsupported("the norms of adapters are not limited"),
    "base_weights": unsupported(MERGED),
    "base_weights_multiplier": unsupported(MERGED),
    "network_multiplier": unsupported("adapters are always trained with multiplier 1"),
    "training_comment": unsupported(MODEL_NOTES),
    "no_metadata": unsupported("metadata is always written (see `training_comment`)"),
}
