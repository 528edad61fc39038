"""A thousand faults, drawn by a seed, against the cache job, training, and every reader of foreign files.

    python tests/campaigns/faults.py [--seed 0] [--state FILE] [--seconds N] [--only KIND...] [--share 1.0]

Each case works in a folder of its own, in a process that is forked with the libraries loaded, and brings one to twelve
faults. With `--state` finished cases are written to a file, and the same command goes on behind them; `--seconds` ends
before a further case would begin. Power cuts need an ext4 file system in a file on a loop device, and full disks a
tmpfs: without the right to mount they are skipped, with the reason. Clocks are shifted by shims of `time.time` and
`time.time_ns` in the job, and by `os.utime`. In the end a table shows faults by kind and by promise; the status is 1 if
a promise was broken.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; and threads do not survive a fork

import argparse
import json
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from campaigns import fault_cache, fault_readers, fault_train  # noqa: E402
from campaigns.fault_jobs import (  # noqa: E402
    HANG,
    LOST,
    MESSAGE,
    TORN,
    WRONG,
    Base,
    Case,
    Job,
    Outcome,
    SharedCounter,
    SkippedError,
    plant_at,
)

PROMISES = (TORN, LOST, WRONG, HANG, MESSAGE)
CASE_SECONDS = 400
IMAGES = 32


@dataclass(frozen=True)
class Kind:
    """A kind of faults, the promises that it tries, and its number of cases."""

    name: str
    run: Callable[[Case], Iterator[Outcome]]
    cases: int
    promises: tuple[str, ...] = PROMISES
    live: bool = True  # against a running job


KINDS = [
    Kind("cache: kill", fault_cache.kill_cache, 20),
    Kind("cache: power cut", fault_cache.cut_power_of_cache, 10),
    Kind("cache: power cut while repacking", fault_cache.cut_power_of_upkeep, 10),
    Kind("cache: full disk", fault_cache.fill_disk_of_cache, 12),
    Kind("cache: clock", fault_cache.move_clock_of_cache, 8),
    Kind("cache: hostile images", fault_cache.feed_images, 24),
    Kind("cache: damage", fault_cache.damage_cache, 14, live=False),
    Kind("training: end", fault_train.end_training, 12),
    Kind("training: one rank of two killed", fault_train.kill_one_rank, 5),
    Kind("training: power cut", fault_train.cut_power_of_training, 5),
    Kind("training: full disk", fault_train.fill_disk_of_training, 8),
    Kind("training: clock", fault_train.move_clock_of_training, 4),
    Kind("training: damaged latents", fault_train.damage_latents, 14),
    Kind("training: damaged run folder", fault_train.damage_run, 24, live=False),
    Kind("training: files deleted", fault_train.delete_while_training, 8),
    Kind("training: started twice", fault_train.start_twice, 2),
    Kind("training: launcher killed", fault_train.kill_launcher, 1),
    Kind("readers: fuzzing", fault_readers.fuzz_readers, 90, (HANG, MESSAGE), live=False),
    Kind("readers: odd values", fault_readers.read_odd_values, 6, (WRONG, MESSAGE), live=False),
    Kind("readers: odd settings", fault_readers.read_odd_settings, 6, (WRONG, MESSAGE), live=False),
]


def import_everything() -> None:
    """Import the libraries once for all jobs to come."""
    import diffusers.models.autoencoders.autoencoder_kl
    import diffusers.models.unets.unet_2d_condition
    import diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl
    import torch.utils.tensorboard
    import transformers.models.clip.modeling_clip

    import sdxl_trainer.cache.job
    import sdxl_trainer.train.engine.engine
    import sdxl_trainer.train.run.job
    import sdxl_trainer.train.sampling.samplers

    assert diffusers and torch and transformers and sdxl_trainer


def write_settings(folder: Path) -> None:
    """Write the settings of both programs: tiny, on one bucket, with cached text."""
    config = {
        "run": {"name": "whole", "dir": str(folder / "runs")},
        "model": {"path": str(folder / "model")},
        "data": {
            "metadata": [str(folder / "data" / "metadata.json")],
            "resolution_px": 64,
            "min_bucket_px": 64,
            "max_bucket_px": 64,
            "num_workers": 0,
        },
        "cache": {"dir": str(folder / "npz"), "batch_size": 4, "num_workers": 1, "shard_mb": 1, "text": True},
        "optim": {"lr": 1e-3},
        "engine": {
            "precision": "fp32",
            "timeout_minutes": 0.5,
            "deepspeed": {"zero_optimization": {"stage3_max_reuse_distance": 30_000}},
        },
        "train": {"max_steps": fault_train.STEPS, "global_batch_size": 4, "micro_batch_size": 2},
        "checkpoint": {"every_steps": fault_train.SAVE_EVERY, "keep_last": 3, "export_dtype": "fp32"},
        "sample": {
            "prompts": ["a red circle"],
            "every_steps": 3,
            "num_inference_steps": 1,
            "width_px": 64,
            "height_px": 64,
        },
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(config))


def build_base(folder: Path, with_run: bool) -> Base:
    """Build the set, both caches and, `with_run`, an unbroken run and a stopped one; or load what is there already."""
    done = folder / f"base-{with_run}.pickle"
    if done.is_file():
        return pickle.loads(done.read_bytes())
    from sdxl_trainer.data.formats.manifest import read_latest
    from sdxl_trainer.data.images.demo_set import draw_demo_set
    from sdxl_trainer.train.tiny.build import build_tiny_sdxl

    build_tiny_sdxl(folder / "model")
    draw_demo_set(folder / "data", num_images=IMAGES)
    write_settings(folder)
    operations: dict[str, int] = {}

    def run(name: str, program: str, *words: str) -> None:
        counter, command = SharedCounter(), ["--cfg", str(folder / "settings.yaml"), *words]
        job = Job(program, command, folder / "base.log", plant=plant_at(-1, lambda: None, counter))
        assert job.wait(300) == 0, f"{name}: {job.read_log()[-3000:]}"
        operations[name] = counter.value

    for form, command in (("npz", "--pack"), ("shards", "--unpack")):
        run(f"cache {form}", "cache", f"cache.dir={folder / form}", f"cache.format={form}")
        shutil.copytree(folder / form, folder / "repacked")
        run(command, "cache", f"cache.dir={folder / 'repacked'}", f"cache.format={form}", command)
        shutil.rmtree(folder / "repacked")
    if with_run:
        run("train", "train")
    hashes = {key: entry.sha256 for key, entry in read_latest(folder / "npz").items()}
    base = Base(folder, hashes, fault_train.read_losses(folder / "runs" / "whole"), operations)
    assert len(base.losses) == (fault_train.STEPS if with_run else 0) and len(hashes) == IMAGES
    done.write_bytes(pickle.dumps(base))
    return base


def run_case(kind: Kind, base: Base, seed: str, keep: Path | None) -> list[Outcome]:
    """Run a case in a child, so that nothing of it stays in this process. One that breaks is an outcome, too."""
    folder = Path(tempfile.mkdtemp(prefix="fault-", dir=base.folder))
    report = folder / "outcomes.json"
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        try:
            outcomes = _try_case(kind, Case(base, folder, random.Random(seed)))
            report.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
        finally:
            os._exit(0)
    deadline = time.monotonic() + CASE_SECONDS
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    if report.is_file():
        outcomes = [Outcome(**fields) for fields in json.loads(report.read_text())]
    else:
        outcomes = [Outcome("the case itself", {HANG: f"no outcome within {CASE_SECONDS} s"})]
    if keep is not None and any(outcome.problems for outcome in outcomes):
        shutil.copytree(folder, keep / folder.name, symlinks=True, ignore=_list_special, dirs_exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def _try_case(kind: Kind, case: Case) -> list[Outcome]:
    try:
        return list(kind.run(case))
    except SkippedError as error:
        return [Outcome(kind.name, skipped=str(error))]
    except BaseException:  # noqa: BLE001  (a broken case must be seen, and must not end the campaign)
        return [Outcome("the case itself", {HANG: traceback.format_exc()[-600:]})]


def _list_special(folder: str, names: list[str]) -> list[str]:
    """List what a copy of a case's folder leaves out: everything but logs, folders and settings."""
    return [name for name in names if not (Path(folder, name).is_dir() or name.endswith((".log", "log", ".jsonl")))]


def plan_cases(seed: str, share: float, only: Sequence[str] | None) -> list[tuple[Kind, str]]:
    """Return the cases in an order of the seed, so that each part of them has all kinds. Each has a name of its own."""
    cases = []
    for kind in KINDS:
        if only is None or any(word in kind.name for word in only):
            cases += [(kind, f"{seed}:{kind.name}:{number}") for number in range(max(1, round(kind.cases * share)))]
    random.Random(seed).shuffle(cases)
    return cases


def print_tables(results: dict[str, list[Outcome]]) -> int:
    """Print faults by kind and by promise, and what was broken. Return the number of faults that broke a promise."""
    by_kind: dict[str, list[Outcome]] = {}
    for name, outcomes in results.items():
        by_kind.setdefault(name.split(":", 1)[1].rpartition(":")[0], []).extend(outcomes)
    print("\n| kind | faults | kept | broken | skipped |\n|---|---|---|---|---|")
    totals: Counter[str] = Counter()
    for kind in KINDS:
        outcomes = by_kind.get(kind.name, [])
        broken, skipped = sum(bool(o.problems) for o in outcomes), sum(bool(o.skipped) for o in outcomes)
        tried = len(outcomes) - skipped
        totals.update(tried=tried, live=tried * kind.live, broken=broken, skipped=skipped)
        if outcomes:
            print(f"| {kind.name} | {tried} | {tried - broken} | {broken} | {skipped} |")
    print("\n| promise | faults tried | broken |\n|---|---|---|")
    for promise in PROMISES:
        tried = sum(not o.skipped for kind in KINDS if promise in kind.promises for o in by_kind.get(kind.name, []))
        print(f"| {promise} | {tried} | {sum(promise in o.problems for every in results.values() for o in every)} |")
    reasons = {outcome.skipped for outcomes in results.values() for outcome in outcomes if outcome.skipped}
    print("".join(f"\nskipped: {reason}" for reason in sorted(reasons)))
    print(f"{totals['tried']} faults, {totals['live']} against a running job: {totals['broken']} broke a promise")
    return totals["broken"]


def append_entry(state: Path, entry: dict[str, Any]) -> None:
    """Append a finished case to the file of states."""
    with open(state, "a") as file:
        file.write(json.dumps(entry) + "\n")


def print_outcomes(name: str, outcomes: Sequence[Outcome]) -> None:
    """Print each promise that a fault of a case broke."""
    for outcome in outcomes:
        for promise, seen in outcome.problems.items():
            print(f"{name}  {outcome.fault}\n    {promise}: {seen}", flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """Run the campaign, or what is left of it, and print the tables; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description="A thousand faults against cache, training and readers.")
    parser.add_argument("--seed", default="0", help="of all faults (0)")
    parser.add_argument("--state", type=Path, help="file of finished cases; the same command goes on behind them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further case after so long")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="kinds whose names contain one of these words")
    parser.add_argument("--share", type=float, default=1.0, help="of each kind's cases (1.0)")
    parser.add_argument("--keep", type=Path, help="folder for the logs of cases that broke a promise")
    parser.add_argument("--show", action="store_true", help="only print the tables of --state")
    options = parser.parse_args(words)
    began, results = time.monotonic(), {}
    if options.state is not None and options.state.is_file():
        for line in options.state.read_text().splitlines():
            entry = json.loads(line)
            results[entry["case"]] = [Outcome(**fields) for fields in entry["outcomes"]]
    left = (
        []
        if options.show
        else [case for case in plan_cases(options.seed, options.share, options.only) if case[1] not in results]
    )
    if left:
        import_everything()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = Path(temporary) if options.state is None else options.state.with_suffix(".base")
        folder.mkdir(exist_ok=True)
        base = build_base(folder, any("training" in kind.name for kind, _ in left)) if left else None
        for kind, name in left:
            if base is None or time.monotonic() - began > options.seconds:
                break
            at = time.monotonic()
            outcomes = results[name] = run_case(kind, base, name, options.keep)
            entry = {
                "case": name,
                "seconds": round(time.monotonic() - at, 2),
                "outcomes": [asdict(o) for o in outcomes],
            }
            if options.state is not None:
                append_entry(options.state, entry)
            print_outcomes(name, outcomes)
            print(f"{name}  {len(outcomes)} faults, {entry['seconds']} s", flush=True)
    broken = print_tables(results)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
