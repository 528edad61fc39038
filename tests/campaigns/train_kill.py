"""Ends training at random moments, by SIGKILL, SIGTERM, SIGINT and raised exceptions, and looks for anything lost.

    python tests/campaigns/train_kill.py [--trials 40] [--seed 0]
    python tests/campaigns/train_kill.py --stages 3 --ends backward:raise saving:kill

Two ranks train the tiny SDXL under ZeRO 1, 2 and 3 in turn. Each trial starts the run with the same command as ever and
ends it in a given phase: loading, forward, backward, step, saving or sampling. The next trial of the stage goes on.
Besides the ends that are drawn at random there is `stall`, by name only: a rank is stopped and the others wait for it.
After each it is checked which step the next start goes on from: the last completed one, or after a SIGKILL at least
that of the newest checkpoint. A finished run's losses must be those of a run that nobody disturbed.

To make 40 starts affordable the ranks are forked from one process that has imported everything, and this script does
what torchrun does: when a rank fails, the others get SIGTERM, and SIGKILL 30 s later.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; and threads do not survive a fork

import argparse
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from rank_port import find_rank_port  # noqa: E402

RANKS = 2
STAGES = (3, 1, 2)
PHASES = ("step", "saving", "forward", "backward", "sampling", "loading")
ENDS = ("raise", "term", "kill", "int")
SIGNALS = {"kill": signal.SIGKILL, "stall": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT}
# A rank that already ends with an error, when the signal for the others comes, may die of it while Python shuts down.
FAILED_STATUSES = {1, 143, -15}
STATUSES = {
    "term": {143},
    "int": {130},
    "kill": {-9, *FAILED_STATUSES},
    "stall": {-9, *FAILED_STATUSES},
    "raise": {134, -6, *FAILED_STATUSES},
}
SAVE_EVERY, SAMPLE_EVERY = 5, 3
GRACE_SECONDS = 30.0  # torchrun's
TIMEOUT_SECONDS = 400.0


class Fault(BaseException):
    """Stands for a fault of the program; no handler for user errors takes it."""


@dataclass(frozen=True)
class Trial:
    """What ends the run: in the `turn`-th call of a phase, `delay_seconds` after it began."""

    stage: int
    phase: str
    end: str
    victim: int
    turn: int
    delay_seconds: float


@dataclass
class Result:
    """What a trial found. Steps: completed before it, completed when it ended, and where the next start goes on."""

    trial: Trial
    before: int
    completed: int
    resumed: int
    statuses: list[int]
    problems: list[str] = field(default_factory=list)


def plant(trial: Trial, rank: int) -> None:
    """In a rank: let the phase end the run."""
    from sdxl_trainer.train.checkpoint.writer import CheckpointWriter
    from sdxl_trainer.train.engine.engine import Engine
    from sdxl_trainer.train.run import build, loop

    if rank != trial.victim:
        return
    places: dict[str, tuple[Any, str]] = {
        "loading": (build, "build_networks"),
        "forward": (Engine, "__call__"),
        "backward": (Engine, "backward"),
        "step": (Engine, "step"),
        "saving": (CheckpointWriter, "write_shard"),
        "sampling": (loop, "write_generated_images"),
    }
    owner, name = places[trial.phase]
    original: Callable = getattr(owner, name)
    calls = 0

    def planted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == trial.turn and trial.end == "raise":
            raise Fault(f"planted in {trial.phase}")
        if calls == trial.turn:
            threading.Timer(trial.delay_seconds, strike, (trial.end,)).start()
        return original(*args, **kwargs)

    setattr(owner, name, planted)


def strike(end: str) -> None:
    """SIGKILL and SIGSTOP hit this rank; SIGTERM and SIGINT hit all, as from torchrun and from a terminal."""
    if end in ("kill", "stall"):
        os.kill(os.getpid(), SIGNALS[end])
        return
    os.killpg(os.getpgrp(), SIGNALS[end])


def start_ranks(words: list[str], log: Path, trial: Trial | None) -> list[int]:
    """Fork the ranks into a process group of their own."""
    port = find_rank_port()
    processes: list[int] = []
    for rank in range(RANKS):
        process = os.fork()
        if process == 0:
            os.setpgid(0, processes[0] if processes else 0)
            run_rank(words, log, rank, port, trial)
        os.setpgid(process, processes[0] if processes else process)
        processes.append(process)
    return processes


def run_rank(words: list[str], log: Path, rank: int, port: int, trial: Trial | None) -> None:
    """Be a rank, and end with its status."""
    status = 1
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        from sdxl_trainer.train.main import main

        if trial is not None:
            plant(trial, rank)
        status = main(words)
    except BaseException:  # as Python itself would do it, but nothing of the parent's may run on in its copy
        traceback.print_exc()
        raise
    finally:
        os._exit(status)


def wait_for_ranks(processes: list[int]) -> list[int]:
    """Exit statuses, negative for signals, brought about as by torchrun."""
    statuses: dict[int, int] = {}
    deadline, warned_at = time.monotonic() + TIMEOUT_SECONDS, None
    while len(statuses) < len(processes):
        for process in processes:
            ended, status = (0, 0) if process in statuses else os.waitpid(process, os.WNOHANG)
            if ended:
                statuses[process] = os.waitstatus_to_exitcode(status)
        living = [process for process in processes if process not in statuses]
        now = time.monotonic()
        if warned_at is None and any(statuses.values()):
            warned_at = now
            send(signal.SIGTERM, living)
        if now > deadline or (warned_at is not None and now > warned_at + GRACE_SECONDS):
            send(signal.SIGKILL, living)
        time.sleep(0.005)
    return [statuses[process] for process in processes]


def send(number: int, processes: list[int]) -> None:
    """A signal to each."""
    for process in processes:
        os.kill(process, number)


def count_steps(run: Path) -> int:
    """Steps that the run says it has completed."""
    metrics = run / "logs" / "metrics.jsonl"
    return len(read_losses(run)) if metrics.is_file() else 0


def read_losses(run: Path) -> list[float]:
    """The losses of all steps."""
    from sdxl_trainer.train.report.metrics import read_metrics

    return [line["loss"] for line in read_metrics(run / "logs" / "metrics.jsonl")]


def forget_steps(run: Path, last: int) -> None:
    """Drop the numbers of steps that were lost, as a start does once its networks are loaded."""
    metrics = run / "logs" / "metrics.jsonl"
    if metrics.is_file():
        metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:last]))


def find_step(run: Path) -> int:
    """The step that the next start goes on from, found as a start finds it."""
    from sdxl_trainer.train.checkpoint.folder import find_newest_checkpoint, recover_partial_checkpoints

    folder = run / "checkpoints"
    if not folder.is_dir():
        return 0
    recover_partial_checkpoints(folder)
    newest = find_newest_checkpoint(folder)
    return int(newest.name.removeprefix("step-")) if newest else 0


def run_trial(base: list[str], run: Path, trial: Trial, log: Path, max_steps: int) -> Result:
    """Start the run, end it, and look."""
    before = find_step(run)
    forget_steps(run, before)
    statuses = wait_for_ranks(start_ranks([*base, f"run.name={run.name}"], log, trial))
    sealed = [int(path.parent.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*/manifest.json")]
    completed, newest = max(count_steps(run), before), max(sealed, default=0)
    result = Result(trial, before, completed, find_step(run), statuses)
    result.problems = list(find_problems(result, newest, max_steps))
    return result


def find_problems(result: Result, newest: int, max_steps: int) -> Iterator[str]:
    """What the run did not keep of its promises. `newest`: step of the newest checkpoint when it ended."""
    trial, statuses = result.trial, result.statuses
    if set(statuses) == {0} and result.completed == max_steps:
        return  # it was done before it could be ended
    if 0 in statuses:
        yield "a rank said that it was done"
    if not set(statuses) <= STATUSES[trial.end]:
        yield f"statuses {statuses}"
    # Metrics are written after a step; one more may have been completed by then.
    kept = newest if trial.end in ("kill", "stall") else result.completed
    if result.resumed < kept:
        yield f"goes on from step {result.resumed}, {result.completed} were completed, {newest} saved"


def finish(base: list[str], run: Path, log: Path, whole: list[float]) -> list[str]:
    """Let the run reach its end, and compare its losses."""
    statuses = wait_for_ranks(start_ranks([*base, f"run.name={run.name}"], log, None))
    if statuses != [0] * RANKS:
        return [f"{run.name} ended with {statuses}"]
    losses = read_losses(run)
    if len(losses) != len(whole):
        return [f"{run.name} has {len(losses)} losses"]
    difference = max(abs(one - other) for one, other in zip(losses, whole, strict=True))
    return [] if difference <= 1e-6 else [f"{run.name}: losses differ by {difference:g} from those of an unbroken run"]


def build_set(folder: Path, max_steps: int) -> list[str]:
    """Draw and cache a small set; returns the words that every start has."""
    from sdxl_trainer.cache.main import main as cache
    from sdxl_trainer.data.images.demo_set import draw_demo_set
    from sdxl_trainer.train.tiny.build import build_tiny_sdxl

    build_tiny_sdxl(folder / "model")
    config = {
        "run": {"dir": str(folder / "runs")},
        "model": {"path": str(folder / "model")},
        "data": {
            "metadata": [str(draw_demo_set(folder / "data", num_images=16))],
            "resolution_px": 64,
            "min_bucket_px": 64,
            "max_bucket_px": 64,
            "num_workers": 0,
        },
        "cache": {"dir": str(folder / "latents")},
        "optim": {"lr": 1e-3},
        # To find out how soon a weight is needed again, ZeRO-3 would search the whole of so small a model for each.
        "engine": {
            "precision": "fp32",
            "timeout_minutes": 0.5,
            "deepspeed": {"zero_optimization": {"stage3_max_reuse_distance": 30_000}},
        },
        "train": {"max_steps": max_steps, "global_batch_size": 4, "micro_batch_size": 2},
        "checkpoint": {"every_steps": SAVE_EVERY, "export_dtype": "fp32"},
        "sample": {
            "prompts": ["a red circle", "a blue star"],
            "every_steps": SAMPLE_EVERY,
            "num_inference_steps": 1,
            "width_px": 64,
            "height_px": 64,
        },
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(config))
    words = ["--cfg", str(folder / "settings.yaml")]
    process = os.fork()
    if process == 0:
        os._exit(cache(words))
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, "the cache job failed"
    return words


def import_everything() -> None:
    """Once for all ranks to come."""
    import diffusers.models.unets.unet_2d_condition
    import diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl
    import torch.utils.tensorboard
    import transformers.models.clip.modeling_clip

    import sdxl_trainer.train.run.job
    import sdxl_trainer.train.sampling.samplers

    assert diffusers and torch and transformers and sdxl_trainer


def draw_pairs(num_trials: int, rng: random.Random) -> list[tuple[str, str]]:
    """Phases and ends: each comes up equally often, in random order."""
    pairs = [(PHASES[number % len(PHASES)], ENDS[number // len(PHASES) % len(ENDS)]) for number in range(num_trials)]
    rng.shuffle(pairs)
    return pairs


def draw_trials(pairs: list[tuple[str, str]], stages: list[int], rng: random.Random) -> list[Trial]:
    """The moment of each end, and the rank that it hits."""
    turns = {"loading": 1, "saving": 2, "sampling": 2}
    return [
        Trial(
            stages[number % len(stages)],
            phase,
            end,
            rng.randrange(RANKS),
            rng.randint(1, turns.get(phase, 6)),
            rng.uniform(0, 0.2),
        )
        for number, (phase, end) in enumerate(pairs)
    ]


def main() -> int:
    """Run the campaign and print a table; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description="End training at random moments and look for anything lost.")
    parser.add_argument("--trials", type=int, default=40, help="ends (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--stages", type=int, nargs="+", default=STAGES, help="of ZeRO, in turn (3 1 2)")
    parser.add_argument(
        "--ends", nargs="*", metavar="PHASE:END", default=[], help="these ends in this order, instead of any"
    )
    parser.add_argument("--steps", type=int, default=24, help="of each run (24)")
    parser.add_argument("--keep", type=Path, help="folder for the runs and logs, kept; by default a temporary one")
    options = parser.parse_args()
    import_everything()
    folder = options.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    base = build_set(folder, options.steps)
    rng = random.Random(options.seed)
    pairs = [tuple(pair.split(":")) for pair in options.ends] or draw_pairs(options.trials, rng)
    trials = draw_trials(pairs, options.stages, rng)
    stages, whole, lost = sorted({trial.stage for trial in trials}), {}, []
    for stage in stages:
        words = [*base, f"run.name=whole-{stage}", f"engine.zero_stage={stage}"]
        assert wait_for_ranks(start_ranks(words, folder / "whole.log", None)) == [0] * RANKS, "the unbroken run failed"
        whole[stage] = read_losses(folder / "runs" / f"whole-{stage}")
    print("trial  ZeRO  phase     end    rank  turn   steps: before, completed, goes on from  statuses    problems")
    attempts = dict.fromkeys(stages, 0)
    for number, trial in enumerate(trials, 1):
        run = folder / "runs" / f"zero-{trial.stage}-{attempts[trial.stage]}"
        words, log = [*base, f"engine.zero_stage={trial.stage}"], folder / f"{number:03}.log"
        result = run_trial(words, run, trial, log, options.steps)
        if find_step(run) > options.steps - 4:
            result.problems += finish(words, run, log, whole[trial.stage])
            attempts[trial.stage] += 1
        lost += result.problems
        print(
            f"{number:5}  {trial.stage:4}  {trial.phase:8}  {trial.end:5}  {trial.victim:4}  {trial.turn:4}   "
            f"{result.before:13}, {result.completed:9}, {result.resumed:12}  {str(result.statuses):10}  "
            f"{'; '.join(result.problems) or 'none'}",
            flush=True,
        )
    for stage in stages:
        run = folder / "runs" / f"zero-{stage}-{attempts[stage]}"
        lost += finish([*base, f"engine.zero_stage={stage}"], run, folder / "end.log", whole[stage])
    num_runs = len(stages) + sum(attempts.values())
    print(f"{len(trials)} ends, {num_runs} runs compared with an unbroken one; {len(lost)} problems {'; '.join(lost)}")
    if options.keep is None and not lost:
        shutil.rmtree(folder)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
