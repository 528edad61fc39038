"""What of the engine's settings is chosen by the number of ranks where the user has said nothing."""

import torch

from sdxl_trainer.configs.engine import PURE_BF16, EngineConfig
from sdxl_trainer.configs.schema import Config
from sdxl_trainer.train.optim.optimizers import find_need_of_whole_tensors


def settle_engine(config: Config, world_size: int) -> tuple[Config, str]:
    """(the settings with a ZeRO stage for so many ranks, what was chosen and why: "" where the user has chosen)."""
    if config.engine.zero_stage is not None:
        return config, ""
    stage, reason = choose_zero_stage(config, world_size)
    settled = config.model_copy(update={"engine": config.engine.model_copy(update={"zero_stage": stage})})
    return settled, f"{stage} is taken, for {reason}"


def choose_zero_stage(config: Config, world_size: int) -> tuple[int, str]:
    """(stage, what it is chosen for). A stage costs some time for each weight, so none is taken without a use."""
    engine = config.engine
    if engine.offload_param:
        return 3, "engine.offload_param, of which no other is capable"
    if engine.offload_optimizer:
        return 2, "engine.offload_optimizer"
    needs_shards = engine.precision in ("fp16", *PURE_BF16)
    if find_need_of_whole_tensors(config.optim, engine) and not needs_shards:
        return 0, f"{config.optim.name}, which must see whole weights"
    if world_size > 1:
        return 2, f"{world_size} ranks, which share gradients, masters and optimizer state"
    if engine.precision == "fp32":
        return 0, "a single rank, where nothing can be shared"
    return 1, f"a single rank, where it keeps what {engine.precision} needs besides weights"


def choose_communication(engine: EngineConfig, world_size: int) -> dict[str, object]:
    """DeepSpeed's `zero_optimization` settings that decide on memory and overlap of what ranks send each other.

    DeepSpeed's own buckets of 5e8 values are buffers of 1 GB each in 16 bit, more than a fifth of SDXL's weights.
    """
    if world_size == 1:  # nothing is sent, but a bucket is filled all the same
        alone: dict[str, object] = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
        return alone if engine.zero_stage != 1 else {**alone, "contiguous_gradients": False}  # one copy less
    settings: dict[str, object] = {"reduce_bucket_size": 200_000_000, "allgather_bucket_size": 200_000_000}
    if torch.cuda.is_available() and engine.zero_stage:
        settings["overlap_comm"] = True  # gradients are sent on a stream of their own beside the backward pass
    return settings
