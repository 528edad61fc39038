"""The stream of one rank's micro batches from any position on, read ahead by worker processes."""

import json
import mmap
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from multiprocessing import forkserver, get_all_start_methods, get_context, parent_process, resource_tracker
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.allocator import release_freed_memory
from sdxl_trainer.data.formats.latents import SDXL_CHANNELS
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import build_bucket_rules, get_cache_folder
from sdxl_trainer.data.loading.dataset import LatentDataset, SampleSettings
from sdxl_trainer.data.loading.micro_batch import MicroBatch, MicroSpec
from sdxl_trainer.data.loading.patches import fail_with_workers, leave_pinning_thread
from sdxl_trainer.data.order.plan import BucketRows, Plan, Position
from sdxl_trainer.data.order.shard_plan import ShardPlan
from sdxl_trainer.data.stores.shard_copies import open_copies
from sdxl_trainer.data.text.cached_text import CachedText
from sdxl_trainer.data.text.captions import build_caption_settings
from sdxl_trainer.data.text.strategy import Strategy
from sdxl_trainer.data.text.tag_rules import RULES_VARIABLE
from sdxl_trainer.data.text.tokens import SOURCES_VARIABLE, Tokenizers
from sdxl_trainer.data.text.variants import CaptionVariants

PREFETCH_PER_WORKER = 4
TERM_PATIENCE_SECONDS = 10.0
# The server imports them in this order: the first one takes no time and protects the imports of the second.
PRELOADED_MODULES = ["sdxl_trainer.data.loading.server_signals", "sdxl_trainer.data.loading.preload"]
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def build_plan(
    index: Index, global_batch_size: int, seed: int, repeats: np.ndarray | None = None, shuffle_shards: int = 0
) -> Plan:
    """Build the order of batches over an index. A bucket's number in the plan is `width << 16 | height`.

    Args:
        repeats: [N] how often each row is used in an epoch; None uses each row once.
        shuffle_shards: number of shards over which samples are shuffled, with shards read one after the other
            (ShardPlan); 0 shuffles all samples.
    """
    if not shuffle_shards:
        members = index.group_by_bucket()
        numbers = [width << 16 | height for width, height in members.buckets]
        starts = np.cumsum([0, *members.counts])
        # Reads a row of each page: a page fault for each sample would take as long as computing the order of a batch.
        members.rows[:: mmap.PAGESIZE // members.rows.itemsize].max(initial=0)
        return Plan(BucketRows(members.rows, numbers, starts), global_batch_size, seed, repeats)
    buckets = (index.column("bucket_width").astype(np.int64) << 16) | index.column("bucket_height")
    shards = index.group_by_shard()
    return ShardPlan(
        buckets,
        shards.shard_of_row,
        shards.names,
        shuffle_shards,
        global_batch_size=global_batch_size,
        seed=seed,
        repeats=repeats,
    )


def build_dataset(
    config: Config,
    index: Index,
    tokenizers: Tokenizers,
    strategy: Strategy | None,
    latent_channels: int = SDXL_CHANNELS,
) -> LatentDataset:
    """Build the dataset of an index of samples, with cached text if `cache.text` is set.

    Args:
        latent_channels: of the VAE; callers that read no latents need not know it.
    """
    data, folder = config.data, get_cache_folder(config)
    settings = SampleSettings(
        seed=config.run.seed,
        max_tokens=data.max_tokens,
        caption=build_caption_settings(data.caption),
        flip_rate=data.flip_rate,
        prior_loss_weight=config.objective.prior_loss_weight,
        latent_channels=latent_channels,
    )
    text = None
    if config.cache.text:
        variants = CaptionVariants(settings.caption, config.cache.text_variants, strategy)
        text = CachedText(folder, variants, settings.seed)
    return LatentDataset(
        index,
        folder,
        tokenizers,
        settings,
        strategy,
        rules=build_bucket_rules(data),
        copies=open_copies(data.remote_shards, index.path.parent),
        text=text,
    )


def iterate_specs(
    plan: Plan, position: Position, rank: int, world_size: int, micro_batch_size: int, step: int = 0
) -> Iterator[MicroSpec]:
    """Yield the specification of each of a rank's micro batches, without end.

    Micro step m of a global batch takes its samples [m, m + 1) x ranks x micro batch size, divided among the ranks in
    their order. All ranks therefore work on one bucket at a time, and the global batch does not depend on their number.

    Args:
        position: position of the first global batch.
        step: optimizer steps done before `position`; each global batch adds one.
    """
    stride = micro_batch_size * world_size
    assert plan.global_batch_size % stride == 0, "ranks x micro batch size must divide the global batch size"
    position = plan.skip_empty_epochs(position)
    while True:
        batch, shards = plan.batch(position), plan.list_shards(position)
        for start in range(rank * micro_batch_size, plan.global_batch_size, stride):
            part = slice(start, start + micro_batch_size)
            yield MicroSpec(
                bucket=Size(batch.bucket >> 16, batch.bucket & 0xFFFF),
                rows=batch.rows[part],
                epochs=batch.epochs[part],
                positions=np.arange(start, start + micro_batch_size),
                step=step,
                shards=shards,
            )
        position, step = plan.next_position(position), step + 1


def iterate_batches(
    dataset: LatentDataset, specs: Iterator[MicroSpec], num_workers: int, pin_memory: bool = False
) -> Iterator[MicroBatch]:
    """Read micro batches in the order of `specs`. The workers start as soon as this is called.

    Workers are forked from a server, a fresh process that loads shared modules and vocabularies once. This is as safe
    beside a GPU as spawning workers, and each worker starts at once and adds only a few megabytes of memory.
    """
    worker_options: dict[str, Any] = {}
    if num_workers:
        context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
        sources = dict.fromkeys(str(tokenizer.source) for tokenizer in dataset.tokenizers)
        os.environ[SOURCES_VARIABLE] = os.pathsep.join(sources)
        if (rules := dataset.settings.caption.rules) is not None:
            os.environ[RULES_VARIABLE] = json.dumps(rules.sources)
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(PRELOADED_MODULES)
            _start_server()
        worker_options = dict(
            multiprocessing_context=context, prefetch_factor=PREFETCH_PER_WORKER, worker_init_fn=_init_worker
        )
    with warnings.catch_warnings():
        # More workers than cores are no fault: they wait for storage most of the time.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = DataLoader(
            dataset,
            sampler=_IteratorSampler(specs),
            batch_size=None,  # a spec is a whole micro batch already
            num_workers=num_workers,  # pyright: ignore
            pin_memory=pin_memory,
            **worker_options,
        )
        batches = iter(loader)
    if num_workers:
        (leave_pinning_thread if pin_memory else fail_with_workers)(batches)
    for variable in (SOURCES_VARIABLE, RULES_VARIABLE):  # the server has read them by now
        os.environ.pop(variable, None)
    return batches


def _start_server() -> None:
    """Start the server of the workers, and multiprocessing's tracker of semaphores, so that both outlast stop signals.

    They inherit blocked signals. The server ignores them from its first module on; the tracker needs none of them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the tracker's start has unblocked two of them
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(worker: int) -> None:
    end_with_parent()
    _outlast_stop_signals()
    # Building CLIP's tokenizer frees 28 of 42 MB, which glibc would keep.
    release_freed_memory()


def end_with_parent() -> None:
    """End this process when its parent ends, even if the parent is killed.

    torch watches the process that forked the worker. Here this is the server, which lives as long as its workers, so
    both would outlive a killed rank.
    """

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _outlast_stop_signals() -> None:
    """Keep serving after a stop signal, which a terminal or Slurm sends to a rank's workers too.

    The rank needs batches to finish its step. It ends workers by SIGTERM itself, so that one is obeyed a little later.
    """

    def end_later(number: int, frame: object) -> None:
        timer = threading.Timer(TERM_PATIENCE_SECONDS, os._exit, (128 + number,))
        timer.daemon = True
        timer.start()

    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)


class _IteratorSampler:
    """Sampler over an iterator: with a batch size of None, DataLoader only iterates over its sampler."""

    def __init__(self, specs: Iterator[MicroSpec]):
        self._specs = specs

    def __iter__(self) -> Iterator[MicroSpec]:
        return self._specs
