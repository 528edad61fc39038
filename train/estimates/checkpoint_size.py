"""Size of a checkpoint on disk, estimated before a run."""

import math
from collections.abc import Sequence

from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.estimates.memory import AVERAGE_BYTES, WEIGHT_BYTES
from sdxl_trainer.train.estimates.optimizer_state import count_master_bytes, count_moments


def compute_checkpoint_bytes(config: Config, shapes: Sequence[Sequence[int]]) -> int:
    """Return the approximate size of a checkpoint in bytes.

    A checkpoint holds the trained weights in the precision of training, their masters, the optimizer's moments and the
    moving averages. It holds no frozen weights.

    Args:
        shapes: of the trained weights, those of adapters if adapters are trained (`list_trained_shapes`).
    """
    num_trained = sum(math.prod(shape) for shape in shapes)
    bytes_per_weight = WEIGHT_BYTES[config.engine.precision] + count_master_bytes(config.engine)
    bytes_per_weight += AVERAGE_BYTES * len(config.ema.decays)
    return num_trained * bytes_per_weight + count_moments(config.engine, config.optim, shapes)
