"""The cache job: check settings and data, plan the work, encode on all ranks, and report."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from sdxl_trainer.cache.encode.background_writer import BackgroundWriter
from sdxl_trainer.cache.encode.bad_images import (
    BadImages,
    hash_rules,
    report_known,
    write_bad_images,
)
from sdxl_trainer.cache.encode.cache_setup import (
    build_identities,
    open_checked_index,
    start_log,
)
from sdxl_trainer.cache.encode.cache_vae import load_cache_vae
from sdxl_trainer.cache.encode.encode_plan import (
    STATES,
    EncodePlan,
    PlanTotals,
    TextRequirement,
    build_planner,
    build_shares,
    find_moved,
)
from sdxl_trainer.cache.encode.estimate import (
    IMAGES_OF_DRY_RUN,
    Estimate,
    estimate_work,
    report_opened_images,
)
from sdxl_trainer.cache.encode.latent_encoder import VaeEncoder, build_vae_encoder
from sdxl_trainer.cache.encode.pipeline import Pipeline, TextJob
from sdxl_trainer.cache.encode.progress import ProgressReporter, RankProgress, write_cache_report
from sdxl_trainer.cache.encode.storage import clear_item_leftovers
from sdxl_trainer.cache.encode.text_caching import (
    build_text_requirement,
    compute_text_identity,
    is_text_state_valid,
    load_text_job,
)
from sdxl_trainer.cache.upkeep.cache_state import open_cache, write_state
from sdxl_trainer.cache.upkeep.target import CacheTarget, open_target_for_ranks
from sdxl_trainer.configs.problems import (
    FailedError,
    Problem,
    UserInputError,
    describe_seconds,
    format_count,
    raise_if_any,
)
from sdxl_trainer.configs.schema import Config, DataConfig
from sdxl_trainer.data.allocator import keep_freed_memory
from sdxl_trainer.data.checks.bad_limit import are_too_many
from sdxl_trainer.data.formats.manifest import (
    ManifestEntry,
    read_latest,
)
from sdxl_trainer.data.images.masks import check_masks
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import get_cache_folder
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import (
    Ranks,
    broadcast_object,
    close_ranks,
    gather_objects,
    init_ranks,
    read_environment,
    share_problems,
    wait_for_ranks,
)
from sdxl_trainer.launch.signals import Interrupted, StopRequest


@dataclass(frozen=True)
class RankResult:
    """Result of one rank."""

    progress: RankProgress
    bad: list[dict[str, Any]]  # see write_bad_images
    untried: list[dict[str, Any]]  # lines of images that a repair does not try
    interrupted: int | None = None  # number of the signal that stopped the rank


def run_job(
    config: Config, problems: list[Problem], dry_run: bool = False, repair: bool = False, every_byte: bool = False
) -> None:
    """Encode every image that is missing in the cache or stale; with `repair`, only cached items that are bad or stale.

    Args:
        every_byte: with `repair`, read the shards of a cache on a store, instead of comparing the store's checksums.

    Raises:
        UserInputError: settings (`problems`, which are reported alone) or data are wrong; all problems at once.
        FailedError: the disk is full, or more images are bad than `data.max_bad_fraction` allows.
        Interrupted: a stop signal was received; everything encoded by then is in the cache.
    """
    rank = read_environment().rank
    keep_freed_memory()
    raise_if_any(problems if rank == 0 else [])
    folder = start_log(config, rank)
    # The other ranks wait for rank 0 in init_ranks.
    path = open_checked_index(config, list(check_masks(config.data.masks))).path if rank == 0 else None
    # Until here a signal ends the process at once: nothing is lost.
    stop = StopRequest("the work in hand", logger.warning)
    ranks = init_ranks(config.engine.timeout_minutes, stop.raise_if_received)
    index = Index(broadcast_object(path))
    vae = load_cache_vae(config.model, folder, ranks, may_replace=repair)
    identities = build_identities(config.cache, config.data, vae.own)
    text = resolve_text_requirement(config, folder, ranks)
    with open_target_for_ranks(config, ranks, dry_run) as target:
        parts = build_shares(config, index, identities, ranks.rank, ranks.world_size)
        ACTIVITY.enter("opening the cache")
        keys = frozenset(key for part in parts for key in part.keys)
        state = open_cache(target, ranks, keys, config.cache if repair else None, dry_run, every_byte)
        known_only = repair and not state.lines_lost
        entries = state.entries | find_moved(config, index, parts, state.entries, state.bad)
        planner = build_planner(config, index, entries, text, known_only, target.list_stored())
        ACTIVITY.enter("planning the work")
        plans = [planner.plan(part) for part in parts]
        bad = BadImages(folder, hash_rules(config), ranks.world_size)
        bad.leave_out_known(plans, keys if known_only else ())
        shares = gather_objects([plan.totals for plan in plans])
        report_plan_of_ranks(config.data, target, index, shares, ranks)
        ACTIVITY.enter("loading the networks")
        encoder = build_vae_encoder(config.cache, vae.network, ranks.device)
        text_job = prepare_text_job(config, plans, text, ranks)
        num_trials = -(-IMAGES_OF_DRY_RUN // ranks.world_size) if dry_run else 0
        estimates = gather_objects(estimate_work(plans, encoder, text_job, config.cache, num_trials))
        report_estimate(estimates, ranks)
        if not dry_run:
            if ranks.is_main:
                write_state(config, identities, vae.own, text, text_job)
            ACTIVITY.enter("encoding images")
            result = encode_plans(config, plans, encoder, text_job, ranks, stop, bad, target)
            results = gather_objects(result)
            ACTIVITY.enter("finishing the cache")
            finish(config, target, len(index) * len(plans), results, ranks)
        elif ranks.is_main:
            num_known = sum(totals.counts["bad"] for share in shares for totals in share)
            report_opened_images(config.data, estimates, len(index) * len(plans), num_known)
    close_ranks()


def resolve_text_requirement(config: Config, folder: Path, ranks: Ranks) -> TextRequirement | None:
    """Return the required text encoder outputs, the same on all ranks; None if `cache.text` is off."""
    if not config.cache.text:
        return None
    model, data, cache = config.model, config.data, config.cache
    own = compute_text_identity(model, data, cache.dtype, folder) if ranks.is_main else None
    return build_text_requirement(model, data, cache, broadcast_object(own))


def report_plan_of_ranks(
    data: DataConfig, target: CacheTarget, index: Index, shares: Sequence[Sequence[PlanTotals]], ranks: Ranks
) -> None:
    """Log the plan on rank 0, as `report_plan`; raise its problems on all ranks."""
    with share_problems():
        if ranks.is_main:
            report_plan(data, target, index, shares)


def report_plan(data: DataConfig, target: CacheTarget, index: Index, shares: Sequence[Sequence[PlanTotals]]) -> None:
    """Log how many images are cached, how many will be encoded, and the disk space that the latents need.

    Args:
        shares: totals of each rank, by resolution.

    Raises:
        UserInputError: the disk has too little space, or no image has a mask.
    """
    totals = [each for share in shares for each in share]
    counts = sum((each.counts for each in totals), Counter())
    folder, free, needed = target.folder, target.get_free_bytes(), sum(each.bytes_needed for each in totals)
    to_do = sum(each.num_items for each in totals)
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    logger.info("{} images ({}); {} to do on {}", len(index), states, to_do, format_count(len(shares), "rank"))
    report_known(folder, counts["bad"])
    if data.masks is not None:
        report_masks(data.masks, counts["masked"], len(index))
    if counts["text"]:
        logger.info("captions of {} images will be encoded", counts["text"])
    if free is None:
        logger.info("about {:.1f} MB to upload", needed / 1e6)
        return
    logger.info("about {:.1f} MB to write, {:.1f} GB free in {}", needed / 1e6, free / 1e9, folder)
    if needed > free:
        rule = f"has {free:,} bytes free and the latents need about {needed:,}"
        cure = "free some space, choose another cache.dir, or set cache.dtype: float16"
        raise UserInputError([Problem("cache.dir", folder, rule, cure)])


def report_estimate(estimates: Sequence[Estimate], ranks: Ranks) -> None:
    """Log the estimated time of the slowest rank."""
    slowest = max(estimates, key=lambda estimate: estimate.seconds)
    if ranks.is_main and slowest.seconds:
        captions = f", captions {describe_seconds(slowest.text_seconds)}" if slowest.text_seconds else ""
        logger.info(
            "estimated time: {} (images {}{}; decoding at the same time {})",
            describe_seconds(slowest.seconds),
            describe_seconds(slowest.encode_seconds),
            captions,
            describe_seconds(slowest.decode_seconds),
        )


def report_masks(masks: str, num_masked: int, num_images: int) -> None:
    """Log how many images have a mask file.

    Raises:
        UserInputError: no image has one.
    """
    if not num_masked:
        cure = "give a folder whose masks have the stems of the images, or the ending of masks beside the images"
        raise UserInputError([Problem("data.masks", masks, "matches no image's mask", cure)])
    others = num_images - num_masked
    logger.info("{} images have a mask; the loss of the other {} counts everywhere", num_masked, others)


def prepare_text_job(
    config: Config, plans: list[EncodePlan], text: TextRequirement | None, ranks: Ranks
) -> TextJob | None:
    """Load the text encoders on ranks that have captions to encode, and on rank 0 if `text.json` is out of date."""
    if text is None:
        return None
    out_of_date = ranks.is_main and not is_text_state_valid(get_cache_folder(config), text.identity)
    if not (out_of_date or any(plan.has_captions for plan in plans)):
        return None
    return load_text_job(config.model, config.data, config.cache, text.identity, ranks.device)


def encode_plans(
    config: Config,
    plans: list[EncodePlan],
    encoder: VaeEncoder,
    text_job: TextJob | None,
    ranks: Ranks,
    stop: StopRequest,
    bad: BadImages,
    target: CacheTarget,
) -> RankResult:
    """Encode this rank's items. A stop signal ends the work between two batches."""
    folder, cache = target.folder, config.cache
    reporter = ProgressReporter(ranks, sum(plan.num_items for plan in plans))
    reporter.progress.bad = len(bad.lines)
    # An image that a killed job was writing is still to be encoded, so its folder is among these.
    clear_item_leftovers(folder, {item.file for plan in plans for item in (*plan.items, *plan.texts)})
    storage, manifest = target.build_writers(cache, ranks.rank)
    for plan in plans:
        for entry in plan.refreshed:
            manifest.append(entry)

    def skip_item(entry: ManifestEntry, error: OSError) -> None:
        reporter.progress.bad += 1
        reason = f"{entry.source_path}: its files cannot be named after it, as {entry.file} is: {error.strerror}"
        bad.add(entry.key, entry.source_path, ValueError(reason))

    writer = BackgroundWriter(storage, manifest, skip_item)
    interrupted = None
    try:
        for plan in plans:
            pipeline = Pipeline(
                encoder=encoder,
                writer=writer,
                rule=plan.rule,
                identity=plan.identity,
                batch_size=cache.batch_size,
                num_workers=cache.num_workers,
                progress=reporter.progress,
                report_bad=bad.add,
                raise_if_stopped=stop.raise_if_received,
                text=text_job,
                with_alpha=cache.alpha_mask,
            )
            pipeline.run(plan.items, plan.texts)
    except Interrupted as request:
        interrupted = request.signal_number
    finally:
        reporter.close()
        bad.close()
        try:
            writer.close()
        except OSError as error:
            raise FailedError(
                f"{folder}: {error.strerror}. Everything that the manifest lists is whole; solve this and run the same "
                "command again"
            ) from error
    reporter.progress.bytes_written = writer.bytes_written
    return RankResult(reporter.progress, bad.lines, bad.untried, interrupted)


def finish(config: Config, target: CacheTarget, num_images: int, results: list[RankResult], ranks: Ranks) -> None:
    """Replace outdated shards, write the report, and raise if the work was stopped or failed.

    Raises:
        Interrupted: a rank was stopped by a signal.
        FailedError: too many images were bad (raised on rank 0).
    """
    signals = [result.interrupted for result in results if result.interrupted is not None]
    bad = [line for result in results for line in result.bad]
    file, folder = None, target.folder
    if ranks.is_main:
        file = write_bad_images(folder, [*bad, *(line for result in results for line in result.untried)])
        target.finish()
        if not signals:
            target.replace_shards(config.cache)
        write_cache_report(folder, [result.progress for result in results], read_latest(folder))
    wait_for_ranks("the report and the replaced shards")
    if signals:
        close_ranks()
        raise Interrupted(signals[0])
    if ranks.is_main and are_too_many(len(bad), config.data.max_bad_fraction, num_images):
        raise FailedError(
            f"{len(bad)} of {num_images} images are bad, more than data.max_bad_fraction = "
            f"{config.data.max_bad_fraction:g}; they are listed in {file}; all others are cached. Repair or "
            "remove them and run the same command again, or raise data.max_bad_fraction"
        )
