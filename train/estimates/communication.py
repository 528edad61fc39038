"""Bytes that ranks send each other in a step, by ZeRO stage."""

from typing import NamedTuple

from sdxl_trainer.train.engine.deepspeed_config import MOST_REDUCING_RANKS

# How often a rank of a ring sends each byte that a collective reduces or gathers, without the factor (N-1)/N for N
# ranks.
TIMES_SENT = {"allreduce": 2, "reduce": 1, "reduce_scatter_base": 1, "allgather_base": 1, "broadcast": 1}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


class SentBytes(NamedTuple):
    """Bytes a weight that a rank sends in a step, equal to those it receives, without the factor (N-1)/N."""

    reduced: float  # of gradients
    gathered: float  # of weights

    @property
    def total(self) -> float:
        """Bytes of gradients and weights."""
        return self.reduced + self.gathered


def count_sent_bytes(
    stage: int, accumulation_steps: int, gradients: str, num_ranks: int, weights: str = "bf16"
) -> SentBytes:
    """Count the bytes that a rank sends in a step. `python benchmarks/gradients.py` counts the same on real ranks.

    Gradients are reduced once a step by stages 0 and 1, and once a micro batch by stages 2 and 3. Weights are gathered
    once a step by stages 1 and 2, and in each forward and backward pass by stage 3.

    Args:
        gradients: type in which gradients are sent, such as `fp32`.
        weights: type of the weights.
    """
    reduces = {0: "allreduce", 3: "reduce_scatter_base"}.get(stage, "reduce")
    if num_ranks > MOST_REDUCING_RANKS and stage in (1, 2):
        reduces = "allreduce"
    times = TIMES_SENT[reduces] * (accumulation_steps if stage >= 2 else 1)
    gathered = {0: 0, 1: 1, 2: 1, 3: 2 * accumulation_steps}[stage]
    return SentBytes(times * BYTES[gradients], gathered * BYTES[weights])
