"""Open the training set, the records that have latents, and check it against the settings."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from loguru import logger

from sdxl_trainer.configs.problems import Problem, format_count, join_reasons
from sdxl_trainer.configs.schema import Config, DataConfig
from sdxl_trainer.data.checks.bad_cures import describe_bad_cure
from sdxl_trainer.data.checks.folders import build_index_problem
from sdxl_trainer.data.checks.latent_files import count_unflipped
from sdxl_trainer.data.checks.records import MAX_NAMED, OpenedIndex, build_source_problem, open_checked_records
from sdxl_trainer.data.checks.unusable_images import UnusableImage, list_unusable_images
from sdxl_trainer.data.formats.manifest import STALE, read_identity
from sdxl_trainer.data.formats.shards import BadShardError
from sdxl_trainer.data.images.bucket import BucketRule, Size
from sdxl_trainer.data.index.index import Index, open_sample_index
from sdxl_trainer.data.index.selection import build_bucket_rules, build_latent_selection, get_cache_folder
from sdxl_trainer.data.order.source_weights import check_weighted_samples


def open_training_set(config: Config) -> OpenedIndex:
    """Open the index of the training set, check it, and log warnings about it.

    Latent files are not read, except the headers of files that no manifest lists; data/checks/left_out.py verifies all.
    """
    records, problems = open_checked_records(config)
    if records is None:
        return OpenedIndex(None, problems)
    folder = get_cache_folder(config)
    try:
        index = open_sample_index(folder, records, build_latent_selection(config))
    except OSError as error:
        return OpenedIndex(None, [*problems, build_index_problem(folder, error)])
    except BadShardError as error:  # a damaged catalogue
        return OpenedIndex(None, [*problems, Problem("data.metadata", config.data.metadata, str(error), "start again")])
    if len(index) == 0:
        return OpenedIndex(None, [*problems, explain_no_latents(config.data, folder, index)])
    num_unflipped = count_unflipped(index, folder) if config.data.flip_rate else 0
    unusable = list_unusable_images(folder, records, index) if count_missing(index) else []
    if config.cache.on_missing == "error":
        problems += check_missing(index, unusable)
    warn_about_samples(index, config.cache.on_missing, unusable)
    warn_about_unflipped(num_unflipped, len(index))
    return OpenedIndex(index, [*problems, *check_training_set(config, index, num_unflipped)])


def explain_no_latents(data: DataConfig, folder: Path, index: Index) -> Problem:
    """Build the problem of a training set without any sample: nothing is cached yet, or nothing can be used."""
    bad = index.summary.bad
    if bad:
        samples = format_count(index.summary.num_bad, "sample")
        rule = f"{bad[0].reason} (sample {bad[0].key}); of {samples} that were found none can be used"
        return build_source_problem(data, rule, describe_bad_cure([reason for _, reason in bad]))
    has_cache = (folder / "cache.json").is_file()
    rule = "holds the latents of none of the records" if has_cache else "holds no latent cache"
    cure = "run bash launch/cache.sh with the same settings first"
    return Problem("cache.dir", folder, rule, cure, is_next_step=not has_cache)


def check_training_set(config: Config, index: Index, num_unflipped: int) -> Iterator[Problem]:
    """Yield the problems of a training set with at least one sample, besides missing latents.

    Args:
        num_unflipped: samples without latents of the mirrored image.
    """
    folder, rule = get_cache_folder(config), build_bucket_rules(config.data)[""]
    yield from check_identity(folder, rule, index)
    yield from check_flip(config.data.flip_rate, num_unflipped, len(index))
    yield from check_weighted_samples(config.data, index)


def check_missing(index: Index, unusable: Sequence[UnusableImage]) -> Iterator[Problem]:
    """Yield a problem if samples have no latents, for `cache.on_missing: error`.

    Args:
        unusable: images of such samples that the cache job could not use.
    """
    if num_missing := count_missing(index):
        rule = f"{num_missing} of {index.summary.num_wanted} samples have no latents"
        cure = "run bash launch/cache.sh, or set cache.on_missing to encode or skip"
        if unusable:
            images = format_count(len(unusable), "image")
            rule = f"{rule}; the cache job could not use {images}:\n      {list_reasons(unusable)}"
            cure = "repair or remove these images and run bash launch/cache.sh, or set cache.on_missing: skip"
        yield Problem("cache.on_missing", "error", rule, cure)


def list_reasons(unusable: Sequence[UnusableImage]) -> str:
    """Return the first reasons why images cannot be used, as lines."""
    return join_reasons([image.reason for image in unusable], MAX_NAMED)


def check_identity(folder: Path, wanted: BucketRule, index: Index) -> Iterator[Problem]:
    """Yield a problem if the cache was made with another bucket rule, or if its last job did not finish."""
    try:
        identity = read_identity(folder)
        if identity is None:  # another program made the latents
            return
        made = BucketRule(
            resolution_px=identity.get("resolution_px", 0),
            min_px=identity.get("min_bucket_px", 0),
            max_px=identity.get("max_bucket_px", 0),
            step_px=identity.get("bucket_step_px", 0),
            no_upscale=identity.get("no_upscale", False),
            fixed=tuple(Size(*bucket) for bucket in identity.get("buckets", ())),
        )
    except (ValueError, TypeError) as error:
        cure = "run bash launch/cache.sh with the same settings, which writes it anew"
        yield Problem("cache.dir", folder, f"holds a damaged cache.json: {error}", cure)
        return
    if made != wanted:
        rule = f"holds latents made with {_describe_rule(made)}, but the settings have {_describe_rule(wanted)}"
        cure = "run bash launch/cache.sh with these settings, or use the cache's settings; another cache.dir keeps both"
        yield Problem("cache.dir", folder, rule, cure)
    elif num_stale := _count_stale(identity, index):
        rule = f"holds {num_stale} latents of other settings, because the last cache job did not finish"
        yield Problem("cache.dir", folder, rule, "run bash launch/cache.sh again")


def check_flip(flip_rate: float, num_unflipped: int, num_samples: int) -> Iterator[Problem]:
    """Yield a problem if `data.flip_rate` is set but no sample has latents of the mirrored image."""
    if flip_rate and num_unflipped == num_samples:
        rule = "no sample has latents of its mirrored image, and mirroring latents does not mirror the image"
        cure = "set cache.flip: true and run bash launch/cache.sh, or data.flip_rate: 0"
        yield Problem("data.flip_rate", flip_rate, rule, cure)


def warn_about_samples(index: Index, on_missing: str, unusable: Sequence[UnusableImage] = ()) -> None:
    """Log how many samples have no latents, and how many have latents that no manifest describes in full.

    Args:
        on_missing: `cache.on_missing`; missing latents are a problem instead of a warning if it is `error`.
        unusable: images of samples without latents that the cache job could not use.
    """
    num_missing = count_missing(index)
    if num_missing and on_missing != "error":
        warn_about_missing(num_missing, index.summary.num_wanted, unusable)
    if index.summary.num_uncached:
        logger.info("{} samples have no latents and are encoded when training reads them", index.summary.num_uncached)
    if index.summary.num_unlisted:
        text = "{} latents of other programs are used as they are; nothing needs doing"
        logger.info(text, index.summary.num_unlisted)
    if index.summary.other_sizes:
        logger.warning("{}: the images' sizes are used", index.summary.other_sizes)
    if index.summary.num_assumed_sizes:
        logger.warning(
            "{} latent files hold no original size: the bucket's size is used", index.summary.num_assumed_sizes
        )


def warn_about_missing(num_missing: int, num_wanted: int, unusable: Sequence[UnusableImage]) -> None:
    """Log how many samples have no latents, and what brings them in: the cache job, or the repair of the images."""
    missing = f"{num_missing} of {num_wanted} samples have no latents and are skipped"
    if not unusable:
        logger.warning("{}; bash launch/cache.sh with the same settings adds them", missing)
        return
    images, reasons = format_count(len(unusable), "image"), list_reasons(unusable)
    if len(unusable) < num_missing:
        text = "{}; repair or remove {}, and bash launch/cache.sh with the same settings adds the others:\n      {}"
    else:
        text = "{}; repair or remove {}, which the cache job could not use:\n      {}"
    logger.warning(text, missing, images, reasons)


def warn_about_unflipped(num_unflipped: int, num_samples: int) -> None:
    """Log how many samples are never flipped, if other samples are."""
    if 0 < num_unflipped < num_samples:
        logger.warning(
            "{} of {} samples have no latents of the mirrored image and are never flipped; bash launch/cache.sh with "
            "cache.flip: true adds them",
            num_unflipped,
            num_samples,
        )


def count_missing(index: Index) -> int:
    """Return the number of samples that the index leaves out because they have no latents."""
    return index.summary.num_wanted - len(index) - index.summary.num_bad


def _count_stale(identity: dict, index: Index) -> int:
    """Return the number of latents of other settings than `identity`. Latents marked STALE count as bad instead."""
    names = {"": identity.get("name"), **identity.get("further", {})}
    return sum(
        count
        for prefix, counts in index.summary.identities.items()
        for name, count in counts.items()
        if name not in (names.get(prefix), STALE)
    )


def _describe_rule(rule: BucketRule) -> str:
    if rule.fixed:
        return f"data.buckets {[list(size) for size in rule.fixed]}"
    sides = f"data.resolution_px {rule.resolution_px}, buckets of {rule.min_px} to {rule.max_px} px by {rule.step_px}"
    return f"{sides}, no_upscale" if rule.no_upscale else sides
