"""Size of a checkpoint on disk, estimated before a run."""

from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.estimates.memory import AVERAGE_BYTES, WEIGHT_BYTES, count_optimizer_bytes


def compute_checkpoint_bytes(config: Config, num_trained: int) -> int:
    """Return the approximate size of a checkpoint in bytes.

    A checkpoint holds the trained weights in the precision of training, their masters, the optimizer's moments and the
    moving averages. It holds no frozen weights.

    Args:
        num_trained: number of trained weights, those of adapters if adapters are trained (`count_trained_weights`).
    """
    bytes_per_weight = WEIGHT_BYTES[config.engine.precision] + count_optimizer_bytes(config.engine, config.optim.name)
    return int(num_trained * (bytes_per_weight + AVERAGE_BYTES * len(config.ema.decays)))
