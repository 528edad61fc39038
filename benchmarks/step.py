"""What does the framework itself cost? The real step against a bare loop of the same networks, optimizer and batches.

On one rank the bare loop is PyTorch's: text encoders, U-Net, loss, backward, clipping, AdamW, on batches that lie in
memory. On two ranks it is DeepSpeed's (the same ZeRO stage). The real step reads latents, shapes and tokenises
captions, draws noise, checks the gradient, agrees on requests and logs. Both take turns within one process, a few steps
each, and the medians of their step times are compared. Tiny SDXL on a CPU, one thread a rank, fp32 and bf16.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from harness import ROOT, Figure, finish, parse_arguments, start

PRECISIONS = ("fp32", "bf16")
TURNS, STEPS = 12, 5
LIMIT = 1.02  # of the bare step's time


def main() -> int:
    """Run and report; within torchrun, measure and print one JSON line."""
    if "STEP_BENCHMARK_CONFIG" in os.environ:
        return measure(json.loads(os.environ["STEP_BENCHMARK_CONFIG"]))
    from sdxl_trainer.data.demo import draw_demo_set
    from sdxl_trainer.train.tiny import build_tiny_sdxl

    options = parse_arguments(__doc__ or "")
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        words = [f"model.path={build_tiny_sdxl(work / 'model')}", f"data.metadata=[{draw_demo_set(work / 'data')}]"]
        words += [f"cache.dir={work / 'latents'}", f"run.dir={work / 'runs'}", "sample.prompts=[]"]
        words += ["checkpoint.every_steps=0", "train.micro_batch_size=4", "data.num_workers=1", "log.level=WARNING"]
        start("cache.sh", "--cfg", ROOT / "configs" / "tiny.yaml", *words, ranks=2)
        for ranks in (1, 2):
            for precision in PRECISIONS if not options.quick else PRECISIONS[:1]:
                more = [f"engine.precision={precision}", f"train.global_batch_size={4 * ranks}"]
                found = run_ranks(
                    [*words, *more, f"run.name={precision}-{ranks}"], ranks, 3 if options.quick else TURNS
                )
                print(ranks, precision, found, file=sys.stderr)
                name = f"{precision}_{ranks}_rank{'s' * (ranks > 1)}"
                figures[f"time_of_bare_step_{name}"] = Figure(found["ratio"], "<=", LIMIT)
                figures[f"time_of_bare_step_{name}_least"] = Figure(found["least"])
                figures[f"time_of_bare_step_{name}_most"] = Figure(found["most"])
                figures[f"bare_step_seconds_{name}"] = Figure(found["bare"])
                figures[f"data_wait_share_{name}"] = Figure(found["wait"], "<=", 0.01)
    return finish("step", figures)


def run_ranks(words: list[str], ranks: int, turns: int) -> dict[str, float]:
    """Start this program again on so many ranks and return what rank 0 found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
    environment = {**os.environ, "STEP_BENCHMARK_CONFIG": json.dumps({"words": words, "turns": turns})}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(settings: dict[str, Any]) -> int:
    """Take turns and print the figures."""
    from sdxl_trainer.configs.load import load_config
    from sdxl_trainer.launch.distributed import close_ranks
    from sdxl_trainer.launch.program import end_program
    from sdxl_trainer.train.job import build, set_up
    from sdxl_trainer.train.loop import advance, report_step, train_step

    torch.set_num_threads(1)
    config, problems = load_config(ROOT / "configs" / "tiny.yaml", settings["words"])
    run, batches = build(config, *set_up(config, problems))
    bare = build_bare(run, [next(batches) for _ in range(4)])
    waits: list[float] = []

    def step() -> None:
        started = time.perf_counter()
        result = train_step(run, batches, config.optim.lr)
        advance(run, result)
        report_step(run, result, config.optim.lr, time.perf_counter() - started)
        waits.append(result.data_wait_seconds)

    time_steps(bare), time_steps(step)  # the first ones make memory and kernels ready
    waits.clear()
    pairs = [(time_steps(bare), time_steps(step)) for _ in range(settings["turns"])]
    if run.ranks.is_main:
        ratios = [real / plain for plain, real in pairs]
        real = statistics.median(pair[1] for pair in pairs)
        found = {
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "bare": statistics.median(pair[0] for pair in pairs),
            "wait": statistics.mean(waits) / real,
        }
        print(json.dumps(found), flush=True)
    close_ranks()
    end_program(0)


def time_steps(step: Callable[[], None]) -> float:
    """Median seconds of a few steps."""
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def build_bare(run: Any, batches: list[Any]) -> Callable[[], None]:
    """A step of the bare loop over batches in memory: PyTorch's on one rank, DeepSpeed's on several."""
    from sdxl_trainer.train.deepspeed_config import DTYPES, build_deepspeed_config

    config, dtype = run.config, DTYPES[run.config.engine.precision]
    networks = deepcopy(run.engine.model).float()
    optimizer = torch.optim.AdamW(networks.parameters(), lr=config.optim.lr)
    engine = None
    if run.ranks.world_size > 1:
        import deepspeed

        size = config.train.micro_batch_size
        batch = (size * run.ranks.world_size, size, 1)
        settings = build_deepspeed_config(config.engine, batch, config.optim.max_grad_norm, optimizer)
        engine, *_ = deepspeed.initialize(model=networks, optimizer=optimizer, config=settings)
    made = [
        (torch.randn_like(batch.latents), torch.randint(0, 1000, (len(batch.latents),)), batch) for batch in batches
    ]
    turn = 0

    def step() -> None:
        nonlocal turn
        noise, timesteps, batch = made[turn % len(made)]
        turn += 1
        text = run.conditioner.condition(batch, run.ranks.device)
        with torch.autocast("cpu", dtype, enabled=engine is None and dtype != torch.float32):
            prediction = (engine or networks)(noise.to(dtype) if engine else noise, timesteps, text, batch.time_ids)
        loss = torch.nn.functional.mse_loss(prediction.float(), noise)
        if engine is not None:
            engine.backward(loss)
            engine.step()
            return
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    sys.exit(main())
