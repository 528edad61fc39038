"""What each option of kohya's sdxl_train.py and sdxl_train_network.py is here: the one table that the import goes by
and that docs/FROM_KOHYA.md is made from.

Options are in the order in which they are imported: a later one may overwrite what an earlier one set.
"""

from dataclasses import dataclass

from sdxl_trainer.configs.kohya.values import (
    VAE_CONVERSION,
    WEIGHTINGS,
    Convert,
    as_list,
    as_text,
    choose,
    choose_weighting,
    convert_batch,
    convert_epochs,
    convert_full_bf16,
    convert_log_with,
    convert_masked_loss,
    convert_network,
    convert_optimizer,
    convert_optimizer_args,
    convert_resolution,
    convert_steps,
    convert_text_encoder_lr,
    convert_text_encoders,
    convert_tracker_name,
    convert_vae,
    convert_wandb_run,
    count_kept,
    for_huber,
    needs,
    read_numbers_of,
    refuse_suffixes,
    say,
)


@dataclass(frozen=True)
class Option:
    """The keys that an option sets, what is different about them, and how its value becomes theirs."""

    keys: tuple[str, ...] = ()  # none: there is no counterpart, and `note` says why
    note: str = ""
    convert: Convert | None = None  # the same value without one
    is_always: bool = False  # needs no setting: `note` says how it is


def same(key: str, note: str = "") -> Option:
    """The same value under another key."""
    return Option((key,), note)


def made(convert: Convert, *keys: str, note: str = "") -> Option:
    """Another value."""
    return Option(keys, note, convert)


def none(why: str) -> Option:
    """No counterpart."""
    return Option((), why)


def always(how: str = "") -> Option:
    """What is done without being asked for."""
    return Option((), how or "is so without being set", is_always=True)


def weighed(name: str) -> Option:
    """A weighting that an option of its own turns on, with its number or without."""
    keys = ("objective.weighting", "objective.weighting_gamma")
    return Option(keys, f"`{WEIGHTINGS[name]}`; weightings are not multiplied", choose_weighting(name))


# What kohya's scripts do without an option, where it is something else than what happens here.
KOHYA_DEFAULTS = {
    "learning_rate": 2e-6,
    "max_train_steps": 1600,
    "train_batch_size": 1,
    "mixed_precision": "no",
    "max_bucket_reso": 1024,
}
ENCODERS = ("optim.text_encoder_lr", "optim.text_encoder_2_lr")
BATCH = ("train.micro_batch_size", "train.global_batch_size")
CACHED = "latents are always cached, by `bash launch/cache.sh`; with `--adopt` it takes kohya's files as they are"
MEMORY = "a way of kohya's scripts to save memory; here ZeRO, offload and the precision do (docs/TRAINING.md)"
PIXELS = "images are encoded beforehand, so nothing can be done to their pixels while training"
UPLOAD = "nothing is uploaded; send the file when it is done"
RESUME = "the same command goes on from where training stood; kohya's states cannot be read"
LOGS = "logs lie in the run folder, as TensorBoard's and as metrics.jsonl"
FROZEN_UNET = {"match": r"^unet\.", "lr": 0}
FREEZES = "a group with a rate of 0 freezes the U-Net"
MODEL_NOTES = (
    "is not written; a model's file tells its title (`run.name`), date, resolution, prediction and timesteps, that of "
    "adapters title, rank and alpha"
)

MODEL = {
    "pretrained_model_name_or_path": made(
        refuse_suffixes(".ckpt", ".pt", why="weights are read from safetensors only; convert the file"), "model.path"
    ),
    "vae": made(
        convert_vae,
        "model.vae",
        note=f"a folder in diffusers' form or a hub id; convert a single file once: `{VAE_CONVERSION}`",
    ),
    "no_half_vae": always("the VAE runs in fp32 unless `cache.vae_precision: bf16` is set"),
    "tokenizer_cache_dir": none("CLIP's vocabulary comes with the model, or from `model.tokenizer`"),
    "sdxl": always(),
    "v2": none("SDXL only"),
    "clip_skip": none("SDXL is always told the states before the last layer; kohya's SDXL scripts ignore it too"),
    "disable_mmap_load_safetensors": none("files are read tensor by tensor"),
    "lowram": none(MEMORY),
    "highvram": none(MEMORY),
}
DATA = {
    "train_data_dir": made(
        as_list, "data.image_dirs", note="its `N_name` folders become folders with weights N; the name is no caption"
    ),
    "reg_data_dir": made(as_list, "data.regularisation_dirs", note="come as often as all others together"),
    "in_json": made(as_list, "data.metadata"),
    "image_dir": made(as_list, "data.image_dirs", note="of a subset"),
    "metadata_file": made(as_list, "data.metadata", note="of a subset"),
    "is_reg": same("data.regularisation_dirs", "of a subset"),
    "num_repeats": same(
        "data.source_weights",
        "of a subset; one for each entry of `data.metadata` or `data.image_dirs`; "
        "with `is_reg` named only: these come as often as all others together, there too",
    ),
    "dataset_repeats": none("all images alike: the same as more steps"),
    "class_tokens": none("an image without a caption is trained with the empty one; write .txt files"),
    "caption_extension": made(
        choose({".txt": None, ".caption": None}), "data.image_dirs", note="`.txt` and `.caption` files are read"
    ),
    "caption_extention": none("misspelt caption_extension; `.txt` and `.caption` files are read"),
    "resolution": made(
        convert_resolution,
        "data.resolution_px",
        "data.buckets",
        note="with `enable_bucket` the side of a square of the same area; several for data sets of the same folders",
    ),
    "enable_bucket": made(
        say(None),
        "data.resolution_px",
        "data.buckets",
        note="without it `data.buckets` has one bucket of `resolution`'s size, as there",
    ),
    "min_bucket_reso": made(needs("enable_bucket"), "data.min_bucket_px"),
    "max_bucket_reso": made(needs("enable_bucket"), "data.max_bucket_px", note="1024 there by default, 2048 here"),
    "bucket_reso_steps": made(needs("enable_bucket"), "data.bucket_step_px", note="multiples of 32"),
    "bucket_no_upscale": made(needs("enable_bucket"), "data.no_upscale"),
    "flip_aug": made(
        lambda value, given: {"cache.flip": True, "data.flip_rate": 0.5},
        "cache.flip",
        "data.flip_rate",
        note="every other time, as there",
    ),
    "alpha_mask": made(
        lambda value, given: {"cache.alpha_mask": True, "objective.masked_loss": True},
        "cache.alpha_mask",
        "objective.masked_loss",
        note="without `masked_loss` too, as there",
    ),
    "masked_loss": made(
        convert_masked_loss, "objective.masked_loss", "data.masks", note="with `conditioning_data_dir` or `alpha_mask`"
    ),
    "conditioning_data_dir": made(needs("masked_loss", say(None)), "data.masks", note="the folder, with `masked_loss`"),
    "color_aug": none(PIXELS),
    "random_crop": none(PIXELS),
    "face_crop_aug_range": none(PIXELS),
    "resize_interpolation": none("images are resized by Pillow's bicubic filter"),
    "skip_image_resolution": none("leave small images out of the metadata, or give them 0 repeats by a strategy"),
    "cache_latents": always(CACHED),
    "cache_latents_to_disk": always(CACHED),
    "vae_batch_size": same("cache.batch_size"),
    "skip_cache_check": made(say("none"), "data.verify_latents", note="`none`"),
    "cache_info": always("what is known of images is always indexed"),
    "cache_text_encoder_outputs": made(say(True), "cache.text"),
    "cache_text_encoder_outputs_to_disk": made(say(True), "cache.text"),
    "text_encoder_batch_size": none("goes by `cache.batch_size`"),
    "max_data_loader_n_workers": same("data.num_workers", "of each rank"),
    "persistent_data_loader_workers": always(),
    "debug_dataset": none("`bash launch/preview.sh --cfg x.yaml` shows the data"),
    "dataset_class": none("write a strategy (docs/STRATEGY.md), or metadata of your own (docs/DATA.md)"),
    "custom_attributes": none("write them into the metadata, for a strategy"),
    "validation_split": same("validation.share"),
    "validation_seed": same("validation.seed"),
    "validate_every_n_steps": same("validation.every_steps"),
    "validate_every_n_epochs": made(convert_epochs, "validation.every_steps", note="with `--samples`"),
    "max_validation_steps": none("`validation.max_samples` counts samples"),
}
CAPTIONS = {
    "caption_prefix": made(as_text, "data.caption.prefix"),
    "caption_suffix": made(as_text, "data.caption.suffix"),
    "caption_separator": made(as_text, "data.caption.separator"),
    "caption_dropout_rate": same("data.caption.dropout_rate"),
    "caption_dropout_every_n_epochs": same("data.caption.dropout_every_epochs"),
    "caption_tag_dropout_rate": same("data.caption.tag_dropout_rate"),
    "enable_wildcard": same("data.caption.wildcards"),
    "shuffle_caption": same("data.caption.shuffle"),
    "keep_tokens": same("data.caption.keep_tokens"),
    "keep_tokens_separator": made(as_text, "data.caption.keep_tokens_separator"),
    "secondary_separator": made(as_text, "data.caption.secondary_separator"),
    "token_warmup_min": same("data.caption.token_warmup_min"),
    "token_warmup_step": made(convert_steps, "data.caption.token_warmup_steps"),
    "max_token_length": same("data.max_tokens"),
    "weighted_captions": none("brackets in captions reach the tokenizer as they are"),
}
OBJECTIVE = {
    "v_parameterization": made(say("v"), "objective.prediction", note="`v`"),
    "zero_terminal_snr": same("objective.zero_terminal_snr", "applied before weights are computed from the SNR"),
    "min_snr_gamma": weighed("min_snr_gamma"),
    "debiased_estimation_loss": weighed("debiased_estimation_loss"),
    "scale_v_pred_loss_like_noise_pred": weighed("scale_v_pred_loss_like_noise_pred"),
    "v_pred_like_loss": weighed("v_pred_like_loss"),
    "noise_offset": same("objective.noise_offset"),
    "noise_offset_random_strength": same("objective.noise_offset_random_strength"),
    "adaptive_noise_scale": same("objective.adaptive_noise_scale"),
    "multires_noise_iterations": same("objective.multires_noise_iterations"),
    "multires_noise_discount": made(needs("multires_noise_iterations"), "objective.multires_noise_discount"),
    "ip_noise_gamma": same("objective.ip_noise_gamma"),
    "ip_noise_gamma_random_strength": same("objective.ip_noise_gamma_random_strength"),
    "min_timestep": same("objective.min_timestep"),
    "max_timestep": same("objective.max_timestep"),
    "loss_type": made(
        lambda value, given: (
            {"objective.loss": value} | ({"objective.huber_schedule": "snr"} if value in ("huber", "smooth_l1") else {})
        ),
        "objective.loss",
        "objective.huber_schedule",
        note="kohya's schedule without `huber_schedule` is `snr`",
    ),
    "huber_schedule": made(for_huber, "objective.huber_schedule"),
    "huber_c": made(for_huber, "objective.huber_c"),
    "huber_scale": none("errors are not scaled; `huber_c` alone says where the loss turns linear"),
    "prior_loss_weight": same("objective.prior_loss_weight"),
}
OPTIMIZER = {
    "learning_rate": same("optim.lr"),
    "unet_lr": made(needs("network_module"), "optim.lr"),
    "optimizer_type": made(
        convert_optimizer,
        "optim.name",
        "optim.weight_decay",
        "optim.kwargs",
        "engine.zero_stage",
        note="with its default weight decay, which biases and norms do not get here; of classes not listed: 0.01 of "
        "AdamW's kind, else 0; Adafactor only with a learning rate; ZeRO 0 for those that look at whole weights",
    ),
    "use_8bit_adam": made(say("adamw8bit"), "optim.name", note="`adamw8bit`"),
    "use_lion_optimizer": made(say("lion"), "optim.name", note="`lion`"),
    "optimizer_args": made(convert_optimizer_args, "optim.weight_decay", "optim.betas", "optim.eps", "optim.kwargs"),
    "max_grad_norm": same("optim.max_grad_norm"),
    "lr_scheduler": made(
        choose(
            {
                "constant": "constant",
                "constant_with_warmup": "constant",
                "linear": "linear",
                "cosine": "cosine",
                "cosine_with_restarts": "cosine_with_restarts",
                "polynomial": "polynomial",
                "cosine_with_min_lr": "cosine",
                "warmup_stable_decay": "wsd",
            }
        ),
        "optim.schedule",
        note="with or without warm-up; `warmup_stable_decay` is `wsd`, which falls along a line",
    ),
    "lr_warmup_steps": made(convert_steps, "optim.warmup_steps"),
    "lr_decay_steps": made(convert_steps, "optim.decay_steps"),
    "lr_scheduler_num_cycles": same("optim.num_cycles"),
    "lr_scheduler_power": same("optim.power"),
    "lr_scheduler_min_lr_ratio": same("optim.min_lr_ratio"),
    "lr_scheduler_timescale": none("is of `inverse_sqrt`, which there is not"),
    "lr_scheduler_type": none("schedules are those of `optim.schedule`"),
    "lr_scheduler_args": none("schedules are those of `optim.schedule`"),
    "block_lr": made(read_numbers_of, "optim.block_lrs"),
    "train_text_encoder": made(convert_text_encoders, *ENCODERS, note="`learning_rate` by default"),
    "learning_rate_te1": made(needs("train_text_encoder"), ENCODERS[0]),
    "learning_rate_te2": made(needs("train_text_encoder"), ENCODERS[1]),
    "blocks_to_swap": none(MEMORY),
    "fused_backward_pass": none(MEMORY),
    "fused_optimizer_groups": none(MEMORY),
    "blockwise_fused_optimizers": none(MEMORY),
}
ADAPTERS = {
    "network_module": made(
        convert_network, "lora.rank", "lora.alpha", *ENCODERS, note="`networks.lora`; rank 4 and alpha 1 by default"
    ),
    "network_dim": made(needs("network_module"), "lora.rank"),
    "network_alpha": made(needs("network_module"), "lora.alpha"),
    "text_encoder_lr": made(convert_text_encoder_lr, *ENCODERS, note="`learning_rate` by default"),
    "network_train_unet_only": made(say(None), *ENCODERS, note="text encoders stay at 0, which freezes"),
    "network_train_text_encoder_only": made(say([FROZEN_UNET]), "optim.groups", note=FREEZES),
    "network_args": none("adapters are of networks.lora's linear layers, without convolutions or rates by block"),
    "network_weights": none("adapters begin at zero; `run.resume` goes on with those of the run itself"),
    "network_dropout": none("adapters have no dropout; less rank or weight decay restrains them too"),
    "dim_from_weights": none("adapters begin at zero"),
    "scale_weight_norms": none("norms of adapters are not limited"),
    "base_weights": none("merge adapters into the model beforehand"),
    "base_weights_multiplier": none("merge adapters into the model beforehand"),
    "network_multiplier": none("adapters are trained at full strength"),
    "training_comment": none(MODEL_NOTES),
    "no_metadata": none("a file always tells what `training_comment` says here"),
}
TRAINING = {
    "max_train_steps": same("train.max_steps"),
    "max_train_epochs": made(convert_epochs, "train.max_steps", note="length is counted in steps: give `--samples`"),
    "train_batch_size": made(convert_batch, *BATCH, note="global = this x accumulation x processes"),
    "batch_size": made(convert_batch, *BATCH, note="train_batch_size, in a data set's file"),
    "gradient_accumulation_steps": made(say(None), *reversed(BATCH), note="what remains of the global batch"),
    "num_processes": made(say(None), *BATCH, note="accelerate's; `NPROC` here, by default one for each GPU"),
    "seed": same("run.seed"),
    "mixed_precision": made(
        choose({"no": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8": "bf16"}),
        "engine.precision",
        note="`no`, the default there, is fp32",
    ),
    "full_bf16": made(
        convert_full_bf16, "engine.precision", note="rounding is by chance, so that small updates are not lost"
    ),
    "full_fp16": none("fp16 keeps fp32 masters; for less memory take `bf16_stochastic`"),
    "gradient_checkpointing": same("engine.gradient_checkpointing"),
    "xformers": made(say("xformers"), "engine.attention", note="`xformers`"),
    "diffusers_xformers": made(say("xformers"), "engine.attention", note="`xformers`"),
    "sdpa": made(say("sdpa"), "engine.attention", note="`sdpa`, the default"),
    "mem_eff_attn": made(say("sdpa"), "engine.attention", note="`sdpa`"),
    "torch_compile": same("engine.compile"),
    "dynamo_backend": none("`torch.compile`'s own default"),
    "deepspeed": always(),
    "zero_stage": made(needs("deepspeed"), "engine.zero_stage"),
    "offload_optimizer_device": made(needs("deepspeed", choose({"cpu": True})), "engine.offload_optimizer"),
    "offload_param_device": made(needs("deepspeed", choose({"cpu": True})), "engine.offload_param"),
    "offload_optimizer_nvme_path": none("DeepSpeed's own settings go into `engine.deepspeed`"),
    "offload_param_nvme_path": none("DeepSpeed's own settings go into `engine.deepspeed`"),
    "zero3_init_flag": none("networks are loaded whole, then sharded"),
    "zero3_save_16bit_model": none("exported weights have `checkpoint.export_dtype`"),
    "fp16_master_weights_and_gradients": none(MEMORY),
    "cpu_offload_checkpointing": none(MEMORY),
    "fp8_base": none(MEMORY),
    "fp8_base_unet": none(MEMORY),
    "ddp_timeout": made(lambda value, given: value or None, "engine.timeout_minutes", note="in minutes there too"),
    "ddp_gradient_as_bucket_view": none("gradients are DeepSpeed's"),
    "ddp_static_graph": none("gradients are DeepSpeed's"),
}
OUTPUT = {
    "output_dir": same("run.dir", "the run folder is `<run.dir>/<run.name>`"),
    "output_name": made(as_text, "run.name"),
    "save_every_n_steps": same("checkpoint.every_steps", "of the whole state; `train/convert.py` makes models of it"),
    "save_every_n_epochs": made(
        lambda value, given: (
            {"checkpoint.every_epochs": value}
            | ({} if given.get("save_every_n_steps") else {"checkpoint.every_steps": 0})
        ),
        "checkpoint.every_epochs",
        "checkpoint.every_steps",
    ),
    "save_n_epoch_ratio": none("write `checkpoint.every_epochs`"),
    "save_last_n_steps": made(
        needs("save_every_n_steps", count_kept), "checkpoint.keep_last", note="how many that are; 2 by default"
    ),
    "save_last_n_steps_state": made(needs("save_every_n_steps", count_kept), "checkpoint.keep_last"),
    "save_last_n_epochs": made(needs("save_every_n_epochs"), "checkpoint.keep_last", note="checkpoints, there too"),
    "save_last_n_epochs_state": made(needs("save_every_n_epochs"), "checkpoint.keep_last"),
    "save_precision": made(choose({"float": "fp32", "fp16": "fp16", "bf16": "bf16"}), "checkpoint.export_dtype"),
    "save_model_as": made(
        choose(
            {"safetensors": "single", "ckpt": "single", "diffusers": "diffusers", "diffusers_safetensors": "diffusers"}
        ),
        "checkpoint.export_format",
        note="weights are always written as safetensors",
    ),
    "use_safetensors": always(),
    "save_state": always(),
    "save_state_on_train_end": always(),
    "save_state_to_huggingface": none(UPLOAD),
    "resume": none(RESUME),
    "resume_from_huggingface": none(RESUME),
    "initial_epoch": none(RESUME),
    "initial_step": none(RESUME),
    "skip_until_initial_step": none(RESUME),
    **{f"metadata_{name}": none(MODEL_NOTES) for name in ("title", "author", "description", "license", "tags")},
    **{
        f"huggingface_{name}": none(UPLOAD)
        for name in ("repo_id", "repo_type", "path_in_repo", "token", "repo_visibility")
    },
    "async_upload": none(UPLOAD),
    "sample_prompts": made(
        refuse_suffixes(".toml", why="is a text file or .json here; write one prompt a line"), "sample.prompt_file"
    ),
    "sample_every_n_steps": made(needs("sample_prompts"), "sample.every_steps"),
    "sample_every_n_epochs": made(
        needs("sample_prompts", convert_epochs), "sample.every_steps", note="with `--samples`"
    ),
    "sample_at_first": made(needs("sample_prompts"), "sample.at_start"),
    "sample_sampler": made(
        needs(
            "sample_prompts",
            choose(
                {
                    **{
                        name: name
                        for name in (
                            "ddim",
                            "pndm",
                            "euler",
                            "euler_a",
                            "heun",
                            "dpm_2",
                            "dpm_2_a",
                            "dpmsolver++",
                            "dpmsingle",
                        )
                    },
                    "k_euler": "euler",
                    "k_euler_a": "euler_a",
                    "k_dpm_2": "dpm_2",
                    "k_dpm_2_a": "dpm_2_a",
                    "dpmsolver": "dpmsolver++",
                }
            ),
        ),
        "sample.scheduler",
        note="`ddim` there by default, `euler` here",
    ),
    "logging_dir": always(LOGS),
    "log_with": made(convert_log_with, "log.wandb", note="`wandb` and `all`; TensorBoard's files are always written"),
    "log_tracker_name": made(
        convert_tracker_name, "log.wandb", note="the project; by default `finetuning` or `network_train`, as there"
    ),
    "wandb_run_name": made(convert_wandb_run, "run.name", note="a run has one name, there too: `output_name` if given"),
    "wandb_api_key": none("run `wandb login` once, or set WANDB_API_KEY in the environment"),
    **{
        name: none(LOGS)
        for name in ("log_prefix", "log_tracker_config", "log_config", "console_log_file", "console_log_simple")
    },
    "console_log_level": made(choose({name.lower(): name for name in ("DEBUG", "INFO", "WARNING")}), "log.level"),
    "output_config": always("the settings of a run are saved in its folder"),
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
