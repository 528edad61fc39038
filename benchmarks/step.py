"""The framework's own cost: the real training step against a bare loop with the same networks and batches.

On one rank the bare loop is plain PyTorch: text encoders, U-Net, loss, backward, clipping, AdamW; in bf16 with fp32
masters, as in the engine. On two ranks it is a DeepSpeed engine with the same settings. In bf16 the DeepSpeed loop is
also measured on one rank, to separate DeepSpeed's cost from this project's. The real step does more: it reads latents,
builds and tokenises captions, draws noise and timesteps, checks the gradient, exchanges requests and logs.

Both loops take a step each within one process, on the same batch, and chance decides which is first, because the other
finds other caches and a busy data worker. Their times over a turn are compared, as wall time and as CPU time of the
main thread. The tiny SDXL runs on a CPU with one thread per rank, or on one GPU per rank. Fixed costs per weight are a
larger share there than in the longer steps of the real model. A case that needs more GPUs than the machine has is
skipped and named.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from harness import (
    ROOT,
    Figure,
    Results,
    Skipped,
    limit_ranks,
    make_tiny_set,
    measure_on_ranks,
    run_on_ranks,
    run_script,
)


class Case(NamedTuple):
    """A comparison that is measured."""

    bare: str  # the bare loop: pytorch or deepspeed
    num_ranks: int
    precision: str


CASES = (
    Case("pytorch", 1, "fp32"),
    Case("pytorch", 1, "bf16"),
    Case("deepspeed", 1, "bf16"),
    Case("deepspeed", 2, "fp32"),
    Case("deepspeed", 2, "bf16"),
)
TURNS, STEPS = 24, 5
LIMIT = 1.02  # of the bare step's time


def compare(work: Path, quick: bool) -> Results:
    """Measure all cases for which there are enough devices."""
    figures: dict[str, Figure | Skipped] = {}
    words = [*make_tiny_set(work), "checkpoint.every_steps=0", "data.num_workers=1", "run.resume=never"]
    run_script("cache.sh", "--cfg", ROOT / "configs" / "tiny.yaml", *words, ranks=limit_ranks(2))
    for bare, ranks, precision in CASES[::3] if quick else CASES:
        name = f"{bare}_{precision}_{ranks}_rank{'s' * (ranks > 1)}"
        if limit_ranks(ranks) < ranks:
            figures[f"time_of_bare_{name}"] = Skipped(f"needs {ranks} GPUs; this machine has {limit_ranks(ranks)}")
            continue
        more = [f"engine.precision={precision}", f"train.global_batch_size={8 * ranks}"]
        more += [f"run.name={precision}-{ranks}-{time.time_ns()}"]
        settings = {"words": [*words, *more], "bare": bare, "turns": 3 if quick else TURNS}
        found = measure_on_ranks(__file__, settings, ranks)
        print(ranks, bare, precision, found, file=sys.stderr)
        figures[f"time_of_bare_{name}"] = Figure(found["ratio"], "<=", LIMIT)
        figures[f"time_of_bare_{name}_least"] = Figure(found["least"])
        figures[f"time_of_bare_{name}_most"] = Figure(found["most"])
        figures[f"cpu_time_of_bare_{name}"] = Figure(found["cpu_ratio"], "<=", LIMIT)
        figures[f"bare_seconds_{name}"] = Figure(found["bare"])
        figures[f"data_wait_share_{name}"] = Figure(found["wait"], "<=", 0.01)
    return figures


def measure(settings: dict[str, Any]) -> int:
    """Measure one case on this rank; rank 0 prints the figures."""
    from sdxl_trainer.configs.load import load_config
    from sdxl_trainer.launch.distributed import close_ranks
    from sdxl_trainer.launch.program import end_program
    from sdxl_trainer.train.run.build import build_run
    from sdxl_trainer.train.run.job import set_up
    from sdxl_trainer.train.run.loop import log_step, record_step, train_step

    torch.set_num_threads(1)
    config, problems = load_config(ROOT / "configs" / "tiny.yaml", settings["words"])
    run, batches = build_run(*set_up(config, problems))
    bare = {"pytorch": build_bare_pytorch, "deepspeed": build_bare_deepspeed}[settings["bare"]](run)
    used: list[Any] = []
    waits: list[float] = []

    def keep(stream: Iterator[Any]) -> Iterator[Any]:
        for batch in stream:
            used[:] = [batch]
            yield batch

    kept = keep(batches)

    def take_real_step() -> None:
        started = time.perf_counter()
        result = train_step(run, kept, config.optim.lr)
        record_step(run, result)
        log_step(run, result, config.optim.lr, time.perf_counter() - started)
        waits.append(result.data_wait_seconds)

    def take_turn() -> np.ndarray:
        """Run a few steps of both loops and return [real, bare] x [seconds, CPU seconds]."""
        spent = np.zeros((2, 2))
        for _ in range(STEPS):
            inputs = draw_inputs(used[0], run.ranks.device)  # outside the measured time
            calls = [(0, take_real_step), (1, partial(bare, inputs))]
            for loop, call in calls if order.random() < 0.5 else calls[::-1]:
                spent[loop] += time_call(call)
        return spent

    order = Random(0)  # the same on all ranks, which wait for each other
    take_real_step()
    take_turn()  # warm-up: allocates memory and builds kernels
    waits.clear()
    turns = np.stack([take_turn() for _ in range(settings["turns"])])  # [turns, 2, 2]
    if run.ranks.is_main:
        ratios, cpu_ratios = (turns[:, 0] / turns[:, 1]).T
        found = {
            "ratio": float(np.median(ratios)),
            "least": ratios.min(),
            "most": ratios.max(),
            "cpu_ratio": float(np.median(cpu_ratios)),
            "bare": float(np.median(turns[:, 1, 0])) / STEPS,
            "wait": sum(waits) / turns[:, 0, 0].sum(),
        }
        print(json.dumps(found), flush=True)
    close_ranks()
    end_program(0)


class Elapsed(NamedTuple):
    """Time that a call took."""

    seconds: float
    cpu_seconds: float  # of this thread, which does all the arithmetic of a CPU


def time_call(call: Callable[[], None]) -> Elapsed:
    """Measure the time of a call, and of the work that it starts on a GPU."""
    wait_for_gpu()
    started, cpu_started = time.perf_counter(), time.thread_time()
    call()
    cpu_seconds = time.thread_time() - cpu_started
    wait_for_gpu()
    return Elapsed(time.perf_counter() - started, cpu_seconds)


def wait_for_gpu() -> None:
    """Wait for all work of this rank's GPU; return at once without one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class StepInputs(NamedTuple):
    """Inputs of a bare step, on the rank's device except for the batch."""

    batch: Any  # a MicroBatch
    x_t: torch.Tensor  # [B, 4, h, w]
    noise: torch.Tensor  # [B, 4, h, w], the target
    timesteps: torch.Tensor  # [B]
    time_ids: torch.Tensor  # [B, 6]


def draw_inputs(batch: Any, device: torch.device) -> StepInputs:
    """Draw the inputs of a bare step from a batch."""
    latents = batch.latents.to(device)
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, 1000, (len(noise),), device=device)
    return StepInputs(batch, latents + noise, noise, timesteps, batch.time_ids.to(device))


def build_bare_pytorch(run: Any) -> Callable[[StepInputs], None]:
    """Build the step of a plain PyTorch loop."""
    from sdxl_trainer.train.networks.parameter_groups import build_parameter_groups
    from sdxl_trainer.train.optim.optimizers import build_optimizer

    config, dtype = run.config, run.engine.dtype
    networks = deepcopy(run.engine.model).float()
    weights = list(networks.parameters())
    unet_config = run.source.read_config("unet")
    groups = build_parameter_groups(networks, config.optim, unet_config)
    optimizer = build_optimizer(groups, config.optim, config.engine)
    masters = [weight.detach().clone() for weight in weights] if dtype != torch.float32 else []
    if masters:
        networks.to(dtype)
        replaced = dict(zip(weights, map(torch.nn.Parameter, masters), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [replaced[weight] for weight in group["params"]]
        masters = list(replaced.values())

    def step(inputs: StepInputs) -> None:
        text = run.conditioner.build_inputs(inputs.batch, run.ranks.device)
        prediction = networks(inputs.x_t.to(dtype), inputs.timesteps, text, inputs.time_ids)
        torch.nn.functional.mse_loss(prediction.float(), inputs.noise).backward()
        for master, weight in zip(masters, weights, strict=bool(masters)):
            master.grad = weight.grad.float()  # pyright: ignore (there is one)
        torch.nn.utils.clip_grad_norm_(masters or weights, config.optim.max_grad_norm)
        optimizer.step()
        if masters:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        for weight in [*weights, *masters]:
            weight.grad = None

    return step


def build_bare_deepspeed(run: Any) -> Callable[[StepInputs], None]:
    """Build the step of a loop over a plain DeepSpeed engine."""
    import deepspeed

    from sdxl_trainer.train.engine.deepspeed_config import BatchSizes, build_deepspeed_config
    from sdxl_trainer.train.networks.parameter_groups import build_parameter_groups
    from sdxl_trainer.train.optim.optimizers import build_optimizer

    config, networks = run.config, deepcopy(run.engine.model).float()
    unet_config = run.source.read_config("unet")
    groups = build_parameter_groups(networks, config.optim, unet_config)
    optimizer = build_optimizer(groups, config.optim, config.engine)
    batch_sizes = BatchSizes(config.train.global_batch_size, config.train.micro_batch_size, 1)
    settings = build_deepspeed_config(config.engine, batch_sizes, config.optim.max_grad_norm, optimizer)
    engine, *_ = deepspeed.initialize(model=networks, optimizer=optimizer, config=settings, dist_init_required=False)

    def step(inputs: StepInputs) -> None:
        text = run.conditioner.build_inputs(inputs.batch, run.ranks.device)
        prediction = engine(inputs.x_t.to(run.engine.dtype), inputs.timesteps, text, inputs.time_ids)
        engine.backward(torch.nn.functional.mse_loss(prediction.float(), inputs.noise))
        engine.step()

    return step


if __name__ == "__main__":
    sys.exit(run_on_ranks("step", __doc__ or "", compare, measure))
