"""The data of a run: rows to train on and their repeats, the validation set, and the stream of micro batches."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from loguru import logger

from sdxl_trainer.configs.problems import Problem, UserInputError, format_count, raise_if_any
from sdxl_trainer.configs.schema import Config, TrainConfig, ValidationConfig
from sdxl_trainer.data.checks.left_out import load_left_out_rows
from sdxl_trainer.data.checks.validation_set import derive_validation_config, find_held_out_rows, open_validation_set
from sdxl_trainer.data.formats.latents import compute_shape
from sdxl_trainer.data.images.bucket import Size
from sdxl_trainer.data.index.index import Index
from sdxl_trainer.data.loading.dataset import LatentDataset
from sdxl_trainer.data.loading.loader import build_dataset, build_plan, iterate_batches, iterate_specs
from sdxl_trainer.data.loading.micro_batch import MicroBatch, MicroSpec
from sdxl_trainer.data.order.plan import Plan, Position
from sdxl_trainer.data.order.regularisation import balance_regularisation, find_regularisation_rows
from sdxl_trainer.data.order.source_weights import apply_data_repeats
from sdxl_trainer.data.order.split import exclude_rows, hash_keys
from sdxl_trainer.data.text.strategy import Strategy, load_repeats
from sdxl_trainer.launch.activity import ACTIVITY
from sdxl_trainer.launch.distributed import Ranks, broadcast_object
from sdxl_trainer.train.checkpoint.state import TrainState
from sdxl_trainer.train.objective.objective import Objective, SampleKeys
from sdxl_trainer.train.run.checks import check_regularisation_settings, get_repeats_file

READ_AHEAD = 4  # micro batches of the validation set that are read in advance


@dataclass(frozen=True)
class DataSplit:
    """The rows to train on and the rows to validate on.

    Args:
        plan: the order of training batches.
        repeats: [rows of the training index] how often each row is used in an epoch; None for once each.
        validation_index: the training index, or that of a validation set with its own metadata.
        validation_rows: rows of `validation_index`, in order of preference; None for all.
    """

    plan: Plan
    repeats: np.ndarray | None
    validation_index: Index
    validation_rows: np.ndarray | None


def split_data(config: Config, index: Index, strategy: Strategy | None, ranks: Ranks) -> DataSplit:
    """Hold out the validation samples and plan the training batches; the same on all ranks."""
    ACTIVITY.enter("dividing the data")
    opened = open_validation_set(config).index if ranks.is_main else None
    path = broadcast_object(opened and opened.path)
    own_index = Index(path) if path else None
    held_out = find_held_out_rows(config.validation, index, own_index)
    repeats = combine_repeats(config, index, held_out, strategy, ranks)
    shuffle_shards = config.data.remote_shards.shuffle_shards
    plan = build_plan(index, config.train.global_batch_size, config.run.seed, repeats, shuffle_shards)
    return DataSplit(
        plan=plan,
        repeats=repeats,
        validation_index=own_index or index,
        validation_rows=None if own_index else held_out,
    )


def count_run_steps(train: TrainConfig, plan: Plan, state: TrainState) -> int:
    """Return the number of steps of a whole run: `train.max_steps`, or those that `train.max_epochs` complete.

    It depends on the data and the global batch size, and not on the ranks. If the data have changed since a checkpoint,
    the epochs that remain have as many steps as the new data give.

    Raises:
        UserInputError: the epochs do not complete one global batch.
    """
    if train.max_epochs is None:
        return train.num_steps
    num_steps = state.step + plan.count_batches(Position(state.epoch, state.index), train.max_epochs)
    if not num_steps:
        rule = f"is too few: the training set does not fill one global batch of {train.global_batch_size} by then"
        cure = "raise it, lower train.global_batch_size, or set train.max_steps instead"
        raise UserInputError([Problem("train.max_epochs", train.max_epochs, rule, cure)])
    return num_steps


def combine_repeats(
    config: Config, index: Index, held_out: np.ndarray, strategy: Strategy | None, ranks: Ranks
) -> np.ndarray | None:
    """Return how often each row is used in an epoch, [rows], or None for once each.

    The repeats are the strategy's times the weight of the row's source. Bad and held-out rows have 0, and
    regularisation samples are repeated as `data.regularisation_repeats` asks.

    Raises:
        UserInputError: there are settings for regularisation samples, but no such samples.
    """
    repeats = load_repeats(get_repeats_file(config.run)) if strategy and strategy.has("repeats") else None
    if len(held_out):
        logger.info("validation: {} of {} samples are held out of training", len(held_out), len(index))
    elif config.validation.share:
        cure = "give validation.metadata or validation.image_dirs to validate on other samples"
        logger.info("validation is off: {} samples are too few to hold some out; {}", len(index), cure)
    repeats = exclude_rows(load_left_out_rows(config.run.folder, index), len(index), repeats)
    repeats = exclude_rows(held_out, len(index), repeats)
    repeats = apply_data_repeats(index, repeats, config.data)
    regularisation = broadcast_object(find_regularisation_rows(index) if ranks.is_main else None)
    raise_if_any(check_regularisation_settings(config, len(regularisation)))
    return balance_regularisation(regularisation, len(index), repeats, config.data.regularisation_repeats)


def start_loader(
    config: Config,
    dataset: LatentDataset,
    plan: Plan,
    state: TrainState,
    ranks: Ranks,
    objective: Objective,
) -> Iterator[MicroBatch]:
    """Return this rank's micro batches from the state's position on, without end. The workers start at once.

    Args:
        objective: may draw the noise of each micro batch as soon as a worker is asked for it.
    """
    if config.data.num_workers:
        logger.info("starting {} on each rank", format_count(config.data.num_workers, "data worker"))
    specs = iterate_specs(
        plan,
        Position(state.epoch, state.index),
        ranks.rank,
        ranks.world_size,
        config.train.micro_batch_size,
        state.step,
    )
    specs = request_noise(specs, objective, config.run.seed, dataset.settings.latent_channels)
    return iterate_batches(dataset, specs, config.data.num_workers, pin_memory=ranks.device.type == "cuda")


def request_noise(
    specs: Iterator[MicroSpec], objective: Objective, seed: int, latent_channels: int
) -> Iterator[MicroSpec]:
    """Yield the specs of micro batches, and request the noise that the objective will need for each."""
    for spec in specs:
        shape = compute_shape(spec.bucket, latent_channels)
        objective.request_noise(shape, SampleKeys(seed, spec.step, spec.positions.tolist()))
        yield spec


@dataclass(frozen=True)
class ValidationSet:
    """The samples that are validated on, in micro batches that do not depend on the number of ranks."""

    dataset: LatentDataset
    batches: list[MicroSpec]  # each of one bucket
    ids: np.ndarray  # [rows of the index] int64, the keys of each row's random numbers
    config: ValidationConfig
    encode_missing: Callable[[MicroBatch], None] | None  # fills in latents that are not cached yet

    def read(self, specs: Sequence[MicroSpec]) -> Iterator[MicroBatch]:
        """Yield micro batches in order, with all their latents."""
        for batch in self._read_ahead(specs):
            if self.encode_missing is not None:
                self.encode_missing(batch)
            yield batch

    def _read_ahead(self, specs: Sequence[MicroSpec]) -> Iterator[MicroBatch]:
        """Yield micro batches in order; one thread reads the next ones, because a dataset serves a single reader."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting = deque()
            for spec in specs:
                waiting.append(pool.submit(self.dataset.__getitem__, spec))
                if len(waiting) > READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def build_validation_set(
    config: Config,
    split: DataSplit,
    trained: LatentDataset,
    encode_missing: Callable[[MicroBatch], None] | None,
) -> ValidationSet | None:
    """Build the validation set from the first `validation.max_samples` rows of the split.

    If the split lists no rows, it takes all rows in the order of their keys' hashes.

    Args:
        trained: the dataset of the training set, whose tokenizers and strategy are used.

    Returns:
        The validation set, or None if nothing is held out.
    """
    rows, index = split.validation_rows, split.validation_index
    if rows is not None and len(rows) == 0:
        return None
    channels = trained.settings.latent_channels
    dataset = build_dataset(derive_validation_config(config), index, trained.tokenizers, trained.strategy, channels)
    hashes = hash_keys(index.arrow_column("key"), config.validation.seed)
    ids = (hashes >> np.uint64(1)).astype(np.int64)
    rows = np.argsort(hashes, kind="stable") if rows is None else rows
    rows = rows[: config.validation.max_samples]
    return ValidationSet(
        dataset=dataset,
        batches=list_validation_batches(index, rows, ids, config.train.micro_batch_size),
        ids=ids,
        config=config.validation,
        encode_missing=encode_missing,
    )


def list_validation_batches(index: Index, rows: np.ndarray, ids: np.ndarray, batch_size: int) -> list[MicroSpec]:
    """Return micro batches of one bucket each, sorted by bucket and by the rows' ids."""
    widths, heights = (index.column(f"bucket_{side}")[rows] for side in ("width", "height"))
    order = np.lexsort((ids[rows], heights, widths))
    rows, widths, heights = rows[order], widths[order], heights[order]
    batches = []
    for width, height in sorted(set(zip(widths.tolist(), heights.tolist(), strict=True))):
        in_bucket = rows[(widths == width) & (heights == height)]
        for start in range(0, len(in_bucket), batch_size):
            part = in_bucket[start : start + batch_size]
            batches.append(
                MicroSpec(
                    bucket=Size(width, height),
                    rows=part,
                    epochs=np.zeros(len(part), np.int64),
                    positions=np.arange(len(part)),
                )
            )
    return batches
