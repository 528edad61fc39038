"""What each setting of the first sdxl-trainer's Python file is here: the name of the same option of kohya's scripts,
whose conversion it shares, or an option of its own."""

from pathlib import Path
from typing import Any

from sdxl_trainer.configs.kohya.options import (
    FREEZES,
    FROZEN_UNET,
    LOGS,
    RESUME,
    Option,
    always,
    made,
    none,
    same,
)
from sdxl_trainer.configs.kohya.values import Given, NoCounterpart, as_list, choose, say

STRATEGY = "is Python: write it as a class and name it in `data.strategy` (docs/STRATEGY.md)"
# What is taken where its file does not say, by kohya's names: the defaults here, but for the batch.
SEED_DEFAULTS = {"learning_rate": 1e-5, "max_train_steps": 1000, "train_batch_size": 1}
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
    """Prompt and settings of the samples."""
    settings = {SAMPLES[name]: item for name, item in dict(value).items() if name in SAMPLES and item is not None}
    if "sample.prompts" in settings:
        settings["sample.prompts"] = as_list(settings["sample.prompts"], given)
    return settings


def convert_sources(value: Any, given: Given) -> dict[str, Any]:
    """Files of metadata and folders of images, each a path or a dict with `name_or_path`."""
    items = value if isinstance(value, list) else [value]
    paths = [str(item.get("name_or_path", "") if isinstance(item, dict) else item) for item in items]
    if any(path.endswith((".sqlite3", ".db")) for path in paths):
        raise NoCounterpart("databases are not read; write them as .jsonl or .parquet (docs/DATA.md)")
    settings = {
        "data.metadata": [path for path in paths if Path(path).suffix],
        "data.image_dirs": [path for path in paths if not Path(path).suffix],
    }
    return {key: found for key, found in settings.items() if found}


def convert_density(value: Any, given: Given) -> dict[str, Any]:
    """How often timesteps come."""
    density = choose({"uniform": "uniform", "logit_normal": "logit_normal"})(value, given)
    kwargs = given.get("timestep_sampler_kwargs") or {}
    names = {"mu": "objective.logit_mean", "sigma": "objective.logit_std"}
    found = {names[name]: number for name, number in kwargs.items() if name in names}
    return {"objective.timestep_density": density} | (found if density == "logit_normal" else {})


def convert_largest_side(value: Any, given: Given) -> int:
    """The longest side of a bucket, of both directions."""
    return max(int(given.get(name) or 0) for name in ("max_width", "max_height"))


SEED_OPTIONS: dict[str, str | Option] = {
    "vae_model_name_or_path": "vae",
    "hf_cache_dir": none("the hub's cache is where HF_HOME says"),
    "max_retries": none("the hub's own client retries"),
    "image_dirs": made(as_list, "data.image_dirs"),
    "metadata_files": made(as_list, "data.metadata"),
    "dataset_source": made(convert_sources, "data.metadata", "data.image_dirs"),
    "arb": "enable_bucket",
    "bucket_reso_step": "bucket_reso_steps",
    "predefined_buckets": same("data.buckets"),
    "max_width": made(convert_largest_side, "data.max_bucket_px"),
    "max_height": made(convert_largest_side, "data.max_bucket_px"),
    "max_area": none("buckets keep to the area of `data.resolution_px`"),
    "max_aspect_ratio": none("`data.min_bucket_px` and `data.max_bucket_px` bound it"),
    "allow_crop": none("images are resized to cover their bucket, and cut in the middle"),
    "max_dataset_n_workers": none("metadata are read by one process, into an index"),
    "max_dataloader_n_workers": "max_data_loader_n_workers",
    "cache_latents_max_dataloader_n_workers": same("cache.num_workers"),
    "cache_only": none("`bash launch/cache.sh` only caches"),
    "check_cache_validity": always("every latent is checked (`data.verify_latents`)"),
    "keep_cached_latents_in_memory": none("latents are read as they are needed"),
    "async_cache": always(),
    "dataset_cache_path": always("an index is always kept in the cache folder"),
    "dataset_full_cache_path": always("an index is always kept in the cache folder"),
    **{
        name: none(STRATEGY)
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
    "learning_rate_nnet": same("optim.lr"),
    "train_nnet": made(
        lambda value, given: {} if value else {"optim.groups": [FROZEN_UNET]}, "optim.groups", note=FREEZES
    ),
    "nnet_trainable_params": none("freeze all else by `optim.groups`, by diffusers' names of parameters"),
    "optimizer_kwargs": "optimizer_args",
    "lr_scheduler_kwargs": "lr_scheduler_args",
    "prediction_type": made(
        choose({"epsilon": "epsilon", "v_prediction": "v", "rectified_flow": "flow"}), "objective.prediction"
    ),
    "timestep_sampler_type": made(
        convert_density, "objective.timestep_density", "objective.logit_mean", "objective.logit_std"
    ),
    "timestep_sampler_kwargs": made(say(None), "objective.logit_mean", note="goes with timestep_sampler_type"),
    "use_deepspeed": "deepspeed",
    "cpu": always("without a GPU the CPU trains"),
    "output_subdir": none("folders of a run have fixed names"),
    "loss_recorder_kwargs": none(LOGS),
    "record_columns": none(LOGS),
    "use_wandb": made(say("sdxl-trainer"), "log.wandb", note="the project `sdxl-trainer`; write your own"),
    "wandb_token": "wandb_api_key",
    "save_model": always(),
    "save_train_state": always(),
    "save_on_train_start": none("the model that training starts from is at hand"),
    "save_on_train_end": always(),
    "save_on_keyboard_interrupt": always(),
    "save_on_exception": always(),
    "save_max_n_models": same("checkpoint.keep_last"),
    "resume_from": none(RESUME),
    "sample_params": made(convert_sample_params, *SAMPLES.values()),
    "eval_params": made(convert_sample_params, *SAMPLES.values()),
    "eval_every_n_steps": same("sample.every_steps"),
    "eval_every_n_epochs": none("write `sample.every_steps`"),
    "sample_every_n_steps": same("sample.every_steps"),
    "sample_every_n_epochs": none("write `sample.every_steps`"),
    "eval_on_train_start": same("sample.at_start"),
    "eval_sampler": made(choose({"euler": "euler", "euler_a": "euler_a", "ddim": "ddim"}), "sample.scheduler"),
    "sample_sampler": made(choose({"euler": "euler", "euler_a": "euler_a", "ddim": "ddim"}), "sample.scheduler"),
    "eval_benchmark": none("prompts are `sample.prompts` or `sample.prompt_file`"),
    "sample_benchmark": none("prompts are `sample.prompts` or `sample.prompt_file`"),
    "eval_size": none("prompts are drawn one after the other"),
}
