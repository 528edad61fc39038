"""Communication probe: ranks join a process group and sum numbers. launch/machine.py starts it:

torchrun --standalone --nproc_per_node=2 -m sdxl_trainer.launch.probe
"""

import json
import sys
import time

import torch

from sdxl_trainer.launch.distributed import barrier, close_ranks, init_ranks, reduce_sum

NUM_VALUES = 16 << 20  # 64 MB of float32
NUM_SUMS = 5


def main() -> int:
    """Sum over all ranks; rank 0 prints the speed as JSON. Return 1 if a sum is wrong."""
    ranks = init_ranks()
    values = torch.full((NUM_VALUES,), float(ranks.rank + 1), device=ranks.device)
    total = float(reduce_sum(values)[-1])
    barrier()
    start = time.monotonic()
    for _ in range(NUM_SUMS):
        reduce_sum(values)
    values[0].item()  # waits for the device
    seconds = time.monotonic() - start
    if ranks.is_main:
        figures = {
            "ranks": ranks.world_size,
            "device": ranks.device.type,
            "sum": total,
            "gb_per_second": NUM_SUMS * values.nbytes / seconds / 1e9,
        }
        sys.stdout.write(json.dumps(figures) + "\n")
    close_ranks()
    return int(total != ranks.world_size * (ranks.world_size + 1) / 2)


if __name__ == "__main__":
    sys.exit(main())
