"""Where kohya's pictures are: dataset files with their subsets, and folders named `N_name`.

Subsets may differ in every option there; here most hold for all data, so the first one's is taken and the others named.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_trainer.configs.kohya_options import KOHYA_OPTIONS, Option

REPEATED = re.compile(r"(\d+)_")
OF_SUBSETS = ("image_dir", "metadata_file", "num_repeats", "is_reg")  # these are each subset's own here too
RENAMED = {"batch_size": "train_batch_size"}


def read_datasets(tables: Mapping[str, Any]) -> tuple[dict, dict, list[tuple[str, Any, str]]]:
    """What a dataset file says: options for all data, settings of `data` that say where they are, and what is lost.

    Args:
        tables: of the file: `general`, and `datasets` with `subsets`. What is more special wins.

    Returns:
        options by name, settings by dotted key, and (option, value, why) of what could not be kept.
    """
    general = dict(tables.get("general", {}))
    datasets = [_without(dataset, "subsets") for dataset in tables["datasets"]]
    merged = [
        [general | dataset | subset for subset in whole.get("subsets", [])]
        for dataset, whole in zip(datasets, tables["datasets"], strict=True)
    ]
    subsets = [subset for group in merged for subset in group]
    options, lost = {}, []
    sizes = _list_values([group[0] for group in merged if group], "resolution")
    places = [{_place(subset) for subset in group} for group in merged]
    are_same = len(sizes) > 1 and all(place == places[0] for place in places)  # pictures, at several resolutions
    if are_same:
        options["resolution"] = [size if isinstance(size, list) else [size] for size in sizes]
        options["enable_bucket"] = True
    for name in dict.fromkeys(name for subset in subsets for name in subset):
        if name in OF_SUBSETS or name in options:
            continue
        values = _list_values(subsets, name)
        if not KOHYA_OPTIONS.get(name, Option(("?",))).keys:
            options[name] = next(filter(None, values), None)
            continue
        options[RENAMED.get(name, name)] = values[0]
        if len(values) > 1:
            why = f"differs between data sets or subsets, and holds for all data here: {values[0]!r} is taken"
            lost.append((name, values, f"{why}; a strategy can tell samples apart (docs/STRATEGY.md)"))
    settings, mixed = list_places(merged[0] if are_same else subsets)
    return options, settings, lost + mixed


def list_places(subsets: list[dict[str, Any]]) -> tuple[dict[str, Any], list[tuple[str, Any, str]]]:
    """Settings of `data` for subsets, by dotted key, and what could not be kept."""
    trained = [subset for subset in subsets if not subset.get("is_reg")]
    listed = [subset for subset in trained if subset.get("metadata_file")]
    sources = listed or trained
    folders = [subset["image_dir"] for subset in trained if subset.get("image_dir")]
    settings: dict[str, Any] = {
        "data.metadata": [subset["metadata_file"] for subset in listed],
        "data.image_dirs": list(dict.fromkeys(folders)) if listed else folders,
        "data.weights": [subset.get("num_repeats", 1) for subset in sources],
        "data.regularisation_dirs": [subset["image_dir"] for subset in subsets if subset.get("is_reg")],
    }
    if all(weight == 1 for weight in settings["data.weights"]):
        settings["data.weights"] = []
    lost = []
    if listed and len(listed) < len(trained):
        bare = [subset["image_dir"] for subset in trained if not subset.get("metadata_file")]
        why = "beside metadata, folders are only where pictures are looked for; write metadata for these too"
        lost.append(("image_dir", bare, why))
    return {key: value for key, value in settings.items() if value}, lost


def list_repeated_folders(folder: Path) -> list[dict[str, Any]]:
    """The `N_name` folders of `train_data_dir` as subsets; none if it has none, or is not here."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found = [(name, REPEATED.match(name)) for name in names]
    return [{"image_dir": str(folder / name), "num_repeats": int(match[1])} for name, match in found if match]


def _place(subset: Mapping[str, Any]) -> tuple[Any, Any]:
    return subset.get("metadata_file"), subset.get("image_dir")


def _list_values(tables: list[dict[str, Any]], name: str) -> list[Any]:
    """The different values that tables have for a name, in their order; False where others have one and it has none."""
    found: list[Any] = []
    for table in tables:
        value = table.get(name, False)
        if value not in found:
            found.append(value)
    return [value for value in found if value is not False] or found if name == "resolution" else found


def _without(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != name}
