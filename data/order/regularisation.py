"""Regularisation samples (prior preservation): find them, and balance how often they are used."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from sdxl_trainer.configs.paths import CHECK_PATH
from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.configs.schema import DataConfig
from sdxl_trainer.data.index.index import Index


def check_regularisation(data: DataConfig) -> Iterator[Problem]:
    """Yield a problem for each missing folder of regularisation images, and one if `data.metadata` is set too."""
    key, cure = "data.regularisation_dirs", CHECK_PATH
    for number, path in enumerate(data.regularisation_dirs):
        if not path.is_dir():
            yield Problem(f"{key}.{number}", path, "is not a folder", cure)
    if data.regularisation_dirs and data.metadata:
        cure = 'give the metadata of these images to data.metadata, with "is_reg": true in each record'
        yield Problem(key, data.regularisation_dirs, "works only with data.image_dirs, not with data.metadata", cure)


def find_regularisation_rows(index: Index) -> np.ndarray:
    """Return the rows of an index whose record has a true `is_reg`."""
    return np.flatnonzero(index.column("is_reg"))


def balance_regularisation(
    rows: np.ndarray, num_rows: int, repeats: np.ndarray | None, factor: Literal["balanced"] | float
) -> np.ndarray | None:
    """Return each row's repeats, times a factor for regularisation samples, [num_rows]; None uses each row once.

    Args:
        rows: rows of the regularisation samples.
        repeats: how often each row would be used without the factor; 0 for held-out and bad samples.
        factor: `balanced` uses regularisation samples as often as all other samples together, as kohya-ss/sd-scripts
            does. A fraction holds on average over the epochs (data/order/plan.py).
    """
    used = np.ones(num_rows) if repeats is None else repeats.astype(np.float64)
    total = used[rows].sum()
    multiplier = factor if factor != "balanced" else (used.sum() - total) / total if total else 1.0
    if multiplier == 1.0:
        return repeats
    used[rows] *= multiplier
    return used
