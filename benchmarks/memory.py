"""Memory of a rank between steps, compared with the estimate by ZeRO's arithmetic (train/estimates/memory.py).

Trains the tiny SDXL for two steps on two ranks, for every ZeRO stage in fp32 and bf16. Then it adds up the storages of
all live tensors of rank 0, without the frozen text encoders. ZeRO-3's threshold for small weights and the sizes of
buckets are close to zero, because the tiny model would otherwise consist of small weights and fit into one bucket.
Stage 3 keeps a buffer of gradients between steps; the other stages keep none.
"""

import gc
import json
import os
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from harness import ROOT, Figure, make_tiny_set, measure_on_ranks, run_on_ranks, run_script
from loading import compare_loading, measure_loading

RANKS = 2
STAGES, PRECISIONS = (0, 1, 2, 3), ("fp32", "bf16")
SMALL = {
    "reduce_bucket_size": 1000,
    "allgather_bucket_size": 1000,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 30_000,
}
LIMIT = 1.02  # measured bytes / estimated bytes


def compare(work: Path, quick: bool) -> dict[str, Figure]:
    """Measure each stage and precision."""
    figures: dict[str, Figure] = {}
    words = [*make_tiny_set(work), "train.micro_batch_size=2", f"train.global_batch_size={2 * RANKS}"]
    run_script("cache.sh", "--cfg", ROOT / "configs" / "tiny.yaml", *words, ranks=RANKS)
    for stage, precision in product(STAGES[2:] if quick else STAGES, PRECISIONS[quick:]):
        deepspeed = json.dumps({"zero_optimization": SMALL})
        more = [f"engine.zero_stage={stage}", f"engine.precision={precision}", f"engine.deepspeed={deepspeed}"]
        more += [f"run.name={stage}-{precision}-{time.time_ns()}"]
        found = measure_on_ranks(__file__, {"words": [*words, *more]}, RANKS)
        name = f"zero{stage}_{precision}"
        figures[f"memory_of_theory_{name}"] = Figure(found["held"] / found["theory"], "<=", LIMIT)
        figures[f"bytes_a_weight_{name}"] = Figure(found["held"] / found["weights"])
    return {**figures, **compare_loading(work, quick)}


def measure(settings: dict[str, Any]) -> int:
    """Train two steps, then print this rank's bytes, measured and estimated."""
    from sdxl_trainer.configs.load import load_config
    from sdxl_trainer.launch.distributed import close_ranks
    from sdxl_trainer.launch.program import end_program
    from sdxl_trainer.train.estimates.memory import estimate_memory
    from sdxl_trainer.train.run.build import build_run
    from sdxl_trainer.train.run.job import set_up
    from sdxl_trainer.train.run.loop import train_step

    if "loading" in settings:
        print(json.dumps(measure_loading(Path(settings["loading"]), settings["words"])), flush=True)
        end_program(0)
    config, problems = load_config(ROOT / "configs" / "tiny.yaml", settings["words"])
    run, batches = build_run(*set_up(config, problems))
    for _ in range(2):
        train_step(run, batches, config.optim.lr)
    frozen = [parameter for encoder in run.conditioner.encoders for parameter in encoder.parameters()]
    held = add_up_storages() - sum(weight.untyped_storage().nbytes() for weight in frozen)
    num_weights = sum(getattr(weight, "ds_numel", weight.numel()) for weight in run.engine.model.parameters())
    theory = estimate_memory(run.config, num_weights, RANKS)
    expected = theory.weights + theory.optimizer + (theory.gradients if run.engine.zero_stage == 3 else 0)
    if run.ranks.is_main:
        print(json.dumps({"held": held, "theory": expected, "weights": num_weights}), flush=True)
    close_ranks()
    end_program(0)


def add_up_storages() -> int:
    """Return the bytes of all live tensors of this process, each storage once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if is_tensor(item)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def is_tensor(item: Any) -> bool:
    """Return whether an object is a tensor with a storage; isinstance would raise on proxies of some libraries."""
    return issubclass(type(item), torch.Tensor) and item.layout == torch.strided


if __name__ == "__main__":
    sys.exit(run_on_ranks("memory", __doc__ or "", compare, measure))
