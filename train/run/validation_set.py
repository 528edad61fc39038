"""The samples that are validated on, in micro batches that are the same whatever the number of ranks."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sdxl_trainer.configs.validation import ValidationConfig
from sdxl_trainer.data.loading.dataset import LatentDataset, MicroBatch, MicroSpec
from sdxl_trainer.data.order.split import hash_keys

READ_AHEAD = 4


@dataclass
class ValidationSet:
    """What is validated on."""

    dataset: LatentDataset
    batches: list[MicroSpec]  # each of one bucket
    ids: np.ndarray  # [rows of the index] int64, what a row's draws are keyed to
    config: ValidationConfig
    fill: Callable[[MicroBatch], None] | None = None  # encodes images that have no latents yet

    def read(self, specs: Sequence[MicroSpec]) -> Iterator[MicroBatch]:
        """Micro batches in order."""
        for batch in self._read_ahead(specs):
            if self.fill is not None:
                self.fill(batch)
            yield batch

    def _read_ahead(self, specs: Sequence[MicroSpec]) -> Iterator[MicroBatch]:
        """Micro batches in order, the next ones being read meanwhile, by one thread: a data set is made for one."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting = deque()
            for spec in specs:
                waiting.append(pool.submit(self.dataset.__getitem__, spec))
                if len(waiting) > READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def build_validation_set(
    dataset: LatentDataset, rows: np.ndarray | None, config: ValidationConfig, batch_size: int
) -> ValidationSet:
    """The first `validation.max_samples` of `rows`, or of all of the data set in the order of their keys' hashes."""
    index = dataset.index
    hashes = hash_keys(index.arrow_column("key"), config.seed)
    ids = (hashes >> np.uint64(1)).astype(np.int64)
    rows = np.argsort(hashes, kind="stable") if rows is None else rows
    rows = rows[: config.max_samples]
    widths, heights = (index.column(f"bucket_{side}")[rows] for side in ("width", "height"))
    order = np.lexsort((ids[rows], heights, widths))
    rows, widths, heights = rows[order], widths[order], heights[order]
    batches = []
    for width, height in sorted(set(zip(widths.tolist(), heights.tolist(), strict=True))):
        mine = rows[(widths == width) & (heights == height)]
        for start in range(0, len(mine), batch_size):
            part = mine[start : start + batch_size]
            batches.append(MicroSpec((width, height), part, np.zeros(len(part), np.int64), np.arange(len(part))))
    return ValidationSet(dataset, batches, ids, config)
