"""The cache job on one rank: what is to do, the networks, the pipeline, the report."""

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import torch
from loguru import logger

from sdxl_trainer.cache.encoders import hash_weights, load_vae
from sdxl_trainer.cache.model_source import check_model, resolve_model
from sdxl_trainer.cache.pipeline import WorkItem, encode_items
from sdxl_trainer.cache.writer import LatentWriter
from sdxl_trainer.configs.problems import Problem, raise_if_any
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.check import check_records, get_bucket_rule, get_cache_folder
from sdxl_trainer.data.files import write_atomic
from sdxl_trainer.data.index import Index
from sdxl_trainer.data.manifest import Entry, Identity, ManifestWriter, read_entries, read_identity, write_identity
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

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RankReport:
    """What one rank did."""

    num_encoded: int
    num_bad: int
    bytes_written: int
    seconds: float


def run_job(config: Config, problems: list[Problem], dry_run: bool = False) -> None:
    """Check the settings, then encode whatever is not in the cache yet.

    Raises:
        UserInputError: anything wrong with the user's settings or data, all of it at once.
        RuntimeError: more bad pictures than `data.max_bad_fraction` allows.
    """
    folder = get_cache_folder(config)
    rank, _, _ = read_environment()
    init_logger(rank, config.log.level, folder / "logs", "cache")
    if rank == 0:  # the others wait for it in init_ranks, so storage is asked once and a mistake is reported once
        index, found = check_records(config)
        raise_if_any([*problems, *found, *check_model(config.model)])
        assert index is not None, "records without problems have an index"
        logger.info("{} pictures in {} listed", len(index), index.path.parent.parent)
    ranks = init_ranks()
    index = Index(broadcast_object(index.path if rank == 0 else None))  # pyright: ignore[reportPossiblyUnbound]
    items, total = assign_items(config, index, ranks)
    logger.info("{} valid already, {} to do here", total - len(items), len(items))
    if not dry_run:
        reports = gather_objects(fill_cache(config, items, folder, ranks))
        if ranks.is_main:
            finish_report(config, folder, reports)
    close_ranks()


def assign_items(config: Config, index: Index, ranks: Ranks) -> tuple[list[WorkItem], int]:
    """This rank's pictures that are not in the cache yet, and how many it was assigned in all.

    The share is decided by position in the full list before looking at what exists, so ranks never overlap.
    """
    done = {entry.key for entry in read_entries(get_cache_folder(config))}
    keys, images = index.strings("key"), index.strings("image_path")
    mine = range(ranks.rank, len(index), ranks.world_size)
    beside = config.cache.dir is None
    items = []
    for row in mine:
        key, image = keys[row].as_py(), images[row].as_py()
        if key not in done:
            items.append(WorkItem(key, image, str(Path(image).with_suffix(".npz")) if beside else f"{key}.npz"))
    return items, len(mine)


def fill_cache(config: Config, items: list[WorkItem], folder: Path, ranks: Ranks) -> RankReport:
    """Encode this rank's pictures into the cache."""
    folder.mkdir(parents=True, exist_ok=True)
    vae = load_vae(resolve_model(config.model), config.model)
    claim_folder(config, folder, hash_weights(vae), ranks)
    vae = vae.to(ranks.device, PRECISIONS[config.cache.vae_precision])
    started, bad, progress = time.monotonic(), [], Progress(len(items))

    def report_bad(item: WorkItem, reason: str) -> None:
        bad.append({"key": item.key, "file": item.image_path, "reason": reason})
        logger.warning("bad picture skipped: {}", reason)

    manifest = ManifestWriter(folder, ranks.rank)
    writer = LatentWriter(folder, manifest)
    try:
        encode_items(
            items,
            vae,
            get_bucket_rule(config),
            writer,
            batch_size=config.cache.batch_size,
            num_workers=config.cache.num_workers,
            dtype=config.cache.dtype,
            posterior=config.cache.posterior,
            report_bad=report_bad,
            report_done=progress.advance,
        )
    finally:
        writer.close()
        manifest.close()
        lines = b"".join(orjson.dumps(line) + b"\n" for line in bad)
        write_atomic(folder / "logs" / f"bad_samples-{ranks.rank:05d}.jsonl", lines)
    return RankReport(writer.num_written, len(bad), writer.bytes_written, time.monotonic() - started)


def claim_folder(config: Config, folder: Path, vae_sha256: str, ranks: Ranks) -> None:
    """Write the cache's identity, or stop if the folder holds a cache of another one."""
    rule = get_bucket_rule(config)
    identity = Identity(
        vae_sha256,
        config.cache.dtype,
        config.cache.posterior,
        rule.resolution_px,
        rule.min_px,
        rule.max_px,
        rule.step_px,
        rule.no_upscale,
    )
    if ranks.is_main:
        known = read_identity(folder)
        if known is None:
            write_identity(folder, identity)
        else:
            differing = [
                f"{key} was {known.get(key)}, is {value}"
                for key, value in asdict(identity).items()
                if known.get(key) != value
            ]
            raise_if_any(
                Problem(
                    "cache.dir",
                    folder,
                    f"holds a cache made otherwise: {difference}",
                    "give another cache.dir, or remove this one",
                )
                for difference in differing
            )
    barrier()


def finish_report(config: Config, folder: Path, reports: list[RankReport]) -> None:
    """Log and write what the job did.

    Raises:
        RuntimeError: too many pictures were bad.
    """
    entries: dict[str, Entry] = {entry.key: entry for entry in read_entries(folder)}
    buckets = Counter(f"{entry.bucket[0]}x{entry.bucket[1]}" for entry in entries.values())
    encoded, bad = sum(r.num_encoded for r in reports), sum(r.num_bad for r in reports)
    seconds = max(r.seconds for r in reports)
    report = {
        "cached": len(entries),
        "encoded": encoded,
        "bad": bad,
        "seconds": seconds,
        "bytes_written": sum(r.bytes_written for r in reports),
        "images_per_second": encoded / max(seconds, 1e-9),
        "buckets": dict(sorted(buckets.items())),
        "ranks": [asdict(r) for r in reports],
    }
    write_atomic(folder / "cache_report.json", orjson.dumps(report, option=orjson.OPT_INDENT_2))
    logger.info(
        "{} latents in {} ({} new in {:.1f} s, {} bad), buckets: {}",
        len(entries),
        folder,
        encoded,
        seconds,
        bad,
        ", ".join(f"{size} {count}" for size, count in sorted(buckets.items())),
    )
    if bad > config.data.max_bad_fraction * (encoded + bad):
        raise RuntimeError(
            f"{bad} of {encoded + bad} pictures are bad, more than data.max_bad_fraction = "
            f"{config.data.max_bad_fraction:g}; they are named in {folder / 'logs'}/bad_samples-*.jsonl"
        )


class Progress:
    """Says on the console how far a rank is, every few seconds."""

    def __init__(self, total: int, every_seconds: float = 10.0):
        self._total, self._every = total, every_seconds
        self._done, self._started = 0, time.monotonic()
        self._next = self._started + every_seconds

    def advance(self, count: int) -> None:
        """Count `count` more pictures."""
        self._done += count
        now = time.monotonic()
        if now >= self._next:
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate
            logger.info("{} of {} pictures, {:.1f}/s, {:.0f} s left", self._done, self._total, rate, left)
            self._next = now + self._every
