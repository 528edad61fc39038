"""What values of kohya's options become here, where it is not the same value under another key.

A conversion gets the value and all options that are given, by their names, and returns what to write under its option's
key; for an option of several keys, a dict of those that it sets. None and an empty dict set nothing.
"""

import ast
import math
from collections.abc import Callable, Mapping
from typing import Any

Given = Mapping[str, Any]
Convert = Callable[[Any, Given], Any]

# Names → (name or class here, weight decay without one given, further arguments).
KOHYA_OPTIMIZERS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "adamw": ("adamw", 0.01, {}),
    "adamw8bit": ("adamw8bit", 0.01, {}),
    "pagedadamw": ("bitsandbytes.optim.PagedAdamW", 0.01, {}),
    "pagedadamw8bit": ("bitsandbytes.optim.PagedAdamW8bit", 0.01, {}),
    "pagedadamw32bit": ("bitsandbytes.optim.PagedAdamW32bit", 0.01, {}),
    "lion": ("lion", 0.0, {}),
    "lion8bit": ("bitsandbytes.optim.Lion8bit", 0.0, {}),
    "pagedlion8bit": ("bitsandbytes.optim.PagedLion8bit", 0.0, {}),
    "adafactor": ("adafactor", 0.0, {}),
    "prodigy": ("prodigy", 0.0, {}),
    "dadaptation": ("dadaptation.experimental.DAdaptAdamPreprint", 0.0, {}),
    "dadaptadampreprint": ("dadaptation.experimental.DAdaptAdamPreprint", 0.0, {}),
    "dadaptadagrad": ("dadaptation.DAdaptAdaGrad", 0.0, {}),
    "dadaptadam": ("dadaptation.DAdaptAdam", 0.0, {}),
    "dadaptadan": ("dadaptation.DAdaptAdan", 0.0, {}),
    "dadaptlion": ("dadaptation.DAdaptLion", 0.0, {}),
    "dadaptsgd": ("dadaptation.DAdaptSGD", 0.0, {}),
    "sgdnesterov": ("torch.optim.SGD", 0.0, {"momentum": 0.9, "nesterov": True}),
    "sgdnesterov8bit": ("bitsandbytes.optim.SGD8bit", 0.0, {"momentum": 0.9, "nesterov": True}),
}
WHOLE_WEIGHTS = ("adafactor", "prodigy", "dadapt")  # begin the names of those that ZeRO's shards would change
ADAFACTORS = ("relative_step", "warmup_init", "scale_parameter")  # settled by convert_optimizer_args itself
WEIGHTINGS = {
    "min_snr_gamma": "min_snr",
    "debiased_estimation_loss": "debiased",
    "scale_v_pred_loss_like_noise_pred": "v_like_epsilon",
    "v_pred_like_loss": "v_pred_like",
}
VAE_CONVERSION = (
    'python -c "from diffusers import AutoencoderKL as VAE; VAE.from_single_file('
    "'x.safetensors', config='stabilityai/stable-diffusion-xl-base-1.0', subfolder='vae').save_pretrained('x-folder')\""
)


class NoCounterpart(ValueError):
    """A value that has none here; the message says why, and what to do instead.

    Args:
        settings: what of the value is kept nevertheless, by dotted key.
    """

    def __init__(self, why: str, settings: Mapping[str, Any] | None = None):
        super().__init__(why)
        self.settings = dict(settings or {})


def choose(values: dict[Any, Any]) -> Convert:
    """Look the value up; letters may be large or small."""

    def convert(value: Any, given: Given) -> Any:
        name = value.lower() if isinstance(value, str) else value
        if name not in values:
            raise NoCounterpart(f"here there are {', '.join(str(known) for known in values)}")
        return values[name]

    return convert


def say(answer: Any) -> Convert:
    """The same for every value: of flags."""
    return lambda value, given: answer


def needs(option: str, convert: Convert | None = None) -> Convert:
    """Only together with another option; kohya's scripts ignore it without."""

    def checked(value: Any, given: Given) -> Any:
        if not given.get(option):
            raise NoCounterpart(f"has no effect without {option}, in kohya's scripts either")
        return convert(value, given) if convert else value

    return checked


def convert_masked_loss(value: Any, given: Given) -> dict[str, Any]:
    """Masks of files of their own, where kohya's scripts are told of such; those of opacity are `alpha_mask`'s."""
    if given.get("conditioning_data_dir"):
        return {"objective.masked_loss": True, "data.masks": str(given["conditioning_data_dir"])}
    if given.get("alpha_mask"):
        return {"objective.masked_loss": True}
    raise NoCounterpart("has no effect without conditioning_data_dir or alpha_mask, in kohya's scripts either")


def for_huber(value: Any, given: Given) -> Any:
    """Of the losses that have a c; kohya's files often name it beside others."""
    return value if given.get("loss_type") in ("huber", "smooth_l1") else None


def as_text(value: Any, given: Given) -> str:
    """Text, of names that look like numbers too."""
    return str(value)


def as_list(value: Any, given: Given) -> list[str]:
    """One or several paths."""
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]


def refuse_suffixes(*suffixes: str, why: str) -> Convert:
    """A path, unless it ends in one of these."""

    def convert(value: Any, given: Given) -> str:
        if str(value).lower().endswith(suffixes):
            raise NoCounterpart(why)
        return str(value)

    return convert


def convert_vae(value: Any, given: Given) -> str:
    """A folder or a hub id; of a single file, how it becomes a folder. The config that diffusers guesses for such a
    file is Stable Diffusion 1.5's, whose scaling factor is another."""
    path = str(value).replace("\\", "/")
    if not path.lower().endswith((".safetensors", ".ckpt", ".pt")):
        return str(value)
    folder = path.rpartition(".")[0]
    command = VAE_CONVERSION.replace("x.safetensors", path).replace("x-folder", folder)
    raise NoCounterpart(f"is a folder in diffusers' form, or a hub id, here: run {command} and set model.vae: {folder}")


def _uses_wandb(given: Given) -> bool:
    return given.get("log_with") in ("wandb", "all")


def convert_log_with(value: Any, given: Given) -> str | None:
    """The project at Weights & Biases, which is kohya's name of the tracker."""
    if value == "tensorboard":
        return None
    if not _uses_wandb(given):
        raise NoCounterpart("here there are tensorboard, wandb, all")
    default = "network_train" if given.get("network_module") else "finetuning"
    return str(given.get("log_tracker_name") or default)


def convert_tracker_name(value: Any, given: Given) -> None:
    """Taken by `log_with`."""
    if not _uses_wandb(given):
        raise NoCounterpart("names a project at Weights & Biases only, with log_with")


def convert_wandb_run(value: Any, given: Given) -> str | None:
    """The run's name, if nothing else is."""
    if not _uses_wandb(given):
        raise NoCounterpart("has no effect without log_with, in kohya's scripts either")
    if str(given.get("output_name") or value) != str(value):
        raise NoCounterpart(f"at Weights & Biases too a run is called by run.name, here {given['output_name']!r}")
    return str(value)


def read_numbers(value: Any) -> list[float]:
    """Numbers of a number, a list, or a text such as `1e-5,2e-5`."""
    if isinstance(value, str):
        value = [ast.literal_eval(part) for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def read_numbers_of(value: Any, given: Given) -> list[float]:
    """`read_numbers` as a conversion."""
    return read_numbers(value)


def read_pairs(value: Any) -> dict[str, Any]:
    """Settings of a mapping, or of `name=value` words in a list or a text."""
    if isinstance(value, Mapping):
        return dict(value)
    words = value.split() if isinstance(value, str) else list(value)
    return {name: read_literal(text) for name, _, text in (str(word).partition("=") for word in words)}


def convert_resolution(value: Any, given: Given) -> dict[str, Any]:
    """An area for buckets, or one size for all images, as kohya's scripts have it without `enable_bucket`."""
    if isinstance(value, list) and value and isinstance(value[0], list):  # of several data sets, made by kohya_data.py
        return {"data.resolution_px": list(dict.fromkeys(_compute_side(size) for size in value))}
    sizes = [int(side) for side in read_numbers(value)]
    width, height = sizes * 2 if len(sizes) == 1 else sizes
    if given.get("enable_bucket"):
        return {"data.resolution_px": _compute_side([width, height])}
    return {"data.buckets": [[width, height]]}


def _compute_side(size: Any) -> int:
    """The side of the smallest square that is no smaller, so that a bucket of just this size fits into its area."""
    sides = [int(side) for side in read_numbers(size)]
    return math.isqrt(sides[0] * sides[-1] - 1) + 1


def count_ranks(given: Given) -> int:
    """Processes of the job, as its launcher was told."""
    return int(given.get("num_processes") or 1)


def convert_batch(value: Any, given: Given) -> dict[str, int]:
    """Samples of a rank's forward pass, and of an update."""
    accumulated = int(given.get("gradient_accumulation_steps") or 1)
    return {
        "train.micro_batch_size": int(value),
        "train.global_batch_size": int(value) * accumulated * count_ranks(given),
    }


def convert_epochs(value: Any, given: Given) -> int:
    """Steps of so many epochs, if it is known how many samples one has (`num_samples`, of --samples)."""
    samples = given.get("num_samples")
    if not samples:
        raise NoCounterpart(
            "counts epochs, and how many samples one has is not known here: repeat this with --samples N (images x "
            "repeats), or write steps (epochs x samples / global batch size)"
        )
    batch = convert_batch(given.get("train_batch_size") or 1, given)["train.global_batch_size"]
    return int(value) * math.ceil(int(samples) / batch)


def count_steps(given: Given) -> int:
    """Length of the run in steps."""
    if given.get("max_train_epochs") and given.get("num_samples"):
        return convert_epochs(given["max_train_epochs"], given)
    return int(given["max_train_steps"])


def convert_steps(value: Any, given: Given) -> int:
    """Steps, or a share of the run's if below 1."""
    return round(value * count_steps(given)) if 0 < value < 1 else int(value)


def convert_optimizer(value: Any, given: Given) -> dict[str, Any]:
    """Name, its default weight decay, its fixed arguments, and a ZeRO stage at which it computes the same."""
    name = str(value)
    if "schedulefree" in name.lower():
        raise NoCounterpart("needs its own weights for sampling; take adamw with optim.schedule: wsd")
    unlisted = (name if "." in name else f"torch.optim.{name}", 0.01 if "adamw" in name.lower() else 0.0, {})
    ours, decay, kwargs = KOHYA_OPTIMIZERS.get(name.lower(), unlisted)
    settings: dict[str, Any] = {"optim.name": ours, "optim.weight_decay": decay}
    if kwargs:
        settings["optim.kwargs"] = kwargs
    if name.lower().startswith(WHOLE_WEIGHTS):
        settings["engine.zero_stage"] = 0
    if ours == "adafactor" and _has_relative_steps(read_pairs(given.get("optimizer_args") or {})):
        why = "its relative steps, which are on there unless relative_step=False: optim.lr and optim.schedule hold here"
        raise NoCounterpart(why, settings)
    return settings


def _has_relative_steps(kwargs: Mapping[str, Any]) -> bool:
    return bool(kwargs.get("relative_step", True) or kwargs.get("warmup_init", False))


def convert_optimizer_args(value: Any, given: Given) -> dict[str, Any]:
    """Arguments with a key of their own, and all others."""
    kwargs = read_pairs(value)
    settings: dict[str, Any] = {}
    if "weight_decay" in kwargs:
        settings["optim.weight_decay"] = kwargs.pop("weight_decay")
    if len(read_numbers(kwargs.get("betas", ()))) == 2:  # Prodigy and CAME may have three
        settings["optim.betas"] = read_numbers(kwargs.pop("betas"))
    if isinstance(kwargs.get("eps"), (int, float)):  # Adafactor has two
        settings["optim.eps"] = kwargs.pop("eps")
    if str(given.get("optimizer_type")).lower() == "adafactor":
        if not _has_relative_steps(kwargs) and kwargs.get("scale_parameter", True):
            settings["optim.kwargs"] = {"scale_parameter": True}  # its own default, which is off here
        kwargs = {name: item for name, item in kwargs.items() if name not in ADAFACTORS}
    kwargs = {name: list(item) if isinstance(item, tuple) else item for name, item in kwargs.items()}
    if kwargs:
        fixed = KOHYA_OPTIMIZERS.get(str(given.get("optimizer_type")).lower(), ("", 0.0, {}))[2]
        settings["optim.kwargs"] = fixed | settings.get("optim.kwargs", {}) | kwargs
    return settings


def convert_full_bf16(value: Any, given: Given) -> str:
    """Weights and moments in bf16 alone."""
    name = str(given.get("optimizer_type") or "adamw").lower()
    if name not in ("adamw", "lion"):
        raise NoCounterpart("weights in bf16 alone are for adamw and lion here; engine.precision is bf16, with masters")
    return "bf16_stochastic"


def convert_text_encoders(value: Any, given: Given) -> dict[str, Any]:
    """Rates of both text encoders, which are the U-Net's where none are given."""
    rates = [given.get(name) for name in ("learning_rate_te1", "learning_rate_te2")]
    return _name_rates([given["learning_rate"] if rate is None else rate for rate in rates])


def convert_text_encoder_lr(value: Any, given: Given) -> dict[str, Any]:
    """One rate for both text encoders' adapters, or one for each."""
    if not given.get("network_module") or given.get("network_train_unet_only"):
        raise NoCounterpart("has no effect without adapters for the text encoders, in kohya's scripts either")
    rates = read_numbers(value)
    return _name_rates([rates[0], rates[-1]])


def convert_network(value: Any, given: Given) -> dict[str, Any]:
    """Rank and alpha of adapters as networks.lora has them, and rates of the text encoders' adapters."""
    settings = {"lora.rank": given.get("network_dim") or 4, "lora.alpha": given.get("network_alpha") or 1}
    if not given.get("network_train_unet_only"):
        settings |= _name_rates([given["learning_rate"]] * 2)
    if str(value) != "networks.lora":
        raise NoCounterpart("adapters are those of networks.lora here, in linear layers (docs/TRAINING.md)", settings)
    return settings


def _name_rates(rates: list[Any]) -> dict[str, Any]:
    return dict(zip(("optim.text_encoder_lr", "optim.text_encoder_2_lr"), rates, strict=True))


def choose_weighting(option: str) -> Convert:
    """The weighting that an option turns on, with its number if it has one."""

    def convert(value: Any, given: Given) -> dict[str, Any]:
        if not value:
            return {}
        first = next(name for name in WEIGHTINGS if given.get(name))
        if option != first:
            raise NoCounterpart(f"weightings are not multiplied here, and {first} comes first")
        settings: dict[str, Any] = {"objective.weighting": WEIGHTINGS[option]}
        return settings if isinstance(value, bool) else settings | {"objective.weighting_gamma": value}

    return convert


def count_kept(value: Any, given: Given) -> int:
    """Checkpoints that kohya's scripts keep of so many steps back, by how often they save."""
    return int(value) // int(given["save_every_n_steps"]) + 1


def read_literal(text: str) -> Any:
    """A number, a list, True, ... or, if it is none of them, the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
