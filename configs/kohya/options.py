"""Table of all options of kohya's sdxl_train.py and sdxl_train_network.py, with their settings here.

The importer uses the table, and docs/FROM_KOHYA.md is generated from it. Options are imported in the order of the
table: a later option can override a setting of an earlier one.
"""

import math

from sdxl_trainer.configs.kohya.entries import (
    ENCODERS,
    WHOLE,
    Option,
    built_in,
    converted,
    copied,
    unsupported,
    weighting,
)
from sdxl_trainer.configs.kohya.memory import RELEASING, convert_full_bf16, convert_precision, convert_release
from sdxl_trainer.configs.kohya.networks import ADAPTERS
from sdxl_trainer.configs.kohya.optimizers import (
    convert_optimizer,
    convert_optimizer_args,
    convert_schedule,
    needs_schedule,
)
from sdxl_trainer.configs.kohya.values import (
    TRAINER,
    as_list,
    as_text,
    constant,
    convert_batch,
    convert_epochs,
    convert_log_with,
    convert_masked_loss,
    convert_max_steps,
    convert_numbers,
    convert_prompts,
    convert_resolution,
    convert_run_name,
    convert_steps,
    convert_text_encoders,
    convert_tracker_name,
    convert_wandb_run,
    count_kept_checkpoints,
    keep_for_huber,
    look_up,
    read_whole,
    refuse_suffixes,
    requires,
    round_bucket_side,
    split_commas,
)

# Defaults of kohya's scripts that differ from the defaults here.
KOHYA_DEFAULTS = {
    "learning_rate": 2e-6,
    "max_train_steps": 1600,
    "train_batch_size": 1,
    "mixed_precision": "no",
    "min_bucket_reso": 256,
    "max_bucket_reso": 1024,
    "enable_wildcard": False,
}
SIZE = "a side in pixels, such as 1024, or width and height, such as 832,1216 or 832x1216"
BATCH = ("train.micro_batch_size", "train.global_batch_size")
CACHED = "latents are always cached, by `bash launch/cache.sh`; with `--adopt` it uses those that are cached already"
MEMORY = f"controls memory use in {TRAINER}; use ZeRO, offload and precision here (docs/PERFORMANCE.md)"
QUANTISED = "for adapters, set `lora.quantised_base`"
PIXELS = "images are encoded before training, so their pixels cannot be changed during training"
UPLOAD = "training uploads nothing; `train/convert.py --push` uploads the model afterwards, with a card"
RESUME = f"starting the same command again resumes; states of {TRAINER} cannot be read"
LOGS = "logs are in the run folder, as TensorBoard files and metrics.jsonl"

CAPTION_SUFFIXES = (".txt", ".caption")  # that are read here
SAMPLERS = {
    **{name: name for name in ("ddim", "pndm", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsingle")},
    **{f"k_{name}": name for name in ("euler", "euler_a", "dpm_2", "dpm_2_a")},
    **{name: "dpmpp_2m" for name in ("dpmsolver", "dpmsolver++")},
}
SAFETENSORS_ONLY = refuse_suffixes(
    ".ckpt", ".pt", reason="is not a safetensors file, the only format that is read; convert it"
)

MODEL = {
    "pretrained_model_name_or_path": converted(SAFETENSORS_ONLY, "model.path"),
    "vae": converted(SAFETENSORS_ONLY, "model.vae", note="a diffusers folder, a single file or a hub id"),
    "vae_reflection_padding": converted(constant("reflect"), "model.vae_padding", note="`reflect`"),
    "vae_custom_scale": copied("model.vae_scaling_factor"),
    "vae_custom_shift": copied("model.vae_shift_factor"),
    "no_half_vae": built_in("the VAE runs in fp32 unless `cache.vae_precision: bf16` is set"),
    "tokenizer_cache_dir": unsupported("CLIP's vocabulary is in the model folder or in `model.tokenizer`"),
    "sdxl": built_in(),
    "v2": unsupported("only SDXL is trained"),
    "clip_skip": unsupported("SDXL is always trained on the second-to-last layer, whatever is set here"),
    "disable_mmap_load_safetensors": unsupported("model files are read tensor by tensor"),
    "lowram": unsupported(MEMORY),
    "highvram": unsupported(MEMORY),
}
DATA = {
    "train_data_dir": converted(
        as_list,
        "data.image_dirs",
        "data.kohya_folders",
        note="its `N_name` folders; N is their repeats, and the name the caption of images without a caption file",
    ),
    "reg_data_dir": converted(
        as_list, "data.regularisation_dirs", note="repeated until they equal all others in number"
    ),
    "in_json": converted(as_list, "data.metadata"),
    "image_dir": converted(as_list, "data.image_dirs", note="in a subset"),
    "metadata_file": converted(as_list, "data.metadata", note="in a subset"),
    "is_reg": copied("data.regularisation_dirs", "in a subset"),
    "num_repeats": copied(
        "data.source_weights",
        "in a subset; one number per entry of `data.metadata` or `data.image_dirs`. Not imported with `is_reg`: such "
        "images are repeated until they equal all others in number, as in kohya's scripts",
    ),
    "dataset_repeats": unsupported("repeats all images; train more steps instead"),
    "class_tokens": unsupported("an image without a caption gets the empty caption; write .txt files"),
    "caption_extension": converted(
        look_up(dict.fromkeys(CAPTION_SUFFIXES)), "data.image_dirs", note="`.txt` and `.caption` files are read"
    ),
    "caption_extention": unsupported("misspelling of caption_extension; `.txt` and `.caption` files are read"),
    "resolution": converted(
        convert_resolution,
        "data.resolution_px",
        "data.buckets",
        note="with `enable_bucket`, side of a square of the same area; several for datasets with the same folders. "
        "Without it, sides are rounded down to multiples of 32",
        expects=SIZE,
    ),
    "enable_bucket": converted(
        constant(None),
        "data.resolution_px",
        "data.buckets",
        note="without it, `data.buckets` has one bucket of the size of `resolution`, as in kohya's scripts",
    ),
    "min_bucket_reso": converted(
        requires("enable_bucket", round_bucket_side(math.floor)),
        "data.min_bucket_px",
        note="rounded down to a multiple of `bucket_reso_steps`, as in kohya's scripts",
    ),
    "max_bucket_reso": converted(
        requires("enable_bucket", round_bucket_side(math.ceil)),
        "data.max_bucket_px",
        note="rounded up to a multiple of `bucket_reso_steps`, as in kohya's scripts; the default is 1024 there, 2048 "
        "here",
    ),
    "bucket_reso_steps": converted(
        requires("enable_bucket", lambda value, given: read_whole(value)),
        "data.bucket_step_px",
        note="must be a multiple of 32",
    ),
    "bucket_no_upscale": converted(requires("enable_bucket"), "data.no_upscale"),
    "flip_aug": converted(
        lambda value, given: {"cache.flip": True, "data.flip_rate": 0.5},
        "cache.flip",
        "data.flip_rate",
        note="half of the time, as in kohya's scripts",
    ),
    "alpha_mask": converted(
        lambda value, given: {"cache.alpha_mask": True, "objective.masked_loss": True},
        "cache.alpha_mask",
        "objective.masked_loss",
        note="also without `masked_loss`, as in kohya's scripts",
    ),
    "masked_loss": converted(
        convert_masked_loss, "objective.masked_loss", "data.masks", note="needs `conditioning_data_dir` or `alpha_mask`"
    ),
    "conditioning_data_dir": converted(
        requires("masked_loss", constant(None)), "data.masks", note="needs `masked_loss`"
    ),
    "color_aug": unsupported(PIXELS),
    "random_crop": unsupported(PIXELS),
    "face_crop_aug_range": unsupported(PIXELS),
    "resize_interpolation": unsupported("images are resized with Pillow's bicubic filter"),
    "skip_image_resolution": unsupported(
        "leave small images out of the metadata, or give them 0 repeats in a strategy"
    ),
    "cache_latents": built_in(CACHED),
    "cache_latents_to_disk": built_in(CACHED),
    "vae_batch_size": copied("cache.batch_size"),
    "skip_cache_check": converted(constant("none"), "data.verify_latents", note="`none`"),
    "cache_info": built_in("metadata is always indexed"),
    "cache_text_encoder_outputs": converted(constant(True), "cache.text", note="not if text encoders are trained"),
    "cache_text_encoder_outputs_to_disk": converted(constant(True), "cache.text"),
    "text_encoder_batch_size": unsupported("uses `cache.batch_size`"),
    "max_data_loader_n_workers": copied("data.num_workers", "per rank"),
    "persistent_data_loader_workers": built_in(),
    "debug_dataset": unsupported("run `bash launch/preview.sh --cfg x.yaml` to see the data"),
    "dataset_class": unsupported("write a strategy (docs/STRATEGY.md), or metadata of your own (docs/DATA.md)"),
    "custom_attributes": unsupported("add them to the metadata, and read them in a strategy"),
    "validation_split": copied("validation.share"),
    "validation_seed": copied("validation.seed"),
    "validate_every_n_steps": copied("validation.every_steps"),
    "validate_every_n_epochs": converted(convert_epochs, "validation.every_steps", note="needs `--samples`"),
    "max_validation_steps": unsupported("set `validation.max_samples`, which counts samples"),
}
CAPTIONS = {
    "caption_prefix": converted(as_text, "data.caption.prefix"),
    "caption_suffix": converted(
        as_text,
        "data.caption.suffix",
        difference="follows the first line of captions with several lines, where kohya's scripts lose it",
    ),
    "caption_separator": converted(
        as_text,
        "data.caption.separator",
        note="splits captions; split captions are joined by a comma and a space, as in kohya's scripts",
    ),
    "caption_dropout_rate": copied("data.caption.dropout_rate"),
    "caption_dropout_every_n_epochs": copied("data.caption.dropout_every_epochs"),
    "caption_tag_dropout_rate": copied("data.caption.tag_dropout_rate"),
    "enable_wildcard": converted(
        lambda value, given: {"data.caption.wildcards": True} if value else {"data.caption.first_line": True},
        "data.caption.wildcards",
        "data.caption.first_line",
        note="without it, only the first line of a caption is used, as in kohya's scripts",
        difference="of metadata with caption and tags, the tags follow the last line of the caption only; kohya's "
        "scripts add them to every line",
    ),
    "shuffle_caption": copied(
        "data.caption.shuffle",
        difference=f"empty tags, as in `a,,b`, are dropped, but kept in {TRAINER}",
    ),
    "keep_tokens": copied("data.caption.keep_tokens"),
    "keep_tokens_separator": converted(
        as_text,
        "data.caption.keep_tokens_separator",
        difference="is removed from captions without shuffling too; kohya's scripts then leave it in the text",
    ),
    "secondary_separator": converted(as_text, "data.caption.secondary_separator"),
    "token_warmup_min": copied("data.caption.token_warmup_min"),
    "token_warmup_step": converted(convert_steps, "data.caption.token_warmup_steps"),
    "max_token_length": copied("data.max_tokens"),
    "weighted_captions": copied("data.caption.weighted", difference="shuffling keeps weights of groups with commas"),
}
OBJECTIVE = {
    "v_parameterization": converted(constant("v"), "objective.prediction", note="`v`"),
    "zero_terminal_snr": copied(
        "objective.zero_terminal_snr",
        difference=f"is applied before the SNR of the weighting is computed, in {TRAINER} after it",
    ),
    "min_snr_gamma": weighting("min_snr_gamma"),
    "debiased_estimation_loss": weighting("debiased_estimation_loss"),
    "scale_v_pred_loss_like_noise_pred": weighting("scale_v_pred_loss_like_noise_pred"),
    "v_pred_like_loss": weighting("v_pred_like_loss"),
    "noise_offset": copied("objective.noise_offset"),
    "noise_offset_random_strength": copied("objective.noise_offset_random_strength"),
    "adaptive_noise_scale": copied("objective.adaptive_noise_scale"),
    "multires_noise_iterations": copied("objective.multires_noise_iterations"),
    "multires_noise_discount": converted(requires("multires_noise_iterations"), "objective.multires_noise_discount"),
    "ip_noise_gamma": copied("objective.ip_noise_gamma"),
    "ip_noise_gamma_random_strength": copied("objective.ip_noise_gamma_random_strength"),
    "min_timestep": copied("objective.min_timestep"),
    "max_timestep": copied("objective.max_timestep"),
    "loss_type": converted(
        lambda value, given: (
            {"objective.loss": value} | ({"objective.huber_schedule": "snr"} if value in ("huber", "smooth_l1") else {})
        ),
        "objective.loss",
        "objective.huber_schedule",
        note="without `huber_schedule`, kohya's default `snr` is set",
    ),
    "huber_schedule": converted(keep_for_huber, "objective.huber_schedule"),
    "huber_c": converted(keep_for_huber, "objective.huber_c"),
    "huber_scale": unsupported("errors are not scaled; only `huber_c` sets where the loss becomes linear"),
    "prior_loss_weight": copied("objective.prior_loss_weight"),
}
OPTIMIZER = {
    "learning_rate": copied("optim.lr"),
    "unet_lr": converted(requires("network_module"), "optim.lr"),
    "optimizer_type": converted(
        convert_optimizer,
        "optim.name",
        "optim.weight_decay",
        "optim.kwargs",
        "engine.zero_stage",
        note="with its default weight decay, which is not applied to biases and norms here (other classes: 0.01 if the "
        "name contains AdamW, otherwise 0); Adafactor without relative steps; ZeRO 0 for optimizers that need whole "
        "weights",
    ),
    "use_8bit_adam": converted(constant("adamw8bit"), "optim.name", note="`adamw8bit`"),
    "use_lion_optimizer": converted(constant("lion"), "optim.name", note="`lion`"),
    "optimizer_args": converted(
        convert_optimizer_args,
        *("optim.weight_decay", "optim.betas", "optim.eps", "optim.kwargs"),
        expects='words such as "weight_decay=0.01 betas=0.9,0.99"',
    ),
    "max_grad_norm": copied("optim.max_grad_norm"),
    "lr_scheduler": converted(
        convert_schedule,
        "optim.schedule",
        note="warm-up is set separately; `warmup_stable_decay` becomes `wsd`, with a linear fall",
    ),
    "lr_warmup_steps": converted(needs_schedule(convert_steps), "optim.warmup_steps"),
    "lr_decay_steps": converted(convert_steps, "optim.decay_steps"),
    "lr_scheduler_num_cycles": copied("optim.num_cycles"),
    "lr_scheduler_power": copied("optim.power"),
    "lr_scheduler_min_lr_ratio": copied("optim.min_lr_ratio"),
    "lr_scheduler_timescale": unsupported("belongs to `inverse_sqrt`, which is not available"),
    "lr_scheduler_type": unsupported("only the schedules of `optim.schedule` are available"),
    "lr_scheduler_args": unsupported("only the schedules of `optim.schedule` are available"),
    "block_lr": converted(convert_numbers, "optim.block_lrs", expects="23 numbers with commas between them"),
    "train_text_encoder": converted(convert_text_encoders, *ENCODERS, note="`learning_rate` by default"),
    "learning_rate_te1": converted(requires("train_text_encoder"), ENCODERS[0]),
    "learning_rate_te2": converted(requires("train_text_encoder"), ENCODERS[1]),
    **dict.fromkeys(
        RELEASING,
        converted(convert_release, "engine.gradient_release", "optim.clipping", note="Adafactor works too"),
    ),
    "blocks_to_swap": unsupported(
        "`engine.offload_blocks` counts smaller blocks; set it yourself (docs/LOW_MEMORY.md)"
    ),
    "blockwise_fused_optimizers": unsupported(MEMORY),
}
TRAINING = {
    "max_train_steps": converted(
        convert_max_steps, "train.max_steps", note="unless `max_train_epochs` is given", expects=WHOLE
    ),
    "max_train_epochs": converted(
        lambda value, given: read_whole(value),
        "train.max_epochs",
        note="counts whole global batches: an epoch of kohya's scripts has one more step for each bucket's rest",
    ),
    "train_batch_size": converted(
        convert_batch,
        *BATCH,
        note="global batch = this x accumulation x processes",
        expects="a whole number, for gradient_accumulation_steps and num_processes too",
    ),
    "batch_size": converted(convert_batch, *BATCH, note="train_batch_size in a dataset file", expects=WHOLE),
    "gradient_accumulation_steps": converted(constant(None), *reversed(BATCH), note="follows from the batch sizes"),
    "num_processes": converted(constant(None), *BATCH, note="of accelerate; set `NPROC` here (default: one per GPU)"),
    "seed": copied("run.seed"),
    "mixed_precision": converted(
        convert_precision,
        "engine.precision",
        note="kohya's default `no` becomes fp32; fp16 becomes bf16 for optimizers that need whole weights (ZeRO 0)",
    ),
    "full_bf16": converted(
        convert_full_bf16, "engine.precision", note="with stochastic rounding, so that small updates are not lost"
    ),
    "full_fp16": unsupported("fp16 keeps fp32 master weights; use `bf16_stochastic` to save memory"),
    "gradient_checkpointing": copied("engine.gradient_checkpointing"),
    "xformers": converted(constant("xformers"), "engine.attention", note="`xformers`"),
    "diffusers_xformers": converted(constant("xformers"), "engine.attention", note="`xformers`"),
    "sdpa": converted(constant("sdpa"), "engine.attention", note="`sdpa`"),
    "mem_eff_attn": converted(constant("efficient"), "engine.attention", note="`efficient`"),
    "torch_compile": copied("engine.compile"),
    "dynamo_backend": unsupported("the default backend of `torch.compile` is used"),
    "deepspeed": built_in(),
    "zero_stage": converted(requires("deepspeed"), "engine.zero_stage"),
    "offload_optimizer_device": converted(requires("deepspeed", look_up({"cpu": True})), "engine.offload_optimizer"),
    "offload_param_device": converted(requires("deepspeed", look_up({"cpu": True})), "engine.offload_param"),
    "offload_optimizer_nvme_path": unsupported("write DeepSpeed's own settings into `engine.deepspeed`"),
    "offload_param_nvme_path": unsupported("write DeepSpeed's own settings into `engine.deepspeed`"),
    "zero3_init_flag": unsupported("networks are loaded whole and then sharded"),
    "zero3_save_16bit_model": unsupported("set `checkpoint.export_dtype`"),
    "fp16_master_weights_and_gradients": unsupported(MEMORY),
    "cpu_offload_checkpointing": unsupported(MEMORY),
    **dict.fromkeys(("fp8_base", "fp8_base_unet"), unsupported(QUANTISED)),
    "ddp_timeout": converted(lambda value, given: value or None, "engine.timeout_minutes", note="in minutes"),
    "ddp_gradient_as_bucket_view": unsupported("DeepSpeed reduces gradients, not DDP"),
    "ddp_static_graph": unsupported("DeepSpeed reduces gradients, not DDP"),
}
OUTPUT = {
    "output_dir": copied("run.dir", "run folder: `<run.dir>/<run.name>`"),
    "output_name": converted(convert_run_name, "run.name", note="with `_` in place of spaces and of signs such as `/`"),
    "save_every_n_steps": copied(
        "checkpoint.every_steps", "saves the whole state; `train/convert.py` exports models from it"
    ),
    "save_every_n_epochs": converted(
        lambda value, given: (
            {"checkpoint.every_epochs": value}
            | ({} if given.get("save_every_n_steps") else {"checkpoint.every_steps": 0})
        ),
        "checkpoint.every_epochs",
        "checkpoint.every_steps",
    ),
    "save_n_epoch_ratio": unsupported("set `checkpoint.every_epochs`"),
    "save_last_n_steps": converted(
        requires("save_every_n_steps", count_kept_checkpoints),
        "checkpoint.keep_last",
        note="as a number of checkpoints; 2 by default",
    ),
    "save_last_n_steps_state": converted(
        requires("save_every_n_steps", count_kept_checkpoints), "checkpoint.keep_last"
    ),
    "save_last_n_epochs": converted(
        requires("save_every_n_epochs"), "checkpoint.keep_last", note="number of checkpoints"
    ),
    "save_last_n_epochs_state": converted(requires("save_every_n_epochs"), "checkpoint.keep_last"),
    "save_precision": converted(look_up({"float": "fp32", "fp16": "fp16", "bf16": "bf16"}), "checkpoint.export_dtype"),
    "save_model_as": converted(
        look_up(
            {"safetensors": "single", "ckpt": "single", "diffusers": "diffusers", "diffusers_safetensors": "diffusers"}
        ),
        "checkpoint.export_format",
        note="always safetensors",
    ),
    "use_safetensors": built_in(),
    "save_state": built_in(),
    "save_state_on_train_end": built_in(),
    "save_state_to_huggingface": unsupported(UPLOAD),
    **{
        name: unsupported(RESUME)
        for name in ("resume", "resume_from_huggingface", "initial_epoch", "initial_step", "skip_until_initial_step")
    },
    **{
        f"metadata_{name}": converted(as_text, f"about.{name}")
        for name in ("title", "author", "description", "license", "trigger_phrase", "usage_hint", "thumbnail")
    },
    **{f"metadata_{name}": converted(split_commas, f"about.{name}") for name in ("tags", "merged_from")},
    **{
        f"huggingface_{name}": unsupported(UPLOAD)
        for name in ("repo_id", "repo_type", "path_in_repo", "token", "repo_visibility")
    },
    "async_upload": unsupported(UPLOAD),
    "sample_prompts": converted(
        convert_prompts,
        "sample.prompt_file",
        "sample.prompts",
        note="a file, or prompts, one a line",
        difference="without flags, prompts use the size, steps, guidance scale and sampler of `sample`, and seeds "
        "from `sample.seed` on; kohya's scripts use 512 x 512, 30 steps, 7.5, `ddim` and random seeds",
    ),
    "sample_every_n_steps": converted(requires("sample_prompts"), "sample.every_steps"),
    "sample_every_n_epochs": converted(
        requires("sample_prompts", convert_epochs), "sample.every_steps", note="needs `--samples`"
    ),
    "sample_at_first": converted(requires("sample_prompts"), "sample.at_start"),
    "sample_sampler": converted(
        requires("sample_prompts", look_up(SAMPLERS)),
        "sample.sampler",
        note="default `ddim` in kohya's scripts, `euler` here",
    ),
    "logging_dir": built_in(LOGS),
    "log_with": converted(
        convert_log_with, "log.wandb", note="for `wandb` and `all`; TensorBoard files are always written"
    ),
    "log_tracker_name": converted(
        convert_tracker_name,
        "log.wandb",
        note="project name; default `finetuning` or `network_train`, as in kohya's scripts",
    ),
    "wandb_run_name": converted(
        convert_wandb_run, "run.name", note="unless `output_name` is given, which is the run's name"
    ),
    "wandb_api_key": unsupported("run `wandb login` once, or set WANDB_API_KEY in the environment"),
    **{
        name: unsupported(LOGS)
        for name in ("log_prefix", "log_tracker_config", "log_config", "console_log_file", "console_log_simple")
    },
    "console_log_level": converted(look_up({name.lower(): name for name in ("DEBUG", "INFO", "WARNING")}), "log.level"),
    "output_config": built_in("all settings are saved in the run folder"),
}

KOHYA_GROUPS: dict[str, dict[str, Option]] = {
    "Model": MODEL,
    "Images, latents and validation": DATA,
    "Captions": CAPTIONS,
    "Objective": OBJECTIVE,
    "Training": TRAINING,
    "Optimizer": OPTIMIZER,
    "Adapters (sdxl_train_network.py)": ADAPTERS,
    "Output": OUTPUT,
}
KOHYA_OPTIONS: dict[str, Option] = {name: option for group in KOHYA_GROUPS.values() for name, option in group.items()}
