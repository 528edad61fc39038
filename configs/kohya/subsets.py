"""Where kohya's images are: dataset files with their subsets, and folders named `N_name`.

Subsets may differ in every option there; here most hold for all data, so the first one's is taken and the others named.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdxl_trainer.configs.kohya.options import KOHYA_OPTIONS, Option

Remark = tuple[str, Any, str]  # option, value, why

REPEATED = re.compile(r"(\d+)_")
OF_SUBSETS = ("image_dir", "metadata_file", "num_repeats", "is_reg")  # these are each subset's own here too
RENAMED = {"batch_size": "train_batch_size"}
# What kohya's scripts take for a subset of which nothing is said; False for flags.
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


class _Unset:
    """Stands for a value that is not given and whose default is nothing."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "unset"


UNSET = _Unset()


def read_datasets(
    tables: Mapping[str, Any], others: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[Remark]]:
    """What a dataset file says: options for all data, settings of `data` that say where they are, and remarks.

    Args:
        tables: of the file: `general`, and `datasets` with `subsets`. What is more special wins.
        others: options of training, which hold where the file says nothing.

    Returns:
        options by name, settings by dotted key, and (option, value, why) of what is not quite the same here.
    """
    general = dict(tables.get("general", {}))
    groups = [
        [general | _without(dataset, "subsets") | subset for subset in dataset["subsets"]]
        for dataset in tables["datasets"]
        if dataset.get("subsets")
    ]
    subsets = [subset for group in groups for subset in group]
    names: list[str] = list(dict.fromkeys(name for subset in subsets for name in subset))
    told = {name: others.get(RENAMED.get(name, name)) for name in names}
    fallbacks = SUBSET_DEFAULTS | {name: value for name, value in told.items() if value is not None}
    options: dict[str, Any] = {}
    settings, remarks = list_places(subsets)
    sizes = _list_values([group[0] for group in groups], "resolution", fallbacks)
    if len(sizes) > 1 and UNSET not in sizes and all(_list_keys(group) == _list_keys(groups[0]) for group in groups):
        options = {"resolution": [size if isinstance(size, list) else [size] for size in sizes], "enable_bucket": True}
        settings, remarks = _train_at_each(groups, not any(_list_values(subsets, "enable_bucket", fallbacks)))
    for name in names:
        if name in OF_SUBSETS or name in options:
            continue
        values = _list_values(subsets, name, fallbacks)
        if not KOHYA_OPTIONS.get(name, Option(("?",))).keys:
            options[name] = next(filter(None, values), None)
            continue
        if name in subsets[0]:
            options[RENAMED.get(name, name)] = values[0]
        if len(values) > 1:
            remarks.append((name, values, _explain_difference(name, values)))
    return options, settings, remarks


def list_places(subsets: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Remark]]:
    """Settings of `data` for subsets, by dotted key, and what is not quite the same; each folder or file once."""
    trained = [subset for subset in subsets if not subset.get("is_reg")]
    listed = [subset for subset in trained if subset.get("metadata_file")]
    repeats = _sum_repeats(listed or trained)
    settings: dict[str, Any] = {
        "data.metadata": list(repeats) if listed else [],
        "data.image_dirs": _list_folders(trained) if listed else list(repeats),
        "data.source_weights": list(repeats.values()) if any(number != 1 for number in repeats.values()) else [],
        "data.regularisation_dirs": _list_folders(subset for subset in subsets if subset.get("is_reg")),
    }
    remarks: list[Remark] = []
    if listed and len(listed) < len(trained):
        bare = _list_folders(subset for subset in trained if not subset.get("metadata_file"))
        why = "beside metadata, folders are only where images are looked for; write metadata for these too"
        remarks.append(("image_dir", bare, why))
    keys = [_key(subset) for subset in listed or trained]
    if twice := [key for key in repeats if keys.count(key) > 1]:
        name = "metadata_file" if listed else "image_dir"
        why = "is in several data sets or subsets; here once, with the sum of their num_repeats in data.source_weights"
        remarks.append((name, twice, why))
    regular = [subset.get("num_repeats", 1) for subset in subsets if subset.get("is_reg")]
    if any(number != 1 for number in regular):
        why = (
            "of is_reg: kohya's scripts use regularisation images until they are as many as all others, whatever it "
            f"says, and so they are here; data.regularisation_repeats: {regular[0]} has each just so often"
        )
        remarks.append(("num_repeats", regular if len(set(regular)) > 1 else regular[0], why))
    return {key: value for key, value in settings.items() if value}, remarks


def _train_at_each(groups: list[list[dict[str, Any]]], is_fixed: bool) -> tuple[dict[str, Any], list[Remark]]:
    """Settings of data sets that are the same folders at several resolutions, and what is not quite the same."""
    regular = [subset for group in groups[1:] for subset in group if subset.get("is_reg")]
    settings, remarks = list_places(groups[0] + regular)
    repeats = [_sum_repeats(subset for subset in group if not subset.get("is_reg")) for group in groups]
    if any(numbers != repeats[0] for numbers in repeats):
        why = "differs between resolutions; here images come as often at each: those of the first data set are taken"
        remarks.append(("num_repeats", [list(numbers.values()) for numbers in repeats], why))
    if is_fixed:
        why = "has one bucket for each resolution there; several resolutions have buckets of all shapes here"
        remarks.append(("enable_bucket", False, why))
    return settings, remarks


def _explain_difference(name: str, values: list[Any]) -> str:
    if name == "resolution":
        return (
            f"the data sets have different folders, and here every folder is trained at each of data.resolution_px: "
            f"{values[0]!r} is taken; write data.resolution_px: [side, side] for all of them at several"
        )
    why = f"differs between data sets or subsets, and holds for all data here: {values[0]!r} is taken"
    return f"{why}; a strategy can tell samples apart (docs/STRATEGY.md)"


def list_repeated_folders(folder: Path) -> list[dict[str, Any]]:
    """The `N_name` folders of `train_data_dir` as subsets; none if it has none, or is not here."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found = [(name, REPEATED.match(name)) for name in names]
    return [{"image_dir": str(folder / name), "num_repeats": int(match[1])} for name, match in found if match]


def _key(subset: Mapping[str, Any]) -> str:
    """The file or folder that a subset is."""
    return str(subset.get("metadata_file") or _strip(subset.get("image_dir")))


def _strip(folder: Any) -> str:
    return str(folder or "").rstrip("/\\") or str(folder or "")


def _list_keys(group: list[dict[str, Any]]) -> set[str]:
    return {_key(subset) for subset in group if not subset.get("is_reg")}


def _list_folders(subsets: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(_strip(subset["image_dir"]) for subset in subsets if subset.get("image_dir")))


def _sum_repeats(subsets: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How often each file or folder comes."""
    repeats: dict[str, Any] = {}
    for subset in subsets:
        if key := _key(subset):
            repeats[key] = repeats.get(key, 0) + subset.get("num_repeats", 1)
    return repeats


def _list_values(tables: Iterable[Mapping[str, Any]], name: str, fallbacks: Mapping[str, Any]) -> list[Any]:
    """The different values that tables have for a name, in their order."""
    found: list[Any] = []
    for table in tables:
        value = table.get(name, fallbacks.get(name, UNSET))
        if value not in found:
            found.append(value)
    return found


def _without(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != name}
