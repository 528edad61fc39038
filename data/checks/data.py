"""What can be told of the data before any network is loaded: sources, images, captions, latents."""

from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from loguru import logger

from sdxl_trainer.configs.problems import FailedError, Problem
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.checks.latents import count_unflipped, find_bad_latents
from sdxl_trainer.data.files import open_atomic
from sdxl_trainer.data.formats.manifest import STALE, read_identity
from sdxl_trainer.data.images.bucket import BucketRule, list_buckets
from sdxl_trainer.data.index.index import Index, open_record_index, open_sample_index
from sdxl_trainer.data.index.selection import build_bucket_rules, build_latent_selection, get_cache_folder
from sdxl_trainer.data.metadata.merge import MAX_SHOWN
from sdxl_trainer.data.metadata.records import check_sources
from sdxl_trainer.data.order.regularisation import check_regularisation
from sdxl_trainer.data.order.source_weights import check_weighted_sources, check_weights
from sdxl_trainer.data.stores.remote import is_remote


def check_records(config: Config, need_captions: bool = True) -> tuple[Index | None, list[Problem]]:
    """Open the index of all records, and say what is wrong with the data settings or the data as a whole.

    Args:
        need_captions: False only warns where there are none.
    """
    problems = [
        *check_sources(config.data.metadata, config.data.image_dirs),
        *check_regularisation(config.data),
        *check_weights(config.data),
    ]
    if config.cache.dir is None and config.data.metadata and is_remote(config.data.metadata[0]):
        rule = "must be set where data.metadata is a URL: a local folder for the index"
        problems.append(Problem("cache.dir", None, rule, "set it to a folder with some space"))
    rules = build_bucket_rules(config.data)
    for rule in rules.values():
        if not list_buckets(rule):
            problems.append(Problem("data.resolution_px", rule.resolution_px, "gives no bucket", "raise it"))
    if problems:
        return None, problems
    source = "data.metadata" if config.data.metadata else "data.image_dirs"
    shown = ", ".join(str(path) for path in config.data.metadata or config.data.image_dirs)
    try:
        folder, separator = get_cache_folder(config), config.data.caption.separator
        data = config.data
        index = open_record_index(
            folder, data.metadata, data.image_dirs, separator, data.regularisation_dirs, data.masks
        )
    except ValueError as error:
        return None, [Problem(source, shown, str(error), "mend the data")]
    if len(index) == 0:
        return None, [Problem(source, shown, "holds no images", "check the path and the file types")]
    if clash := find_clash(index, list(rules)):
        rule, cure = f"a record has the key '{clash}'", "rename it: such keys name latents of that resolution"
        return index, [Problem("data.resolution_px", config.data.resolution_px, rule, cure)]
    unsized = int((index.column("width") == 0).sum()) if config.data.metadata else 0
    if unsized:
        logger.warning("{} of {} records do not tell their image's original_size", unsized, len(index))
    problem = check_captions(index, config.data.on_missing_caption, source, shown)
    if problem and not need_captions:
        logger.warning("{}: {}; training will not start so", problem.key, problem.rule)
        return index, []
    return index, [problem] if problem else []


def check_captions(index: Index, missing_caption: str, source: str, shown: str) -> Problem | None:
    """What is wrong with the captions as a whole: `shown` are the paths under the key `source`."""
    uncaptioned = int((~index.column("captioned")).sum())
    if uncaptioned == len(index):
        cure = "give each record `caption` or `tags`, or put a .txt file of the same stem beside each image"
        return Problem(source, shown, f"holds {len(index)} images and not one caption", cure)
    if uncaptioned and missing_caption == "error":
        return _refuse_uncaptioned(index, uncaptioned)
    if uncaptioned:
        fate = {"empty": "are trained with the empty one", "skip": "are left out"}[missing_caption]
        logger.warning("{} of {} records have no caption and {}", uncaptioned, len(index), fate)
    return None


def find_clash(index: Index, prefixes: list[str]) -> str | None:
    """The key of an image that reads like that of another image's latents at a further resolution, or None."""
    keys = index.arrow_column("key").filter(index.arrow_column("offset").is_null())
    for prefix in filter(None, prefixes):
        first = pc.call_function(
            "index",
            [pc.call_function("starts_with", [keys], pc.MatchSubstringOptions(prefix))],
            pc.IndexOptions(pa.scalar(True)),
        ).as_py()
        if first >= 0:
            return keys[first].as_py()
    return None


def check_latents(config: Config, resuming: bool) -> tuple[Index | None, list[Problem]]:
    """Open the index of the training set, verify its latents by `data.verify_latents`, and report and drop bad ones.

    What is left out is noted in the run folder and holds as long as the run: a resumed run keeps its order of batches,
    and meets what has become bad since like any bad sample.

    Raises:
        FailedError: more latents are bad than `data.max_bad_fraction` allows.
    """
    records, problems = check_records(config)
    if records is None:
        return None, problems
    folder = get_cache_folder(config)
    index = open_sample_index(folder, records, build_latent_selection(config))
    if len(index) == 0:
        rule = "holds no latent cache" if read_identity(folder) is None else "holds the latents of none of the records"
        cure = "run bash launch/cache.sh with the same settings first"
        return None, [*problems, Problem("cache.dir", folder, rule, cure)]
    num_wanted = index.note("num_wanted")
    missing = num_wanted - len(index) - len(index.note("bad"))
    if missing and config.cache.on_missing == "error":
        cure = "run bash launch/cache.sh, or set cache.on_missing: encode, or skip"
        problems.append(
            Problem("cache.on_missing", "error", f"{missing} of {num_wanted} samples have no latents", cure)
        )
    elif missing:
        logger.warning("{} of {} samples have no latents and are left out", missing, num_wanted)
    if index.note("num_uncached"):
        logger.info("{} samples have no latents and are encoded when they are met", index.note("num_uncached"))
    if index.note("num_unlisted"):
        logger.info("{} latent files were found that no manifest lists", index.note("num_unlisted"))
    if index.note("other_sizes"):
        logger.warning("{}: the images' is used", index.note("other_sizes"))
    if index.note("num_assumed_sizes"):
        logger.warning(
            "{} latent files do not tell the original size: their bucket's is used", index.note("num_assumed_sizes")
        )
    problems += check_identity(config, folder, index)
    problems += check_copies(config, index)
    problems += [*check_flip(config, index), *check_weighted_sources(config.data.source_weights, index)]
    leave_out_bad(config, index, resuming)
    return index, problems


def check_identity(config: Config, folder: Path, index: Index) -> list[Problem]:
    """Whether the latents are of the sizes that the settings ask for, and all of the cache job's last settings."""
    identity, wanted = read_identity(folder), build_bucket_rules(config.data)[""]
    if identity is None:  # another program made them
        return []
    made = BucketRule(
        resolution_px=identity.get("resolution_px", 0),
        min_px=identity.get("min_bucket_px", 0),
        max_px=identity.get("max_bucket_px", 0),
        step_px=identity.get("bucket_step_px", 0),
        no_upscale=identity.get("no_upscale", False),
        fixed=tuple((width, height) for width, height in identity.get("buckets", ())),
    )
    if made != wanted:
        rule = f"holds latents made with {_describe_rule(made)}, and the settings have {_describe_rule(wanted)}"
        cure = "run bash launch/cache.sh with the same settings, or set them as they were; another cache.dir keeps both"
        return [Problem("cache.dir", folder, rule, cure)]
    names = {"": identity.get("name"), **identity.get("further", {})}
    stale = sum(
        count
        for prefix, counts in index.note("identities").items()
        for name, count in counts.items()
        if name not in (names.get(prefix), STALE)  # the latter are bad, and told as such
    )
    if stale:
        rule = f"holds {stale} latents of other settings than the cache job's last ones: it has not come to its end"
        return [Problem("cache.dir", folder, rule, "run bash launch/cache.sh again")]
    return []


def _describe_rule(rule: BucketRule) -> str:
    if rule.fixed:
        return f"data.buckets {[list(size) for size in rule.fixed]}"
    sides = f"data.resolution_px {rule.resolution_px}, buckets of {rule.min_px} to {rule.max_px} px by {rule.step_px}"
    return f"{sides}, no_upscale" if rule.no_upscale else sides


def check_copies(config: Config, index: Index) -> list[Problem]:
    """Whether the copies of two windows of shards have room: the one that is read, and the next."""
    settings = config.data.remote_shards
    if not settings.shuffle_shards:
        return []
    names = index.group_by_shard().names
    if not any(map(is_remote, names)):
        return []
    ends = np.nan_to_num(index.column("bytes")) + np.nan_to_num(index.column("offset"))
    needed_gb = 2 * min(settings.shuffle_shards, len(names)) * float(ends.max()) / 1e9
    if needed_gb <= settings.copies_gb:
        return []
    rule = f"is less than two windows of data.remote_shards.shuffle_shards shards take: {needed_gb:.3g} GB"
    return [Problem("data.remote_shards.copies_gb", settings.copies_gb, rule, "raise it, or lower shuffle_shards")]


def check_flip(config: Config, index: Index) -> list[Problem]:
    """Whether `data.flip_rate` has latents of mirrored images to work with; some may lack them."""
    if config.data.flip_rate == 0:
        return []
    unflipped = count_unflipped(index, get_cache_folder(config))
    if unflipped == len(index):
        rule = "no sample has latents of its mirrored image (a mirrored latent is not one)"
        cure = "set cache.flip: true and run bash launch/cache.sh, or data.flip_rate: 0"
        return [Problem("data.flip_rate", config.data.flip_rate, rule, cure)]
    if unflipped:
        logger.warning(
            "{} of {} samples have no latents of the mirrored image and are never flipped", unflipped, len(index)
        )
    return []


def leave_out_bad(config: Config, index: Index, resuming: bool) -> None:
    """Check latents, name bad ones in `logs/bad_samples.jsonl`, and note the rows of a new run to leave out.

    Raises:
        RuntimeError: too many are bad.
    """
    bad = find_bad_latents(index, get_cache_folder(config), config.data.verify_latents)
    keys = index.arrow_column("key")
    named = [*index.note("bad"), *((keys[row].as_py(), reason) for row, reason in bad)]
    logs, left_out = config.run.folder / "logs", get_left_out_file(config, index)
    if named:
        logs.mkdir(parents=True, exist_ok=True)
        with open(logs / "bad_samples.jsonl", "ab") as file:
            for key, reason in named:
                file.write(orjson.dumps({"step": 0, "key": key, "reason": reason}) + b"\n")
        logger.warning(
            "{} bad latents are left out, {} first; see {}", len(named), named[0][1], logs / "bad_samples.jsonl"
        )
    if len(named) > config.data.max_bad_fraction * (len(index) + len(index.note("bad"))):
        raise FailedError(
            f"{len(named)} of {len(index)} latents are bad, more than data.max_bad_fraction = "
            f"{config.data.max_bad_fraction:g}; they are named in {logs / 'bad_samples.jsonl'}"
        )
    if not resuming or not left_out.is_file():
        left_out.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(left_out) as file:
            np.save(file, np.array([row for row, _ in bad], np.int64))


def get_left_out_file(config: Config, index: Index) -> Path:
    """Rows of the index that a run does not use, found bad when the run, or its going on with these data, began."""
    return config.run.folder / f"left_out-{index.hash_rows()}.npy"


def leave_out_rows(config: Config, index: Index, repeats: np.ndarray | None) -> np.ndarray | None:
    """[N] how often each row is used, 0 for those that were found bad; None if each is used once."""
    file = get_left_out_file(config, index)
    rows = np.load(file, allow_pickle=False) if file.is_file() else np.empty(0, np.int64)
    if not len(rows):
        return repeats
    used = np.ones(len(index)) if repeats is None else repeats.astype(np.float64)
    used[rows] = 0
    return used


def _refuse_uncaptioned(index: Index, number: int) -> Problem:
    rows = np.flatnonzero(~index.column("captioned"))[:MAX_SHOWN]
    shown = ", ".join(str(index.arrow_column("key")[row]) for row in rows.tolist()) + (
        ", ..." if number > MAX_SHOWN else ""
    )
    cure = "give them captions, or set data.on_missing_caption: skip, or empty"
    return Problem("data.on_missing_caption", "error", f"{number} records have no caption: {shown}", cure)
