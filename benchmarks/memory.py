"""Memory of a rank between steps and during an update, in bytes for each weight.

Between steps: trains the tiny SDXL for two steps on two ranks, for every ZeRO stage in fp32 and bf16. Then it adds up
the storages of all live tensors of rank 0, without the frozen text encoders, and compares the sum with the estimate by
ZeRO's arithmetic (train/estimates/memory.py). ZeRO-3's threshold for small weights and the sizes of buckets are close
to zero, because the tiny model would otherwise consist of small weights and fit into one bucket. Stage 3 keeps a buffer
of gradients between steps; the other stages keep none.

During an update: counts every allocation of a step by torch's profiler, which reads them from torch's CPU allocator.
The figure is the peak within `engine.step()` above the memory at its start, when all gradients are there. Groups of
parameters are limited so that the tiny U-Net falls into as many pieces as SDXL's. `whole_groups` is without a limit.

With gradient release: the same sum between steps for each optimizer and precision on one rank, and in a third step the
most bytes of gradients at a time, and those that the update of a weight adds. Each is compared with the estimate.
"""

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from harness import ROOT, Figure, make_tiny_set, measure_on_ranks, run_on_ranks, run_script
from loading import compare_loading, measure_loading
from scale import WEIGHTS

RANKS = 2
STAGES, PRECISIONS = (0, 1, 2, 3), ("fp32", "bf16")
SMALL = {
    "reduce_bucket_size": 1000,
    "allgather_bucket_size": 1000,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 30_000,
}
LIMIT = 1.02  # measured bytes / estimated bytes
UPDATES = ((1, 1), (2, 2), (3, 2))  # (ZeRO stage, ranks) whose update is measured, in bf16
UPDATE_LIMIT = 0.8  # bytes a weight during an update
RELEASE = ["engine.gradient_release=true", "optim.clipping=parameter", "train.global_batch_size=2", "optim.betas=null"]
RELEASED = ("adafactor", "adamw8bit", "lion", "adamw")
RELEASE_PRECISIONS = ("bf16_stochastic", "bf16_kahan", "fp32")


def compare(work: Path, quick: bool) -> dict[str, Figure]:
    """Measure memory between steps and during an update."""
    words = [*make_tiny_set(work), "train.micro_batch_size=2"]
    run_script("cache.sh", "--cfg", ROOT / "configs" / "tiny.yaml", *words, ranks=RANKS)
    figures = {**compare_between_steps(words, quick), **compare_updates(words, quick), **compare_released(words, quick)}
    return {**figures, **compare_loading(work, quick)}


def compare_between_steps(words: list[str], quick: bool) -> dict[str, Figure]:
    """Measure each stage and precision between steps."""
    figures: dict[str, Figure] = {}
    for stage, precision in product(STAGES[2:] if quick else STAGES, PRECISIONS[quick:]):
        deepspeed = json.dumps({"zero_optimization": SMALL})
        more = [f"engine.zero_stage={stage}", f"engine.precision={precision}", f"engine.deepspeed={deepspeed}"]
        more += [f"run.name={stage}-{precision}-{time.time_ns()}", f"train.global_batch_size={2 * RANKS}"]
        found = measure_on_ranks(__file__, {"words": [*words, *more]}, RANKS)
        name = f"zero{stage}_{precision}"
        figures[f"memory_of_theory_{name}"] = Figure(found["held"] / found["theory"], "<=", LIMIT)
        figures[f"bytes_a_weight_{name}"] = Figure(found["held"] / found["weights"])
    return figures


def compare_updates(words: list[str], quick: bool) -> dict[str, Figure]:
    """Measure an update with parameter groups in pieces, and with whole groups."""
    figures: dict[str, Figure] = {}
    cases = [(UPDATES[0], "pieces")] if quick else product(UPDATES, ("pieces", "whole"))
    for (stage, ranks), pieces in cases:
        more = [f"engine.zero_stage={stage}", "engine.precision=bf16", f"train.global_batch_size={2 * ranks}"]
        more += [f"run.name=update-{stage}-{time.time_ns()}", "engine.accumulation_dtype=bf16"]
        if stage == 3:
            # DeepSpeed gathers small weights at the end of an update, which are nearly all of the tiny model's.
            more += ['engine.deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}}']
        found = measure_on_ranks(__file__, {"words": [*words, *more], "groups": pieces}, ranks)
        name = f"update_bytes_a_weight_zero{stage}_bf16_ranks_{ranks}"
        if pieces == "pieces":
            figures[name] = Figure(found["peak"] / found["weights"], "<=", UPDATE_LIMIT)
            figures[name.replace("bytes_a_weight", "groups")] = Figure(found["groups"])
        else:
            figures[f"{name}_whole_groups"] = Figure(found["peak"] / found["weights"])
    return figures


def compare_released(words: list[str], quick: bool) -> dict[str, Figure]:
    """Measure gradient release with each optimizer and precision, by stage."""
    figures: dict[str, Figure] = {}
    optimizers, precisions = (RELEASED[:1], RELEASE_PRECISIONS[:1]) if quick else (RELEASED, RELEASE_PRECISIONS)
    for name, precision in product(optimizers, precisions):
        more = [*RELEASE, f"optim.name={name}", f"engine.precision={precision}"]
        more += [f"run.name=release-{name}-{time.time_ns()}"]
        found = measure_on_ranks(__file__, {"words": [*words, *more], "release": True}, 1)
        case = f"release_{name}_{precision}"
        figures[f"memory_of_theory_{case}"] = Figure(found["held"] / found["theory"], "<=", LIMIT)
        figures[f"bytes_a_weight_{case}"] = Figure(found["held"] / found["weights"])
        for stage in ("gradients", "copies"):
            figures[f"{stage}_of_theory_{case}"] = Figure(found[stage] / found[f"{stage}_theory"], "<=", LIMIT)
    return figures


def measure(settings: dict[str, Any]) -> int:
    """Train two steps, then print this rank's bytes between steps, or those of a third update."""
    from sdxl_trainer.cache.models.source import resolve_model
    from sdxl_trainer.configs.load import load_config
    from sdxl_trainer.launch.distributed import close_ranks
    from sdxl_trainer.launch.program import end_program
    from sdxl_trainer.train.estimates.networks import count_values
    from sdxl_trainer.train.networks.empty_networks import build_empty_networks
    from sdxl_trainer.train.optim import optimizers
    from sdxl_trainer.train.run.build import build_run
    from sdxl_trainer.train.run.job import set_up
    from sdxl_trainer.train.run.loop import train_step

    if "loading" in settings:
        print(json.dumps(measure_loading(Path(settings["loading"]), settings["words"])), flush=True)
        end_program(0)
    config, problems = load_config(ROOT / "configs" / "tiny.yaml", settings["words"])
    groups = settings.get("groups")
    if groups == "pieces":
        num_weights = count_values(build_empty_networks(resolve_model(config.model), []))
        optimizers.MAX_GROUP_VALUES = optimizers.MAX_GROUP_VALUES * num_weights // WEIGHTS
    elif groups == "whole":
        optimizers.MAX_GROUP_VALUES = sys.maxsize
    run, batches = build_run(*set_up(config, problems))
    for _ in range(2):
        train_step(run, batches, config.optim.lr)
    num_weights = sum(getattr(weight, "ds_numel", weight.numel()) for weight in run.engine.model.parameters())
    if groups:
        peak = measure_update(run.engine, lambda: train_step(run, batches, config.optim.lr))
        found = {"peak": peak, "groups": len(run.engine.weights.layout.flats)}
    else:
        found = measure_held(run)
        if settings.get("release"):
            found |= measure_release(run, lambda: train_step(run, batches, config.optim.lr))
    if run.ranks.is_main:
        print(json.dumps({**found, "weights": num_weights}), flush=True)
    close_ranks()
    end_program(0)


def measure_held(run: Any) -> dict[str, float]:
    """Return the bytes of all tensors without the frozen text encoders, and those of the estimate."""
    frozen = [parameter for encoder in run.conditioner.encoders for parameter in encoder.parameters()]
    held = add_up_storages() - sum(weight.untyped_storage().nbytes() for weight in frozen)
    # ZeRO 3 keeps its buffer of gradients between steps.
    names = ("trained weights", "master weights", "moments of the optimizer", "moving averages")
    names += ("gradients",) if run.engine.zero_stage == 3 else ()
    return {"held": held, "theory": sum(line.device for line in run.memory.lines if line.component in names)}


def measure_update(engine: Any, train: Callable[[], object]) -> int:
    """Return the peak of torch's CPU memory within `engine.step()` above the memory at its start, in bytes.

    Args:
        train: makes one training step of one micro batch.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    def step() -> bool:
        with record_function("update"):
            return type(engine).step(engine)

    engine.step = step
    # The whole step is profiled, because memory that was allocated before would not be counted when it is freed.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    (update,) = (event for event in events if event["name"] == "update" and "dur" in event)
    held = [(event["ts"], event["args"]["Total Allocated"]) for event in events if event["name"] == "[memory]"]
    before = max((time, number) for time, number in held if time < update["ts"])[1]
    return max(number for time, number in held if 0 <= time - update["ts"] <= update["dur"]) - before


def measure_release(run: Any, train: Callable[[], object]) -> dict[str, float]:
    """Return the most bytes of gradients at a time and those that the update of a weight adds, and the estimate's.

    Args:
        train: makes one training step.
    """
    from sdxl_trainer.train.estimates.networks import LiveBytes

    updates, weights = run.engine._engine._updates, list(run.engine.model.parameters())
    state, update = run.engine._engine.optimizer.state, updates.update
    most = {"gradients": 0, "copies": 0}

    def count(weight: torch.nn.Parameter) -> None:
        gradients = [other.grad for other in weights if other.grad is not None]
        known = [weight, *gradients, *(value for value in state[weight].values() if isinstance(value, torch.Tensor))]
        with LiveBytes([tensor.untyped_storage() for tensor in known]) as live:
            update(weight)
        most["gradients"] = max(most["gradients"], sum(gradient.nbytes for gradient in gradients))
        most["copies"] = max(most["copies"], live.peak)

    updates.update = count
    train()
    lines = {line.component: line.device for line in run.memory.lines}
    theory = {"gradients_theory": lines["gradients"], "copies_theory": lines["copies in an update"]}
    return {**most, **theory}


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
