"""Table of all settings of the first sdxl-trainer's Python file.

Each setting maps to the name of the same option of kohya's scripts, or to an `Option` of its own.
"""

import math
import re
from typing import Any

from sdxl_trainer.configs.kohya.entries import FREEZES, FROZEN_UNET, Option, built_in, converted, copied, unsupported
from sdxl_trainer.configs.kohya.memory import convert_full_bf16
from sdxl_trainer.configs.kohya.options import LOGS, RESUME, SAMPLERS, SIZE
from sdxl_trainer.configs.kohya.values import (
    NAME_RULE,
    Given,
    NoEffectError,
    UnsupportedError,
    WrongValueError,
    as_list,
    as_text,
    constant,
    convert_epochs,
    convert_steps,
    count_ranks,
    look_up,
    read_number,
    read_size,
    read_whole,
    replace_signs,
)

TRAINER_NAME, SUCCESSOR = "the first sdxl-trainer", "the first sdxl-trainer's successor"
STRATEGY = "is Python code; write it as {} of a class for `data.strategy` (docs/STRATEGY.md)"
# Own functions, and what a strategy has in their place.
GETTERS = {
    "num_repeats_getter": "`repeats(record, counts)`, which gets the same counts of artists, characters and so on,",
    "data_weight_getter": "`repeats(record, counts)`",
    "caption_getter": "`caption(record, rng)`",
    "caption_processor": "`caption(record, rng)`",
    "description_processor": "`caption(record, rng)`",
    "loss_weight_getter": "`loss_weight(record)`",
    "data_preprocessor": "the methods",
    "dataset_hook_getter": "`counts` or the methods",
    "dataset_hook_saver": "the methods",
}
STRETCHED = (
    "there, images are stretched to their bucket, and those that are smaller than it keep their size; here, images "
    "keep their aspect ratio, are resized to cover the bucket, and are cropped at the centre"
)
# Defaults of settings that the file does not set, by kohya's names.
FIRST_TRAINER_DEFAULTS = {
    "learning_rate": 1e-5,
    "max_train_steps": 1000,
    "train_batch_size": 1,
    "resolution": 1024,
    "mixed_precision": "fp16",
    "max_token_length": 225,
}
# The buckets of the first sdxl-trainer, whatever `resolution` is: those that SDXL was trained with.
HALF_OF_BUCKETS = (
    *((512, 1856), (512, 1920), (512, 1984), (512, 2048), (576, 1664), (576, 1728), (576, 1792), (640, 1536)),
    *((640, 1600), (704, 1344), (704, 1408), (704, 1472), (768, 1280), (768, 1344), (832, 1152), (832, 1216)),
    *((896, 1088), (896, 1152), (960, 1024), (960, 1088)),
)
FIRST_BUCKETS = sorted([[1024, 1024], *map(list, HALF_OF_BUCKETS), *([wide, high] for high, wide in HALF_OF_BUCKETS)])
DATABASES = (".sqlite3", ".sqlite", ".db")
METADATA_FILES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", *DATABASES)
# Entries of a source that are imported with it. Captions in text files are always read here.
SOURCE_ENTRIES = ("name_or_path", "tbname", "read_attrs")
# Other entries of a source → why they are not imported; any further one names columns.
OTHER_ENTRIES = {
    "recur": "folders are always read with all folders in them",
    "exts": "all image files of a folder are read",
    "verbose": "changes only what is printed",
    "read_only": "metadata is never written",
    "cache_dir": "data sets of the hub are not read; download it",
    "token": "data sets of the hub are not read; download it",
    "priority": "of several records of an image, those of the later entry of data.metadata count",
}
COLUMNS = "columns cannot be renamed; name them in the metadata as docs/DATA.md lists them"
DEFAULT_ENTRIES = {"primary_key": "image_key", "fp_key": "image_path", "dataset_type": "local", "split": "train"}
PLACEHOLDERS = re.compile(r"[-_.]*%(?:index|datetime|date|time)%")
PARAMETERS = 'a mapping, such as cfg(prompt="a cat", steps=28)'
SAMPLE_DEFAULTS = {"batch_size": 1, "batch_count": 1, "original_scale_factor": 1.0, "save_latents": False}
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
    """Convert settings of generated images, and their prompt unless a file of prompts is given.

    Raises:
        UnsupportedError: further entries have no setting here.
    """
    if not isinstance(value, dict):
        raise WrongValueError
    settings = {SAMPLES[name]: item for name, item in value.items() if name in SAMPLES and item is not None}
    entries: dict[str, str] = {}
    if given.get("eval_benchmark") or given.get("sample_benchmark"):
        if settings.pop("sample.prompts", None):
            entries["prompt"] = "the file of prompts takes its place"
    if "sample.prompts" in settings:
        settings["sample.prompts"] = as_list(settings["sample.prompts"], given)
    for name, item in value.items():
        if name not in SAMPLES and item is not None and item != SAMPLE_DEFAULTS.get(name):
            entries[name] = "has no setting here: images are generated one at a time, at their own size"
    if entries:
        raise UnsupportedError("", settings, entries)
    return settings


def convert_sources(value: Any, given: Given) -> dict[str, Any]:
    """Convert metadata files, databases and image folders, each a path or a dict with `name_or_path`.

    Of several sources that describe an image, the first one counts there, and the last one here.

    Raises:
        UnsupportedError: the sources are converted, but not exactly.
    """
    items = [item if isinstance(item, dict) else {"name_or_path": item} for item in _as_items(value)]
    named = [item for item in items if item.get("name_or_path")]
    paths = [str(item["name_or_path"]) for item in named]
    files = [_add_table(path, item) for path, item in zip(paths, named, strict=True) if _is_metadata(path)]
    settings = {
        "data.metadata": list(reversed(files)),
        "data.image_dirs": [path for path in paths if not _is_metadata(path)],
    }
    settings = {key: value for key, value in settings.items() if value}
    reasons = []
    if len(named) < len(items):
        reasons.append("a source without name_or_path is not imported")
    if len(files) > 1:
        reasons.append("the order of metadata is reversed: the first source counts there, the last one here")
    if len(settings) > 1:
        reasons.append("images that no metadata name are not trained here; write metadata for them too")
    found = {name for item in items for name, entry in item.items() if entry not in (None, DEFAULT_ENTRIES.get(name))}
    entries = {name: OTHER_ENTRIES.get(name, COLUMNS) for name in sorted(found - set(SOURCE_ENTRIES))}
    folders = [item for item in named if not _is_metadata(str(item["name_or_path"]))]
    if folders and not files and not all(item.get("read_attrs") for item in folders):
        reasons.append("captions in text files are read here; there only with read_attrs = True")
    if reasons or entries:
        raise UnsupportedError("; ".join(reasons), settings, entries)
    return settings


def _as_items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_metadata(path: str) -> bool:
    return path.lower().endswith(METADATA_FILES)


def _add_table(path: str, item: dict[str, Any]) -> str:
    """Return the path of a metadata file, with the table that a source names in a database."""
    table = item.get("tbname")
    return f"{path}:{table}" if table and path.lower().endswith(DATABASES) else path


def convert_buckets(value: Any, given: Given) -> dict[str, Any]:
    """Convert the sizes that images are trained at.

    The first trainer always has 41 fixed buckets. Its successor has one size with `arb = False`, the sizes of
    `predefined_buckets`, or else sizes of every aspect ratio.

    Raises:
        UnsupportedError: the sizes are converted, but images are fitted to them in another way.
    """
    width, height = read_size(value)
    if given.get("arb") is False:
        return {"data.buckets": [[width, height]]}
    fixed = given.get("predefined_buckets")
    if fixed or not is_successor(given):
        buckets = [list(size) for size in _read_sizes(fixed)] if fixed else FIRST_BUCKETS
        name = "the sizes of predefined_buckets" if fixed else "the first trainer's 41 sizes, whatever resolution is"
        raise UnsupportedError(f"data.buckets are {name}; {STRETCHED}", {"data.buckets": buckets})
    settings = {
        "data.resolution_px": math.isqrt(width * height),
        "data.bucket_step_px": read_whole(given.get("bucket_reso_steps") or 32),
        "data.no_upscale": True,
    }
    raise UnsupportedError("small images keep their size, as there; others are cropped instead of stretched", settings)


def _read_sizes(sizes: Any) -> list[tuple[int, int]]:
    """Return the sizes of `predefined_buckets`.

    Raises:
        WrongValueError: they are none.
    """
    if not isinstance(sizes, (list, tuple)):
        raise WrongValueError
    return [read_size(size) for size in sizes]


def is_successor(given: Given) -> bool:
    """Return whether settings are those of the first trainer's successor, which renamed where the images are."""
    return any(given.get(name) is not None for name in ("dataset_source", "arb", "predefined_buckets"))


def convert_largest_area(value: Any, given: Given) -> None:
    """Report the limit unless no bucket exceeds it.

    Raises:
        UnsupportedError: it has an effect.
    """
    sizes = given.get("predefined_buckets") or []
    areas = [width * height for width, height in _read_sizes(sizes or [given["resolution"]])]
    if max(areas) > read_number(value):
        raise UnsupportedError("leaves out images of larger buckets; remove these sizes from data.buckets")


def convert_output_dir(value: Any, given: Given) -> dict[str, Any]:
    """Convert the folder of a project to the folder and name of a run, without the parts that change at each start.

    Raises:
        UnsupportedError: the folder has such parts, or its name cannot be that of a run as it is.
    """
    path = str(value).replace("\\", "/").rstrip("/")
    parent, _, name = path.rpartition("/")
    own_name = PLACEHOLDERS.sub("", name)
    plain = replace_signs(own_name) or "run"
    settings = {"run.name": plain} | ({"run.dir": PLACEHOLDERS.sub("", parent)} if parent else {})
    if PLACEHOLDERS.search(path):
        reason = (
            f"gives each start a folder of its own; here the same command resumes in {plain}, and another run.name "
        )
        raise UnsupportedError(f"{reason}starts anew", settings)
    if plain != own_name:
        raise UnsupportedError(f"becomes {plain}: {NAME_RULE}", settings)
    return settings


def convert_output_name(value: Any, given: Given) -> None:
    """Report names of model files, unless they are the default.

    Raises:
        UnsupportedError: a name is given.
    """
    if not isinstance(value, dict) or any(value.values()):
        raise UnsupportedError("models are called step-<number>; run.name names their folder")


def convert_warmup(value: Any, given: Given) -> int:
    """Convert the warm-up, which accelerate counts once for each process, so that more processes shorten it."""
    return math.ceil(convert_steps(value, given) / count_ranks(given))


def convert_sampled_epochs(value: Any, given: Given) -> int:
    """Convert the epochs between generated images, unless steps are given too, which come more often.

    Raises:
        NoEffectError: steps are given.
    """
    if given.get("eval_every_n_steps") or given.get("sample_every_n_steps"):
        raise NoEffectError("every_n_steps counts more often")
    return convert_epochs(value, given)


def convert_density(value: Any, given: Given) -> dict[str, Any]:
    """Convert the distribution of timesteps."""
    density = look_up({"uniform": "uniform", "logit_normal": "logit_normal"})(value, given)
    kwargs = given.get("timestep_sampler_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise WrongValueError
    names = {
        "objective.logit_mean": ("loc", "mean", "m", "mu"),
        "objective.logit_std": ("scale", "std", "s", "sigma"),
    }
    found = {key: next((kwargs[name] for name in aliases if kwargs.get(name)), None) for key, aliases in names.items()}
    parameters = {key: number for key, number in found.items() if number is not None}
    return {"objective.timestep_density": density} | (parameters if density == "logit_normal" else {})


def convert_half_weights(value: Any, given: Given) -> str:
    """Convert `full_bf16`, which has no effect unless `mixed_precision` is bf16 and `full_fp16` is off.

    Raises:
        UnsupportedError: it has no effect, or the optimizer does not support it.
    """
    if given.get("mixed_precision") != "bf16" or given.get("full_fp16"):
        raise UnsupportedError("has no effect without mixed_precision = 'bf16', or with full_fp16, as there")
    return convert_full_bf16(value, given)


FIRST_TRAINER_OPTIONS: dict[str, str | Option] = {
    "vae_model_name_or_path": "vae",
    "hf_cache_dir": unsupported("set HF_HOME in the environment"),
    "max_retries": unsupported("the hub client retries by itself"),
    "image_dirs": converted(as_list, "data.image_dirs"),
    "metadata_files": converted(as_list, "data.metadata"),
    "dataset_source": converted(convert_sources, "data.metadata", "data.image_dirs"),
    "resolution": converted(
        convert_buckets,
        "data.buckets",
        "data.resolution_px",
        "data.bucket_step_px",
        "data.no_upscale",
        note="the first trainer's 41 fixed buckets. Its successor: one size with `arb = False`, `predefined_buckets`, "
        f"or all aspect ratios in steps of `bucket_reso_step` without enlarging; {STRETCHED}",
        expects=f"{SIZE}; sizes such as (832, 1216) in predefined_buckets",
    ),
    "arb": converted(constant(None), "data.buckets", note="see `resolution`"),
    "bucket_reso_step": "bucket_reso_steps",
    "bucket_reso_steps": converted(constant(None), "data.bucket_step_px", note="see `resolution`; 32 by default"),
    "predefined_buckets": converted(constant(None), "data.buckets", note="see `resolution`"),
    "max_width": unsupported("leaves out wider images there; take them out of the metadata"),
    "max_height": unsupported("leaves out higher images there; take them out of the metadata"),
    "max_area": converted(
        convert_largest_area, "data.buckets", note="leaves out images of larger buckets; without effect as a rule"
    ),
    "max_aspect_ratio": unsupported(
        "limits how much of an image that trainer crops before it stretches the rest; nothing is stretched here"
    ),
    "allow_crop": unsupported("images are always cropped to their bucket at the centre, and never stretched"),
    "max_dataset_n_workers": unsupported("metadata is read by one process, into an index"),
    "max_dataloader_n_workers": "max_data_loader_n_workers",
    "cache_latents_max_dataloader_n_workers": copied("cache.num_workers"),
    "cache_only": unsupported("run `bash launch/cache.sh`"),
    "check_cache_validity": built_in("latents are checked as `data.verify_latents` sets"),
    "keep_cached_latents_in_memory": unsupported("latents are read when they are needed"),
    "async_cache": built_in(),
    "dataset_cache_path": built_in("an index is always kept in the cache folder"),
    "dataset_full_cache_path": built_in("an index is always kept in the cache folder"),
    **{name: unsupported(STRATEGY.format(method)) for name, method in GETTERS.items()},
    "image_getter": unsupported("images are read from files"),
    "image_key_getter": unsupported("the key of an image is its file stem, or `key` in its metadata"),
    "negative_caption_getter": unsupported("samples are trained on one caption, without guidance"),
    "dataset_splitter": unsupported("set `validation.share`, or `validation.metadata` with data of their own"),
    "valid_dataset_source": unsupported("set `validation.metadata` or `validation.image_dirs`"),
    "dataset_merge_mode": unsupported("records of all metadata are united; take out the others beforehand"),
    "records_cache_dir": built_in("an index is always kept in the cache folder"),
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
    "lr_scheduler_type": "lr_scheduler",
    "lr_scheduler_kwargs": "lr_scheduler_args",
    "lr_warmup_steps": converted(
        convert_warmup,
        "optim.warmup_steps",
        note="divided by the processes, as accelerate advances the schedule once for each of them",
    ),
    "use_xformers": "xformers",
    "full_bf16": converted(convert_half_weights, "engine.precision", note="only with `mixed_precision` bf16"),
    "use_edm2": unsupported("`objective.learned_weighting` has EDM2's form; set it yourself"),
    "condition_dropout_prob": copied("objective.text_dropout_rate"),
    "use_ema": unsupported("set `ema.decays`, such as `[0.9999]`"),
    "note": unsupported("write it into the YAML as a comment"),
    "prediction_type": converted(
        look_up({"epsilon": "epsilon", "v_prediction": "v", "velocity": "v", "rectified_flow": "flow"}),
        "objective.prediction",
    ),
    "timestep_sampler_type": converted(
        convert_density,
        *("objective.timestep_density", "objective.logit_mean", "objective.logit_std"),
        expects="a name, with numbers in timestep_sampler_kwargs, such as cfg(mu=0, sigma=1)",
    ),
    "timestep_sampler_kwargs": converted(constant(None), "objective.logit_mean", note="with timestep_sampler_type"),
    "use_deepspeed": "deepspeed",
    "cpu": built_in("a machine without a GPU trains on the CPU"),
    "output_dir": converted(
        convert_output_dir,
        "run.dir",
        "run.name",
        note="the folder of the run; `%index%`, `%date%` and the like are left out, since the same command resumes",
    ),
    "output_name": converted(
        convert_output_name, "run.name", note="models are called `step-<number>`; `run.name` names their folder"
    ),
    "save_precision": converted(
        look_up({"float": "fp32", "no": "fp32", "fp16": "fp16", "bf16": "bf16"}), "checkpoint.export_dtype"
    ),
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
    "sample_params": converted(convert_sample_params, *SAMPLES.values(), expects=PARAMETERS),
    "eval_params": converted(convert_sample_params, *SAMPLES.values(), expects=PARAMETERS),
    **{f"{name}_every_n_steps": copied("sample.every_steps") for name in ("eval", "sample")},
    **{
        f"{name}_every_n_epochs": converted(
            convert_sampled_epochs,
            "sample.every_steps",
            note="needs `--samples`; without effect beside `every_n_steps`, which counts more often",
        )
        for name in ("eval", "sample")
    },
    "eval_on_train_start": copied("sample.at_start"),
    "eval_on_train_end": built_in("images are always generated at the end"),
    **{f"{name}_sampler": converted(look_up(SAMPLERS), "sample.sampler") for name in ("eval", "sample")},
    **{
        f"{name}_benchmark": converted(
            as_text, "sample.prompt_file", note="a JSON list of prompts; without it, the successor takes captions"
        )
        for name in ("eval", "sample")
    },
    **{
        name: unsupported("prompts are those of `sample.prompts` and `sample.prompt_file`, not captions of images")
        for name in ("eval_train_size", "eval_valid_size")
    },
    "eval_size": unsupported("images are generated one at a time"),
}
