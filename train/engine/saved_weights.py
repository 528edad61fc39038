"""The weights that a checkpoint holds, for programs that do not train: fp32 masters, or a moving average of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from sdxl_trainer.configs.problems import Problem
from sdxl_trainer.train.engine.engine import STATE_TAG, map_file
from sdxl_trainer.train.engine.resharding import AVERAGE, MASTER, SavedState


def open_weights(checkpoint: Path, average: str | None = None) -> dict[str, Callable[[], torch.Tensor]]:
    """Name of each trained parameter, such as `unet.conv_in.weight`, to a function that reads it whole, in fp32.

    Args:
        average: read the moving average of this decay; `check_average` tells whether there is one.
    """
    saved = SavedState(checkpoint / STATE_TAG, map_file)
    key = AVERAGE + average if average else MASTER
    return {name: partial(saved.read_whole, name, key) for name in saved.shapes}


def check_average(checkpoint: Path | None, average: str | None) -> list[Problem]:
    """Whether the moving average that the command line asks for, by its decay, is kept in the checkpoint."""
    if average is None:
        return []
    if checkpoint is None:
        return [Problem("--ema", average, "needs a checkpoint, which the model is not", "leave it out")]
    kept = list(SavedState(checkpoint / STATE_TAG, map_file).read_averages()["averages"])
    cure = f"give one of {', '.join(kept)}" if kept else "leave it out: the checkpoint holds no averages"
    return [] if average in kept else [Problem("--ema", average, "is not the decay of an average that was kept", cure)]
