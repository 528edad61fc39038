"""The cache job: check, see what there is to do, encode it on all ranks, report."""

import shutil
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
from loguru import logger

from sdxl_trainer.cache.encode.background_writer import BackgroundWriter
from sdxl_trainer.cache.encode.cache_setup import build_identities, lock_cache, open_checked_index, write_identities
from sdxl_trainer.cache.encode.encode_plan import (
    STATES,
    EncodePlan,
    EncodePlanner,
    PlanTotals,
    Resolution,
    TextRequirement,
    build_share,
)
from sdxl_trainer.cache.encode.estimate import Estimate, describe_seconds, estimate_work
from sdxl_trainer.cache.encode.latent_encoder import VaeEncoder, build_vae_encoder
from sdxl_trainer.cache.encode.pipeline import Pipeline, TextJob
from sdxl_trainer.cache.encode.progress import ProgressReporter, RankProgress, write_report
from sdxl_trainer.cache.encode.storage import NpzStorage, ShardStorage, Storage, recover_shards
from sdxl_trainer.cache.encode.text_caching import (
    build_text_requirement,
    compute_text_identity,
    is_text_state_valid,
    load_text_job,
    save_text_state,
)
from sdxl_trainer.cache.models.encoders import hash_weights, load_vae
from sdxl_trainer.cache.models.source import resolve_model
from sdxl_trainer.cache.upkeep.repack import tidy_shards
from sdxl_trainer.cache.upkeep.verify import verify_entries
from sdxl_trainer.configs.problems import FailedError, Problem, raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.allocator import keep_freed_memory
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.formats.manifest import (
    ManifestEntry,
    ManifestWriter,
    drop_damaged_lines,
    read_entries,
    read_latest,
)
from sdxl_trainer.data.images.masks import MaskFinder, check_masks
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import build_bucket_rules, get_cache_folder
from sdxl_trainer.launch.distributed import (
    Ranks,
    barrier,
    broadcast_object,
    close_ranks,
    gather_objects,
    init_ranks,
    read_environment,
)
from sdxl_trainer.launch.logger import init_logger
from sdxl_trainer.launch.signals import Interrupted, StopRequest


@dataclass(frozen=True)
class RankResult:
    """What one rank did."""

    progress: RankProgress
    bad: list[dict[str, str]]
    interrupted: int | None = None  # signal number


def run_job(config: Config, problems: list[Problem], dry_run: bool = False, repair: bool = False) -> None:
    """Encode whatever is not in the cache, or not true any more; with `repair`, just what is there and bad or stale.

    Raises:
        UserInputError: anything wrong with the user's settings or data, all of it at once.
        FailedError: the disk is full, or more images are bad than `data.max_bad_fraction` allows.
        Interrupted: a stop signal came; everything encoded by then is in the cache.
    """
    rank, _, _ = read_environment()
    keep_freed_memory()
    stop = StopRequest()
    folder = get_cache_folder(config)
    init_logger(rank, config.log.level, folder / "logs", "cache")
    masks = config.data.masks
    # the other ranks wait for it in init_ranks
    path = open_checked_index(config, [*problems, *check_masks(masks)]).path if rank == 0 else None
    ranks = init_ranks(config.engine.timeout_minutes)
    index = Index(broadcast_object(path))
    vae = load_vae(resolve_model(config.model), config.model)
    identities = build_identities(config.cache, config.data, hash_weights(vae))
    text = agree_on_text(config, folder, ranks)
    with lock_cache(folder) if ranks.is_main and not dry_run else nullcontext():
        shares = [
            build_share(index, Resolution(rule, identities[prefix], prefix), ranks.rank, ranks.world_size)
            for prefix, rule in build_bucket_rules(config.data).items()
        ]
        own = frozenset(key for share in shares for key in share.keys)
        entries, lines_lost = open_cache(folder, ranks, own, repair, dry_run)
        beside = config.cache.dir is None
        known_only = repair and not lines_lost
        finder = None if masks is None else MaskFinder(masks)
        planner = EncodePlanner(index, folder, entries, beside=beside, text=text, known_only=known_only, masks=finder)
        plans = [planner.plan(share) for share in shares]
        announce(config, folder, index, gather_objects([plan.totals for plan in plans]), ranks)
        encoder = build_vae_encoder(config.cache, vae, ranks.device)
        captioner = start_captioning(config, plans, text, ranks, dry_run)
        announce_time(estimate_work(plans, encoder, captioner, config.cache), ranks)
        if not dry_run:
            if ranks.is_main:
                write_identities(folder, identities)
            result = encode_work(config, plans, (encoder, captioner), ranks, stop)
            finish(config, folder, len(index) * len(plans), gather_objects(result), ranks)
        elif ranks.is_main:
            logger.info("dry run: all is well up to the first image; nothing was written")
    close_ranks()


def agree_on_text(config: Config, folder: Path, ranks: Ranks) -> TextRequirement | None:
    """The text encoder outputs that are wanted, the same on all ranks; None if `cache.text` is off."""
    if not config.cache.text:
        return None
    model, data, cache = config.model, config.data, config.cache
    own = compute_text_identity(model, data.max_tokens, cache.dtype, folder) if ranks.is_main else None
    return build_text_requirement(model, data, cache, broadcast_object(own))


def open_cache(
    folder: Path, ranks: Ranks, keys: Container[str], repair: bool, dry_run: bool
) -> tuple[Mapping[str, ManifestEntry], bool]:
    """(newest entry of each of this rank's keys, whether lines of the manifest were damaged, if it was to be repaired).

    Rank 0 first finishes what a killed job left, and with `repair` reads every byte. An item found bad is given an
    identity that no settings have, so that it counts as stale, and bad text is taken off the list. A dry run only
    looks: another job may be at work.
    """
    bad: dict[str, str] = {}
    damaged: list[str] = []
    if ranks.is_main and not dry_run:
        clear_leftovers(folder)
    if ranks.is_main and repair:
        entries = read_latest(folder, damaged)
        result = verify_entries(folder, entries)
        bad = result.bad
        for reason in result.reasons:
            logger.warning("bad item is encoded again: {}", reason)
        if not dry_run:
            drop_damaged_lines(folder)
            list_again(folder, [replace(entries[key], text=None) for key in result.bad_text])
    bad, lines_lost = broadcast_object((bad, bool(damaged)))
    entries = read_latest(folder, keys=keys)
    return {key: entry.as_stale() if key in bad else entry for key, entry in entries.items()}, lines_lost


def list_again(folder: Path, entries: Sequence[ManifestEntry]) -> None:
    """Append lines that hold from now on."""
    manifest = ManifestWriter(folder, 0)
    for entry in entries:
        manifest.append(entry)
    manifest.close()


def clear_leftovers(folder: Path) -> None:
    """Finish the shards that a killed job left, and delete the files that it was writing."""
    for shard in recover_shards(folder, read_entries(folder)):
        logger.info("finished {}, which an interrupted job had left", shard)
    for place in (folder, *folder.glob("*px")):  # folders of further resolutions
        for file in place.glob(".*.tmp"):
            file.unlink()


def announce(config: Config, folder: Path, index: Index, shares: list[list[PlanTotals]], ranks: Ranks) -> None:
    """Say what is found, valid and to do, and stop if it cannot fit on the disk.

    Raises:
        UserInputError: too little space.
    """
    totals = [each for share in shares for each in share]
    if ranks.is_main:
        counts = sum((each.counts for each in totals), Counter())
        needed, free = sum(each.bytes_needed for each in totals), shutil.disk_usage(folder).free
        to_do = sum(each.num_items for each in totals)
        states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
        logger.info("{} images ({}); {} to do on {} ranks", len(index), states, to_do, ranks.world_size)
        if config.data.masks is not None:
            tell_masks(config.data.masks, counts["masked"], len(index))
        if counts["text"]:
            logger.info("captions of {} images are to be encoded", counts["text"])
        logger.info("about {:.1f} MB to write, {:.1f} GB free in {}", needed / 1e6, free / 1e9, folder)
        raise_if_any(
            [
                Problem(
                    "cache.dir",
                    folder,
                    f"has {free:,} bytes free and the latents need about {needed:,}",
                    "free some space, give another cache.dir, or cache.dtype: float16",
                )
            ]
            if needed > free
            else []
        )
    barrier()


def announce_time(own: Estimate, ranks: Ranks) -> None:
    """Say how long the slowest rank will take, by its own trial."""
    slowest = max(gather_objects(own), key=lambda estimate: estimate.seconds)
    if ranks.is_main and slowest.seconds:
        whole, decode, encode, text = map(
            describe_seconds,
            (
                slowest.seconds,
                slowest.decode_seconds,
                slowest.encode_seconds,
                slowest.text_seconds,
            ),
        )
        captions = f", captions {text}" if slowest.text_seconds else ""
        logger.info("estimated time: {} (images {}{}; decoding at the same time {})", whole, encode, captions, decode)


def tell_masks(masks: str, num_masked: int, num_images: int) -> None:
    """Say how many images have a mask file.

    Raises:
        UserInputError: not one.
    """
    cure = "check it: as a folder it holds masks with the images' stems, else masks lie beside the images"
    raise_if_any([Problem("data.masks", masks, "names the mask of no image", cure)] if not num_masked else [])
    others = num_images - num_masked
    logger.info("{} images have a mask; the loss of the {} others counts everywhere", num_masked, others)


def start_captioning(
    config: Config, plans: list[EncodePlan], text: TextRequirement | None, ranks: Ranks, dry_run: bool
) -> TextJob | None:
    """The text encoders, loaded only on ranks that have captions to encode, and where `text.json` is out of date.

    It is brought up to date here, except by a dry run.
    """
    folder = get_cache_folder(config)
    if text is None:
        return None
    out_of_date = ranks.is_main and not is_text_state_valid(folder, text.identity)
    if not (out_of_date or any(plan.has_captions for plan in plans)):
        return None
    job = load_text_job(config.model, config.data, config.cache, text.identity, ranks.device)
    if out_of_date and not dry_run:
        save_text_state(folder, text.identity, job, config.model)
    return job


def encode_work(
    config: Config,
    plans: list[EncodePlan],
    encoders: tuple[VaeEncoder, TextJob | None],
    ranks: Ranks,
    stop: StopRequest,
) -> RankResult:
    """Encode this rank's items. A stop signal ends the work between two batches, with all that was encoded written."""
    folder, cache, bad = get_cache_folder(config), config.cache, []
    reporter = ProgressReporter(ranks, sum(plan.num_items for plan in plans))

    def report_bad(key: str, file: str, reason: str) -> None:
        bad.append({"key": key, "file": file, "reason": reason})
        logger.warning("bad image skipped: {}", reason)

    manifest = ManifestWriter(folder, ranks.rank)
    for plan in plans:
        for entry in plan.refreshed:
            manifest.append(entry)
    writer = BackgroundWriter(build_storage(config, folder, ranks.rank), manifest)
    interrupted = None
    try:
        for plan in plans:
            pipeline = Pipeline(
                encoder=encoders[0],
                writer=writer,
                rule=plan.rule,
                identity=plan.identity,
                batch_size=cache.batch_size,
                num_workers=cache.num_workers,
                progress=reporter.progress,
                report_bad=report_bad,
                check_stop=stop.raise_if_received,
                text=encoders[1],
                with_alpha=cache.alpha_mask,
            )
            pipeline.run(plan.items, plan.texts)
    except Interrupted as request:
        interrupted = request.signal_number
    finally:
        reporter.close()
        try:
            writer.close()
        except OSError as error:
            raise FailedError(
                f"{folder}: {error.strerror}. What the manifest lists is whole; mend that and run "
                f"the same command again"
            ) from error
    reporter.progress.bytes_written = writer.bytes_written
    return RankResult(reporter.progress, bad, interrupted)


def build_storage(config: Config, folder: Path, rank: int) -> Storage:
    """Where items go, by `cache.format`."""
    if config.cache.format == "npz":
        return NpzStorage(folder, config.cache.dtype)
    return ShardStorage(folder, config.cache.dtype, rank, config.cache.shard_mb * 1_000_000)


def finish(config: Config, folder: Path, num_images: int, results: list[RankResult], ranks: Ranks) -> None:
    """Tidy up, report, and end as the work ended.

    Raises:
        Interrupted: a rank was stopped by a signal.
        FailedError: too many images were bad (on rank 0, which speaks for all).
    """
    signals = [result.interrupted for result in results if result.interrupted is not None]
    bad = [line for result in results for line in result.bad]
    file = folder / "logs" / "bad_samples.jsonl"
    if ranks.is_main:
        write_atomic(file, b"".join(orjson.dumps(line) + b"\n" for line in bad))
        if not signals:
            tidy(config, folder)
        write_report(folder, [result.progress for result in results], read_latest(folder))
    barrier()
    if signals:
        close_ranks()
        raise Interrupted(signals[0])
    if ranks.is_main and len(bad) > config.data.max_bad_fraction * num_images:
        raise FailedError(
            f"{len(bad)} of {num_images} images are bad, more than data.max_bad_fraction = "
            f"{config.data.max_bad_fraction:g}; they are named in {file}; all others are cached. Mend or remove "
            "them and run the same command again, or raise data.max_bad_fraction"
        )


def tidy(config: Config, folder: Path) -> None:
    """Take out of the shards what has been encoded again."""
    manifest = ManifestWriter(folder, 0)
    storage = ShardStorage(folder, config.cache.dtype, 0, config.cache.shard_mb * 1_000_000)
    for shard in tidy_shards(folder, read_latest(folder), storage, manifest):
        logger.info("{} was out of date in parts and is replaced", shard)
    manifest.close()
