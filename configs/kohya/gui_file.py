"""Settings of the graphical interface kohya_ss, which saves them as JSON, as options of kohya's scripts.

The interface starts kohya's scripts with options that it builds from its own fields. It leaves out options whose field
is empty or 0, so that kohya's default applies.
"""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sdxl_trainer.configs.kohya.options import KOHYA_OPTIONS
from sdxl_trainer.configs.kohya.readers import collect_options
from sdxl_trainer.configs.kohya.values import WrongValueError, read_literal, read_number

# Fields that only the interface has. With kohya's options they are what its files are recognised by.
OWN_FIELDS = ("LoRA_type", "max_resolution", "lr_warmup", "sdxl_no_half_vae", "model_list", "additional_parameters")
MIN_KNOWN_FIELDS = 2
LOOKED_FOR = ("pretrained_model_name_or_path", "max_resolution", "train_batch_size", "learning_rate", "LoRA_type")
# Field → option of kohya's scripts.
RENAMED_FIELDS = {
    "max_resolution": "resolution",
    "optimizer": "optimizer_type",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "sdxl_no_half_vae": "no_half_vae",
    "lora_network_weights": "network_weights",
    "image_folder": "image_dir",
}
WORDS_FIELD = "additional_parameters"  # holds further options as words of a command line
# Field → the option that it becomes in another form.
SOURCES = {
    "LoRA_type": "network_module",
    "epoch": "max_train_epochs",
    "dataset_repeats": "max_train_epochs",
    "lr_warmup": "lr_warmup_steps",
    "use_wandb": "log_with",
    "train_dir": "in_json",
    "caption_metadata_filename": "in_json",
}
NOT_PASSED = "is not passed on by kohya_ss beside the other settings"
INTERFACE = "belongs to the interface; it does not change the training"
# Fields whose 0 is not the same as leaving them out.
ZERO_FIELDS = (
    *("learning_rate", "learning_rate_te1", "learning_rate_te2"),
    *("max_grad_norm", "prior_loss_weight", "max_data_loader_n_workers", "min_timestep"),
)
# Fields without an effect of their own on training: the interface's state, and the launcher's options.
IGNORED_FIELDS = frozenset(
    (
        "model_list",
        "training_preset",
        "num_cpu_threads_per_process",
        "num_machines",
        "multi_gpu",
        "gpu_ids",
        "main_process_port",
    )
    + ("sdxl", "sdxl_checkbox", "epoch", "lr_warmup", "noise_offset_type", "additional_parameters", "use_wandb")
    + (
        "LoRA_type",
        "extra_accelerate_launch_args",
        "save_as_bool",
    )
    + ("train_dir", "create_caption", "create_buckets", "caption_metadata_filename", "latent_metadata_filename")
    + (
        "full_path",
        "use_latent_files",
        "batch_size",
        "dynamo_backend",
        "dynamo_mode",
        "dynamo_use_dynamic",
        "dynamo_use_fullgraph",
    )
    + ("stop_text_encoder_training_pct", "learning_rate_te", "no_token_padding", "conv_dims", "conv_alphas", "headless")
)
# Fields that become arguments of the network.
NETWORK_FIELDS = (
    *("conv_dim", "conv_alpha", "rank_dropout", "module_dropout", "use_cp", "use_tucker", "use_scalar"),
    *("rank_dropout_scale", "constrain", "rescaled", "train_norm", "bypass_mode", "dora_wd"),
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold"),
    *("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "loraplus_lr_ratio"),
    *("loraplus_text_encoder_lr_ratio", "loraplus_unet_lr_ratio"),
)
# Fields that become arguments of LyCORIS' network only.
LYCORIS_FIELDS = {
    "LyCORIS_preset": "preset",
    "factor": "factor",
    "unit": "block_size",
    "decompose_both": "decompose_both",
    "train_on_input": "train_on_input",
}
CONVOLUTION_FIELDS = ("conv_dim", "conv_alpha")  # `Standard` adapters have none
NETWORK_MODULES = {
    "Standard": "networks.lora",
    "Kohya LoCon": "networks.lora",
    "LoRA-FA": "networks.lora_fa",
    "Kohya DyLoRA": "networks.dylora",
}
ALGORITHMS = {"native fine-tuning": "full"}  # LyCORIS' names that differ from the interface's
FOLDER_CAPTIONS = ".none-use-foldername"
ORIGINAL_NOISE, MULTIRES_NOISE = (
    ("noise_offset", "adaptive_noise_scale"),
    (
        "multires_noise_iterations",
        "multires_noise_discount",
    ),
)


class FieldSource(NamedTuple):
    """A field of the interface with the option that it becomes, or the reason why it has no effect."""

    field: str
    value: Any
    option: str
    note: str = ""


class GuiSettings(NamedTuple):
    """The options that kohya_ss starts kohya's scripts with, and where each field of its file went."""

    options: dict[str, Any]
    sources: list[FieldSource]


def is_gui_file(fields: Mapping[str, Any]) -> bool:
    """Return whether a JSON object holds settings of kohya_ss."""
    return len(list_known_fields(fields)) >= MIN_KNOWN_FIELDS


def list_known_fields(fields: Mapping[str, Any]) -> list[str]:
    """Return the fields that settings of kohya_ss may have. A mapping is none: metadata has such values."""
    known = {*OWN_FIELDS, *RENAMED_FIELDS, *KOHYA_OPTIONS}
    return [name for name, value in fields.items() if name in known and not isinstance(value, dict)]


def list_looked_for() -> str:
    """Return names by which a file of kohya_ss is recognised."""
    return ", ".join(LOOKED_FOR)


def convert_gui(saved: Mapping[str, Any]) -> GuiSettings:
    """Return the options that kohya_ss starts kohya's scripts with.

    Raises:
        WrongValueError: a number is none; the message is the name of its field.
    """
    fields = {name: _read_field(name, value) for name, value in saved.items()}
    fields = {name: value for name, value in fields.items() if value or (name in ZERO_FIELDS and value == 0)}
    options = {
        RENAMED_FIELDS.get(name, name): value
        for name, value in fields.items()
        if name not in IGNORED_FIELDS and name not in NETWORK_FIELDS and name not in LYCORIS_FIELDS
    }
    # The tab of fine-tuning always has buckets.
    if not fields.get("enable_bucket") and "image_folder" not in fields:
        options = {name: value for name, value in options.items() if "bucket" not in name}
    if options.get("clip_skip") == 1:
        del options["clip_skip"]
    options |= _convert_length(fields) | _convert_switches(fields)
    for name in MULTIRES_NOISE if fields.get("noise_offset_type", "Original") == "Original" else ORIGINAL_NOISE:
        options.pop(name, None)
    if "LoRA_type" in fields:
        options |= _convert_network(fields)
        for name in ("learning_rate_te1", "learning_rate_te2"):
            options.pop(name, None)
    elif "image_folder" in fields:  # the tab of fine-tuning
        options |= {"enable_bucket": True}
        if not fields.get("create_caption"):
            folder, name = fields.get("train_dir", "."), fields.get("caption_metadata_filename", "meta_cap.json")
            options["in_json"] = f"{folder}/{name}"
    elif fields.get("learning_rate_te1") or fields.get("learning_rate_te2"):
        options["train_text_encoder"] = True
    for name in ("optimizer_args", "lr_scheduler_args"):
        words = options.get(name)
        if isinstance(words, str):
            options[name] = _split(words)
    further = collect_options(_split(str(fields.get(WORDS_FIELD, ""))))
    options |= further
    return GuiSettings(options, list(_list_sources(saved, fields, options, further)))


def _list_sources(
    saved: Mapping[str, Any], fields: Mapping[str, Any], options: Mapping[str, Any], further: Mapping[str, Any]
) -> Iterator[FieldSource]:
    """Yield what became of each field, and of each option in the words of `additional_parameters`."""
    for name, value in saved.items():
        option, note = _name_option(name, fields, options), ""
        if not option and name in fields:
            note = INTERFACE if name in IGNORED_FIELDS and name not in SOURCES else NOT_PASSED
        if option in further and name != WORDS_FIELD:
            note = f"is overridden by {WORDS_FIELD}"
        yield FieldSource(name, value if option or name in fields else None, option, note)
    for name, value in further.items():
        yield FieldSource(f"{WORDS_FIELD}.{name}", value, name)


def _name_option(name: str, fields: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Return the option that a field becomes; empty if it becomes none."""
    if name in NETWORK_FIELDS or name in LYCORIS_FIELDS:
        argument = LYCORIS_FIELDS.get(name, name)
        passed = any(str(word).startswith(f"{argument}=") for word in options.get("network_args") or [])
        return "network_args" if passed else ""
    if name == WORDS_FIELD:
        return next(iter(collect_options(_split(str(fields.get(name, ""))))), "")
    if name == "xformers" and isinstance(fields.get(name), str):
        return "sdpa" if fields[name] == "sdpa" else "xformers"
    if name == "noise_offset_type":
        return next((option for option in (*ORIGINAL_NOISE, *MULTIRES_NOISE) if option in options), "")
    if name == "text_encoder_lr" and not fields.get(name):
        return "network_train_unet_only" if options.get("network_train_unet_only") else ""
    has_length = fields.get("max_train_steps") or fields.get("max_train_epochs")
    if (name == "epoch" and has_length) or (name == "lr_warmup" and fields.get("lr_warmup_steps")):
        return ""
    option = SOURCES.get(name) or RENAMED_FIELDS.get(name, name)
    return option if options.get(option) is not None else ""


def _read_field(name: str, value: Any) -> Any:
    """Return a field's value. Text fields hold numbers as texts; `none` stands for nothing."""
    if isinstance(value, str):
        value = value.strip()
        literal = read_literal(value)
        if name == "mixed_precision" and value.lower() == "no":
            return "no"  # a precision
        # Texts in quotes stay as they are; they are words of a command line.
        return None if value.lower() in ("", "none", "no") else value if isinstance(literal, str) else literal
    return value


def _read_number(fields: Mapping[str, Any], name: str) -> float:
    """Return the number in a field, 0 if it is empty.

    Raises:
        WrongValueError: it is none; the message is the name of the field.
    """
    try:
        return read_number(fields.get(name) or 0)
    except WrongValueError:
        raise WrongValueError(name) from None


def _split(text: str) -> list[str]:
    """Split a text into words as a shell does."""
    try:
        return shlex.split(text)
    except ValueError:  # an open quote
        return text.split()


def _convert_length(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the length of the run and of its warm-up, which is a share of it in percent."""
    options: dict[str, Any] = {}
    # With a dataset file the interface does not count steps, and kohya's default applies.
    counts_steps = not (fields.get("max_train_steps") or fields.get("max_train_epochs") or fields.get("dataset_config"))
    if counts_steps and fields.get("epoch"):
        repeats = _read_number(fields, "dataset_repeats") if "image_folder" in fields else 1
        options["max_train_epochs"] = int(_read_number(fields, "epoch")) * int(repeats or 1)
    if "image_folder" in fields and fields.get("dataset_repeats"):
        options["dataset_repeats"] = None  # a part of the epochs
    if not fields.get("lr_warmup_steps") and fields.get("lr_warmup"):
        options["lr_warmup_steps"] = min(_read_number(fields, "lr_warmup") / 100, 0.999)
    return options


def _convert_switches(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of fields that choose among several options."""
    options: dict[str, Any] = {}
    attention = fields.get("xformers")
    if isinstance(attention, str):
        options |= {"xformers": attention == "xformers", "sdpa": attention == "sdpa"}
    if fields.get("use_wandb"):
        options["log_with"] = "wandb"
    if fields.get("caption_extension") == FOLDER_CAPTIONS:
        options["caption_extension"] = None
    if "sample_prompts" not in fields:
        options |= dict.fromkeys(("sample_every_n_steps", "sample_every_n_epochs", "sample_sampler"))
    return options


def _convert_network(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of adapters. A learning rate of 0 leaves out the U-Net's or the text encoders' adapters."""
    kind = str(fields["LoRA_type"])
    names = [name for name in NETWORK_FIELDS if kind != "Standard" or name not in CONVOLUTION_FIELDS]
    arguments = [f"{name}={fields[name]}" for name in names if fields.get(name)]
    if kind not in NETWORK_MODULES:
        algorithm = kind.removeprefix("LyCORIS/").lower()
        arguments.insert(0, f"algo={ALGORITHMS.get(algorithm, algorithm)}")
        arguments += [f"{word}={fields[name]}" for name, word in LYCORIS_FIELDS.items() if fields.get(name)]
    return {
        "network_module": NETWORK_MODULES.get(kind, "lycoris.kohya"),
        "network_args": arguments,
        "network_train_unet_only": bool(fields.get("unet_lr") and not fields.get("text_encoder_lr")),
        "network_train_text_encoder_only": bool(fields.get("text_encoder_lr") and not fields.get("unet_lr")),
    }
