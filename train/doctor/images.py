"""Findings about the images that have no latents yet: they are opened, and the cache job's rule is applied to them."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc

from sdxl_trainer.cache.encode.decoder import WorkItem
from sdxl_trainer.cache.encode.estimate import OpenedImages, build_image_problem, try_decoding
from sdxl_trainer.cache.preview.survey import find_image_rows
from sdxl_trainer.configs.problems import format_count
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.records import open_checked_records
from sdxl_trainer.data.index.index import Index, open_sample_index
from sdxl_trainer.data.index.selection import build_bucket_rules, build_latent_selection, get_cache_folder
from sdxl_trainer.data.order.keyed_random import permute
from sdxl_trainer.launch.machine import Finding, announce_stage, convert_problem

MAX_OPENED = 2000  # images; a smaller set is opened whole
MAX_SECONDS = 60.0


def examine_images(config: Config, can_train: bool) -> Iterator[Finding]:
    """Open images that have no latents yet, and yield a finding: whether the cache job could use them.

    Nothing is found if all images have latents, or if the records cannot be opened, which is reported elsewhere.

    Args:
        can_train: a run can start, so images that cannot be encoded are no fault.
    """
    records = open_checked_records(config, need_captions=False).index
    if records is None:
        return
    selection = build_latent_selection(config)
    samples = open_sample_index(get_cache_folder(config), records, selection)
    rows = find_unencoded_rows(records, samples)
    if len(samples) and selection.captioned_only:  # others may have latents, which are not among the samples
        rows = rows[records.column("captioned")[rows]]
    if not len(rows):
        return
    # In random order, because the time may not suffice for all.
    chosen = rows[permute(np.arange(min(len(rows), MAX_OPENED)), len(rows), key=0)]
    announce_stage(f"opening {len(chosen):,} of {format_count(len(rows), 'image')} without latents")
    keys, paths = (records.arrow_column(name) for name in ("key", "image_path"))
    items = [WorkItem(key=str(keys[row]), image_path=str(paths[row]), file="") for row in chosen.tolist()]
    rule = build_bucket_rules(config.data)[""]
    trial = try_decoding(items, rule, len(items), config.cache.num_workers, max_seconds=MAX_SECONDS)
    num_tried, num_to_do = trial.num_images, len(rows)
    opened = OpenedImages(num_tried, num_to_do, sorted(trial.bad))
    if not opened.bad:
        yield Finding("images", f"opened {num_tried:,} of the {num_to_do:,} images to encode: all can be used")
        return
    finding = convert_problem(build_image_problem(config.data, opened, len(records)))
    is_fault = opened.would_fail(config.data.max_bad_fraction, len(records)) and not can_train
    yield replace(finding, is_note=not is_fault)


def find_unencoded_rows(records: Index, samples: Index) -> np.ndarray:
    """Return the rows of records that name an image, and have no latents at the largest resolution, [K] int64."""
    rows = find_image_rows(records)
    encoded = samples.arrow_column("key").filter(samples.arrow_column("bytes").is_valid())
    has_latents = pc.call_function(
        "is_in", [records.arrow_column("key")], pc.SetLookupOptions(encoded.combine_chunks())
    )
    return rows[~has_latents.to_numpy()[rows]]
