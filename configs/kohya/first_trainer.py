"""Table of all settings of the first sdxl-trainer's Python file.

Each setting maps to the name of the same option of kohya's scripts, or to an `Option` of its own.
"""

from pathlib import Path
from typing import Any

from sdxl_trainer.configs.kohya.entries import Option, built_in, converted, copied, unsupported
from sdxl_trainer.configs.kohya.options import FREEZES, FROZEN_UNET, LOGS, RESUME
from sdxl_trainer.configs.kohya.values import Given, UnsupportedError, as_list, constant, look_up

STRATEGY = "is Python code; write it as a class for `data.strategy` (docs/STRATEGY.md)"
# Defaults of settings that the file does not set, by kohya's names: the defaults here, except for the batch size.
FIRST_TRAINER_DEFAULTS = {"learning_rate": 1e-5, "max_train_steps": 1000, "train_batch_size": 1}
SAMPLES = {
    "prompt": "sample.prompts",
    "negative_prompt": "sample.negative_prompt",
    "steps": "sample.num_inference_steps",
    "scale": "sample.guidance_scale",
    "seed": "sample.seed",
    "width": "sample.width_px",
    "height": "sample.height_px",
}


def convert_sample_params(value: Any, given: Given) -> dict[str, Any]:
    """Convert prompts and settings of generated images."""
    settings = {SAMPLES[name]: item for name, item in dict(value).items() if name in SAMPLES and item is not None}
    if "sample.prompts" in settings:
        settings["sample.prompts"] = as_list(settings["sample.prompts"], given)
    return settings


def convert_sources(value: Any, given: Given) -> dict[str, Any]:
    """Convert metadata files and image folders, each a path or a dict with `name_or_path`."""
    items = value if isinstance(value, list) else [value]
    paths = [str(item.get("name_or_path", "") if isinstance(item, dict) else item) for item in items]
    if any(path.endswith((".sqlite3", ".db")) for path in paths):
        raise UnsupportedError("databases are not supported; export them as .jsonl or .parquet (docs/DATA.md)")
    settings = {
        "data.metadata": [path for path in paths if Path(path).suffix],
        "data.image_dirs": [path for path in paths if not Path(path).suffix],
    }
    return {key: value for key, value in settings.items() if value}


def convert_density(value: Any, given: Given) -> dict[str, Any]:
    """Convert the distribution of timesteps."""
    density = look_up({"uniform": "uniform", "logit_normal": "logit_normal"})(value, given)
    kwargs = given.get("timestep_sampler_kwargs") or {}
    names = {"mu": "objective.logit_mean", "sigma": "objective.logit_std"}
    parameters = {names[name]: number for name, number in kwargs.items() if name in names}
    return {"objective.timestep_density": density} | (parameters if density == "logit_normal" else {})


def convert_largest_side(value: Any, given: Given) -> int:
    """Return the larger one of the maximum width and height."""
    return max(int(given.get(name) or 0) for name in ("max_width", "max_height"))


FIRST_TRAINER_OPTIONS: dict[str, str | Option] = {
    "vae_model_name_or_path": "vae",
    "hf_cache_dir": unsupported("set HF_HOME in the environment"),
    "max_retries": unsupported("the hub client retries by itself"),
    "image_dirs": converted(as_list, "data.image_dirs"),
    "metadata_files": converted(as_list, "data.metadata"),
    "dataset_source": converted(convert_sources, "data.metadata", "data.image_dirs"),
    "arb": "enable_bucket",
    "bucket_reso_step": "bucket_reso_steps",
    "predefined_buckets": copied("data.buckets"),
    "max_width": converted(convert_largest_side, "data.max_bucket_px"),
    "max_height": converted(convert_largest_side, "data.max_bucket_px"),
    "max_area": unsupported("the area of buckets is that of `data.resolution_px`"),
    "max_aspect_ratio": unsupported("`data.min_bucket_px` and `data.max_bucket_px` limit it"),
    "allow_crop": unsupported("images are always resized to cover their bucket and cropped at the centre"),
    "max_dataset_n_workers": unsupported("metadata is read by one process, into an index"),
    "max_dataloader_n_workers": "max_data_loader_n_workers",
    "cache_latents_max_dataloader_n_workers": copied("cache.num_workers"),
    "cache_only": unsupported("run `bash launch/cache.sh`"),
    "check_cache_validity": built_in("latents are checked as `data.verify_latents` sets"),
    "keep_cached_latents_in_memory": unsupported("latents are read when they are needed"),
    "async_cache": built_in(),
    "dataset_cache_path": built_in("an index is always kept in the cache folder"),
    "dataset_full_cache_path": built_in("an index is always kept in the cache folder"),
    **{
        name: unsupported(STRATEGY)
        for name in (
            "num_repeats_getter",
            "data_weight_getter",
            "caption_getter",
            "caption_processor",
            "description_processor",
            "loss_weight_getter",
            "data_preprocessor",
            "dataset_hook_getter",
            "dataset_hook_saver",
        )
    },
    "num_train_epochs": "max_train_epochs",
    "batch_size": "train_batch_size",
    "block_lrs": "block_lr",
    "learning_rate_nnet": copied("optim.lr"),
    "train_nnet": converted(
        lambda value, given: {} if value else {"optim.groups": [FROZEN_UNET]}, "optim.groups", note=FREEZES
    ),
    "nnet_trainable_params": unsupported(
        "freeze the other parameters with `optim.groups`, by diffusers' parameter names"
    ),
    "optimizer_kwargs": "optimizer_args",
    "lr_scheduler_kwargs": "lr_scheduler_args",
    "prediction_type": converted(
        look_up({"epsilon": "epsilon", "v_prediction": "v", "rectified_flow": "flow"}), "objective.prediction"
    ),
    "timestep_sampler_type": converted(
        convert_density, "objective.timestep_density", "objective.logit_mean", "objective.logit_std"
    ),
    "timestep_sampler_kwargs": converted(constant(None), "objective.logit_mean", note="with timestep_sampler_type"),
    "use_deepspeed": "deepspeed",
    "cpu": built_in("a machine without a GPU trains on the CPU"),
    "output_subdir": unsupported("the folders in a run folder have fixed names"),
    "loss_recorder_kwargs": unsupported(LOGS),
    "record_columns": unsupported(LOGS),
    "use_wandb": converted(constant("sdxl-trainer"), "log.wandb", note="the project `sdxl-trainer`; choose your own"),
    "wandb_token": "wandb_api_key",
    "save_model": built_in(),
    "save_train_state": built_in(),
    "save_on_train_start": unsupported("the first model is available anyway"),
    "save_on_train_end": built_in(),
    "save_on_keyboard_interrupt": built_in(),
    "save_on_exception": built_in(),
    "save_max_n_models": copied("checkpoint.keep_last"),
    "resume_from": unsupported(RESUME),
    "sample_params": converted(convert_sample_params, *SAMPLES.values()),
    "eval_params": converted(convert_sample_params, *SAMPLES.values()),
    "eval_every_n_steps": copied("sample.every_steps"),
    "eval_every_n_epochs": unsupported("set `sample.every_steps`"),
    "sample_every_n_steps": copied("sample.every_steps"),
    "sample_every_n_epochs": unsupported("set `sample.every_steps`"),
    "eval_on_train_start": copied("sample.at_start"),
    "eval_sampler": converted(look_up({"euler": "euler", "euler_a": "euler_a", "ddim": "ddim"}), "sample.scheduler"),
    "sample_sampler": converted(look_up({"euler": "euler", "euler_a": "euler_a", "ddim": "ddim"}), "sample.scheduler"),
    "eval_benchmark": unsupported("set `sample.prompts` or `sample.prompt_file`"),
    "sample_benchmark": unsupported("set `sample.prompts` or `sample.prompt_file`"),
    "eval_size": unsupported("images are generated one at a time"),
}
