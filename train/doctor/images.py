"""Findings about the images that have no latents yet: they are opened, and the cache job's rule is applied to them."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_trainer.cache.encode.decoder import WorkItem
from sdxl_trainer.cache.encode.estimate import OpenedImages, build_image_problem, try_decoding
from sdxl_trainer.cache.preview.survey import find_image_rows
from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.configs.schema import Config, DataConfig
from sdxl_trainer.data.checks.records import open_checked_records
from sdxl_trainer.data.checks.unusable_images import list_unusable_images
from sdxl_trainer.data.images.image_files import walk_images
from sdxl_trainer.data.index.index import Index, open_sample_index
from sdxl_trainer.data.index.selection import build_bucket_rules, build_latent_selection, get_cache_folder
from sdxl_trainer.data.order.keyed_random import permute
from sdxl_trainer.launch.machine import Finding, announce_stage, convert_problem
from sdxl_trainer.train.doctor.changed_images import examine_changed_images

MAX_OPENED = 2000  # images; a smaller set is opened whole
MAX_SECONDS = 60.0


def examine_images(config: Config, can_train: bool) -> Iterator[Finding]:
    """Open images that have no latents yet, and yield a finding: whether the cache job could use them.

    Another finding names images that have changed. Nothing is found if all images have latents of their own. If
    captions cannot be read, which is reported elsewhere, the images of the folders are opened.

    Args:
        can_train: a run can start, so images that cannot be encoded are no fault.
    """
    records = open_checked_records(config, need_captions=False).index
    if records is None:
        found = list_folder_images(config.data)
        yield from open_images(config, len(found), found.__getitem__, can_train=False)
        return
    selection = build_latent_selection(config)
    samples = open_sample_index(get_cache_folder(config), records, selection)
    yield from examine_changed_images(config, samples)
    rows = find_unencoded_rows(records, samples)
    if len(samples) and selection.captioned_only:  # others may have latents, which are not among the samples
        rows = rows[records.column("captioned")[rows]]
    if can_train and (known := list_unusable_images(get_cache_folder(config), records, samples)):
        # The checks of training have named these.
        options = pc.SetLookupOptions(pa.array([image.key for image in known], pa.string()))
        is_known = pc.call_function("is_in", [records.arrow_column("key")], options).to_numpy()
        rows = rows[~is_known[rows]]
    if not len(rows):
        return
    paths = records.arrow_column("image_path")
    yield from open_images(config, len(rows), lambda at: str(paths[int(rows[at])]), can_train, len(records))


def open_images(
    config: Config, num_to_do: int, get_path: Callable[[int], str], can_train: bool, num_images: int = 0
) -> Iterator[Finding]:
    """Open images, as many as the time allows, and yield a finding, unless there are none.

    Args:
        num_to_do: images to encode.
        get_path: returns the path of one of them, by its number.
        can_train: as in `examine_images`.
        num_images: images of the set, if these are not all.
    """
    if not num_to_do:
        return
    # In random order, because the time may not suffice for all.
    chosen = permute(np.arange(min(num_to_do, MAX_OPENED)), num_to_do, key=0)
    announce_stage(f"opening {len(chosen):,} of {format_count(num_to_do, 'image')} without latents")
    items = [WorkItem(key=path, image_path=path, file="") for path in map(get_path, chosen.tolist())]
    rule = build_bucket_rules(config.data)[""]
    trial = try_decoding(items, rule, len(items), config.cache.num_workers, max_seconds=MAX_SECONDS)
    num_tried, num_images = trial.num_images, num_images or num_to_do
    opened = OpenedImages(num_tried, num_to_do, sorted(trial.bad))
    if not opened.bad:
        yield Finding("images", f"opened {num_tried:,} of the {num_to_do:,} images to encode: all can be used")
        return
    finding = convert_problem(build_image_problem(config.data, opened, num_images))
    is_fault = opened.would_fail(config.data.max_bad_fraction, num_images) and not can_train
    yield replace(finding, is_note=not is_fault)


def list_folder_images(data: DataConfig) -> list[str]:
    """List the images below `data.image_dirs`, unless metadata names the images or a folder cannot be listed."""
    folders = [] if data.metadata else [path for path in data.image_dirs if path.is_dir()]
    try:
        return [
            os.path.join(folder.path, name) for folder in walk_images(folders, data.masks) for name in folder.images
        ]
    except ValueError:
        return []


def find_unencoded_rows(records: Index, samples: Index) -> np.ndarray:
    """Return the rows of records that name an image, and have no latents at the largest resolution, [K] int64."""
    rows = find_image_rows(records)
    encoded = samples.arrow_column("key").filter(samples.arrow_column("bytes").is_valid())
    has_latents = pc.call_function(
        "is_in", [records.arrow_column("key")], pc.SetLookupOptions(encoded.combine_chunks())
    )
    return rows[~has_latents.to_numpy()[rows]]
