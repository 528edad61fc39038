"""Repeats of samples by the source or the folder that they come from: how often each is used in an epoch."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from loguru import logger

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import DataConfig
from sdxl_trainer.data.images.kohya_folders import find_kohya_folder
from sdxl_trainer.data.index.index import Index


class SourceRepeats(NamedTuple):
    """A folder or an entry of the settings that samples come from."""

    name: str
    num_samples: int
    num_used: float  # samples an epoch, with repeats


def check_source_weights(data: DataConfig) -> Iterator[Problem]:
    """Yield a problem if `data.source_weights` is set but does not have one number for each source."""
    name = "metadata" if data.metadata else "image_dirs"
    entries = getattr(data, name)
    if data.source_weights and len(data.source_weights) != len(entries):
        rule = f"holds {len(data.source_weights)} numbers for the {len(entries)} entries of data.{name}"
        cure = "give one number per entry; files that match one entry's pattern share its number"
        yield Problem("data.source_weights", data.source_weights, rule, cure)


def check_weighted_samples(data: DataConfig, index: Index) -> Iterator[Problem]:
    """Yield a problem if every source or folder with samples has the weight 0."""
    weights, sources = data.source_weights, np.unique(index.column("source")).tolist()
    if data.kohya_folders and not read_folder_repeats(index, data.image_dirs).any():
        cure = "rename a folder: images in `0_name` are left out"
        yield Problem("data.kohya_folders", True, "leaves nothing to train on", cure)
    elif weights and not any(source >= len(weights) or weights[source] for source in sources):
        cure = "raise the weight of an entry that has samples with latents"
        yield Problem("data.source_weights", list(weights), "leaves nothing to train on", cure)


def apply_data_repeats(index: Index, repeats: np.ndarray | None, data: DataConfig) -> np.ndarray | None:
    """Return each row's repeats times the weight of its source and the repeats of its folder, [N]; None for once each.

    Args:
        repeats: how often each row would be used without these.
    """
    repeats = apply_source_weights(index, repeats, data.source_weights)
    if not data.kohya_folders:
        return repeats
    numbers = read_folder_repeats(index, data.image_dirs)
    used = numbers if repeats is None else repeats * numbers
    logger.info("data.kohya_folders: {} samples, {:.6g} samples an epoch", len(index), used.sum())
    return used


def read_folder_repeats(index: Index, image_dirs: Sequence[Path]) -> np.ndarray:
    """Return the number in the name of each row's folder, such as 10 of `10_dog`, or 1 if it has none, [N].

    Regularisation images have 1, because a setting of their own repeats them.
    """
    roots = [os.path.abspath(root) for root in image_dirs]
    folders, folder_of_row = _group_by_folder(index)
    found = [find_kohya_folder(folder, roots) for folder in folders]
    numbers = np.array([each.repeats if each else 1 for each in found], np.float64)[folder_of_row]
    numbers[index.column("source") >= len(roots)] = 1
    return numbers


def list_repeats(index: Index, data: DataConfig) -> list[SourceRepeats]:
    """List the folders or entries that samples come from, with their repeats; none if each sample is used once.

    With `data.kohya_folders` each folder of images is listed, else each entry of the settings. The factors of
    regularisation images and of a strategy are not included.
    """
    if not data.kohya_folders and all(weight == 1 for weight in data.source_weights):
        return []
    sources = group_of_row = index.column("source")
    names = [*map(str, data.metadata or data.image_dirs), *map(str, data.regularisation_dirs)]
    used = np.append(data.source_weights, np.ones(len(names)))[sources]
    if data.kohya_folders:
        used *= read_folder_repeats(index, data.image_dirs)
        names, group_of_row = _group_by_folder(index)
    num_samples = np.bincount(group_of_row, minlength=len(names))
    num_used = np.bincount(group_of_row, used, minlength=len(names))
    counted = zip(names, num_samples.tolist(), num_used.tolist(), strict=True)
    return [SourceRepeats(name, number, total) for name, number, total in sorted(counted) if number]


def _group_by_folder(index: Index) -> tuple[list[str], np.ndarray]:
    """Return the folders of the images, and the number of each row's folder, [N]."""
    folders = pc.call_function(
        "replace_substring_regex",
        [index.arrow_column("image_path")],
        pc.ReplaceSubstringOptions(pattern="/[^/]*$", replacement=""),
    )
    encoded = pa.concat_arrays(folders.chunks).dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()


def apply_source_weights(index: Index, repeats: np.ndarray | None, weights: Sequence[float]) -> np.ndarray | None:
    """Return each row's repeats times the weight of its source, [N]; None uses each row once.

    Args:
        repeats: how often each row would be used without weights.
        weights: weight of each source. Further sources, which are folders of regularisation images, keep their repeats.
    """
    if all(weight == 1 for weight in weights):
        return repeats
    sources = index.column("source")
    factors = np.ones(max(len(weights), int(sources.max(initial=0)) + 1))
    factors[: len(weights)] = weights
    used = factors[sources] if repeats is None else repeats * factors[sources]
    num_samples = np.bincount(sources, minlength=len(weights))
    num_used = np.bincount(sources, used, minlength=len(weights))
    for number, weight in enumerate(weights):
        text = "source {}: {} samples, weight {:g}, {:.6g} samples an epoch"
        logger.info(text, number, num_samples[number], weight, num_used[number])
    return used
