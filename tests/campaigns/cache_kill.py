"""Kills the cache job with SIGKILL at random moments and looks for anything torn.

    python tests/campaigns/cache_kill.py [--trials 30] [--images 400] [--seed 0]

Trials take turns over npz files and shards, one rank and two, the whole job and one rank of it. They go on in each
other's cache, so what one left is what the next has to cope with; a finished cache is begun anew. After each kill every
npz and tar under its final name must read completely, and what the manifest lists must verify, with the bytes that an
unbroken job made. In the end the job runs through, and every latent must be the unbroken job's.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from sdxl_trainer.cache.upkeep.verify import verify_entries
from sdxl_trainer.data.formats.latents import BadLatentError, parse_latents
from sdxl_trainer.data.formats.manifest import read_latest
from sdxl_trainer.data.formats.shards import BadShardError, iterate_members
from sdxl_trainer.data.formats.text_outputs import BadTextError, parse_text_outputs
from sdxl_trainer.data.images.image_files import TEXT_OUTPUTS_SUFFIX

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Trial:
    """What is killed ("job": all its processes, "rank": one rank), on how many ranks, in which form of cache."""

    victim: str
    ranks: int
    form: str


@dataclass
class Result:
    """What a trial found."""

    trial: Trial
    moment_seconds: float  # after the job began to write
    listed_before: int
    listed: int
    status: int
    problems: list[str] = field(default_factory=list)


def check_folder(folder: Path, whole: dict[str, str] | None = None) -> list[str]:
    """What is torn under a final name, or listed and not true. `whole`: key → SHA-256 that each item must have."""
    problems = []
    for path in sorted(folder.rglob("*.npz")):
        if not path.name.startswith("."):
            problems += _check_npz(path.read_bytes(), str(path), is_text=path.name.endswith(TEXT_OUTPUTS_SUFFIX))
    for path in sorted(folder.glob("shards/*.tar")):
        if path.name.startswith("."):
            continue
        content = path.read_bytes()
        try:
            for key, suffix, offset, size in iterate_members(path):
                if suffix in ("npz", "te.npz"):
                    member = content[offset : offset + size]
                    problems += _check_npz(member, f"{path}: {key}.{suffix}", is_text=suffix == "te.npz")
        except BadShardError as error:
            problems.append(str(error))
    entries = read_latest(folder)
    problems += verify_entries(folder, entries).reasons
    for key, entry in entries.items():
        if whole is not None and entry.sha256 != whole.get(key):
            problems.append(f"{key}: other latents than the unbroken job's")
    return problems


def _check_npz(content: bytes, name: str, is_text: bool) -> list[str]:
    try:
        if is_text:
            parse_text_outputs(content, 1)
        else:
            parse_latents(content)
    except (BadLatentError, BadTextError) as error:
        return [f"{name}: {error}"]
    return []


def run_trials(settings: Path, folder: Path, trials: list[Trial], whole: dict[str, str], seed: int) -> Iterator[Result]:
    """Kill, look, kill again; last run the job through in each form and compare.

    Args:
        settings: of the set that `whole` was made from.
        folder: for the caches, one of each form.
        whole: key → SHA-256 of an unbroken job's items.
    """
    rng = random.Random(seed)
    pace = 0.0
    for trial in trials:
        cache = folder / trial.form
        before = len(read_latest(cache)) if cache.exists() else 0
        if before == len(whole):
            shutil.rmtree(cache)
            before = 0
        job = start_job(settings, cache, trial)
        # One in five before or while it starts to write, the others while it does: up to half of the set further on.
        early = rng.random() < 0.2
        wait_for(lambda cache=cache, before=before, job=job, early=early: early or count_lines(cache) > before, job)
        moment = rng.uniform(0, 8) if early else rng.uniform(0, max(0.5, pace * len(whole) / 2))
        began = time.monotonic()
        while job.poll() is None and time.monotonic() - began < moment:
            time.sleep(0.005)
        kill(job, trial, rng)
        status = job.wait(TIMEOUT_SECONDS)
        wait_for_the_dead(settings)
        entries = read_latest(cache) if cache.exists() else {}
        if not early and len(entries) > before:
            pace = max(moment, 0.1) / (len(entries) - before)
        result = Result(trial, moment, before, len(entries), status, check_folder(cache, whole))
        if status == 0 and len(entries) != len(whole):
            result.problems.append("said it was done and was not")
        yield result
    for form in dict.fromkeys(trial.form for trial in trials):
        trial = Trial("nobody", 1, form)
        status = start_job(settings, folder / form, trial).wait(TIMEOUT_SECONDS)
        entries = read_latest(folder / form)
        problems = check_folder(folder / form, whole)
        problems += list(verify_entries(folder / form, entries).bad_shards.values())
        if status != 0 or set(entries) != set(whole):
            problems.append(f"the rerun ended with {status} and {len(entries)} of {len(whole)} items")
        yield Result(trial, 0.0, len(entries), len(entries), status, problems)


def start_job(settings: Path, cache: Path, trial: Trial) -> subprocess.Popen:
    """The job as users start it."""
    words = ["--cfg", str(settings), f"cache.dir={cache}", f"cache.format={trial.form}"]
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "cache.sh"), *words],
        env={**os.environ, "NPROC": str(trial.ranks), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill(job: subprocess.Popen, trial: Trial, rng: random.Random) -> None:
    """Kill the job, or one of its ranks; whatever has ended meanwhile is left."""
    processes = list_descendants(job.pid)
    ranks = [process for process in processes if get_variable(process, "RANK") is not None]
    victims = [job.pid, *processes] if trial.victim == "job" or not ranks else [rng.choice(ranks)]
    for process in victims:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            pass


def list_descendants(process: int) -> list[int]:
    """Process ids of all children and children's children."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found, waiting = [], [process]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def get_variable(process: int, name: str) -> str | None:
    """A variable of a process's environment."""
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((word.decode().partition("=")[2] for word in variables if word.startswith(f"{name}=".encode())), None)


def count_lines(cache: Path) -> int:
    """Lines of a manifest."""
    return sum(part.read_bytes().count(b"\n") for part in cache.glob("manifest/part-*.jsonl"))


def wait_for(condition, job: subprocess.Popen) -> None:
    """Wait until something is so, or the job has ended."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition() and job.poll() is None:
        assert time.monotonic() < deadline, "the job does nothing"
        time.sleep(0.005)


def wait_for_the_dead(settings: Path) -> None:
    """Wait until no process of a job on these settings is left."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while any(_is_of_job(path, settings) for path in Path("/proc").glob("[0-9]*/cmdline")):
        assert time.monotonic() < deadline, "a rank lives on"
        time.sleep(0.02)


def _is_of_job(path: Path, settings: Path) -> bool:
    try:
        return b"--cfg\0" + str(settings).encode() in path.read_bytes()
    except OSError:
        return False


def build_set(folder: Path, num_images: int) -> tuple[Path, dict[str, str]]:
    """(settings, key → SHA-256 of what an unbroken job makes) of a demo set."""
    from sdxl_trainer.data.images.demo_set import draw_demo_set
    from sdxl_trainer.train.tiny.build import build_tiny_sdxl

    build_tiny_sdxl(folder / "model")
    config = {
        "model": {"path": str(folder / "model")},
        "data": {
            "metadata": [str(draw_demo_set(folder / "data", num_images))],
            "resolution_px": 128,
            "min_bucket_px": 64,
            "max_bucket_px": 256,
            "bucket_step_px": 32,
        },
        "cache": {"batch_size": 4, "shard_mb": 1, "text": True},
    }
    settings = folder / "settings.yaml"
    settings.write_text(yaml.safe_dump(config))
    assert start_job(settings, folder / "whole", Trial("nobody", 1, "npz")).wait(600) == 0, "the unbroken job failed"
    entries = read_latest(folder / "whole")
    hashes = {
        key: hashlib.sha256((folder / "whole" / entry.file).read_bytes()).hexdigest() for key, entry in entries.items()
    }
    assert len(hashes) == num_images
    return settings, hashes


def main() -> int:
    """Run the campaign and print a table; 1 if anything was torn."""
    parser = argparse.ArgumentParser(description="Kill the cache job at random moments and look for anything torn.")
    parser.add_argument("--trials", type=int, default=30, help="kills (30)")
    parser.add_argument("--images", type=int, default=400, help="images in the set (400)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    options = parser.parse_args()
    kinds = [
        Trial("job", 1, "npz"),
        Trial("job", 1, "shards"),
        Trial("job", 2, "npz"),
        Trial("job", 2, "shards"),
        Trial("rank", 2, "npz"),
        Trial("rank", 2, "shards"),
    ]
    trials = [kinds[number % len(kinds)] for number in range(options.trials)]
    print(
        f"{'trial':>5}  {'form':6}  {'ranks':>5}  {'killed':6}  {'after':>7}  {'listed':>12}  {'status':>6}  problems"
    )
    num_bad, results = 0, []
    with tempfile.TemporaryDirectory() as folder:
        settings, whole = build_set(Path(folder), options.images)
        for number, result in enumerate(run_trials(settings, Path(folder) / "caches", trials, whole, options.seed), 1):
            trial, listed = result.trial, f"{result.listed_before} -> {result.listed}"
            print(
                f"{number:5}  {trial.form:6}  {trial.ranks:5}  {trial.victim:6}  {result.moment_seconds:6.2f}s  "
                f"{listed:>12}  {result.status:6}  {'; '.join(result.problems) or 'none'}",
                flush=True,
            )
            num_bad += bool(result.problems)
            results.append(result)
    hit = sum(result.listed < options.images for result in results if result.trial.victim != "nobody")
    gained = np.mean([result.listed - result.listed_before for result in results[: options.trials]])
    print(f"{options.trials} kills, {hit} before the set was done, {gained:.0f} items a kill; {num_bad} with problems")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
