"""Open and check the records of a data set: its sources, bucket rules, keys and captions."""

import importlib.util
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from loguru import logger

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import Config, DataConfig
from sdxl_trainer.data.checks.cache_store import open_mirror
from sdxl_trainer.data.checks.captions import warn_about_captions
from sdxl_trainer.data.checks.folders import build_index_problem, check_folder
from sdxl_trainer.data.formats.shards import CutShardError, ImageShardError
from sdxl_trainer.data.images.bucket import list_buckets
from sdxl_trainer.data.images.kohya_folders import describe_folders, list_kohya_folders
from sdxl_trainer.data.index.index import Index, open_record_index
from sdxl_trainer.data.index.selection import build_bucket_rules, get_cache_folder
from sdxl_trainer.data.metadata.merge import MAX_SHOWN, DuplicateKeyError
from sdxl_trainer.data.metadata.records import check_sources
from sdxl_trainer.data.metadata.sources import list_source_files
from sdxl_trainer.data.order.regularisation import check_regularisation
from sdxl_trainer.data.order.source_weights import check_source_weights
from sdxl_trainer.data.stores.remote import StoredObject, StoreError, describe_objects, is_remote, is_remote_shard
from sdxl_trainer.data.stores.streams import StreamError, is_streamed
from sdxl_trainer.data.text.tag_rules import check_tag_rules

MAX_NAMED = 5  # records that a warning names; launch/preview.sh lists all


class OpenedIndex(NamedTuple):
    """An index and all problems found in it; `index` is None if it cannot be opened or is empty."""

    index: Index | None
    problems: list[Problem]


def open_checked_records(config: Config, need_captions: bool = True, is_validation: bool = False) -> OpenedIndex:
    """Open the index of all records, check it, and log warnings about it.

    Args:
        need_captions: False logs a warning instead of yielding a problem if captions are missing. The cache job does so
            if it caches no text.
        is_validation: the records are a validation set, which may lack tags of the training set.
    """
    data = config.data
    problems = list(check_data_settings(data, config.cache.dir)) or [*check_streams(data), *check_copies(data)]
    problems = problems or open_mirror(config)
    if problems:
        return OpenedIndex(None, problems)
    try:
        index = open_record_index(
            get_cache_folder(config),
            data.metadata,
            data.image_dirs,
            data.caption.separator,
            data.regularisation_dirs,
            data.masks,
            data.kohya_folders,
        )
    except OSError as error:
        return OpenedIndex(None, [build_index_problem(get_cache_folder(config), error)])
    except ValueError as error:
        overlap = find_overlap(data) if isinstance(error, DuplicateKeyError) else None
        problem = overlap or build_source_problem(data, str(error), choose_source_cure(error, data.metadata))
        return OpenedIndex(None, [problem])
    except StoreError as error:
        if not isinstance(error.__cause__, StreamError):
            raise
        cure = "run the command in a shell: it must write the bytes of one tar to its standard output"
        return OpenedIndex(None, [build_source_problem(data, str(error), cure)])
    if len(index) == 0:
        cure = "check the path and the file types"
        return OpenedIndex(None, [build_source_problem(data, "holds no images", cure)])
    warn_about_records(data, index)
    warn_of_kohya_folders(data)
    warn_about_captions(data, index, check_lists=not is_validation)
    caption_problems = list(check_captions(data, index))
    if not need_captions:
        for problem in caption_problems:
            logger.warning("{}: {}; training will not start with these data", problem.key, problem.rule)
        caption_problems = []
    return OpenedIndex(index, [*check_keys(data, index), *caption_problems])


def check_data_settings(data: DataConfig, cache_dir: Path | str | None) -> Iterator[Problem]:
    """Yield the problems of the `data` section that can be found without an index."""
    yield from check_sources(data.metadata, data.image_dirs)
    yield from check_regularisation(data)
    yield from check_source_weights(data)
    yield from check_kohya_folders(data)
    yield from check_tag_rules(data.caption)
    if data.caption.fix_text and importlib.util.find_spec("ftfy") is None:
        cure = "pip install ftfy, or set it to false; other characters than ASCII may then be other tokens"
        yield Problem("data.caption.fix_text", True, "needs the package ftfy", cure)
    if cache_dir is not None and not is_remote(cache_dir):
        yield from check_folder("cache.dir", Path(cache_dir))
    if cache_dir is None and data.metadata and is_remote(data.metadata[0]):
        rule = "must be set if data.metadata is a URL: the index needs a local folder"
        yield Problem("cache.dir", None, rule, "set it to a folder with free disk space")
    for rule in build_bucket_rules(data).values():
        if not list_buckets(rule):
            yield Problem("data.resolution_px", rule.resolution_px, "gives no bucket", "raise it")


def check_streams(data: DataConfig) -> Iterator[Problem]:
    """Yield a problem for each setting that streams rule out. A stream is read from a local copy, and copied once.

    Raises:
        StoreError: a store cannot be listed.
    """
    settings = data.remote_shards
    stream = next(filter(is_streamed, list_source_files(data.metadata)), None)
    if stream is None:
        return
    if not settings.shuffle_shards and settings.copies_dir is None:
        rule = f"must be set: {stream} is a stream, which is read from a local copy"
        cure = "set it, or data.remote_shards.shuffle_shards, which also reads the shards one after the other"
        yield Problem("data.remote_shards.copies_dir", None, rule, cure)
    if data.verify_latents == "full":
        cure = "set it to header: each sample's checksum is verified when training reads it"
        yield Problem("data.verify_latents", "full", f"cannot read {stream}, which is a stream", cure)


def check_copies(data: DataConfig) -> Iterator[Problem]:
    """Yield a problem if `copies_gb` is too small for two windows of shards, the current and the next one.

    Only the sizes of the objects are read.

    Raises:
        StoreError: a store cannot be read.
    """
    settings = data.remote_shards
    names = map(str, list_source_files(data.metadata)) if settings.shuffle_shards else ()
    shards = list(filter(is_remote_shard, names))
    sizes = [item.size for item in describe_objects(shards) if isinstance(item, StoredObject)]
    needed_gb = 2 * min(settings.shuffle_shards, len(sizes)) * max(sizes, default=0) / 1e9
    if needed_gb > settings.copies_gb:
        rule = f"is less than the {needed_gb:.3g} GB of two windows of data.remote_shards.shuffle_shards shards"
        yield Problem("data.remote_shards.copies_gb", settings.copies_gb, rule, "raise it, or lower shuffle_shards")


def check_kohya_folders(data: DataConfig) -> Iterator[Problem]:
    """Yield a problem if `data.kohya_folders` is set, but images come from metadata."""
    if data.kohya_folders and data.metadata:
        rule = "works only with data.image_dirs, not with data.metadata"
        yield Problem("data.kohya_folders", True, rule, "leave it out; data.source_weights sets repeats of metadata")


def warn_of_kohya_folders(data: DataConfig) -> None:
    """Name the setting that gives folders such as `10_dog` their repeats, if there are such folders without it."""
    names = [] if data.kohya_folders or data.metadata else list_kohya_folders(data.image_dirs)
    if names and not data.source_weights:
        text = "folders named {} look like kohya's; set data.kohya_folders: true to use their numbers as repeats"
        logger.warning(text, describe_folders(names))


def check_keys(data: DataConfig, index: Index) -> Iterator[Problem]:
    """Yield a problem if a record's key is also the name of latents at a further resolution."""
    if clash := find_key_clash(index, list(build_bucket_rules(data))):
        cure = "rename the image: keys with this prefix name latents of that resolution"
        yield Problem("data.resolution_px", data.resolution_px, f"a record has the key '{clash}'", cure)


def check_captions(data: DataConfig, index: Index) -> Iterator[Problem]:
    """Yield a problem if no record has a caption, or if some lack one and `data.on_missing_caption` is `error`."""
    num_uncaptioned = count_uncaptioned(index)
    if num_uncaptioned == len(index):
        cure = "give each record `caption` or `tags`, or put a .txt file of the same stem beside each image"
        if not data.metadata and not data.kohya_folders and list_kohya_folders(data.image_dirs):
            cure += "; or set data.kohya_folders: true, which takes the names of folders such as `10_dog`"
        yield build_source_problem(data, f"holds {len(index)} images and not one caption", cure)
    elif num_uncaptioned and data.on_missing_caption == "error":
        cure = "give them captions, or set data.on_missing_caption to skip or empty"
        rule = f"{num_uncaptioned} records have no caption: {name_rows(index, ~index.column('captioned'), MAX_SHOWN)}"
        yield Problem("data.on_missing_caption", "error", rule, cure)


def warn_about_records(data: DataConfig, index: Index) -> None:
    """Log how many records lack a caption, unless `check_captions` yields a problem for it.

    A record needs no `original_size`: the image or the latents have it, and latents without one are reported.
    """
    num_uncaptioned, choice = count_uncaptioned(index), data.on_missing_caption
    if 0 < num_uncaptioned < len(index) and choice != "error":
        treatment = {"empty": "are trained with the empty caption", "skip": "are skipped"}[choice]
        named = name_rows(index, ~index.column("captioned"), MAX_NAMED)
        logger.warning("{} of {} records have no caption and {}: {}", num_uncaptioned, len(index), treatment, named)


def name_rows(index: Index, selected: np.ndarray, limit: int) -> str:
    """Return the keys of selected rows as text, at most `limit` of them, and dots if there are more.

    Args:
        selected: [N] bool.
    """
    rows, keys = np.flatnonzero(selected), index.arrow_column("key")
    return ", ".join(str(keys[row]) for row in rows[:limit].tolist()) + (", ..." if len(rows) > limit else "")


def count_uncaptioned(index: Index) -> int:
    """Return the number of records without a caption."""
    return int((~index.column("captioned")).sum())


def find_key_clash(index: Index, prefixes: Sequence[str]) -> str | None:
    """Return the first key of an image that begins with the prefix of a further resolution, or None.

    Such a key would be read as the key of another image's latents at that resolution.
    """
    keys = index.arrow_column("key").filter(index.arrow_column("offset").is_null())
    for prefix in filter(None, prefixes):
        matches = pc.call_function("starts_with", [keys], pc.MatchSubstringOptions(prefix))
        first = pc.call_function("index", [matches], pc.IndexOptions(pa.scalar(True))).as_py()
        if first >= 0:
            return keys[first].as_py()
    return None


def build_source_problem(data: DataConfig, rule: str, cure: str) -> Problem:
    """Build a problem of `data.metadata`, or of `data.image_dirs` if no metadata is set."""
    key = "data.metadata" if data.metadata else "data.image_dirs"
    paths: Sequence[Any] = data.metadata or data.image_dirs
    value = ", ".join(map(str, paths))
    return Problem(key, value, rule.removeprefix(f"{value}: "), cure)  # the one source is named already


def find_overlap(data: DataConfig) -> Problem | None:
    """Return the problem of an image folder that is named twice or lies in another one, or None: its images come twice.

    With metadata, image folders are only searched, and may overlap.
    """
    named = [
        (f"data.{name}.{number}", folder, folder.resolve())
        for name in ("image_dirs", "regularisation_dirs")
        for number, folder in enumerate(getattr(data, name))
    ]
    for (_, outer, whole), (key, inner, part) in permutations(() if data.metadata else named, 2):
        if part == whole:
            return Problem(key, inner, "is named twice", "remove this entry")
        if part.is_relative_to(whole):
            cure = f"remove this entry, or move the folder out of {outer}"
            return Problem(key, inner, f"lies in {outer}, so its images come twice", cure)
    return None


def choose_source_cure(error: ValueError, metadata: Sequence[Path | str]) -> str:
    """Return what repairs metadata or captions that cannot be read."""
    if isinstance(error, ImageShardError):
        return "unpack it into a folder, and name that folder in data.image_dirs"
    is_stored = any(map(is_remote, metadata))
    if isinstance(error, DuplicateKeyError):
        if ".tar" not in str(error):
            return "rename one of the two images in each pair, or leave it out of the metadata"
        if is_stored:
            return "give each sample a key of its own: write one of the shards again and upload it, or leave it out"
        return "give each sample a key of its own: write one of the shards again, or leave it out"
    if isinstance(error, CutShardError):
        return "upload the object again" if is_stored else "copy or write the tar again"
    return "correct the file and upload it again" if is_stored else "correct the data"
