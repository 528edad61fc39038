"""Conversion of kohya's dataset files with their subsets, and of folders named `N_name`.

In kohya's scripts every option may differ between subsets. Here most settings apply to the whole training set, so the
first subset's value is used and the others are reported.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sdxl_trainer.configs.kohya.options import CAPTION_SUFFIXES, CAPTIONS, KOHYA_OPTIONS
from sdxl_trainer.configs.paths import REPEATS_PREFIX
from sdxl_trainer.configs.problems import format_value

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")  # that kohya's scripts read
# Options that can differ between subsets here too.
SUBSET_OPTIONS = ("image_dir", "metadata_file", "num_repeats", "is_reg")
# Option in a dataset file → the same option in a training file.
TRAINING_NAMES = {"batch_size": "train_batch_size"}
# Options of captions that a strategy cannot imitate, because it does not know the epoch or the step.
TIMED_OPTIONS = ("caption_dropout_every_n_epochs", "token_warmup_min", "token_warmup_step")
# Reasons for a single value, of options that the general reason does not explain.
SHARED_REASONS = {
    "batch_size": "all micro batches have the same size here",
    "conditioning_data_dir": "data.masks is a single folder here",
    **dict.fromkeys(
        ("enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"),
        "all images share the same buckets here",
    ),
}
# Defaults of kohya's scripts for subsets.
SUBSET_DEFAULTS = {
    "batch_size": 1,
    "min_bucket_reso": 256,
    "max_bucket_reso": 1024,
    "bucket_reso_steps": 64,
    "caption_separator": ",",
    "caption_extension": ".caption",
    "token_warmup_min": 1,
    **dict.fromkeys(
        (
            "keep_tokens",
            "token_warmup_step",
            "caption_dropout_every_n_epochs",
            "caption_dropout_rate",
            "caption_tag_dropout_rate",
        ),
        0,
    ),
    **dict.fromkeys(
        (
            "enable_bucket",
            "bucket_no_upscale",
            "shuffle_caption",
            "enable_wildcard",
            "flip_aug",
            "color_aug",
            "random_crop",
            "alpha_mask",
        ),
        False,
    ),
}


class Remark(NamedTuple):
    """An option of kohya's scripts whose value is not imported exactly, with the reason."""

    option: str
    value: Any
    reason: str


class DataSources(NamedTuple):
    """The settings of `data` that name metadata files and image folders, by dotted key, and remarks."""

    settings: dict[str, Any]
    remarks: list[Remark]


class DatasetFile(NamedTuple):
    """A converted dataset file: options by kohya's names, settings by dotted key, and remarks."""

    options: dict[str, Any]
    settings: dict[str, Any]
    remarks: list[Remark]


class _Unset:
    """The value of an option that is not set and has no default."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "unset"


UNSET = _Unset()


def read_datasets(tables: Mapping[str, Any], training_options: Mapping[str, Any]) -> DatasetFile:
    """Convert a dataset file to options for the whole training set, settings of `data`, and remarks.

    Args:
        tables: the file's tables, `general` and `datasets` with `subsets`. The innermost value is used.
        training_options: used for options that the file does not set.
    """
    general = dict(tables.get("general", {}))
    groups = [
        [general | _without(dataset, "subsets") | subset for subset in dataset["subsets"]]
        for dataset in tables["datasets"]
        if dataset.get("subsets")
    ]
    subsets = [subset for group in groups for subset in group]
    names: list[str] = list(dict.fromkeys(name for subset in subsets for name in subset))
    given = {name: training_options.get(TRAINING_NAMES.get(name, name)) for name in names}
    fallbacks = SUBSET_DEFAULTS | {name: value for name, value in given.items() if value is not None}
    options: dict[str, Any] = {}
    settings, remarks = list_data_sources(subsets)
    sizes = _list_values([group[0] for group in groups], "resolution", fallbacks)
    sources = [_list_trained_sources(group) for group in groups]
    if len(sizes) > 1 and UNSET not in sizes and all(group_sources == sources[0] for group_sources in sources):
        options = {"resolution": [size if isinstance(size, list) else [size] for size in sizes], "enable_bucket": True}
        settings, remarks = _merge_resolutions(groups, not any(_list_values(subsets, "enable_bucket", fallbacks)))
    for name in names:
        if name in SUBSET_OPTIONS or name in options:
            continue
        values = _list_values(subsets, name, fallbacks)
        option = KOHYA_OPTIONS.get(name)
        if option is None or not option.keys:
            options[name] = _join_values(list(filter(None, values)))
            continue
        if name == "caption_extension":  # files of all endings in CAPTION_SUFFIXES are read, whatever a subset asks for
            options[name] = _join_values([value for value in values if value not in CAPTION_SUFFIXES] or values[:1])
            continue
        if name in subsets[0]:
            options[TRAINING_NAMES.get(name, name)] = values[0]
        if len(values) > 1:
            remarks.append(Remark(name, values, _explain_difference(name, values)))
    if not training_options.get("num_samples") and (num_samples := count_samples(subsets)):
        options["num_samples"] = num_samples
    return DatasetFile(options, settings, remarks)


def list_dataset_keys(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return every key of a dataset file with its first value."""
    keys: dict[str, Any] = {}
    for dataset in tables["datasets"]:
        for table in (*dataset.get("subsets", []), _without(dataset, "subsets")):
            keys = dict(table) | keys
    return dict(tables.get("general", {})) | keys


def count_samples(subsets: Iterable[Mapping[str, Any]]) -> int:
    """Count the samples of an epoch in image folders of this machine; 0 if they cannot be counted so.

    Regularisation images double the number of samples.
    """
    total, factor = 0, 1
    for subset in subsets:
        folder = Path(str(subset.get("image_dir") or ""))
        if subset.get("metadata_file") or not folder.is_dir():
            return 0
        if subset.get("is_reg"):
            factor = 2
            continue
        images = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
        total += images * int(subset.get("num_repeats", 1))
    return total * factor


def has_images(folder: Path) -> bool:
    """Return whether a folder or one below it holds an image, or latents in place of one."""
    suffixes = (*IMAGE_SUFFIXES, ".npz")
    return any(name.lower().endswith(suffixes) for _, _, names in os.walk(folder) for name in names)


def list_data_sources(subsets: list[dict[str, Any]]) -> DataSources:
    """Return the metadata files and folders of subsets as settings of `data`, each once."""
    trained = [subset for subset in subsets if not subset.get("is_reg")]
    with_metadata = [subset for subset in trained if subset.get("metadata_file")]
    repeats = _sum_repeats(with_metadata or trained)
    settings: dict[str, Any] = {
        "data.metadata": list(repeats) if with_metadata else [],
        "data.image_dirs": _list_folders(trained) if with_metadata else list(repeats),
        "data.source_weights": list(repeats.values()) if any(number != 1 for number in repeats.values()) else [],
        "data.regularisation_dirs": _list_folders(subset for subset in subsets if subset.get("is_reg")),
    }
    remarks: list[Remark] = []
    if with_metadata and len(with_metadata) < len(trained):
        folders = _list_folders(subset for subset in trained if not subset.get("metadata_file"))
        reason = "with metadata, images in folders are not samples of their own; write metadata for these too"
        remarks.append(Remark("image_dir", folders, reason))
    sources = [_get_source(subset) for subset in with_metadata or trained]
    if duplicates := [source for source in repeats if sources.count(source) > 1]:
        name = "metadata_file" if with_metadata else "image_dir"
        reason = "is in several datasets or subsets; used once, with the sum of num_repeats in data.source_weights"
        remarks.append(Remark(name, duplicates, reason))
    reg_repeats = [subset.get("num_repeats", 1) for subset in subsets if subset.get("is_reg")]
    if any(number != 1 for number in reg_repeats):
        reason = (
            "has no effect with is_reg, as in kohya's scripts: regularisation images are repeated until they equal all "
            f"others in number; set data.regularisation_repeats: {reg_repeats[0]} to use this number of repeats"
        )
        remarks.append(Remark("num_repeats", reg_repeats if len(set(reg_repeats)) > 1 else reg_repeats[0], reason))
    return DataSources({key: value for key, value in settings.items() if value}, remarks)


def _merge_resolutions(groups: list[list[dict[str, Any]]], has_fixed_size: bool) -> DataSources:
    """Return the settings of `data` for datasets that use the same folders at several resolutions."""
    reg_subsets = [subset for group in groups[1:] for subset in group if subset.get("is_reg")]
    settings, remarks = list_data_sources(groups[0] + reg_subsets)
    repeats = [_sum_repeats(subset for subset in group if not subset.get("is_reg")) for group in groups]
    if any(numbers != repeats[0] for numbers in repeats):
        reason = "differs between resolutions, which have the same repeats here; the first dataset's are used"
        remarks.append(Remark("num_repeats", [list(numbers.values()) for numbers in repeats], reason))
    if has_fixed_size:
        reason = (
            "gives one bucket per resolution in kohya's scripts; several resolutions use buckets of all shapes here"
        )
        remarks.append(Remark("enable_bucket", False, reason))
    return DataSources(settings, remarks)


def _explain_difference(name: str, values: list[Any]) -> str:
    if name == "resolution":
        return (
            "differs between datasets with different folders, but here every folder is trained at each resolution; "
            f"{format_value(values[0])} is used; write data.resolution_px: [side, side] to train all folders at several"
        )
    state = "on" if values[0] else "off"
    if name == "flip_aug":
        return f"differs between datasets or subsets; flips are {state} for all images here"
    if name == "alpha_mask":
        return f"differs between datasets or subsets; masks from alpha channels are {state} for all images here"
    why = SHARED_REASONS[name] if name in SHARED_REASONS else "applies to the whole training set here"
    reason = f"differs between datasets or subsets, but {why}; {format_value(values[0])} is used"
    if name not in CAPTIONS or name in TIMED_OPTIONS:
        return reason
    return f"{reason}; a strategy can treat samples differently (docs/STRATEGY.md)"


def list_repeated_folders(folder: Path) -> list[dict[str, Any]]:
    """Return the `N_name` folders in `train_data_dir` as subsets; an empty list if there are none."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    matches = [(name, re.match(REPEATS_PREFIX, name)) for name in names]
    return [{"image_dir": str(folder / name), "num_repeats": int(match[1])} for name, match in matches if match]


def _get_source(subset: Mapping[str, Any]) -> str:
    """Return the metadata file or the folder of a subset."""
    return str(subset.get("metadata_file") or _strip_slash(subset.get("image_dir")))


def _strip_slash(folder: Any) -> str:
    return str(folder or "").rstrip("/\\") or str(folder or "")


def _list_trained_sources(group: list[dict[str, Any]]) -> set[str]:
    return {_get_source(subset) for subset in group if not subset.get("is_reg")}


def _list_folders(subsets: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(_strip_slash(subset["image_dir"]) for subset in subsets if subset.get("image_dir")))


def _sum_repeats(subsets: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the repeats of each metadata file or folder, summed over subsets."""
    repeats: dict[str, Any] = {}
    for subset in subsets:
        if source := _get_source(subset):
            repeats[source] = repeats.get(source, 0) + subset.get("num_repeats", 1)
    return repeats


def _list_values(tables: Iterable[Mapping[str, Any]], name: str, fallbacks: Mapping[str, Any]) -> list[Any]:
    """Return the distinct values of an option in tables, in the order of the tables."""
    values: list[Any] = []
    for table in tables:
        value = table.get(name, fallbacks.get(name, UNSET))
        if value not in values:
            values.append(value)
    return values


def _join_values(values: list[Any]) -> Any:
    """Return the only value of an option, all of several, or None without any."""
    return values if len(values) > 1 else next(iter(values), None)


def _without(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != name}
