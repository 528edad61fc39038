"""Settings of the graphical interface kohya_ss, which saves them as JSON, as options of kohya's scripts.

The interface starts kohya's scripts with options that it builds from its own fields. It leaves out options whose field
is empty or 0, so that kohya's default applies.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from sdxl_trainer.configs.kohya.readers import collect_options
from sdxl_trainer.configs.kohya.values import read_literal

# Fields that only the interface has, by which its files are recognised.
OWN_FIELDS = ("LoRA_type", "max_resolution", "lr_warmup", "sdxl_no_half_vae", "model_list", "additional_parameters")
MIN_OWN_FIELDS = 2
# Field → option of kohya's scripts.
RENAMED_FIELDS = {
    "max_resolution": "resolution",
    "optimizer": "optimizer_type",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "sdxl_no_half_vae": "no_half_vae",
    "lora_network_weights": "network_weights",
    "image_folder": "image_dir",
}
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
        "LyCORIS_preset",
        "unit",
        "factor",
        "train_on_input",
        "decompose_both",
        "extra_accelerate_launch_args",
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
CONVOLUTION_FIELDS = ("conv_dim", "conv_alpha")  # `Standard` adapters have none
NETWORK_MODULES = {
    "Standard": "networks.lora",
    "Kohya LoCon": "networks.lora",
    "LoRA-FA": "networks.lora_fa",
    "Kohya DyLoRA": "networks.dylora",
}
FOLDER_CAPTIONS = ".none-use-foldername"
ORIGINAL_NOISE, MULTIRES_NOISE = (
    ("noise_offset", "adaptive_noise_scale"),
    (
        "multires_noise_iterations",
        "multires_noise_discount",
    ),
)


def is_gui_file(fields: Mapping[str, Any]) -> bool:
    """Return whether a JSON object holds settings of kohya_ss."""
    return sum(name in fields for name in OWN_FIELDS) >= MIN_OWN_FIELDS


def convert_gui(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that kohya_ss starts kohya's scripts with."""
    fields = {name: _read_field(value) for name, value in saved.items()}
    fields = {name: value for name, value in fields.items() if value or (name in ZERO_FIELDS and value == 0)}
    options = {
        RENAMED_FIELDS.get(name, name): value
        for name, value in fields.items()
        if name not in IGNORED_FIELDS and name not in NETWORK_FIELDS
    }
    if not fields.get("enable_bucket"):
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
    return options | collect_options(_split(str(fields.get("additional_parameters", ""))))


def _read_field(value: Any) -> Any:
    """Return a field's value. Text fields hold numbers as texts; `none` stands for nothing."""
    if isinstance(value, str):
        value = value.strip()
        literal = read_literal(value)
        # Texts in quotes stay as they are; they are words of a command line.
        return None if value.lower() in ("", "none", "no") else value if isinstance(literal, str) else literal
    return value


def _split(text: str) -> list[str]:
    """Split a text into words as a shell does."""
    try:
        return shlex.split(text)
    except ValueError:  # an open quote
        return text.split()


def _convert_length(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the length of the run and of its warm-up, which is a share of it in percent."""
    options: dict[str, Any] = {}
    if not fields.get("max_train_steps") and not fields.get("max_train_epochs"):
        repeats = fields.get("dataset_repeats") if "image_folder" in fields else 1
        options["max_train_epochs"] = int(fields.get("epoch") or 1) * int(repeats or 1)
    if "image_folder" in fields and fields.get("dataset_repeats"):
        options["dataset_repeats"] = None  # a part of the epochs
    if not fields.get("lr_warmup_steps") and fields.get("lr_warmup"):
        options["lr_warmup_steps"] = min(float(fields["lr_warmup"]) / 100, 0.999)
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
        arguments.insert(0, f"algo={kind.removeprefix('LyCORIS/')}")
    return {
        "network_module": NETWORK_MODULES.get(kind, "lycoris.kohya"),
        "network_args": arguments,
        "network_train_unet_only": bool(fields.get("unet_lr") and not fields.get("text_encoder_lr")),
        "network_train_text_encoder_only": bool(fields.get("text_encoder_lr") and not fields.get("unet_lr")),
    }
