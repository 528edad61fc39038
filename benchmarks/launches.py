"""Kernel launches and host syncs of the real training step, counted on the CPU as a GPU would be given them.

The networks have SDXL's topology, 1,680 trained tensors and text encoders of 12 and 32 layers, with widths of a
sixteenth. Sizes that decide on launches (tensors of multi-tensor operators, groups, buckets) are those of the real
widths, by arithmetic. A step of two micro steps is counted with its data, logging and one moving average, after three
others, from which on DeepSpeed's timers would run. launch_counter.py has the rules.

What a micro step adds is its launches without those of the text encoders, and of a forward and backward pass of the
bare networks: objective, loop, DeepSpeed's hooks, sums of gradients. What an update takes are the launches of the last
call of `engine.step()`, and of the loop after it. Syncs of the project's own code are named apart from those within the
engine. On a GPU, gradients are sent on a stream beside the backward pass, by as many kernels. With LAUNCHES_DETAIL=1 in
the environment, every operator is printed by phase.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from gpu_parts.full_size import random_weights, write_random_latents
from harness import ROOT, Figure, measure_on_ranks, run_on_ranks
from launch_counter import DEVICE, LaunchCounter
from scale import WEIGHTS

SCALE = 16  # real width / width here
SIDE_PX = 128
MOST_PLAIN = 9  # dimensions up to this, such as a kernel's, are the real ones
ACCUMULATION_STEPS = 2


class Case(NamedTuple):
    """A step that is counted."""

    zero_stage: int
    precision: str
    num_ranks: int
    has_feedback: bool = False  # a learned weighting and adaptive timesteps

    @property
    def name(self) -> str:
        """Name of the case in figures."""
        ranks = f"{self.num_ranks}_rank{'s' * (self.num_ranks > 1)}"
        return f"zero{self.zero_stage}_{self.precision}_{ranks}{'_feedback' * self.has_feedback}"


CASES = (
    *(Case(0, "fp32", 1), Case(0, "bf16", 1), Case(1, "bf16", 1), Case(2, "bf16", 1)),
    *(Case(0, "fp32", 2), Case(1, "bf16", 2), Case(2, "bf16", 2), Case(2, "fp32", 2)),
    Case(1, "bf16", 1, has_feedback=True),
)
QUICK_CASES = (Case(1, "bf16", 1), Case(2, "bf16", 1))
LARGEST_UPDATE = {0: 1500, 1: 600, 2: 600}  # launches, by ZeRO stage
NUM_FIRST_STEPS = 3  # make the optimizer's state, and start DeepSpeed's timers if they are on
LARGEST_MICRO_STEP = 300  # launches beside forward and backward


def compare(work: Path, quick: bool) -> dict[str, Figure]:
    """Count the steps of all cases."""
    write_models(work)
    figures: dict[str, Figure] = {}
    for case in QUICK_CASES if quick else CASES:
        found = measure_on_ranks(__file__, {"work": str(work), "case": case}, case.num_ranks)
        print(case.name, found, file=sys.stderr)
        figures[f"micro_step_{case.name}"] = Figure(found["micro_step"], "<=", LARGEST_MICRO_STEP)
        figures[f"update_{case.name}"] = Figure(found["update"], "<=", LARGEST_UPDATE[case.zero_stage])
        figures[f"own_syncs_of_micro_step_{case.name}"] = Figure(found["own_syncs_of_micro_step"], "<=", 0)
        figures[f"own_syncs_of_update_{case.name}"] = Figure(found["own_syncs_of_update"], "<=", 1)
        figures[f"syncs_of_micro_step_{case.name}"] = Figure(found["syncs_of_micro_step"], "<=", 0)
        figures[f"syncs_of_update_{case.name}"] = Figure(found["syncs_of_update"], "<=", 2)
        others = ("objective", "text", "forward", "backward")
        figures |= {f"{name}_{case.name}": Figure(found[name]) for name in others}
    return figures


def measure(settings: dict[str, Any]) -> int:
    """Count the step of a case on this rank; rank 0 prints the counts."""
    from sdxl_trainer.launch.distributed import close_ranks
    from sdxl_trainer.launch.logger import init_logger
    from sdxl_trainer.launch.program import end_program

    init_logger(1, "WARNING")
    torch.set_num_threads(1)
    run, batches = build_counted_run(Path(settings["work"]), Case(*settings["case"]), SCALE)
    counter = count_step(run, batches, get_real_sizes(run, SCALE))
    if run.ranks.is_main:
        if os.environ.get("LAUNCHES_DETAIL"):
            print_detail(counter)
        print(json.dumps(summarise(counter)), flush=True)
    close_ranks()
    end_program(0)


def write_models(work: Path) -> None:
    """Write the configs of SDXL's networks with narrow widths into `work/model`."""
    folder = work / "model"
    for name in ("unet", "text_encoder", "text_encoder_2"):
        real, tiny = (
            json.loads((ROOT / "configs" / kind / name / "config.json").read_text()) for kind in ("sdxl", "tiny")
        )
        kept = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
        config = {**real, **{key: tiny[key] for key in kept if key in tiny}}
        for key in ("hidden_size", "intermediate_size", "projection_dim", "cross_attention_dim"):
            if key in config:
                config[key] //= SCALE
        if name == "unet":
            config["block_out_channels"] = [width // SCALE for width in config["block_out_channels"]]
            config["norm_num_groups"] = 4
            config["addition_time_embed_dim"] //= SCALE
            config["projection_class_embeddings_input_dim"] //= SCALE
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    for name in ("model_index.json", "scheduler", "tokenizer", "tokenizer_2", "vae"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / "configs" / "tiny" / name)


def build_counted_run(work: Path, case: Case, scale: int, words: list[str] | None = None) -> tuple[Any, Iterator[Any]]:
    """Build a run over the networks in `work/model`, with random weights, and its micro batches.

    Args:
        scale: real width of the networks / width in their configs.
        words: further settings, as on the command line.
    """
    from sdxl_trainer.configs.load import build_config
    from sdxl_trainer.configs.problems import raise_if_any
    from sdxl_trainer.data.checks.training_set import open_training_set
    from sdxl_trainer.launch.distributed import init_ranks, wait_for_ranks
    from sdxl_trainer.train.engine.deepspeed_config import build_communication_settings, resolve_zero_stage
    from sdxl_trainer.train.optim import optimizers
    from sdxl_trainer.train.run.build import build_run

    settings = {
        "model": {"path": str(work / "model")},
        "data": {"metadata": [str(work / "latents" / "metadata.json")], "num_workers": 0, **SMALL_BUCKETS},
        "run": {"name": f"{case.name}-{time.time_ns()}", "dir": str(work / "runs")},
        "engine": {"zero_stage": case.zero_stage, "precision": case.precision},
        "ema": {"decays": [0.999]},
        "train": {"micro_batch_size": 1, "global_batch_size": ACCUMULATION_STEPS * case.num_ranks, "max_steps": 100},
        "checkpoint": {"every_steps": 0},
        "sample": {"prompts": []},
        "log": {"level": "WARNING"},
        "objective": {"learned_weighting": True, "adaptive_timestep_bins": 100} if case.has_feedback else {},
    }
    config, problems = build_config(settings, words or [])
    raise_if_any(problems)
    buckets = build_communication_settings(config.engine, case.num_ranks)
    sizes = {key: int(value) // scale**2 for key, value in buckets.items() if key.endswith("bucket_size")}  # pyright: ignore
    engine = config.engine.model_copy(update={"deepspeed": {"zero_optimization": sizes}})
    config, _ = resolve_zero_stage(config.model_copy(update={"engine": engine}), case.num_ranks)
    ranks = init_ranks()
    if ranks.is_main:
        write_random_latents(work / "latents", SIDE_PX)
        open_training_set(config)
    wait_for_ranks("the latents")
    index, _ = open_training_set(config)
    assert index is not None, "the random latents have no index"
    with random_weights(), mock.patch.object(optimizers, "MAX_GROUP_VALUES", optimizers.MAX_GROUP_VALUES // scale**2):
        return build_run(config, index, replace(ranks, device=DEVICE))


SMALL_BUCKETS = {"resolution_px": SIDE_PX, "min_bucket_px": 64, "max_bucket_px": 256, "bucket_step_px": 32}


class RealSizes:
    """Number of values that a tensor has at the real widths.

    Args:
        scale: real width / width here.
    """

    def __init__(self, scale: int):
        self._scale = scale
        self._flat: dict[int, int] = {}  # values of a flat tensor here → at the real widths

    def __call__(self, tensor: torch.Tensor) -> int:
        if tensor.dim() == 1 and len(tensor) in self._flat:
            return self._flat[len(tensor)]
        return self.enlarge(tensor.shape)

    def enlarge(self, shape: tuple[int, ...]) -> int:
        """Return the number of values of a weight of this shape."""
        return torch.Size(size * self._scale if size > MOST_PLAIN else size for size in shape).numel()

    def add_flat(self, here: int, real: int) -> None:
        """Note the size of a flat tensor."""
        self._flat.setdefault(here, real)


def get_real_sizes(run: Any, scale: int) -> RealSizes:
    """Return the real sizes of a run's weights, and of the flat tensors that hold them."""
    sizes, layout = RealSizes(scale), run.engine.weights.layout
    real = {name: sizes.enlarge(shape) for name, shape in layout.shapes.items()}
    if scale == SCALE:
        assert len(real) == 1680 and sum(real.values()) == WEIGHTS, "the networks are not SDXL's"
    for name, shape in layout.shapes.items():
        sizes.add_flat(torch.Size(shape).numel(), real[name])
    for flat in layout.flats:
        shares = [
            real[part.name] * part.numel / torch.Size(layout.shapes[part.name]).numel() for part in flat.fragments
        ]
        sizes.add_flat(flat.numel, int(sum(shares)))
    return sizes


def count_step(run: Any, batches: Iterator[Any], sizes: RealSizes) -> LaunchCounter:
    """Count a step of a run, and a pass of its bare networks."""
    from sdxl_trainer.data.loading import device_copy
    from sdxl_trainer.train.run import loop

    counter = LaunchCounter(sizes)
    probe = CountedEngine(run.engine, counter)
    counted = replace(run, engine=probe, conditioner=CountedConditioner(run.conditioner, counter))
    for _ in range(NUM_FIRST_STEPS):
        take_step(run, batches)
    compute = loop.compute_losses

    def pin(values: torch.Tensor, _: torch.device) -> torch.Tensor:
        if counter.is_host(values):
            counter.add_host(values, pinned=True)
        return values

    def compute_losses(*arguments: Any) -> Any:
        with counter.phase("objective"):
            return compute(*arguments)

    with mock.patch.object(loop, "compute_losses", compute_losses), mock.patch.object(device_copy, "pin", pin), counter:
        take_step(counted, count_data(batches, counter))
    count_bare_pass(run, probe.inputs, counter)
    return counter


def take_step(run: Any, batches: Iterator[Any]) -> None:
    """Take a step of the loop, as `fit` does."""
    from sdxl_trainer.train.run.loop import log_step, record_step, train_step

    result = train_step(run, batches, run.config.optim.lr)
    record_step(run, result)
    log_step(run, result, run.config.optim.lr, 1.0)


def count_data(batches: Iterator[Any], counter: LaunchCounter) -> Iterator[Any]:
    """Yield micro batches, whose tensors a run with a GPU has in pinned memory."""
    while True:
        with counter.phase("data"):
            batch = next(batches)
        tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        for tensor in [*tensors, *(batch.text or {}).values()]:
            counter.add_host(tensor, pinned=True)
        yield batch


class CountedConditioner:
    """A text conditioner whose work is counted as the phase `text`."""

    def __init__(self, conditioner: Any, counter: LaunchCounter):
        self._conditioner, self._counter = conditioner, counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conditioner, name)

    def build_inputs(self, *arguments: Any) -> Any:
        """Return the text inputs of a micro batch."""
        with self._counter.phase("text"):
            return self._conditioner.build_inputs(*arguments)


class CountedEngine:
    """An engine whose work is counted by phase and micro step.

    Attributes:
        inputs: those of the last forward pass.
    """

    def __init__(self, engine: Any, counter: LaunchCounter):
        self._engine, self._counter = engine, counter
        self.inputs: tuple[Any, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *arguments: Any) -> Any:
        """Forward pass."""
        self.inputs = arguments
        with self._counter.phase("forward"):
            return self._engine(*arguments)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass."""
        with self._counter.phase("backward"):
            self._engine.backward(loss)

    def step(self) -> bool:
        """Close a micro step."""
        self._counter.part += 1
        with self._counter.phase("update" if self._counter.part == ACCUMULATION_STEPS else "close"):
            return self._engine.step()


def count_bare_pass(run: Any, inputs: tuple[Any, ...], counter: LaunchCounter) -> None:
    """Count a forward and a backward pass of the networks without an engine."""
    networks = deepcopy(run.engine.model)
    with counter:
        with counter.phase("bare forward"):
            prediction = networks(*inputs)
        with counter.phase("bare backward"):
            prediction.sum().backward()


def summarise(counter: LaunchCounter) -> dict[str, int]:
    """Return the figures of a counted step."""
    bare = counter.read("bare forward", "bare backward").launches
    phases = ("objective", "forward", "backward", "loop")
    micro_steps = [counter.read(*phases, part=part) for part in range(ACCUMULATION_STEPS)]
    closed = [counter.read("close", part=part + 1) for part in range(ACCUMULATION_STEPS)]
    own = [counter.read("objective", "text", "loop", part=part).syncs for part in range(ACCUMULATION_STEPS)]
    # The loop's work after the last micro step.
    update, after = counter.read("update"), counter.read("loop", part=ACCUMULATION_STEPS)
    return {
        "objective": counter.read("objective", part=0).launches,
        "text": counter.read("text", part=0).launches,
        "forward": counter.read("bare forward").launches,
        "backward": counter.read("bare backward").launches,
        "micro_step": max(a.launches + b.launches - bare for a, b in zip(micro_steps, closed, strict=True)),
        "update": update.launches + after.launches,
        "own_syncs_of_micro_step": max(own),
        "own_syncs_of_update": after.syncs,
        "syncs_of_micro_step": max(a.syncs + b.syncs for a, b in zip(micro_steps, closed, strict=True)),
        "syncs_of_update": update.syncs + after.syncs,
    }


def print_detail(counter: LaunchCounter) -> None:
    """Print the operators of each phase to stderr, the most launches first."""
    for (part, phase, name), launches in sorted(counter.launches.items(), key=lambda item: (item[0][:2], -item[1])):
        syncs = counter.syncs[part, phase, name]
        if launches or syncs:
            print(f"{part} {phase:14} {name:50} {launches:6} {syncs:5}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_on_ranks("launches", __doc__ or "", compare, measure))
