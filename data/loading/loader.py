"""The stream of one rank's micro batches, from any position on, read ahead by worker processes."""

import os
import threading
from collections.abc import Iterator
from multiprocessing import get_all_start_methods, get_context, parent_process
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from sdxl_trainer.configs.schema import Config
from sdxl_trainer.data.allocator import give_freed_memory_back
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.index.selection import build_bucket_rules, get_cache_folder
from sdxl_trainer.data.loading.dataset import LatentDataset, MicroBatch, MicroSpec, SampleSettings
from sdxl_trainer.data.order.plan import Plan, Position
from sdxl_trainer.data.order.shard_plan import ShardPlan
from sdxl_trainer.data.stores.shard_copies import open_copies
from sdxl_trainer.data.text.cached_text import CachedText
from sdxl_trainer.data.text.captions import CaptionSettings
from sdxl_trainer.data.text.strategy import Strategy
from sdxl_trainer.data.text.tokens import SOURCES_VARIABLE, Tokenizers
from sdxl_trainer.data.text.variants import CaptionVariants

PREFETCH_PER_WORKER = 4
PRELOADED_MODULE = "sdxl_trainer.data.loading.preload"


def build_plan(
    index: Index, global_batch_size: int, seed: int, repeats: np.ndarray | None = None, shuffle_shards: int = 0
) -> Plan:
    """The plan over an index of latents, each row `repeats` times an epoch; the bucket is `width << 16 | height`.

    Args:
        shuffle_shards: if not 0, shards come one after the other and samples are mixed over so many (ShardPlan).
    """
    buckets = (index.column("bucket_width").astype(np.int64) << 16) | index.column("bucket_height")
    if not shuffle_shards:
        return Plan(buckets, global_batch_size, seed, repeats)
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
) -> LatentDataset:
    """What the loader's workers read samples from."""
    settings = SampleSettings(
        seed=config.run.seed,
        max_tokens=config.data.max_tokens,
        caption=CaptionSettings(**config.data.caption.model_dump()),
        flip_rate=config.data.flip_rate,
        prior_loss_weight=config.objective.prior_loss_weight,
    )
    rules = build_bucket_rules(config.data)
    folder, copies = get_cache_folder(config), open_copies(config.data.remote_shards, index.path.parent)
    dataset = LatentDataset(index, folder, tokenizers, settings, strategy, rules, copies)
    if config.cache.text:
        variants = CaptionVariants(settings.caption, config.cache.text_variants, strategy)
        dataset.text = CachedText(folder, variants, settings.seed)
    return dataset


def iterate_specs(
    plan: Plan, position: Position, rank: int, world_size: int, micro_batch_size: int, step: int = 0
) -> Iterator[MicroSpec]:
    """What a rank reads, micro step by micro step, without end, from the global batch at `position` on.

    Micro step m of a global batch is its samples [m, m + 1) x ranks x micro batch size, the ranks' shares in order of
    rank; so all ranks work on one bucket at a time, and who reads what does not alter the global batch.
    `step` is the number of optimizer steps done at `position`; each global batch makes one more.
    """
    stride = micro_batch_size * world_size
    assert plan.global_batch_size % stride == 0, "ranks x micro batch size must divide the global batch size"
    position = plan.skip_empty_epochs(position)
    while True:
        batch, shards = plan.batch(position), plan.list_shards(position)
        for start in range(rank * micro_batch_size, plan.global_batch_size, stride):
            share = slice(start, start + micro_batch_size)
            yield MicroSpec(
                (batch.bucket >> 16, batch.bucket & 0xFFFF),
                batch.rows[share],
                batch.epochs[share],
                np.arange(start, start + micro_batch_size),
                step,
                shards,
            )
        position, step = plan.next_position(position), step + 1


def iterate_batches(
    dataset: LatentDataset, specs: Iterator[MicroSpec], num_workers: int, pin_memory: bool = False
) -> Iterator[MicroBatch]:
    """Read micro batches in order. Workers start as soon as this is called.

    They are forked from a server, a fresh process that has loaded what they need once and shares it with all of them:
    as safe as spawning beside a GPU, and each adds a few megabytes and no seconds.
    """
    workers: dict[str, Any] = {}
    if num_workers:
        context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
        os.environ[SOURCES_VARIABLE] = os.pathsep.join(dict.fromkeys(str(each.source) for each in dataset.tokenizers))
        context.set_forkserver_preload([PRELOADED_MODULE])
        workers = dict(
            multiprocessing_context=context, prefetch_factor=PREFETCH_PER_WORKER, worker_init_fn=_settle_worker
        )
    # batch_size None: each item of the sampler is a whole micro batch for one worker.
    loader = DataLoader(
        dataset,
        sampler=_OneWay(specs),
        batch_size=None,
        num_workers=num_workers,  # pyright: ignore
        pin_memory=pin_memory,
        **workers,
    )
    batches = iter(loader)
    os.environ.pop(SOURCES_VARIABLE, None)  # the server has it
    return batches


def _settle_worker(worker: int) -> None:
    end_with_parent()
    # What building CLIP's tokenizer took for a moment, 28 of 42 MB, glibc would keep.
    give_freed_memory_back()


def end_with_parent() -> None:
    """End this process when the one that started it ends, however it does.

    torch's own watch looks at the process that forked the worker. That is the server, and the server lives as long as
    the worker does: both would outlive a rank that was killed.
    """

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


class _OneWay:
    """A sampler over an iterator; DataLoader asks for nothing else when the batch size is None."""

    def __init__(self, specs: Iterator[MicroSpec]):
        self._specs = specs

    def __iter__(self) -> Iterator[MicroSpec]:
        return self._specs
