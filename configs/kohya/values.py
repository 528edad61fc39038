"""Conversions of the values of kohya's options.

A conversion takes an option's value and all options that are given, by name. It returns the value of the option's first
key, or a dict of values by dotted key. None and an empty dict set nothing.
"""

import ast
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from sdxl_trainer.configs.paths import VARIABLE

Given = Mapping[str, Any]
Convert = Callable[[Any, Given], Any]


NOT_EXECUTED = "an `export` in an imported file is not executed"
NAME_RULE = "run.name consists of letters, digits, `.`, `_` and `-`"
TRAINER = "{trainer}"  # in a reason: the program that the files are of
WEIGHTINGS = {
    "min_snr_gamma": "min_snr",
    "debiased_estimation_loss": "debiased",
    "scale_v_pred_loss_like_noise_pred": "v_like_epsilon",
    "v_pred_like_loss": "v_pred_like",
}


class UnsupportedError(ValueError):
    """A value that cannot be converted, or not completely; the message gives the reason and an alternative.

    Args:
        reason: why; empty if only entries of the value are not converted.
        settings: settings by dotted key that are imported anyway.
        entries: name of an entry of the value (a mapping, or a list of such) that has no setting here → the reason.
        is_other_training: what is imported anyway trains something else than the files ask for.
    """

    def __init__(
        self,
        reason: str,
        settings: Mapping[str, Any] | None = None,
        entries: Mapping[str, str] | None = None,
        is_other_training: bool = False,
    ):
        super().__init__(reason)
        self.settings = dict(settings or {})
        self.entries = dict(entries or {})
        self.is_other_training = is_other_training


class NoEffectError(ValueError):
    """An option that its own program ignores; the message says why."""


class WrongValueError(ValueError):
    """A value that its own program cannot read either; the message names its option if that is another."""


def look_up(values: dict[Any, Any]) -> Convert:
    """Return a conversion that looks the value up, ignoring case."""

    def convert(value: Any, given: Given) -> Any:
        name = value.lower() if isinstance(value, str) else value
        if isinstance(name, (list, dict)) or name not in values:
            raise UnsupportedError(f"is not available here; choose one of {', '.join(str(known) for known in values)}")
        return values[name]

    return convert


def constant(result: Any) -> Convert:
    """Return a conversion of flags, which has the same result for every value."""
    return lambda value, given: result


def requires(option: str, convert: Convert | None = None) -> Convert:
    """Return a conversion that rejects the value without another option; kohya's scripts then ignore the value."""

    def convert_if_given(value: Any, given: Given) -> Any:
        if not given.get(option):
            raise UnsupportedError(f"has no effect without {option}, as in {TRAINER}")
        return convert(value, given) if convert else value

    return convert_if_given


def convert_masked_loss(value: Any, given: Given) -> dict[str, Any]:
    """Convert masks from files (`conditioning_data_dir`); `alpha_mask` converts masks from the alpha channel."""
    if given.get("conditioning_data_dir"):
        return {"objective.masked_loss": True, "data.masks": str(given["conditioning_data_dir"])}
    if given.get("alpha_mask"):
        return {"objective.masked_loss": True}
    raise UnsupportedError(f"has no effect without conditioning_data_dir or alpha_mask, as in {TRAINER}")


def keep_for_huber(value: Any, given: Given) -> Any:
    """Keep the value for the losses that use it (`huber`, `smooth_l1`); kohya's files often set it for others too."""
    if given.get("loss_type") not in ("huber", "smooth_l1"):
        raise NoEffectError("needs loss_type huber or smooth_l1")
    return value


def as_text(value: Any, given: Given) -> str:
    """Return the value as text, because a name may look like a number."""
    return str(value)


def as_list(value: Any, given: Given) -> list[str]:
    """Return one or several paths as a list."""
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]


def split_commas(value: Any, given: Given) -> list[str]:
    """Return names that a text or a list separates by commas."""
    return [name.strip() for item in as_list(value, given) for name in item.split(",") if name.strip()]


def refuse_suffixes(*suffixes: str, reason: str) -> Convert:
    """Return a conversion that rejects paths with one of these suffixes."""

    def convert(value: Any, given: Given) -> str:
        if str(value).lower().endswith(suffixes):
            raise UnsupportedError(reason)
        return str(value)

    return convert


def _uses_wandb(given: Given) -> bool:
    return given.get("log_with") in ("wandb", "all")


def convert_log_with(value: Any, given: Given) -> str | None:
    """Return the project at Weights & Biases: the name of kohya's tracker, or None for TensorBoard alone."""
    if value == "tensorboard":
        return None
    if not _uses_wandb(given):
        raise UnsupportedError("is not available here; choose one of tensorboard, wandb, all")
    default = "network_train" if given.get("network_module") else "finetuning"
    return str(given.get("log_tracker_name") or default)


def convert_tracker_name(value: Any, given: Given) -> None:
    """Set nothing: the conversion of `log_with` uses the name."""
    if not _uses_wandb(given):
        raise UnsupportedError("has no effect without log_with: wandb or all")


def convert_run_name(value: Any, given: Given) -> str:
    """Return the name of a run.

    Raises:
        UnsupportedError: the name cannot be that of a folder as it is, or it contains a variable.
    """
    name, variable = replace_signs(str(value)), VARIABLE.search(str(value))
    if variable:
        raise UnsupportedError(f"contains the variable {variable[0]}; {NOT_EXECUTED}: write run.name yourself")
    if name != str(value):
        raise UnsupportedError(f"becomes {name}: {NAME_RULE}", {"run.name": name})
    return name


def replace_signs(name: str) -> str:
    """Return a name with `_` in place of each sign that the name of a run cannot contain."""
    return re.sub(r"[^\w.\-]", "_", name.strip())


def convert_wandb_run(value: Any, given: Given) -> str | None:
    """Return the run's name, unless `output_name` gives another.

    Raises:
        UnsupportedError: the name has no effect, is not that of the run, or cannot be used as it is.
    """
    if not _uses_wandb(given):
        raise UnsupportedError(f"has no effect without log_with, as in {TRAINER}")
    if str(given.get("output_name") or value) != str(value):
        raise UnsupportedError(f"run.name is also the name at Weights & Biases; here it is {given['output_name']!r}")
    return convert_run_name(value, given)


def read_numbers(value: Any) -> list[float]:
    """Return the numbers in a number, a list, or a string such as `1e-5,2e-5`.

    Raises:
        WrongValueError: there is something else in it, or nothing.
    """
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    numbers = [read_number(item) for item in items if not (isinstance(item, str) and not item.strip())]
    if not numbers:
        raise WrongValueError
    return numbers


def read_number(value: Any) -> float:
    """Return a finite number, which may be written as a text.

    Raises:
        WrongValueError: it is none.
    """
    number = read_literal(value.strip()) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise WrongValueError
    return number


def read_whole(value: Any) -> int:
    """Return a whole number, which may be written as a text or with a point (`4.0`).

    Raises:
        WrongValueError: it is none.
    """
    number = read_number(value)
    if number != int(number):
        raise WrongValueError
    return int(number)


def convert_numbers(value: Any, given: Given) -> list[float]:
    """Convert a number, a list or a string to a list of numbers."""
    return read_numbers(value)


def read_pairs(value: Any) -> dict[str, Any]:
    """Return the items of a mapping, or of `name=value` words in a list or a string.

    Raises:
        WrongValueError: it is none of these.
    """
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, (str, list, tuple)):
        raise WrongValueError
    words = value.split() if isinstance(value, str) else value
    return {name: read_literal(text) for name, _, text in (str(word).partition("=") for word in words)}


def convert_resolution(value: Any, given: Given) -> dict[str, Any]:
    """Convert a size to the area of buckets or, without `enable_bucket`, to a single bucket, as in kohya's scripts."""
    # subsets.py builds a list of sizes for several datasets.
    if isinstance(value, list) and value and isinstance(value[0], list):
        return {"data.resolution_px": list(dict.fromkeys(_compute_side(size) for size in value))}
    if given.get("enable_bucket"):
        return {"data.resolution_px": _compute_side(value)}
    size = list(read_size(value))
    bucket = [max(1, side // 32) * 32 for side in size]
    if bucket != size:
        reason = f"is rounded to {bucket[0]}x{bucket[1]}, because SDXL's U-Net needs multiples of 32"
        raise UnsupportedError(reason, {"data.buckets": [bucket]})
    return {"data.buckets": [bucket]}


def read_size(value: Any) -> tuple[int, int]:
    """Return width and height in pixels: `1024`, `[832, 1216]`, `832,1216`, or `832x1216`.

    Raises:
        WrongValueError: it is none of these.
    """
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return read_size(value[0])
    sides = re.split("[,x×*]", value.lower()) if isinstance(value, str) else value
    sides = [read_whole(side) for side in (sides if isinstance(sides, (list, tuple)) else [sides])]
    if len(sides) not in (1, 2) or min(sides) <= 0:
        raise WrongValueError
    return sides[0], sides[-1]


def _compute_side(size: Any) -> int:
    """Return the side of the smallest square whose area is at least that of a bucket of this size."""
    width, height = read_size(size)
    return math.isqrt(width * height - 1) + 1


def round_bucket_side(round_steps: Callable[[float], int]) -> Convert:
    """Return a conversion that rounds a bucket's shortest or longest side to a multiple of the step, at least one step.

    Args:
        round_steps: rounds a number of steps down (math.floor) or up (math.ceil).
    """

    def convert(value: Any, given: Given) -> int:
        step = read_option(given, "bucket_reso_steps", 64)
        if step <= 0:
            raise WrongValueError("bucket_reso_steps")
        return max(1, round_steps(read_whole(value) / step)) * step

    return convert


def read_option(given: Given, name: str, default: int) -> int:
    """Return the whole number of another option than the one that is converted.

    Raises:
        WrongValueError: it is none; the message is its name.
    """
    try:
        return read_whole(given.get(name) or default)
    except WrongValueError:
        raise WrongValueError(name) from None


def count_ranks(given: Given) -> int:
    """Return the launcher's number of processes."""
    return read_option(given, "num_processes", 1)


def convert_batch(value: Any, given: Given) -> dict[str, int]:
    """Convert samples per forward pass to micro and global batch size."""
    micro, accumulated = read_whole(value), read_option(given, "gradient_accumulation_steps", 1)
    return {"train.micro_batch_size": micro, "train.global_batch_size": micro * accumulated * count_ranks(given)}


def convert_epochs(value: Any, given: Given) -> int:
    """Convert epochs to steps, if the number of samples per epoch is known (`num_samples`, from --samples)."""
    samples = given.get("num_samples")
    if not samples:
        raise UnsupportedError(
            "is counted in epochs, and the samples per epoch are unknown: import again with --samples N (images x "
            "repeats), or write steps (epochs x samples / global batch size)"
        )
    batch = convert_batch(given.get("train_batch_size") or 1, given)["train.global_batch_size"]
    return read_whole(value) * math.ceil(int(samples) / max(1, batch))


def convert_max_steps(value: Any, given: Given) -> int | None:
    """Return the length of the run in steps, unless it is given in epochs, which decide in kohya's scripts too."""
    if given.get("max_train_epochs"):
        raise NoEffectError("max_train_epochs decides the length of the run")
    return read_whole(value)


def count_steps(given: Given) -> int:
    """Return the length of the run in steps.

    Raises:
        UnsupportedError: the length is a number of epochs, and the samples per epoch are unknown.
    """
    if given.get("max_train_epochs"):
        return convert_epochs(given["max_train_epochs"], given)
    return read_option(given, "max_train_steps", 1)


def convert_steps(value: Any, given: Given) -> int:
    """Return steps; a value below 1 is a share of the run.

    Raises:
        UnsupportedError: it is a share of epochs, and the samples per epoch are unknown.
    """
    number = read_number(value)
    if not 0 < number < 1:
        return read_whole(number)
    try:
        return round(number * count_steps(given))
    except UnsupportedError:
        raise UnsupportedError(
            "is a share of a run whose steps are unknown, because epochs give its length: import again with --samples "
            "N (images x repeats), or write the number of steps"
        ) from None


def convert_prompts(value: Any, given: Given) -> dict[str, Any]:
    """Convert the name of a prompt file, or the prompts themselves, which the GUI kohya_ss keeps in its settings."""
    text = str(value).strip()
    if "\n" not in text and text.lower().endswith((".txt", ".toml", ".json")):
        return {"sample.prompt_file": text}
    return {"sample.prompts": [line.strip() for line in text.splitlines() if line.strip() and line.strip()[0] != "#"]}


def convert_text_encoders(value: Any, given: Given) -> dict[str, Any]:
    """Return the learning rates of both text encoders; the default is the U-Net's."""
    rates = [given.get(name) for name in ("learning_rate_te1", "learning_rate_te2")]
    return name_rates([given["learning_rate"] if rate is None else rate for rate in rates])


def name_rates(rates: list[Any]) -> dict[str, Any]:
    """Return the settings of both text encoders' learning rates."""
    return dict(zip(("optim.text_encoder_lr", "optim.text_encoder_2_lr"), rates, strict=True))


def choose_weighting(option: str) -> Convert:
    """Return the conversion of an option that turns on a weighting, with its gamma if it has one."""

    def convert(value: Any, given: Given) -> dict[str, Any]:
        if not value:
            return {}
        first = next(name for name in WEIGHTINGS if given.get(name))
        if option != first:
            raise UnsupportedError(f"cannot be combined with {first}, which is used here")
        settings: dict[str, Any] = {"objective.weighting": WEIGHTINGS[option]}
        return settings if isinstance(value, bool) else settings | {"objective.weighting_gamma": value}

    return convert


def count_kept_checkpoints(value: Any, given: Given) -> int:
    """Return the number of checkpoints that kohya's scripts keep among those of the last `value` steps."""
    return read_whole(value) // max(1, read_option(given, "save_every_n_steps", 1)) + 1


def read_literal(text: str) -> Any:
    """Return the value of a Python literal (number, list, True, ...), or the text itself if it is not a literal."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # the last two for deep nesting
        return text
